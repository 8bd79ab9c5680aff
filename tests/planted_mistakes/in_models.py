"""In stg_trt/models."""

from __future__ import annotations

from tests.planted_mistakes.mistake import Mistake

_FAMILIES = "tests/models/families/test_families.py"
_CHECKPOINT = "tests/models/test_checkpoint.py"

IN_MODELS = (
    Mistake(
        "the skip rows fork again at every perturbed block",
        "stg_trt/models/plan.py",
        "        if perturbed and not forked:",
        "        if perturbed:",
        ("tests/models/test_plan.py::test_stg_r_by_hand",),
    ),
    Mistake(
        "stg-r computes the skip rows that pass a block by",
        "stg_trt/models/plan.py",
        "return replace(run, passes=_plain(run.passes), bypass=True)",
        "return replace(run, bypass=True)",
        ("tests/models/test_plan.py::test_stg_r_by_hand",),
    ),
    Mistake(
        "operations are counted for one row",
        "stg_trt/models/plan.py",
        "per_row(run.segment) * len(run.passes)",
        "per_row(run.segment)",
        ("tests/models/test_plan.py::test_flops_count_every_row_of_every_run",),
    ),
    Mistake(
        "the back begins with the block that was cut out",
        "stg_trt/models/segment.py",
        'Segment("back", block + 1, num_blocks, back=True)',
        'Segment("back", block, num_blocks, back=True)',
        ("tests/models/test_segment.py::test_segments_in_the_order_they_run",),
    ),
    Mistake(
        "blocks are cut in the order they were named",
        "stg_trt/models/segment.py",
        "tuple(sorted(blocks))",
        "tuple(blocks)",
        ("tests/models/test_segment.py::test_segments_in_the_order_they_run",),
    ),
    Mistake(
        "the block after the last one is allowed",
        "stg_trt/models/perturbation.py",
        "0 <= block < num_blocks]",
        "0 <= block <= num_blocks]",
        ("tests/models/test_segment.py::test_cuts_that_cannot_be",),
    ),
    Mistake(
        "the fingerprint reads the first weight file only",
        "stg_trt/models/checkpoint.py",
        "for path in self._weights().files:",
        "for path in self._weights().files[:1]:",
        (f"{_CHECKPOINT}::test_a_fingerprint_reads_every_shard",),
    ),
    Mistake(
        "the fingerprint leaves the configuration out",
        "stg_trt/models/checkpoint.py",
        "hashlib.sha256(json.dumps(facts, sort_keys=True).encode())",
        "hashlib.sha256()",
        (f"{_CHECKPOINT}::test_fingerprints_tell_configurations_apart",),
    ),
    Mistake(
        "all random weights have one seed",
        "stg_trt/models/random_weights.py",
        'int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")',
        "0",
        (f"{_CHECKPOINT}::test_random_weights_are_seeded_by_name",),
    ),
    Mistake(
        "shapes of the weights are not checked",
        "stg_trt/models/weights.py",
        "if found[name] != tuple(tensor.shape):",
        "if name not in found:",
        (f"{_CHECKPOINT}::test_what_is_no_checkpoint_is_refused",),
    ),
    Mistake(
        "the videos of a prompt do not lie next to each other",
        "stg_trt/models/text.py",
        "self.embeds.repeat_interleave(times, 0)",
        "torch.cat([self.embeds] * times)",
        ("tests/runtime/test_prompts.py::test_embeddings_are_padded_and_repeated",),
    ),
    Mistake(
        "the rotary embedding turns the other way",
        "stg_trt/models/families/dit.py",
        "a * cos - b * sin, b * cos + a * sin",
        "a * cos + b * sin, b * cos - a * sin",
        (f"{_FAMILIES}::test_the_cut_chain_is_the_diffusers_model",),
    ),
    Mistake(
        "the islands are lowered and all else stays in float32",
        "stg_trt/models/families/dit.py",
        "if not re.search(self.float32_islands, name):",
        "if re.search(self.float32_islands, name):",
        (f"{_FAMILIES}::test_lower_precision_keeps_its_float32_islands",),
    ),
    Mistake(
        "rows keep their self-attention where they should skip it",
        "stg_trt/models/families/cross_attention.py",
        "[:, None, None], mixed, value)",
        "[:, None, None], value, mixed)",
        (f"{_FAMILIES}::test_one_cut_serves_every_subset_of_its_blocks",),
    ),
    Mistake(
        "a skipped self-attention costs what a whole one does",
        "stg_trt/models/families/cross_attention.py",
        "(without_attention if skipped else self_attention)",
        "self_attention",
        ("tests/models/test_plan.py::test_segments_cost_what_torch_counts",),
    ),
    Mistake(
        "logits of the perturbed attention are not scaled",
        "stg_trt/models/families/joint_attention.py",
        "query = query * query.shape[-1] ** -0.5",
        "query = query * 1.0",
        ("tests/models/families/test_joint_attention.py",),
    ),
    Mistake(
        "the perturbed attention reads the video's part of the mask",
        "stg_trt/models/families/joint_attention.py",
        "bias[..., video.query.shape[2] :]",
        "bias[..., : text.key.shape[2]]",
        ("tests/models/families/test_joint_attention.py",),
    ),
    Mistake(
        "real tokens are masked instead of padding",
        "stg_trt/models/families/ltx_video.py",
        "(1 - text.mask.float()) * -10000.0",
        "text.mask.float() * -10000.0",
        (f"{_FAMILIES}::test_what_becomes_of_padding",),
    ),
    Mistake(
        "padding is not zeroed",
        "stg_trt/models/families/wan.py",
        "text.embeds * text.mask[:, :, None].to(text.embeds)",
        "text.embeds",
        (f"{_FAMILIES}::test_what_becomes_of_padding",),
    ),
    Mistake(
        "height and width of the trained grid are swapped",
        "stg_trt/models/families/cogvideox.py",
        "(tuple(size), trained[1], trained[0])",
        "(tuple(size), trained[0], trained[1])",
        (f"{_FAMILIES}::test_position_tables_are_those_of_diffusers",),
    ),
    Mistake(
        "the pooled text attends to padding",
        "stg_trt/models/families/mochi.py",
        "F.pad((1 - mask) * MASKED, (1, 0))",
        "F.pad((1 - mask) * MASKED, (0, 1))",
        (f"{_FAMILIES}::test_the_cut_chain_is_the_diffusers_model",),
    ),
    Mistake(
        "shift and scale of the head are swapped",
        "stg_trt/models/families/hunyuan_video.py",
        "scale, shift = modulation(self.norm_out.linear",
        "shift, scale = modulation(self.norm_out.linear",
        (f"{_FAMILIES}::test_the_cut_chain_is_the_diffusers_model",),
    ),
)
