"""The table of families that the tests go through."""

from tests.family_cases.case import TIMESTEP, FamilyCase, Published
from tests.family_cases.cogvideox import COGVIDEOX
from tests.family_cases.hunyuan_video import HUNYUAN_VIDEO
from tests.family_cases.ltx import LTX
from tests.family_cases.mochi import MOCHI
from tests.family_cases.wan import WAN

__all__ = [
    "CASES",
    "COGVIDEOX",
    "HUNYUAN_VIDEO",
    "LTX",
    "MOCHI",
    "TIMESTEP",
    "WAN",
    "FamilyCase",
    "Published",
]

CASES = (LTX, WAN, MOCHI, HUNYUAN_VIDEO, *COGVIDEOX.values())
