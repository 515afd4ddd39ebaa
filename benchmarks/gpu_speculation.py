"""What drafts bring on a GPU: tokens a second with and without, of models whose weights are random.

Such models never repeat themselves, so what was accepted on texts is replayed: a kernel in front of
the engine's makes that share of the drafts agree with what was drawn. All else is what serves: the
look-up, steps of so many tokens, graphs, the planner and its clock.

    python -m benchmarks.gpu_speculation --shape 8B
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.engine_figures import figure
from benchmarks.gpu_engine import compile_kernels, keep_rows
from benchmarks.model_shapes import CONFIGS, write_config
from benchmarks.offline_engine import OfflineEngine, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.gpu_recorder import Recorder
    from octavo.worker.gpu.draft_planner import DraftPlanner

Emit = Callable[[dict[str, Any]], None]
# Accepted of the first draft, and of each behind accepted ones, along SmolLM2-135M's greedy answers
# to 20 prompts each of prompts_sum and prompts_mt_bench (`spec_acceptance`: "ngram on a GPU").
CHANCES = {
    "summaries": (0.285, 0.605, 0.687, 0.775, 0.815, 0.842, 0.835),
    "chat": (0.12, 0.562, 0.726, 0.821, 0.899, 0.934, 0.839),
}
_MAX_DRAFTS = 7
_FIXED = (1, 3, 7)
_OPTIONS = {"max_model_len": 4096, "max_num_seqs": 256}
_TIMES = 3  # that a workload is run; the figure is the median
_SPECULATION = {"method": "auto", "num_speculative_tokens": _MAX_DRAFTS}


def run_speculation(recorder: Recorder, *, is_short: bool) -> None:
    for shape in ("0.6B",) if is_short else ("8B", "0.6B"):
        compile_kernels(recorder, shape)
        keep_rows(recorder, "gpu_speculation", "--shape", shape)


def workloads(vocab_size: int, *, shrink: int = 1) -> list[Workload]:
    """One request, and 128 of them, with prompts of 512 tokens."""
    found = []
    for batch, length in ((1, 512), (128, 192)):
        count, size = max(1, batch // shrink), max(8, 512 // shrink)
        prompts = [
            tuple(2 + (number * 7 + i * 31) % (vocab_size - 2) for i in range(size))
            for number in range(count)
        ]
        lens = [max(4, length // shrink)] * count
        found.append(Workload(name=f"batch {count}", prompts=prompts, output_lens=lens))
    return found


@contextlib.contextmanager
def replaying(chances: Tensor) -> Iterator[None]:
    """Inside, drafts are accepted with these chances, which lie on the device and may change."""
    from benchmarks.gpu_replay_kernel import agree
    from octavo.worker.gpu import sampler
    from octavo_kernels.launch import launch

    accept = sampler.accept

    def accept_replayed(sample_rows: Tensor, tokens: Tensor, **given: Any) -> None:
        table = given["token_table"]
        launch(
            agree,
            (-(-len(sample_rows) // 128),),
            sample_rows,
            tokens,
            table,
            given["num_tokens"],
            chances,
            len(sample_rows),
            table.shape[0],
            table.stride(0),
            len(chances),
            BLOCK=128,
            num_warps=4,
        )
        accept(sample_rows, tokens, **given)

    with patch.object(sampler, "accept", accept_replayed):
        yield


class NoDrafts:
    """A planner that wants none, in an engine that could have them."""

    num_wanted = 0

    def choose(self, step: Any) -> dict[str, int]:
        return {}

    def learn(self, outcome: Any) -> None:
        return

    def add_stats(self, stats: Any) -> Any:
        return stats


def measure_speculation(shape: str, folder: Path, emit: Emit, *, shrink: int = 1) -> None:
    """Rows of an engine without speculation, then of one with it and several planners."""
    import torch

    options = {**_OPTIONS, "max_model_len": 256, "max_num_seqs": 4} if shrink > 1 else _OPTIONS
    engine = OfflineEngine(folder, **options)
    engine.capture_all()
    todo = workloads(engine.info.vocab_size, shrink=shrink)
    off = {}
    for workload in todo:
        off[workload.name] = rate(engine, workload)
        emit(figure("speculation", f"{shape}, {workload.name}, off", off[workload.name], "tok/s"))
    engine.close()
    device = engine.core._executor._runner._runtime.device  # type: ignore[attr-defined]
    del engine
    gc.collect()
    chances = torch.zeros(_MAX_DRAFTS, device=device)
    with replaying(chances):
        engine = OfflineEngine(folder, **options, speculative_config=json.dumps(_SPECULATION))
        engine.capture_all()
        for kind, values in CHANCES.items():
            chances.copy_(torch.tensor(values))
            for workload in todo:
                for name, planner in planners(engine).items():
                    use(engine, planner)
                    before = dict(engine.counts)
                    found = rate(engine, workload)
                    new = {key: n - before.get(key, 0) for key, n in engine.counts.items()}
                    emit(
                        figure(
                            "speculation",
                            f"{shape}, {workload.name}, {kind}, {name}",
                            found / off[workload.name],
                            "x off",
                            tok_s=round(found, 1),
                            ms_step=round(step_ms(workload, found, new), 3),
                            counts={key: number for key, number in new.items() if number},
                        )
                    )
        engine.close()


def step_ms(workload: Workload, rate: float, counts: dict[str, int]) -> float:
    """Of the steps that these tokens took, prompts included."""
    steps = counts.get("graph_steps", 0) + counts.get("eager_steps", 0)
    return (1 + _TIMES) * workload.num_tokens / max(steps, 1) / rate * 1e3


def planners(engine: OfflineEngine) -> dict[str, DraftPlanner]:
    from octavo.worker.gpu.draft_planner import AutoPlanner, FixedPlanner

    runner: Any = engine.core._executor._runner  # type: ignore[attr-defined]
    most, sizes = runner._buffers.sizes.max_samples, runner._graphs._sizes.drafting
    found: dict[str, DraftPlanner] = {"none": NoDrafts()}
    found |= {f"{number} drafts": FixedPlanner(number, max_samples=most) for number in _FIXED}
    return found | {"auto": AutoPlanner(_MAX_DRAFTS, max_samples=most, step_sizes=sizes)}


def use(engine: OfflineEngine, planner: DraftPlanner) -> None:
    runner: Any = engine.core._executor._runner  # type: ignore[attr-defined]
    runner._speculation = replace(runner._speculation, planner=planner)


def rate(engine: OfflineEngine, workload: Workload) -> float:
    """Tokens a second; the first run asks for graphs, which are captured before the others."""
    engine.run(workload)
    engine.capture_all()
    seconds = statistics.median(engine.run(workload) for _ in range(_TIMES))
    return workload.num_tokens / seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=CONFIGS, required=True)
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(arguments.shape, Path(name))
        shrink = 64 if arguments.shape == "tiny" else 1
        measure_speculation(
            arguments.shape, folder, lambda row: print(json.dumps(row), flush=True), shrink=shrink
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
