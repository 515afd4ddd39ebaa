"""Blocks, context, cores and memory from made-up machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from octavo.config import CacheConfig
from octavo.worker.sizing import (
    GIB,
    CachePlan,
    available_memory,
    max_num_batched_tokens,
    plan_cache,
    usable_cores,
)

MIB = 1 << 20


def plan(cache: CacheConfig | None = None, **changed: Any) -> CachePlan:
    given: dict[str, Any] = {
        "block_bytes": MIB,
        "wanted_len": None,
        "model_len": 4096,
        "max_num_seqs": 64,
        "available_bytes": 16 * GIB,
    }
    return plan_cache(cache or CacheConfig(), **given | changed)


def test_default_holds_one_long_request_and_usual_ones_within_its_share_and_the_cap() -> None:
    assert plan().num_blocks == 256 + 64 * 512 // 16
    assert plan(max_num_seqs=8).num_blocks == 256 + 8 * 512 // 16
    assert plan(block_bytes=2 * MIB).num_blocks == 2048  # 4 GiB
    assert plan(available_bytes=4 * GIB).num_blocks == 2048  # half
    assert plan(max_num_seqs=2, model_len=256).num_blocks == 32  # two requests of 16 blocks
    assert plan(CacheConfig(gpu_memory_utilization=0.125)).num_blocks == 2048
    long = plan(model_len=6 * 1024 * 16)  # one request takes 6 GiB
    assert (long.num_blocks, long.max_model_len, long.notes) == (6144, 6 * 1024 * 16, ())


def test_the_context_is_cut_to_fit_and_said() -> None:
    cut = plan(model_len=1 << 20)
    assert cut.num_blocks == 8192 and cut.max_model_len == 8192 * 16
    assert "cut from 1048576 to 131072 tokens" in cut.notes[0]
    few = plan(CacheConfig(num_gpu_blocks_override=10))
    assert few.max_model_len == 160 and few.num_blocks == 10


def test_a_context_that_was_asked_for_is_never_cut() -> None:
    kept = plan(wanted_len=160, cache=CacheConfig(num_gpu_blocks_override=10))
    assert kept.max_model_len == 160
    with pytest.raises(ValueError, match="161 tokens, which take 11 .* only 10 .160 tokens"):
        plan(wanted_len=161, cache=CacheConfig(num_gpu_blocks_override=10))
    with pytest.raises(ValueError, match=r"kv_cache_memory_bytes is 4.0 MiB"):
        plan(wanted_len=4096, cache=CacheConfig(kv_cache_memory_bytes=4 * MIB))


def test_exact_sizes() -> None:
    exact = plan(CacheConfig(kv_cache_memory_bytes=100 * MIB + 7, block_size=64))
    assert exact.num_blocks == 100
    with pytest.raises(ValueError, match="no K/V block fits: one takes 1.0 MiB"):
        plan(CacheConfig(kv_cache_memory_bytes=1))
    with pytest.raises(ValueError, match=r"20000 K/V blocks take 19.53 GiB, more than .* 16.00"):
        plan(CacheConfig(num_gpu_blocks_override=20000))


def test_step_tokens() -> None:
    assert max_num_batched_tokens(77, max_num_seqs=256) == 77
    assert max_num_batched_tokens(None, max_num_seqs=8) == 256
    assert max_num_batched_tokens(None, max_num_seqs=1000) == 1000


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")
    return folder


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    nowhere = tmp_path / "none"
    assert usable_cores(cgroups=nowhere, cpus=nowhere) == len(allowed)
    for cpu in allowed:
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text("0-255\n")
    assert usable_cores(cgroups=nowhere, cpus=tmp_path) == 1
    (tmp_path / f"cpu{allowed[0]}" / "topology" / "thread_siblings_list").write_text("9,73\n")
    assert usable_cores(cgroups=nowhere, cpus=tmp_path) == min(2, len(allowed))


def test_cores_of_a_container(tmp_path: Path) -> None:
    cores = usable_cores(cgroups=tmp_path)
    assert usable_cores(cgroups=tmp_path) == cores
    assert usable_cores(cgroups=write(tmp_path / "v2", cpu__max="max 100000")) == cores
    assert usable_cores(cgroups=write(tmp_path / "one", cpu__max="150000 100000")) == 1
    assert usable_cores(cgroups=write(tmp_path / "bit", cpu__max="20000 100000")) == 1
    old = tmp_path / "v1"
    old.mkdir()
    write(old / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert usable_cores(cgroups=old) == cores
    write(old / "cpu", cpu__cfs_quota_us="100000")
    assert usable_cores(cgroups=old) == 1


def test_memory_of_a_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 32000000 kB\nMemAvailable:   10485760 kB\n")

    def available(folder: Path) -> int:
        return available_memory(meminfo=meminfo, cgroups=folder)

    assert available(tmp_path / "none") == 10 * GIB
    unlimited = write(tmp_path / "max", memory__max="max", memory__current=str(GIB))
    assert available(unlimited) == 10 * GIB
    limited = write(
        tmp_path / "two",
        memory__max=str(4 * GIB),
        memory__current=str(3 * GIB),
        memory__stat=f"anon 5\ninactive_file {GIB // 2}",
    )
    assert available(limited) == GIB + GIB // 2
    (tmp_path / "old").mkdir()
    write(
        tmp_path / "old" / "memory",
        memory__limit_in_bytes=str(2 * GIB),
        memory__usage_in_bytes=str(3 * GIB),
    )
    assert available(tmp_path / "old") == 0
    assert available_memory() > 0
