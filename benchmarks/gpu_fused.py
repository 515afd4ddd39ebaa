"""Norm, rotary embedding with cache write, gate and sampling at the sizes of an 8B model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_recorder import Recorder, times_to_fill
from octavo_kernels.rms_norm import gpu as rms_norm
from octavo_kernels.rotary_kv_write import gpu as rotary
from octavo_kernels.silu_mul import gpu as silu_mul

HIDDEN, FFN, VOCAB = 4096, 14336, 128256
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
BLOCK_SIZE = 16
CASE = "8B, {} tokens"


def _random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.bfloat16, device="cuda")


def run_fused(recorder: Recorder, *, is_short: bool) -> None:
    seconds = 0.1 if is_short else 0.3
    for tokens in (4096,) if is_short else (4096, 64, 1):
        for op, make, flops in (
            ("rms_norm", _norm, 5 * HIDDEN),
            ("rotary_kv_write", _rotary, 3 * (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM),
            ("silu_mul", _gate, 5 * FFN),
        ):
            case = CASE.format(tokens)
            with recorder.case(op, case):
                _, num_bytes = make(tokens)
                # At few tokens what the kernel before has written is still in L2, in a model too.
                sets = times_to_fill(num_bytes) if tokens > 64 else 1
                calls = [make(tokens)[0] for _ in range(sets)]
                recorder.measure(
                    op,
                    case,
                    calls,
                    bytes_moved=num_bytes,
                    flops=tokens * flops,
                    seconds=seconds,
                )
                del calls


def _norm(tokens: int) -> tuple[Callable[[], Any], int]:
    """Reads x and residual, writes the residual and the result."""
    x, residual, weight = _random(tokens, HIDDEN), _random(tokens, HIDDEN), _random(HIDDEN)
    out = torch.empty_like(x)
    call = partial(rms_norm.rms_norm, x, weight, eps=1e-5, residual=residual, out=out)
    return call, 4 * x.nbytes + weight.nbytes


def _gate(tokens: int) -> tuple[Callable[[], Any], int]:
    x = _random(tokens, 2 * FFN)
    out = torch.empty(tokens, FFN, dtype=x.dtype, device="cuda")
    return partial(silu_mul.silu_mul, x, out=out), x.nbytes + out.nbytes


def _rotary(tokens: int) -> tuple[Callable[[], Any], int]:
    """Reads q, k and v and writes them all, k and v into the cache."""
    qkv = _random(tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    num_blocks = -(-tokens // BLOCK_SIZE) + 8
    sizes = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    k_cache, v_cache = (torch.zeros(sizes, dtype=qkv.dtype, device="cuda") for _ in range(2))
    angles = torch.randn(8192, HEAD_DIM // 2, device="cuda")
    blocks = torch.randperm(num_blocks, device="cuda")
    slots = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device="cuda")).flatten()
    call = partial(
        rotary.rotary_kv_write,
        qkv,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        positions=torch.arange(tokens, dtype=torch.int32, device="cuda"),
        cos=angles.cos(),
        sin=angles.sin(),
        slots=slots[:tokens].to(torch.int32),
        k_cache=k_cache,
        v_cache=v_cache,
    )
    return call, 2 * qkv.nbytes + 2 * tokens * HEAD_DIM // 2 * 4
