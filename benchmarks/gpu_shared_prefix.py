"""Decode attention over a prefix that all requests hold in common, read once or by each of them.

Where the first overtakes the second is what `PrefixSharing` takes for the point where it pays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_recorder import Recorder, times_to_fill
from octavo_kernels.paged_attention import numerics
from octavo_kernels.paged_attention.gpu import make_plan, paged_attention
from octavo_kernels.paged_attention.shared_prefix import attend_shared_prefix, group_prefixes

NUM_KV_HEADS, HEAD_DIM, BLOCK = 8, 128, 16
OWN = 64  # tokens behind the prefix
CELLS = ((2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (128, 1), (256, 1), (4, 8), (32, 8))
SHORT_CELLS = ((4, 1), (16, 1), (128, 1), (32, 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Requests that share so many leading partitions."""

    requests: int
    partitions: int
    num_heads: int = 32

    @property
    def prefix(self) -> int:
        return self.partitions * int(numerics.PARTITION)

    @property
    def prefix_bytes(self) -> int:
        """K and V of one layer."""
        return 4 * self.prefix * NUM_KV_HEADS * HEAD_DIM

    def calls(self, num_layers: int) -> tuple[list[Callable[[], Tensor]], ...]:
        """Layers with sharing and without it; a plan is made once for all of them."""

        def ints(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cuda")

        own = OWN // BLOCK
        common, rows = self.prefix // BLOCK, self.requests
        order = torch.randperm(common + rows * own, device="cuda").to(torch.int32)
        tables = torch.cat(
            [order[:common].expand(rows, -1), order[common:].view(rows, own)], dim=1
        ).contiguous()
        lengths: dict[str, Any] = {
            "query_start_loc": ints(range(rows + 1)),
            "seq_lens": ints([self.prefix + OWN]).repeat(rows),
        }
        sizes: dict[str, Any] = {
            "num_tokens": rows,
            "max_query_len": 1,
            "max_seq_len": self.prefix + OWN,
            "num_heads": self.num_heads,
            "num_kv_heads": NUM_KV_HEADS,
            "head_dim": HEAD_DIM,
            "cache_dtype": torch.bfloat16,
        }
        apart = make_plan(**lengths, **sizes)
        shared = ints([self.partitions]).repeat(rows)
        together = make_plan(**lengths, **sizes, shared_partitions=shared)
        groups = group_prefixes(
            together,
            group_start_loc=ints([0, rows]),
            members=ints(range(rows)),
            group_partitions=ints([self.partitions]),
            max_partitions=self.partitions,
        )
        q = torch.randn(rows, self.num_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        common_arguments: dict[str, Any] = {"block_tables": tables, "scale": HEAD_DIM**-0.5}

        def attend(k: Tensor, v: Tensor, *, is_shared: bool) -> Tensor:
            if is_shared:
                attend_shared_prefix(q, k, v, plan=together, groups=groups, **common_arguments)
            plan = together if is_shared else apart
            return paged_attention(q, k, v, plan=plan, **lengths, **common_arguments)

        def cache() -> Tensor:
            sizes = (len(order), NUM_KV_HEADS, BLOCK, HEAD_DIM)
            return torch.randn(sizes, dtype=torch.bfloat16, device="cuda")

        caches = [(cache(), cache()) for _ in range(num_layers)]
        return tuple(
            [functools.partial(attend, *pair, is_shared=is_shared) for pair in caches]
            for is_shared in (True, False)
        )


def run_shared_prefix(recorder: Recorder, *, is_short: bool) -> None:
    for num_heads in (32,) if is_short else (32, 16):
        for requests, partitions in SHORT_CELLS if is_short else CELLS:
            cell = Cell(requests=requests, partitions=partitions, num_heads=num_heads)
            case = f"N{num_heads} {requests}x({cell.prefix} + {OWN})"
            with recorder.case("shared_prefix", case):
                layers = times_to_fill(cell.prefix_bytes)
                together, apart = cell.calls(layers)
                recorder.measure(
                    "shared_prefix",
                    case,
                    together,
                    baselines={"apart": apart},
                    seconds=0.1 if is_short else 0.2,
                )
