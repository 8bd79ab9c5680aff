"""Names of weights as the original code of a model has them."""

from __future__ import annotations

from collections.abc import Mapping

from tests.support.family_cases import LTX, WAN, FamilyCase

# From diffusers' names to the original code's, in this order.
ORIGINAL: dict[FamilyCase, Mapping[str, str]] = {
    LTX: {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"},
    WAN: {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        ".to_out.0.": ".o.",
        ".to_q.": ".q.",
        ".to_k.": ".k.",
        ".to_v.": ".v.",
        "proj_out": "head.head",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "norm2": "norm_swapped",
        "norm3": "norm2",
        "norm_swapped": "norm3",
    },
}


def original_name(case: FamilyCase, name: str) -> str:
    """Of a weight that diffusers calls `name`."""
    if case is WAN and name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in ORIGINAL[case].items():
        name = name.replace(ours, theirs)
    return name.replace("scale_shift_table", "modulation") if case is WAN else name
