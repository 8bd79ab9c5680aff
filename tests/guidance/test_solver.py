from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.solver import SolverTable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHAPE = (2, 4, 3, 6, 8)
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
COGVIDEOX: dict[str, Any] = {
    "snr_shift_scale": 3.0,
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
SVD: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "steps_offset": 1,
}


def new(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


def scheduler(name: str, steps: int, *, timesteps: dict[str, Any] | None = None, **config: Any) -> Any:
    made = new(name, **config)
    made.set_timesteps(**({"num_inference_steps": steps} if timesteps is None else timesteps))
    return made


def flow_euler(steps: int, **config: Any) -> Any:
    return scheduler("FlowMatchEulerDiscreteScheduler", steps, **config)


def dynamic_shift(steps: int) -> Any:
    sigmas = np.linspace(1.0, 1 / steps, steps)
    config = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    return flow_euler(steps, timesteps={"sigmas": sigmas, "mu": 1.7}, **config)


def inverted(steps: int) -> Any:
    sigmas = 1.0 - np.linspace(0.0, 1.0, steps + 1)[:-1] ** 2
    return flow_euler(steps, timesteps={"sigmas": sigmas}, invert_sigmas=True)


def late_start(steps: int) -> Any:
    made = scheduler("UniPCMultistepScheduler", 2 * steps, **FLOW)
    made.set_begin_index(steps)
    return made


def of(name: str, **config: Any) -> Callable[[int], Any]:
    return lambda steps: scheduler(name, steps, **config)


DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
SINGLE_STEP = {
    "flow euler": of("FlowMatchEulerDiscreteScheduler"),
    "flow euler, shift 7": of("FlowMatchEulerDiscreteScheduler", shift=7.0),
    "flow euler, dynamic shift": dynamic_shift,
    "flow euler, inverted": inverted,
    "euler, epsilon": of("EulerDiscreteScheduler"),
    "euler, svd": of("EulerDiscreteScheduler", **SVD),
    "ddim": of("DDIMScheduler", clip_sample=False),
    "ddim, v": of("DDIMScheduler", clip_sample=False, prediction_type="v_prediction", set_alpha_to_one=False),
    "cogvideox ddim": of("CogVideoXDDIMScheduler", **COGVIDEOX),
    "dpm++, order 1": of(DPM, solver_order=1),
    "edm euler": of("EDMEulerScheduler"),
}
STOCHASTIC = {
    "flow euler": of("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True),
    "flow lcm": of("FlowMatchLCMScheduler", shift=3.0),
    "lcm": of("LCMScheduler", prediction_type="v_prediction"),
    "euler ancestral": of("EulerAncestralDiscreteScheduler"),
    "dpm++ sde": of(DPM, algorithm_type="sde-dpmsolver++"),
}
HISTORY = {
    "cogvideox dpm": of("CogVideoXDPMScheduler", **COGVIDEOX),
    "cogvideox dpm, epsilon": of("CogVideoXDPMScheduler", timestep_spacing="leading"),
    "dpm++ 2m": of(DPM),
    "dpm++ 2m karras": of(DPM, use_karras_sigmas=True),
    "dpm++ 2m flow": of(DPM, **FLOW),
    "dpm++ order 3": of(DPM, solver_order=3),
    "dpm++ 2m heun": of(DPM, solver_type="heun", **FLOW),
    "unipc": of(UNIPC),
    "unipc flow": of(UNIPC, **FLOW),
    "unipc flow, order 3": of(UNIPC, solver_order=3, **FLOW),
    "unipc flow, no corrector": of(UNIPC, disable_corrector=list(range(50)), **FLOW),
    "unipc, bh1": of(UNIPC, solver_type="bh1", final_sigmas_type="sigma_min"),
    "unipc from the middle": late_start,
    "deis": of("DEISMultistepScheduler"),
    "heun": of("HeunDiscreteScheduler"),
    "flow heun": of("FlowMatchHeunDiscreteScheduler"),
    "kdpm2": of("KDPM2DiscreteScheduler"),
    "ipndm": of("IPNDMScheduler"),
    "pndm": of("PNDMScheduler", skip_prk_steps=True),
}


def errors(reference: Any, table: SolverTable, dtype: torch.dtype) -> list[float]:
    """Per step: the table in float32 against the scheduler in `dtype`, on the same predictions and seeds."""
    values = torch.Generator().manual_seed(0)
    theirs, ours = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    initial = torch.randn(SHAPE, generator=values).to(dtype) * table.noise_scale
    x, y, preds, noise, history, result = initial, initial, [], [], None, []
    timesteps = reference.timesteps[getattr(reference, "begin_index", None) or 0 :]
    for i, t in enumerate(timesteps):
        if hasattr(reference, "scale_model_input"):
            scaled = reference.scale_model_input(x, t)
            torch.testing.assert_close(scaled, table.input_scale[i] * x, rtol=1e-6, atol=1e-6)
        preds.append(torch.randn(SHAPE, generator=values).to(dtype))
        if type(reference).__name__ == "CogVideoXDPMScheduler":
            back = timesteps[i - 1] if i > 0 else None
            x, history = reference.step(preds[-1], history, t, back, x, generator=theirs, return_dict=False)
        else:
            given = {"generator": theirs} if any(table.draws) else {}
            x = reference.step(preds[-1], t, x, **given, return_dict=False)[0]
        noise += [torch.randn(SHAPE, generator=ours, dtype=dtype) for _ in range(table.draws[i])]
        y = table.advance(i, y, preds, initial, noise)
        assert x.isfinite().all() and y.isfinite().all()
        result.append(((x - y).abs().max() / x.abs().max()).item())
    assert torch.equal(theirs.get_state(), ours.get_state())
    return result


@pytest.mark.parametrize("steps", [2, 7, 20, 50])
@pytest.mark.parametrize("name", [*SINGLE_STEP, *HISTORY])
def test_reproduces_the_scheduler(name: str, steps: int) -> None:
    make = {**SINGLE_STEP, **HISTORY}[name]
    table = SolverTable.from_scheduler(make(steps))
    assert max(errors(make(steps), table, torch.float64)) <= 2e-6
    # Below about 10 steps a float32 scheduler itself is off by up to 5e-5: it cancels latents of size sigma.
    if steps >= 20:
        assert max(errors(make(steps), table, torch.float32)) <= 2e-6


@pytest.mark.parametrize("name", STOCHASTIC)
def test_draws_of_a_stochastic_scheduler_are_columns(name: str) -> None:
    """Also those that it discards: what is drawn after them must be the same."""
    make = STOCHASTIC[name]
    table = SolverTable.from_scheduler(make(20))
    # Some draw in float32 whatever the latents are.
    assert table.c.any() and max(errors(make(20), table, torch.float32)) <= 2e-6


def test_steps_from_their_own_timestep_end_at_the_next_lower_sigma() -> None:
    """By hand: shift 3 makes 1, 0.923, 0.667 of the sigmas 1, 0.8, 0.4; the timesteps stay."""
    timesteps = [1000.0, 800.0, 400.0]
    shifted = scheduler("FlowMatchEulerDiscreteScheduler", 3, timesteps={"timesteps": timesteps}, shift=3.0)
    table = SolverTable.from_scheduler(shifted, per_token=True)
    falls = torch.tensor([12 / 13 - 1.0, 2 / 3 - 0.8, -0.4]).double()
    assert torch.allclose(table.b, falls.expand(3, 3).tril(), atol=1e-6) and torch.allclose(table.a, falls**0)
    assert table.timesteps == pytest.approx(timesteps)


def test_new_noise_does_not_turn_the_prediction_round() -> None:
    """diffusers counts such steps downwards, with the prediction negated, but not those that draw noise."""
    reference = flow_euler(3, stochastic_sampling=True)
    own, usual = (SolverTable.from_scheduler(reference, per_token=per_token) for per_token in (True, False))
    assert torch.allclose(own.b, usual.b) and torch.allclose(own.c, usual.c) and own.b[0, 0] < 0


@pytest.mark.parametrize("name", SINGLE_STEP)
def test_solvers_without_history_are_single_step(name: str) -> None:
    table = SolverTable.from_scheduler(SINGLE_STEP[name](20))
    assert None not in table.single_step
    assert table.draws == (0,) * 20 and table.c.shape == (20, 0)


@pytest.mark.parametrize("name", HISTORY)
def test_solvers_with_history_are_not_single_step(name: str) -> None:
    assert None in SolverTable.from_scheduler(HISTORY[name](20)).single_step


@pytest.mark.parametrize("name", ["flow euler, shift 7", "euler, svd", "cogvideox ddim"])
def test_single_step_and_full_rows_agree(name: str) -> None:
    table = SolverTable.from_scheduler(SINGLE_STEP[name](20))
    full = dataclasses.replace(table, single_step=(None,) * 20)
    initial = torch.randn(SHAPE) * table.noise_scale
    preds = torch.randn(20, *SHAPE)
    latents = initial
    for i in range(20):
        latents = table.advance(i, latents, preds, initial)
        torch.testing.assert_close(full.advance(i, latents, preds, initial), latents, rtol=0, atol=1e-3)


def test_flow_euler_is_x_plus_the_sigma_step_times_the_prediction() -> None:
    reference = flow_euler(10, shift=3.0)
    table = SolverTable.from_scheduler(reference)
    falls = reference.sigmas.diff().tolist()
    assert [pair[0] for pair in table.single_step if pair] == pytest.approx([1.0] * 10, abs=1e-7)
    assert [pair[1] for pair in table.single_step if pair] == pytest.approx(falls, abs=1e-7)
    assert table.sigmas == tuple(reference.sigmas[:-1].tolist())
    assert table.timesteps == tuple(reference.timesteps.tolist())
    assert table.noise_scale == 1.0 and set(table.input_scale) == {1.0}


@pytest.mark.parametrize("build", [of("FlowMatchEulerDiscreteScheduler", shift=3.0), inverted])
def test_noise_levels_fall_from_noise_whichever_way_the_timesteps_count(
    build: Callable[[int], Any],
) -> None:
    reference = build(10)
    table = SolverTable.from_scheduler(reference)
    sigmas = reference.sigmas[:-1]
    expected = 1 - sigmas if reference.config.invert_sigmas else sigmas
    assert table.noise_levels == pytest.approx(expected.tolist(), abs=1e-6)
    assert table.noise_levels[0] == 1.0 and expected.diff().max() < 0


def test_svd_scales_noise_and_input() -> None:
    table = SolverTable.from_scheduler(scheduler("EulerDiscreteScheduler", 25, **SVD))
    assert table.sigmas[0] == pytest.approx(700.0)
    assert table.noise_scale == pytest.approx((700.0**2 + 1) ** 0.5)
    assert table.input_scale == pytest.approx([(s * s + 1) ** -0.5 for s in table.sigmas])


def test_coefficients_are_causal_and_float64() -> None:
    table = SolverTable.from_scheduler(scheduler(UNIPC, 20, solver_order=3, **FLOW))
    assert table.a.dtype == table.b.dtype == torch.float64
    assert torch.equal(table.b, table.b.tril())


def test_advance_never_reads_later_predictions_or_discarded_draws() -> None:
    table = SolverTable.from_scheduler(scheduler("CogVideoXDPMScheduler", 6, **COGVIDEOX))
    poison = torch.full(SHAPE, torch.nan)
    noise = [torch.randn(SHAPE) if table.c[:, k].any() else poison for k in range(sum(table.draws))]
    assert any(draw is poison for draw in noise)
    preds = [torch.randn(SHAPE)] * 4 + [poison] * 2
    assert table.advance(3, torch.randn(SHAPE), preds, torch.randn(SHAPE), noise).isfinite().all()


def test_cogvideox_dpm_draws_twice_once_it_has_a_history() -> None:
    table = SolverTable.from_scheduler(scheduler("CogVideoXDPMScheduler", 5, **COGVIDEOX))
    assert table.draws == (1, 2, 2, 2, 1)
    assert table.single_step[0] is None


def test_advance_takes_half_precision_and_returns_float32_without_writing_its_inputs() -> None:
    table = SolverTable.from_scheduler(scheduler(UNIPC, 4, **FLOW))
    initial, preds = torch.randn(SHAPE), torch.randn(4, *SHAPE, dtype=torch.bfloat16)
    kept, kept_preds = initial.clone(), preds.clone()
    for i in range(4):
        assert table.advance(i, initial, preds, initial).dtype == torch.float32
    assert torch.equal(initial, kept) and torch.equal(preds, kept_preds)


def test_leaves_the_scheduler_and_the_global_generator_alone() -> None:
    reference = scheduler(UNIPC, 8, **FLOW)
    before, state = copy.deepcopy(vars(reference)), torch.get_rng_state()
    table = SolverTable.from_scheduler(reference)
    assert repr(vars(reference)) == repr(before)
    assert torch.equal(torch.get_rng_state(), state)
    again = SolverTable.from_scheduler(reference)
    assert torch.equal(table.a, again.a) and torch.equal(table.b, again.b)


def test_num_steps_sets_timesteps_on_the_copy_only() -> None:
    reference = new("FlowMatchEulerDiscreteScheduler")
    assert len(SolverTable.from_scheduler(reference, num_steps=6).timesteps) == 6
    assert not hasattr(reference, "num_inference_steps")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of("FlowMatchLCMScheduler", scale_factors=[0.5, 0.7, 1.0]), "with scale_factors: leave them out"),
        (of("DDIMScheduler"), "turn off clip_sample"),
        (of("DDIMScheduler", clip_sample=False, thresholding=True), "turn off clip_sample, thresholding"),
        (of(UNIPC, thresholding=True), "turn off clip_sample, thresholding"),
        (of("CogVideoXDDIMScheduler", **{**COGVIDEOX, "prediction_type": "epsilon"}), "finite"),
        (of(UNIPC, solver_type="bh1", **FLOW), "finite"),
        (of("RePaintScheduler"), "choose another scheduler"),
    ],
)
def test_refuses_what_is_not_linear(make: Callable[[int], Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SolverTable.from_scheduler(make(4))


def test_refuses_a_scheduler_whose_noise_has_no_generator() -> None:
    class Loose(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # has no types
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            return (sample + torch.randn_like(sample),)

    made: Callable[[], Any] = Loose
    reference = made()
    reference.set_timesteps(3)
    with pytest.raises(InvalidRequest, match="got Loose, which adds its own at step 0"):
        SolverTable.from_scheduler(reference)


def test_refuses_a_scheduler_whose_step_rolls_its_own_dice() -> None:
    class Dice(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # has no types
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            return (sample + torch.empty_like(sample).normal_(),)

    made: Callable[[], Any] = Dice
    reference = made()
    reference.set_timesteps(3)
    with pytest.raises(InvalidRequest, match="linear"):
        SolverTable.from_scheduler(reference)


def test_refuses_a_scheduler_without_timesteps_or_already_stepped() -> None:
    reference = new("FlowMatchEulerDiscreteScheduler")
    with pytest.raises(InvalidRequest, match="call set_timesteps first"):
        SolverTable.from_scheduler(reference)
    reference.set_timesteps(3)
    reference.step(torch.zeros(1), reference.timesteps[0], torch.zeros(1))
    with pytest.raises(InvalidRequest, match="at step 1: call set_timesteps again"):
        SolverTable.from_scheduler(reference)


def test_a_step_count_without_finite_timesteps_is_refused() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    with np.errstate(invalid="ignore"):
        scheduler.set_timesteps(sigmas=[1.0], mu=1.0)
    with pytest.raises(InvalidRequest, match="nan for 1 steps: use more steps"):
        SolverTable.from_scheduler(scheduler)
