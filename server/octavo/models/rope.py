"""Rotary embedding tables with every context-stretching variant. Knows no kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo.checkpoint import RopeSpec


def rotary_tables(
    rope: RopeSpec, *, max_positions: int, frequency_factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [max_positions, rotary_dim / 2] float32, computed as transformers does.

    They depend on ``max_positions`` only for dynamic scaling past the original context, where they
    are those of the longest request allowed: a request's bits must not depend on how long it has
    become. ``frequency_factors`` [rotary_dim / 2] divide the frequencies (GGUF's llama3 scaling).
    """
    frequencies = _frequencies(rope, max_positions=max_positions)
    if frequency_factors is not None:
        frequencies = frequencies / frequency_factors.to(torch.float32)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return (angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor)


def _frequencies(rope: RopeSpec, *, max_positions: int) -> Tensor:
    if rope.kind == "dynamic":
        original, dim = rope.original_max_position_embeddings, rope.rotary_dim
        length = max(max_positions, original)
        stretch = rope.factor * length / original - (rope.factor - 1)
        return _inverse(rope, theta=rope.theta * stretch ** (dim / (dim - 2)))
    if rope.kind == "linear":
        return _inverse(rope, theta=rope.theta) / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope)
    if rope.kind == "yarn":
        return _yarn(rope)
    return _inverse(rope, theta=rope.theta)


def _exponents(rope: RopeSpec) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2).to(torch.float32) / rope.rotary_dim


def _inverse(rope: RopeSpec, *, theta: float) -> Tensor:
    return 1.0 / (theta ** _exponents(rope))


def _llama3(rope: RopeSpec) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended."""
    plain = _inverse(rope, theta=rope.theta)
    context = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    is_long = wavelength > context / rope.low_freq_factor
    is_short = wavelength < context / rope.high_freq_factor
    blend = (context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * plain / rope.factor + blend * plain
    return torch.where(is_long, plain / rope.factor, torch.where(is_short, plain, between))


def _yarn(rope: RopeSpec) -> Tensor:
    """Dims that turn often within the original context are kept, those that turn seldom are
    stretched by the factor, with a linear ramp between."""
    dim = rope.rotary_dim

    def dim_of(rotations: float) -> float:
        context = rope.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = rope.theta ** _exponents(rope)
    kept, stretched = 1.0 / powers, 1.0 / (rope.factor * powers)
    share = 1 - ramp  # rounded once here, so that the sum below has transformers' bits
    return stretched * (1 - share) + kept * share
