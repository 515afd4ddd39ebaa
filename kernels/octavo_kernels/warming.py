"""Runs every GPU op as a server of a model's shape would, to compile what it will need.

This file alone knows how each op is called: `RUNS` has an entry for every `<op>/gpu.py`. On tensors
of the device "meta" nothing is computed and the launches are listed; the few batches of `batches`
stand for all others, since nothing that is compiled depends on lengths beyond their buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.compiling import compile_all, distinct
from octavo_kernels.launch import Launch, collecting
from octavo_kernels.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's lengths: new tokens and tokens in the cache afterwards, of each request."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)


def decode(num_requests: int, seq_len: int) -> Batch:
    """One token each of equally long requests."""
    return Batch((1,) * num_requests, (seq_len,) * num_requests)


def prefill(*lengths: int) -> Batch:
    """Whole prompts."""
    return Batch(lengths, lengths)


def batches() -> tuple[Batch, ...]:
    """One for every bucket that decides what is compiled: rows of a matmul, short and long keys."""
    found = [decode(rows, 100) for rows in (1, 8, 16, 32, 64, 128, 256, 512)]
    found += [decode(rows, 40_000) for rows in (1, 256)]
    found += [prefill(length) for length in (1, 60, 600, 5_000)]
    found += [Batch((4, 4), (300, 9_000)), Batch((500, 1), (2_500, 70))]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Scene:
    """A model's tensors for one batch on one device."""

    shape: ModelShape
    batch: Batch
    device: str

    def activations(self, *sizes: int) -> Tensor:
        return self._random(sizes, self.shape.activation_dtype)

    def floats(self, *sizes: int) -> Tensor:
        return self._random(sizes, torch.float32)

    def _random(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float32, device=self.device).to(dtype)

    def ints(self, values: Iterable[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device)

    @property
    def blocks_a_request(self) -> int:
        return max(1, -(-max(self.batch.seq_lens) // self.shape.block_size))

    def caches(self) -> tuple[Tensor, Tensor]:
        """K and V, each [B, K, BLOCK, H], with room for two requests; blocks are shared."""
        shape = self.shape
        sizes = (2 * self.blocks_a_request, shape.num_kv_heads, shape.block_size, shape.head_dim)
        k, v = (torch.zeros(sizes, dtype=shape.cache_dtype, device=self.device) for _ in range(2))
        return k, v

    def cache_scales(self) -> dict[str, Tensor]:
        """k_scale and v_scale [K] where the cache is FP8."""
        if self.shape.cache_dtype != torch.float8_e4m3fn:
            return {}
        heads = self.shape.num_kv_heads
        return {f"{name}_scale": torch.ones(heads, device=self.device) for name in ("k", "v")}

    def positions(self) -> Tensor:
        batch = self.batch
        lengths = zip(batch.query_lens, batch.seq_lens, strict=True)
        return self.ints(p for new, all_ in lengths for p in range(all_ - new, all_))


def _block_copy(scene: Scene) -> None:
    from octavo_kernels.block_copy import gpu

    gpu.block_copy([*scene.caches()], scene.ints([0]), scene.ints([1]))


def _embedding(scene: Scene) -> None:
    from octavo_kernels.embedding import gpu

    shape = scene.shape
    weight = scene.activations(shape.vocab, shape.hidden)
    gpu.embedding(scene.ints([0] * scene.batch.num_tokens), weight)
    gpu.embedding(scene.ints([0] * scene.batch.num_tokens), weight, scale=2.0)


def _layer_norm(scene: Scene) -> None:
    from octavo_kernels.layer_norm import gpu

    x = scene.activations(scene.batch.num_tokens, scene.shape.hidden)
    weight = scene.activations(scene.shape.hidden)
    gpu.layer_norm(x, weight, weight, eps=1e-5)
    gpu.layer_norm(x, weight, weight, eps=1e-5, residual=x.clone())


def _matmul(scene: Scene) -> None:
    from octavo_kernels.matmul import gpu

    shape, tokens = scene.shape, scene.batch.num_tokens
    heads = shape.num_heads * shape.head_dim
    x = scene.activations(tokens, shape.hidden)
    residual = scene.activations(tokens, shape.hidden)
    qkv = scene.activations(shape.qkv_width, shape.hidden)
    bias = scene.activations(shape.qkv_width) if shape.has_qkv_bias else None
    attended = scene.activations(tokens, heads)
    gated = scene.activations(tokens, shape.ffn)
    gate_up = scene.activations(2 * shape.ffn, shape.hidden)
    back = scene.activations(shape.hidden, heads)
    down = scene.activations(shape.hidden, shape.ffn)
    head = scene.activations(shape.vocab, shape.hidden)
    gpu.linear(x, qkv, bias=bias)
    for y, weight in ((attended, back), (gated, down)):
        gpu.linear(y, weight)
        gpu.linear(y, weight, residual=residual)
    gpu.linear(x, gate_up)
    product = gpu.linear(x, gate_up, activation=shape.gate)  # type: ignore[arg-type]
    gpu.linear(x[: scene.batch.num_requests], head, out_dtype=torch.float32)
    # What follows cuBLAS, which takes over where it is faster and proven.
    gpu.finish(residual, residual=x, out=residual)
    gpu.finish(scene.activations(tokens, 2 * shape.ffn), activation=shape.gate, out=product)
    if bias is not None:
        wide = scene.activations(tokens, shape.qkv_width)
        gpu.finish(wide, bias=bias, out=wide)


def _rms_norm(scene: Scene) -> None:
    from octavo_kernels.rms_norm import gpu

    x = scene.activations(scene.batch.num_tokens, scene.shape.hidden)
    weight = scene.activations(scene.shape.hidden)
    offset = float(scene.shape.norm_offset)
    gpu.rms_norm(x, weight, eps=1e-5, weight_offset=offset)
    gpu.rms_norm(x, weight, eps=1e-5, weight_offset=offset, residual=x.clone())


def _silu_mul(scene: Scene) -> None:
    from octavo_kernels.silu_mul import gpu

    x = scene.activations(scene.batch.num_tokens, 2 * scene.shape.ffn)
    getattr(gpu, scene.shape.gate)(x)


RUNS: Mapping[str, Callable[[Scene], None]] = MappingProxyType(
    {
        "block_copy": _block_copy,
        "embedding": _embedding,
        "layer_norm": _layer_norm,
        "matmul": _matmul,
        "rms_norm": _rms_norm,
        "silu_mul": _silu_mul,
    }
)


def launches(shape: ModelShape) -> list[Launch]:
    """Every launch that differs in machine code; needs no GPU."""
    with collecting() as found:
        for batch in batches():
            for run in RUNS.values():
                run(Scene(shape, batch, "meta"))
    return distinct(found)


def warm(shape: ModelShape, *, processes: int | None = None) -> list[Launch]:
    """Compiles what `launches` lists for this machine's GPU and loads it; returns the list.

    Raises RuntimeError where there is no GPU, and for kernels that do not compile.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: launches(shape) lists what would be compiled")
    found = launches(shape)
    major, minor = torch.cuda.get_device_capability()
    failed = compile_all(found, capability=10 * major + minor, processes=processes)
    if failed:
        what = "; ".join(f"{found[index].name}: {why}" for index, why in failed.items())
        raise RuntimeError(f"{len(failed)} of {len(found)} kernels do not compile: {what}")
    for launch in found:
        _load(launch.compile())
    return found


def _load(compiled: Any) -> None:
    """Puts machine code on the GPU now, not at the first launch."""
    if hasattr(compiled, "_init_handles"):
        compiled._init_handles()
