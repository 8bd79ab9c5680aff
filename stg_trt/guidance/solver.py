"""A solver as data: a step of most diffusers schedulers is linear in the noise and the predictions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stg_trt.errors import InvalidRequest

# Some schedulers round the sample to float32 in every step; real non-linearity is far above these.
_LINEAR_TOLERANCE = 1e-5
_SINGLE_STEP_TOLERANCE = 1e-6
_HISTORY = "old_pred_original_sample"


@dataclass(frozen=True, eq=False)
class SolverTable:
    """x_{i+1} = a_i*x_T + sum_{j<=i} b_ij*pred_j + sum_k c_ik*noise_k, read off a diffusers scheduler.

    x_T is the initial latents, standard normal noise times `noise_scale`. The network of step i is fed
    `input_scale[i]*x_i` and `timesteps[i]`. `sigmas` are the scheduler's own, one per step, or empty;
    `noise_levels` are the timesteps as parts of the training steps, 1 for noise whichever way they count.
    Step i draws `draws[i]` standard normal tensors of the latents' shape; noise_k counts all draws in order.
    `a` (steps,), `b` (steps, steps) and `c` (steps, all draws) are float64. `single_step[i]` is (a, b) where
    step i is x_{i+1} = a*x_i + b*pred_i, else None.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    noise_levels: tuple[float, ...]
    noise_scale: float
    input_scale: tuple[float, ...]
    draws: tuple[int, ...]
    a: Tensor
    b: Tensor
    c: Tensor
    single_step: tuple[tuple[float, float] | None, ...]

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, num_steps: int | None = None, *, per_token: bool = False
    ) -> SolverTable:
        """The table of a scheduler fresh from `set_timesteps`, which is left as it was.

        `num_steps` calls `set_timesteps(num_steps)` first, on our copy. With `per_token` each step starts
        from its timestep and ends at the next lower sigma, as FlowMatchEulerDiscreteScheduler does if every
        token has its own. Raises InvalidRequest for a scheduler that is not linear, whose noise has no
        generator, or that has stepped or has no timesteps.
        """
        solver = _private_copy(scheduler)
        if num_steps is not None:
            solver.set_timesteps(num_steps)
        _check_ready(solver)
        begin, timesteps = _remaining(solver)
        zeros = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
        run = partial(_Trajectory, solver, per_token)
        dry = run(zeros, [zeros] * len(timesteps), lambda _: zeros)
        rows = _basis_rows(run, len(timesteps), sum(dry.draws))
        _check_finite(solver, rows)
        _check_noise(solver, rows, len(timesteps))
        _check_linear(solver, run, rows, len(timesteps))
        sigmas = getattr(solver, "sigmas", ())
        return cls(
            timesteps=tuple(float(t) for t in timesteps),
            sigmas=tuple(float(s) for s in sigmas[begin : begin + len(timesteps)]),
            noise_levels=tuple(noise_level(solver, float(t)) for t in timesteps),
            noise_scale=float(getattr(solver, "init_noise_sigma", 1.0)),
            input_scale=tuple(dry.input_scale),
            draws=tuple(dry.draws),
            a=rows[:, 0].clone(),
            b=rows[:, 1 : 1 + len(timesteps)].clone(),
            c=rows[:, 1 + len(timesteps) :].clone(),
            single_step=tuple(_single_step_rows(rows)),
        )

    def used_draws(self, steps: int) -> tuple[int, ...]:
        """The draws of the first steps that are added to the latents; the scheduler discards the others."""
        return tuple(k for k in range(sum(self.draws[:steps])) if self.c[:steps, k].any())

    def advance(
        self,
        step: int,
        latents: Tensor,
        preds: Sequence[Tensor] | Tensor,
        initial: Tensor,
        noise: Sequence[Tensor] = (),
    ) -> Tensor:
        """x_{i+1} in float32 from x_i, the predictions 0..i, x_T and the draws of steps 0..i, in order."""
        pair = self.single_step[step]
        if pair is not None:
            a, b = pair
            return a * latents.float() + b * preds[step].float()
        total = self.a[step].item() * initial.float()
        for j in range(step + 1):
            total.add_(preds[j].float(), alpha=self.b[step, j].item())
        for k in range(sum(self.draws[: step + 1])):
            if self.c[step, k] != 0:
                total.add_(noise[k].float(), alpha=self.c[step, k].item())
        return total


class _Draws(TorchFunctionMode):
    """Answers the k-th normal draw made inside the context with `answer(k)`."""

    def __init__(self, answer: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **(kwargs or {}))
        self.count += 1
        return self.answer(self.count - 1)


class _Trajectory:
    """Steps a copy of the scheduler over given predictions: states, draws and input scale per step."""

    def __init__(
        self,
        scheduler: Any,
        per_token: bool,
        latents: Tensor,
        preds: Sequence[Tensor],
        draw: Callable[[int], Tensor],
    ) -> None:
        solver = copy.deepcopy(scheduler)
        self.states: list[Tensor] = []
        self.draws: list[int] = []
        self.input_scale: list[float] = []
        timesteps = _remaining(solver)[1]
        step = _stepper(solver, timesteps, per_token)
        with _Draws(draw) as drawn:
            for i, pred in enumerate(preds):
                before = drawn.count
                self.input_scale.append(_input_scale(solver, timesteps[i]))
                latents = step(i, pred, latents)
                self.states.append(latents)
                self.draws.append(drawn.count - before)


_Run = Callable[[Tensor, Sequence[Tensor], Callable[[int], Tensor]], _Trajectory]


def _remaining(solver: Any) -> tuple[int, Tensor]:
    """Where a sampling run starts and the timesteps from there on."""
    begin: int = getattr(solver, "begin_index", None) or 0
    return begin, solver.timesteps[begin:]


def noise_level(scheduler: Any, timestep: float) -> float:
    """A timestep as a part of the training steps, 1 for noise; inverted sigmas count them up from noise."""
    part: float = timestep / scheduler.config.num_train_timesteps
    return 1 - part if scheduler.config.get("invert_sigmas") else part


def _stepper(solver: Any, timesteps: Tensor, per_token: bool) -> Callable[[int, Tensor, Tensor], Tensor]:
    """`step(i, pred, x) -> x`, with the history that CogVideoXDPMScheduler wants, or its own timestep."""
    history: Tensor | None = None

    def plain(i: int, pred: Tensor, x: Tensor) -> Tensor:
        result: Tensor = solver.step(pred, timesteps[i], x, return_dict=False)[0]
        return result

    def with_history(i: int, pred: Tensor, x: Tensor) -> Tensor:
        nonlocal history
        back = timesteps[i - 1] if i > 0 else None
        result: Tensor
        result, history = solver.step(pred, history, timesteps[i], back, x, return_dict=False)
        return result

    def from_own_timestep(i: int, pred: Tensor, x: Tensor) -> Tensor:
        # diffusers counts these steps downwards, but not those that draw new noise.
        sign = 1 if solver.config.get("stochastic_sampling") else -1
        levels = timesteps[i].reshape(1, 1).float()
        result: Tensor
        result = solver.step(sign * pred, timesteps[i], x, per_token_timesteps=levels, return_dict=False)[0]
        return result

    if per_token:
        return from_own_timestep
    return with_history if _takes_history(solver) else plain


def _takes_history(solver: Any) -> bool:
    return _HISTORY in inspect.signature(solver.step).parameters


def _input_scale(solver: Any, timestep: Tensor) -> float:
    """The factor scale_model_input applies; several schedulers insist on that call before every step."""
    if not hasattr(solver, "scale_model_input"):
        return 1.0
    return float(solver.scale_model_input(torch.ones(1, dtype=torch.float64), timestep))


def _private_copy(scheduler: Any) -> Any:
    """A deep copy with its tensors on the CPU, where the basis vectors live."""
    solver = copy.deepcopy(scheduler)
    for name, value in vars(solver).items():
        if isinstance(value, Tensor):
            setattr(solver, name, value.cpu())
    return solver


def _basis_rows(trajectory: _Run, steps: int, draws: int) -> Tensor:
    """Row i: x_{i+1}'s coefficients of x_T, pred_0.., noise_0.., by stepping over unit vectors."""
    eye = torch.eye(1 + steps + draws, dtype=torch.float64).reshape(-1, 1 + steps + draws, 1, 1, 1, 1)
    preds = [eye[1 + j] for j in range(steps)]
    run = trajectory(eye[0], preds, lambda k: eye[1 + steps + k])
    return torch.stack([state.flatten() for state in run.states]).double()


def _check_finite(solver: Any, rows: Tensor) -> None:
    if not rows.isfinite().all():
        first = int((~rows.isfinite()).any(dim=1).nonzero()[0])
        raise InvalidRequest(
            f"scheduler: expected finite coefficients, got nan or inf from {_name(solver)} at step {first}: "
            "choose another prediction_type, timestep_spacing or beta schedule"
        )


def _single_step_rows(rows: Tensor) -> Iterator[tuple[float, float] | None]:
    """(a, b) where row_i = a*row_{i-1} + b*[pred_i] within float32 rounding, else None."""
    previous = torch.zeros_like(rows[0])
    previous[0] = 1
    for i, row in enumerate(rows):
        rest = row.clone()
        rest[1 + i] = 0
        a = (rest @ previous) / (previous @ previous).clamp_min(torch.finfo(torch.float64).tiny)
        close = (rest - a * previous).abs().max() <= _SINGLE_STEP_TOLERANCE * row.abs().max()
        yield (float(a), float(row[1 + i])) if close else None
        previous = row


def _check_ready(solver: Any) -> None:
    """Steppable from the first timestep with (model_output, timestep, sample) or the known history."""
    if getattr(solver, "num_inference_steps", None) is None:
        raise InvalidRequest(
            f"scheduler: expected one with timesteps set, got a new {_name(solver)}: "
            "call set_timesteps first or pass num_steps"
        )
    if not solver.timesteps.isfinite().all():
        # Flow shifting with a terminal divides 0 by 0 for a single step.
        raise InvalidRequest(
            f"num_inference_steps: expected finite timesteps from {_name(solver)}, got nan for "
            f"{len(solver.timesteps)} steps: use more steps"
        )
    if getattr(solver, "step_index", None) is not None:
        raise InvalidRequest(
            f"scheduler: expected one that has not stepped, got {_name(solver)} at step {solver.step_index}: "
            "call set_timesteps again"
        )
    if solver.config.get("scale_factors"):
        raise InvalidRequest(
            f"scheduler: expected latents of one size, got {_name(solver)} with scale_factors: leave them out"
        )
    known = {"model_output", "timestep", "sample"}
    if _takes_history(solver):
        known |= {_HISTORY, "timestep_back"}
    parameters = inspect.signature(solver.step).parameters.values()
    asked = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    if asked != known:
        raise InvalidRequest(
            f"scheduler: expected step(model_output, timestep, sample), got {_name(solver)}.step with "
            f"{', '.join(sorted(asked))}: choose another scheduler"
        )


def _check_noise(solver: Any, rows: Tensor, steps: int) -> None:
    """Fresh noise is a column only if the sampler can reproduce the scheduler's draws."""
    noisy = (rows[:, 1 + steps :] != 0).any(dim=1)
    if bool(noisy.any()) and "generator" not in inspect.signature(solver.step).parameters:
        raise InvalidRequest(
            f"scheduler: expected one that draws its noise from a generator, got {_name(solver)}, which adds "
            f"its own at step {int(noisy.nonzero()[0])}: choose another scheduler"
        )


def _check_linear(solver: Any, trajectory: _Run, rows: Tensor, steps: int) -> None:
    """Re-steps on random vectors, large enough to reach any clipping, and compares with the rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows.shape[1], 1, 1, 1, 4, 4)
    columns = 10 * torch.randn(shape, generator=generator, dtype=torch.float64)
    columns[0] *= float(getattr(solver, "init_noise_sigma", 1.0))
    run = trajectory(columns[0], list(columns[1 : 1 + steps]), lambda k: columns[1 + steps + k])
    for i, state in enumerate(run.states):
        expected = torch.tensordot(rows[i], columns, dims=1)
        scale = torch.tensordot(rows[i].abs(), columns.abs(), dims=1).max()
        error = float((state - expected).abs().max() / scale)
        if not error <= _LINEAR_TOLERANCE:
            raise InvalidRequest(
                f"scheduler: expected steps linear in the latents and the predictions, got {_name(solver)}, "
                f"which is off by {error:.1e} at step {i}: turn off clip_sample, thresholding and "
                "the like"
            )


def _name(solver: Any) -> str:
    return type(solver).__name__
