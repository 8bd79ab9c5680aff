"""Pictures that a request brings, decoded with their format, size and pixels bounded."""

from __future__ import annotations

import base64
import binascii
import io

from PIL import Image, ImageOps

from .refusal import invalid

FIELD = "input_reference"
_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_PIXELS = 64_000_000


def decode_picture(data: bytes) -> Image.Image:
    """A PNG, JPEG or WebP picture as RGB, turned as its camera says; raises Refusal for anything else."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            # The header alone has been read so far.
            if picture.width * picture.height > _MAX_PIXELS:
                raise Image.DecompressionBombError
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Image.DecompressionBombError as error:
        raise invalid(
            FIELD, f"expected at most {_MAX_PIXELS} pixels, got more: make it smaller, as the video is"
        ) from error
    except Exception as error:  # Decoders raise what they like for broken files.
        raise invalid(
            FIELD, f"expected a PNG, JPEG or WebP picture, got {len(data)} bytes of none: check the file"
        ) from error


def bytes_of_text(text: str) -> bytes:
    """The bytes of a data: URL; raises Refusal for other texts.

    Nothing is fetched: a server that follows addresses in requests reaches places that the sender cannot.
    """
    head, comma, body = text.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise invalid(
            FIELD,
            f"expected a file, or a data: URL in base64, got {text[:40]!r}: http(s) addresses are not "
            "fetched, send the picture itself",
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(FIELD, "expected base64 in the data: URL, got something else: encode it") from error
