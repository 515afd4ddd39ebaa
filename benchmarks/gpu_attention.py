"""Decode and prefill attention on a paged cache; prefill beside torch's flash and cuDNN kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_recorder import Recorder, times_to_fill
from benchmarks.gpu_rows import FA3_DECODE_US, FA3_PREFILL_TFLOP_S
from octavo_kernels.paged_attention import gpu, prefill, prefill_hopper
from octavo_kernels.paged_attention.gpu_plan import AttentionPlan, make_plan

NUM_HEADS, NUM_KV_HEADS = 32, 8
DECODE_CELLS = (
    (1, 1024),
    (1, 8192),
    (1, 65536),
    (8, 1024),
    (8, 8192),
    (64, 1024),
    (64, 4096),
    (256, 1024),
    (256, 2048),
)
SHORT_CELLS = ((1, 1024), (1, 8192), (8, 8192), (64, 4096), (256, 2048))
PREFILL_CELLS = ((16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384))
SHORT_PREFILL = ((4, 4096), (1, 16384))


def _name(requests: int, length: int) -> str:
    return f"{requests}x{length // 1024}k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One set of sizes: `requests` requests of `length` tokens, all prefilled or all decoded."""

    requests: int
    length: int
    query_len: int
    head_dim: int
    block_size: int
    cache_dtype: torch.dtype = torch.bfloat16

    @property
    def cache_bytes(self) -> int:
        """K and V of one layer."""
        return (
            2
            * self.requests
            * self.length
            * NUM_KV_HEADS
            * self.head_dim
            * self.cache_dtype.itemsize
        )

    @property
    def case(self) -> str:
        text = f"d{self.head_dim} {_name(self.requests, self.length)} block {self.block_size}"
        return text + (" fp8" if self.cache_dtype == torch.float8_e4m3fn else "")

    def cache(self) -> Tensor:
        """[B, K, BLOCK, H] of random values."""
        num_blocks = self.requests * self.length // self.block_size
        sizes = (num_blocks, NUM_KV_HEADS, self.block_size, self.head_dim)
        return torch.randn(sizes, dtype=torch.bfloat16, device="cuda").to(self.cache_dtype)

    def table(self) -> Tensor:
        """Blocks in no order, as a pool gives them out."""
        blocks = torch.randperm(self.requests * self.length // self.block_size, device="cuda")
        return blocks.to(torch.int32).view(self.requests, -1)

    def plan(self, starts: Tensor, seq_lens: Tensor) -> AttentionPlan:
        return make_plan(
            starts,
            seq_lens,
            num_tokens=self.requests * self.query_len,
            max_query_len=self.query_len,
            max_seq_len=self.length,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=self.head_dim,
            cache_dtype=self.cache_dtype,
        )

    def lengths(self) -> tuple[Tensor, Tensor]:
        """query_start_loc and seq_lens."""
        starts = torch.arange(self.requests + 1, dtype=torch.int32, device="cuda") * self.query_len
        return starts, torch.full((self.requests,), self.length, dtype=torch.int32, device="cuda")

    def arguments(self) -> dict[str, Any]:
        """Everything of a call but the caches: one plan and one query for all layers."""
        starts, seq_lens = self.lengths()
        sizes = (self.requests * self.query_len, NUM_HEADS, self.head_dim)
        return {
            "q": torch.randn(sizes, dtype=torch.bfloat16, device="cuda"),
            "plan": self.plan(starts, seq_lens),
            "block_tables": self.table(),
            "query_start_loc": starts,
            "seq_lens": seq_lens,
            "scale": self.head_dim**-0.5,
        }

    def decode_calls(self, num_layers: int) -> list[functools.partial[Tensor]]:
        """The op on caches of several layers."""
        arguments = {**self.arguments(), "max_query_len": self.query_len}
        if self.cache_dtype == torch.float8_e4m3fn:
            ones = torch.ones(NUM_KV_HEADS, device="cuda")
            arguments |= {"k_scale": ones, "v_scale": ones}
        return [
            functools.partial(
                gpu.paged_attention, k_cache=self.cache(), v_cache=self.cache(), **arguments
            )
            for _ in range(num_layers)
        ]

    def prefill_calls(self) -> dict[str, Callable[[], Any]]:
        """The portable kernel and, on a Hopper, the other one with the same bits."""
        arguments = self.arguments()
        common = {**arguments, "k_cache": self.cache(), "v_cache": self.cache()}
        common["out"] = torch.empty_like(arguments["q"])
        found = {"prefill_attention": functools.partial(prefill.attend_prefill, **common)}
        if prefill_hopper.is_hopper():
            found["prefill_hopper_attention"] = functools.partial(
                prefill_hopper.attend_prefill_hopper, **common
            )
        return found


def run_decode(recorder: Recorder, *, is_short: bool) -> None:
    seconds = 0.1 if is_short else 0.25
    medians: dict[str, float] = {}
    for head_dim in (128, 64):
        for block_size in (16,) if is_short else (16, 64):
            for requests, length in SHORT_CELLS if is_short else DECODE_CELLS:
                _decode(recorder, seconds, medians, requests, length, head_dim, block_size)
    for block_size in (16, 64):
        _decode(recorder, seconds, medians, 64, 4096, 128, block_size, torch.float8_e4m3fn)
    _fp8_error(recorder)
    _plans(recorder, seconds)


def _plans(recorder: Recorder, seconds: float) -> None:
    """What dividing a step's work costs, once for all layers."""
    for requests in (1, 64, 256):
        cell = Cell(requests=requests, length=4096, query_len=1, head_dim=128, block_size=16)
        case = f"{requests} requests of 4k"
        with recorder.case("attention_plan", case):
            call = functools.partial(cell.plan, *cell.lengths())
            recorder.measure("attention_plan", case, [call], seconds=seconds)


def _fp8_error(recorder: Recorder) -> None:
    """What an e4m3 cache costs in accuracy: the same values rounded, beside the bf16 cache's."""
    cell = Cell(requests=8, length=4096, query_len=1, head_dim=128, block_size=16)
    with recorder.case("decode_attention", "d128 8x4k, fp8 beside bf16"):
        call = cell.decode_calls(1)[0]
        caches = {name: call.keywords[name] for name in ("k_cache", "v_cache")}
        scales = {}
        for name, cache in caches.items():
            wide = cache.float()
            scale = wide.abs().amax((0, 2, 3)) / 448
            caches[name] = (wide / scale[:, None, None]).to(torch.float8_e4m3fn)
            scales[name.replace("cache", "scale")] = scale
        plan = dataclasses.replace(cell, cache_dtype=torch.float8_e4m3fn).plan(*cell.lengths())
        rounded = functools.partial(call, **caches, **scales, plan=plan)
        error = recorder.relative_error(rounded, call)
        recorder.measure(
            "decode_attention",
            "d128 8x4k, fp8 beside bf16",
            [rounded],
            baselines={"bf16": [call]},
            seconds=0.05,
            **{"relative error": error},
        )


def _decode(
    recorder: Recorder,
    seconds: float,
    medians: dict[str, float],
    requests: int,
    length: int,
    head_dim: int,
    block_size: int,
    cache_dtype: torch.dtype = torch.bfloat16,
) -> None:
    cell = Cell(
        requests=requests,
        length=length,
        query_len=1,
        head_dim=head_dim,
        block_size=block_size,
        cache_dtype=cache_dtype,
    )
    with recorder.case("decode_attention", cell.case):
        known = {"bf16": medians.get(cell.case.removesuffix(" fp8"))}
        if cell.cache_dtype == torch.bfloat16:
            known = {"FA3": FA3_DECODE_US[f"d{head_dim}"].get(_name(requests, length))}
        row = recorder.measure(
            "decode_attention",
            cell.case,
            cell.decode_calls(times_to_fill(cell.cache_bytes)),
            known_us={name: us for name, us in known.items() if us is not None},
            bytes_moved=cell.cache_bytes,
            flops=4 * requests * NUM_HEADS * head_dim * length,
            seconds=seconds,
        )
        medians[cell.case] = row["us"]


def run_prefill(recorder: Recorder, *, is_short: bool) -> None:
    seconds = 0.2 if is_short else 0.5
    for head_dim in (128, 64):
        for requests, length in SHORT_PREFILL if is_short else PREFILL_CELLS:
            _prefill(recorder, seconds, requests, length, head_dim)


def _prefill(recorder: Recorder, seconds: float, requests: int, length: int, head_dim: int) -> None:
    flops = 4 * NUM_HEADS * head_dim * requests * length * (length + 1) // 2
    fa3 = FA3_PREFILL_TFLOP_S.get(f"d{head_dim}", {}).get(_name(requests, length))
    baselines = _sdpa(requests, length, head_dim)
    for block_size in (16, 64):
        cell = Cell(
            requests=requests,
            length=length,
            query_len=length,
            head_dim=head_dim,
            block_size=block_size,
        )
        for op, call in cell.prefill_calls().items():
            with recorder.case(op, cell.case):
                recorder.measure(
                    op,
                    cell.case,
                    [call],
                    baselines=baselines,
                    known_us={} if fa3 is None else {"FA3": flops / fa3 / 1e6},
                    bytes_moved=cell.cache_bytes + 4 * requests * length * NUM_HEADS * head_dim,
                    flops=flops,
                    seconds=seconds,
                )
            baselines = {}  # once is enough


def _sdpa(requests: int, length: int, head_dim: int) -> dict[str, list[Callable[[], Any]]]:
    def tensor(heads: int) -> Tensor:
        sizes = (requests, length, heads, head_dim)
        return torch.randn(sizes, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    q, k, v = tensor(NUM_HEADS), tensor(NUM_KV_HEADS), tensor(NUM_KV_HEADS)

    def attend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

    return {
        "flash": [functools.partial(attend, SDPBackend.FLASH_ATTENTION)],
        "cuDNN": [functools.partial(attend, SDPBackend.CUDNN_ATTENTION)],
    }
