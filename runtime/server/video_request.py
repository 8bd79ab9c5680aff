"""The fields of a request for a video, and how texts of a form become them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stg_trt.guidance.options import GuidanceOptions

from .refusal import Refusal, invalid

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=1, le=1 << 16)]
PerStep = Number | list[Number]
PerPass = PerStep | dict[str, PerStep]
Blocks = list[int] | dict[str, list[int]]

# The table of a solver takes time that grows with their square.
_MAX_STEPS = 250
# A form has texts alone: those of these fields may be lists, or mappings from the names of skip passes.
_LISTS = (
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "stg_scale",
    "stg_blocks",
    "stg_range",
    "rescale",
    "timesteps",
    "sigmas",
    "modality_scale",
    "audio_guidance_scale",
    "audio_stg_scale",
    "audio_modality_scale",
    "audio_rescale",
)

# Fields that clients of other servers send too, and the values that change nothing: a job is one video, and
# whether it is decoded in tiles is the server's choice.
_FOREIGN = {"n": ("1",), "vae_use_slicing": ("true", "false"), "vae_use_tiling": ("false",)}


class VideoRequest(BaseModel):
    """A video to make; None is the default of the engines or the model."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: str = Field(default="", max_length=32_000)
    negative_prompt: str | None = Field(default=None, max_length=32_000)
    model: str | None = Field(default=None, max_length=200)
    seconds: float | None = Field(default=None, gt=0, le=3600)
    size: str | None = Field(default=None, pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")
    width: Pixels | None = None
    height: Pixels | None = None
    num_frames: Pixels | None = None
    fps: float | None = Field(default=None, gt=0, le=1000)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    num_inference_steps: int | None = Field(default=None, ge=1, le=_MAX_STEPS)
    timesteps: list[Number] | None = Field(default=None, max_length=_MAX_STEPS)
    sigmas: list[Number] | None = Field(default=None, max_length=_MAX_STEPS)
    guidance_scale: PerStep | None = None
    guidance_scale_2: PerStep | None = None
    true_cfg_scale: PerStep | None = None
    min_guidance_scale: Number | None = None
    max_guidance_scale: Number | None = None
    use_dynamic_cfg: bool = False
    cfg_zero_star: bool | None = None
    stg_scale: PerPass | None = None
    stg_mode: str | None = None
    stg_blocks: Blocks | None = None
    stg_range: tuple[int, int] | None = None
    rescale: PerStep | None = None
    preset: str | None = None
    modality_scale: PerStep | None = None
    audio_guidance_scale: PerStep | None = None
    audio_stg_scale: PerPass | None = None
    audio_modality_scale: PerStep | None = None
    audio_rescale: PerStep | None = None
    motion_bucket_id: Number | None = None
    noise_aug_strength: Number | None = None
    image_crf: int | None = Field(default=None, ge=0, le=51)
    decode_chunk_size: int | None = Field(default=None, ge=1, le=1 << 16)

    @property
    def guidance(self) -> GuidanceOptions:
        """The scales as the pipeline takes them; raises InvalidRequest for names that do not exist."""
        return GuidanceOptions(
            guidance_scale=self.guidance_scale,
            stg_scale=self.stg_scale,
            rescale=self.rescale,
            stg_mode=self.stg_mode,
            stg_blocks=self.stg_blocks,
            stg_range=self.stg_range,
            preset=self.preset,
            cfg_zero_star=self.cfg_zero_star,
            use_dynamic_cfg=self.use_dynamic_cfg,
            true_cfg_scale=self.true_cfg_scale,
            min_guidance_scale=self.min_guidance_scale,
            max_guidance_scale=self.max_guidance_scale,
            guidance_scale_2=self.guidance_scale_2,
            modality_scale=self.modality_scale,
            audio_guidance_scale=self.audio_guidance_scale,
            audio_stg_scale=self.audio_stg_scale,
            audio_modality_scale=self.audio_modality_scale,
            audio_rescale=self.audio_rescale,
        )

    @property
    def pixels(self) -> tuple[int | None, int | None]:
        """Width and height, of `size` or of the two fields; raises Refusal if they contradict each other."""
        if self.size is None:
            return self.width, self.height
        width, height = map(int, self.size.split("x"))
        for name, value, of_size in (("width", self.width, width), ("height", self.height, height)):
            if value not in (None, of_size):
                raise invalid(name, f"expected that of size {self.size}, got {value}: leave one of them out")
        return width, height


class ResolvedRequest(VideoRequest):
    """A request in which the server has filled in all that decides which video is made."""

    model: str
    width: int
    height: int
    num_frames: int
    fps: float
    seed: int


def read_fields(fields: Mapping[str, object]) -> VideoRequest:
    """The request of a body's fields; raises Refusal with the name of the first that cannot be used.

    `extra_params` is a JSON object with more of the same fields.
    """
    given = {name: value for name, value in fields.items() if value is not None and value != ""}
    extra = _parsed("extra_params", given.pop("extra_params", {}))
    if not isinstance(extra, dict):
        raise invalid("extra_params", f"expected a JSON object, got {_short(extra)}: write {{}}")
    twice = sorted(given.keys() & extra.keys())
    if twice:
        raise invalid(twice[0], "expected it once, got it in extra_params too: leave one out")
    given |= extra
    for name, neutral in _FOREIGN.items():
        value = given.pop(name, neutral[0])
        if str(value).lower() not in neutral:
            raise invalid(name, f"expected {' or '.join(neutral)}, got {_short(value)}: leave it out")
    parsed = {name: _parsed(name, value) if name in _LISTS else value for name, value in given.items()}
    try:
        return VideoRequest.model_validate(parsed)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> Refusal:
    """The first problem, under the name of its field."""
    first = error.errors(include_url=False, include_context=False)[0]
    # A name that is no text has no place of its own.
    name = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "extra_forbidden":
        known = ", ".join((*VideoRequest.model_fields, "input_reference", "extra_params"))
        return invalid(name, f"expected one of {known}, got an unknown name: check the spelling")
    said = first["msg"].removeprefix("Input should be ")
    return invalid(name, f"expected {said}, got {_short(first['input'])}: correct it")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _parsed(name: str, value: object) -> object:
    """A list or a mapping of a text: JSON, or numbers separated by commas."""
    if isinstance(value, dict):
        return {key: _parsed(name, one) for key, one in value.items()}
    if name == "stg_blocks" and isinstance(value, int):
        return [value]
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise invalid(name, f"expected JSON, got {_short(value)}: correct it") from error
    if "," in text or name in ("stg_blocks", "timesteps", "sigmas"):
        return text.split(",")
    return text


def fields_of_form(items: Iterable[tuple[str, str]]) -> dict[str, object]:
    """Fields of a form's texts, in which `name[]` is an entry of a list and `name[key]` one of a mapping.

    Raises Refusal for a field that is there twice.
    """
    fields: dict[str, object] = {}
    for key, text in items:
        name, bracket, inner = key.partition("[")
        inner = inner.removesuffix("]")
        if not bracket and name not in fields:
            fields[name] = text
            continue
        entries = fields.setdefault(name, {} if inner else [])
        if bracket and isinstance(entries, list) and not inner:
            entries.append(text)
        elif bracket and isinstance(entries, dict) and inner and inner not in entries:
            entries[inner] = text
        else:
            raise invalid(name, "expected it once, got it twice: leave one out")
    return fields
