"""Norm and rotary embedding of queries and keys, in one pass over memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .shared_library import DTYPES, Kernels, address


class QKNormRopeParameters(ctypes.Structure):
    """`StgQKNormRope` of plugins/qk_norm_rope/qk_norm_rope.h, field for field."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("q_out", ctypes.c_void_p),
        ("k_out", ctypes.c_void_p),
        ("q_weight", ctypes.c_void_p),
        ("k_weight", ctypes.c_void_p),
        ("q_bias", ctypes.c_void_p),
        ("k_bias", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("table_pairs", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("centred", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Norm:
    """A norm over groups of len(weight) channels, in float32; `centred` makes it a layer norm."""

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-6
    centred: bool = False


@dataclass(frozen=True)
class Rope:
    """Float32 tables (tokens, pairs of channels), or of a head's pairs if all heads have the same."""

    cos: Tensor
    sin: Tensor


class QKNormRopeKernel:
    """norm_rope of q and k (rows, tokens, channels) into q_out and k_out, which may be q and k."""

    def __init__(
        self,
        kernels: Kernels,
        inputs: tuple[Tensor, Tensor],
        outputs: tuple[Tensor, Tensor],
        norms: tuple[Norm, Norm],
        rope: Rope | None,
    ) -> None:
        self._kernels = kernels
        self._alive = (inputs, outputs, norms, rope)
        (q, k), (q_out, k_out), (q_norm, k_norm) = inputs, outputs, norms
        assert q.shape == k.shape == q_out.shape == k_out.shape and len({q.dtype, k.dtype}) == 1
        assert (q_norm.eps, q_norm.centred) == (k_norm.eps, k_norm.centred)
        rows, tokens, channels = q.shape
        self._parameters = QKNormRopeParameters(
            q=address(q),
            k=address(k),
            q_out=address(q_out),
            k_out=address(k_out),
            q_weight=address(q_norm.weight),
            k_weight=address(k_norm.weight),
            q_bias=address(q_norm.bias),
            k_bias=address(k_norm.bias),
            cos=address(rope.cos) if rope else None,
            sin=address(rope.sin) if rope else None,
            rows=rows,
            tokens=tokens,
            channels=channels,
            group=len(q_norm.weight),
            table_pairs=rope.cos.shape[-1] if rope else 0,
            eps=q_norm.eps,
            centred=q_norm.centred,
            dtype=DTYPES[q.dtype],
        )

    def enqueue(self, stream: int) -> None:
        """Both, in the order of a stream."""
        self._kernels.enqueue("stg_qk_norm_rope", self._parameters, stream)


def norm_rope(x: Tensor, norm: Norm, rope: Rope | None) -> Tensor:
    """The kernel's result for q, or for k: (a, b) -> (a*cos - b*sin, b*cos + a*sin) of normed pairs."""
    groups = x.float().unflatten(-1, (-1, len(norm.weight)))
    if norm.centred:
        groups = groups - groups.mean(-1, keepdim=True)
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    if norm.bias is not None:
        groups = groups + norm.bias
    normed: Tensor = groups.flatten(-2)
    if rope is not None:
        even, odd = normed.unflatten(-1, (-1, rope.cos.shape[-1], 2)).unbind(-1)
        cos, sin = rope.cos[:, None], rope.sin[:, None]
        normed = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-3)
    return normed.to(x.dtype)
