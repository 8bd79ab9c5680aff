"""In steps that several ranks take together."""

from __future__ import annotations

from tests.planted_mistakes.mistake import Mistake

_PARALLEL = "tests/runtime/test_guidance_parallel.py"
_RANKS = "tests/models/test_ranks.py"

IN_RANKS = (
    Mistake(
        "rows of other ranks keep the last step's predictions",
        "runtime/rank_group.py",
        "                part.zero_()",
        "                part.view_as(part)",
        (f"{_PARALLEL}::test_every_guidance_is_that_of_one_rank",),
    ),
    Mistake(
        "a skip pass without cond waits for a prefix",
        "stg_trt/models/plan.py",
        "() if COND in passes else tuple(one for one in passes if one.is_skip)",
        "()",
        (f"{_RANKS}::test_a_skip_pass_without_cond_is_computed_from_its_start",),
    ),
    Mistake(
        "own rows are counted from uncond where it is not computed",
        "runtime/step.py",
        "slice((groups.start - first) * videos, (groups.stop - first) * videos)",
        "slice(groups.start * videos, groups.stop * videos)",
        (f"{_PARALLEL}::test_every_guidance_is_that_of_one_rank",),
    ),
    Mistake(
        "a callback's latents stay on the first rank",
        "runtime/ranks.py",
        "            spread = step.replaced\n",
        "",
        (f"{_PARALLEL}::test_callbacks_change_the_latents_of_all",),
    ),
    Mistake(
        "ranks draw noise of their own",
        "runtime/ranks.py",
        "torch.Generator().set_state(torch.get_rng_state())",
        "torch.Generator()",
        (f"{_PARALLEL}::test_without_a_generator_all_draw_what_torch_would",),
    ),
    Mistake(
        "the busiest rank gets as much as possible",
        "stg_trt/models/ranks.py",
        "return min(splits",
        "return max(splits",
        (f"{_RANKS}::test_the_table_of_the_documentation",),
    ),
    Mistake(
        "other ranks load their engines in the first step",
        "runtime/ranks.py",
        "            running.wait()\n",
        "",
        (f"{_PARALLEL}::test_ranks_load_engines_before_the_steps",),
    ),
)
