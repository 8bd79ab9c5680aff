"""The table of families that the tests go through."""

from tests.support.family_cases.case import TIMESTEP, FamilyCase, Published, Sizes, SomeSizes
from tests.support.family_cases.cogvideox import COGVIDEOX
from tests.support.family_cases.hunyuan_video import HUNYUAN_VIDEO
from tests.support.family_cases.ltx import LTX
from tests.support.family_cases.mochi import MOCHI
from tests.support.family_cases.wan import WAN

__all__ = [
    "CASES",
    "COGVIDEOX",
    "HUNYUAN_VIDEO",
    "LTX",
    "MOCHI",
    "TIMESTEP",
    "WAN",
    "WITH_PLUGIN",
    "FamilyCase",
    "Published",
    "Sizes",
    "SomeSizes",
]

CASES = (LTX, WAN, MOCHI, HUNYUAN_VIDEO, *COGVIDEOX.values())
WITH_PLUGIN = [case for case in CASES if "qk_norm_rope" in case.family.plugins]
