"""In stg_trt/guidance."""

from __future__ import annotations

from tests.planted_mistakes.mistake import Mistake

_TABLES = "tests/guidance/test_tables.py"
_SOLVER = "tests/guidance/test_solver.py"

IN_GUIDANCE = (
    Mistake(
        "every pass is weighed the other way round",
        "stg_trt/guidance/combine.py",
        "(other - of_cond)",
        "(of_cond - other)",
        (f"{_TABLES}::test_combine_is_the_equation",),
    ),
    Mistake(
        "the weight of cond is read",
        "stg_trt/guidance/combine.py",
        "of_cond = pred = preds[cond]",
        "of_cond, pred = preds[cond], preds[cond] * weights[cond]",
        (f"{_TABLES}::test_combine_is_the_equation",),
    ),
    Mistake(
        "the weights of skip passes follow their names, not their rows",
        "stg_trt/guidance/tables.py",
        "plain[one] for one in self.passes(step))",
        "plain[one] for one in sorted(self.passes(step), key=str))",
        (f"{_TABLES}::test_rows_are_in_the_order_in_which_passes_leave_the_prefix",),
    ),
    Mistake(
        "all skip passes take the first one's scale",
        "stg_trt/guidance/skips.py",
        "scales[name], sigmas",
        "next(iter(scales.values())), sigmas",
        (f"{_TABLES}::test_several_skip_passes_have_names",),
    ),
    Mistake(
        "rescale divides the wrong way round",
        "stg_trt/guidance/combine.py",
        "rescale * _std(of_cond) / _std(pred)",
        "rescale * _std(pred) / _std(of_cond)",
        (f"{_TABLES}::test_full_rescale_restores_each_videos_own_spread",),
    ),
    Mistake(
        "one standard deviation for all videos",
        "stg_trt/guidance/combine.py",
        "pred.std(dim=tuple(range(1, pred.ndim)), keepdim=True)",
        "pred.std(dim=tuple(range(pred.ndim)), keepdim=True)",
        (f"{_TABLES}::test_a_batch_is_its_videos_one_by_one",),
    ),
    Mistake(
        "a step on an edge takes the next bin",
        "stg_trt/guidance/bins.py",
        "(edges <= torch.tensor(sigma, dtype=torch.float32))",
        "(edges < torch.tensor(sigma, dtype=torch.float32))",
        (f"{_TABLES}::test_a_step_takes_the_first_bin_at_or_below_it_else_the_last",),
    ),
    Mistake(
        "STG goes on for one step after its range",
        "stg_trt/guidance/per_step.py",
        "value if start <= i < stop else 0.0",
        "value if start <= i <= stop else 0.0",
        (f"{_TABLES}::test_stg_runs_only_inside_its_range",),
    ),
    Mistake(
        "a negative STG scale is allowed",
        "stg_trt/guidance/skips.py",
        'check_values("stg_scale", self.scale, 0, math.inf)',
        'check_values("stg_scale", self.scale, -math.inf, math.inf)',
        (f"{_TABLES}::test_refuses_with_expected_got_and_fix",),
    ),
    Mistake(
        "the caller's scheduler is stepped",
        "stg_trt/guidance/solver.py",
        "        solver = copy.deepcopy(scheduler)\n        self.states",
        "        solver = scheduler\n        self.states",
        (_SOLVER,),
    ),
    Mistake(
        "a scheduler that adds noise of its own is taken",
        "stg_trt/guidance/solver.py",
        "        _check_noise(solver, rows, len(timesteps))\n",
        "",
        (f"{_SOLVER}::test_refuses_what_is_not_linear",),
    ),
    Mistake(
        "a scheduler that clips is taken",
        "stg_trt/guidance/solver.py",
        "        _check_linear(solver, run, rows, len(timesteps))\n",
        "",
        (f"{_SOLVER}::test_refuses_what_is_not_linear",),
    ),
    Mistake(
        "the last prediction is left out of a step",
        "stg_trt/guidance/solver.py",
        "for j in range(step + 1):",
        "for j in range(step):",
        (f"{_SOLVER}::test_single_step_and_full_rows_agree",),
    ),
    Mistake(
        "an inverted schedule counts its noise the wrong way",
        "stg_trt/guidance/solver.py",
        "return 1 - part if",
        "return part if",
        (f"{_SOLVER}::test_noise_levels_fall_from_noise_whichever_way_the_timesteps_count",),
    ),
    Mistake(
        "a step per token goes the wrong way",
        "stg_trt/guidance/solver.py",
        'sign = 1 if solver.config.get("stochastic_sampling") else -1',
        "sign = 1",
        (f"{_SOLVER}::test_steps_from_their_own_timestep_end_at_the_next_lower_sigma",),
    ),
    Mistake(
        "new noise per token turns the prediction round",
        "stg_trt/guidance/solver.py",
        'sign = 1 if solver.config.get("stochastic_sampling") else -1',
        "sign = -1",
        (f"{_SOLVER}::test_new_noise_does_not_turn_the_prediction_round",),
    ),
    Mistake(
        "noise without a generator is a column",
        "stg_trt/guidance/solver.py",
        'if bool(noisy.any()) and "generator" not in inspect.signature(solver.step).parameters:',
        "if False:",
        (f"{_SOLVER}::test_refuses_a_scheduler_whose_noise_has_no_generator",),
    ),
    Mistake(
        "CFG below 1 turns away from the prompt",
        "stg_trt/guidance/tables.py",
        "tuple(max(scale, 1.0) for scale in",
        "tuple(scale for scale in",
        ("tests/runtime/test_calls_of_diffusers.py::test_there_is_no_cfg_at_one_and_below[ltx-0.5]",),
    ),
)
