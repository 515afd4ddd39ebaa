"""What tells two models apart, however their matrices are quantised. Knows weights, no file.

A draft head fits the one model whose hidden states it was trained on. Norm weights are the same
bits in every file of a model, so their hash must be equal; of token vectors, which differ a little
between files, only signs of sums are kept, and most must be equal.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from octavo.models.base import Model

_NUM_TOKENS, _NUM_SUMS = 64, 4  # of a fingerprint's 256 signs
_MAX_DIFFERENT = 48  # signs; those of two unrelated models differ in 128, give or take 8


def target_fingerprint(model: Model) -> str:
    """Of a model on any device: 64 hex digits that must be equal, a colon, 64 that may differ."""
    spec = model.spec
    sizes = (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads)
    digest = hashlib.sha256(repr(sizes).encode())
    for weight in model.norms():
        digest.update(weight.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return f"{digest.hexdigest()}:{_signs(model):064x}"


def is_same_target(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints are of one model."""
    exact, _, signs = fingerprint.partition(":")
    other_exact, _, other_signs = other.partition(":")
    if exact != other_exact or not signs or not other_signs:
        return False
    return (int(signs, 16) ^ int(other_signs, 16)).bit_count() <= _MAX_DIFFERENT


def _signs(model: Model) -> int:
    vocab_size, size = model.spec.vocab_size, model.spec.hidden_size
    ids = torch.linspace(0, vocab_size - 1, _NUM_TOKENS, dtype=torch.float64).to(torch.int32)
    rows: Tensor = model.embed(ids.to(model.platform.device)).to("cpu", torch.float64)
    columns = torch.arange(size)
    sums = [rows[:, columns % _NUM_SUMS == part].sum(dim=1) for part in range(_NUM_SUMS)]
    bits = (torch.stack(sums, dim=1) > 0).flatten().tolist()
    return sum(bit << place for place, bit in enumerate(bits))
