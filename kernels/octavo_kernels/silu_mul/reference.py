"""Gated activations in plain torch, in the dtype they are given. Know nothing of vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def silu_mul_reference(x: Tensor) -> Tensor:
    """See `silu_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def gelu_tanh_mul_reference(x: Tensor) -> Tensor:
    """See `gelu_tanh_mul`."""
    gate, up = x.chunk(2, dim=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def gelu_mul_reference(x: Tensor) -> Tensor:
    """See `gelu_mul`."""
    gate, up = x.chunk(2, dim=-1)
    tail: Tensor = torch.special.erfc(-gate / math.sqrt(2))
    return 0.5 * gate * tail * up
