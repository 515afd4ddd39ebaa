"""How many blocks, tokens and threads fit this machine. Knows bytes and limits; allocates nothing.

Limits of a container (cgroup version 1 or 2) count like the machine's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from octavo.config import CacheConfig

GIB = 1 << 30
# Of the memory that is free once the model is loaded; the rest is for activations, the HTTP
# process, the page cache and the neighbours.
_CPU_SHARE = 0.5
# The cache holds one request of full length and these, so that the default stays small: what is
# not needed by running requests fills with prefixes, and all of it ends up in memory. More is the
# user's to ask for.
_USUAL_REQUESTS, _USUAL_TOKENS = 64, 512
# More is taken only when one request of full length needs it.
_CPU_MOST_BYTES = 4 * GIB
# Kernels reach their full rate at about 128 tokens, so larger steps compute no faster; each one
# holds up every running request for as long as it lasts.
_CPU_STEP_TOKENS = 256
_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """The K/V cache that was decided on."""

    num_blocks: int
    max_model_len: int
    num_host_slots: int = 0  # blocks of the host tier
    notes: tuple[str, ...] = ()  # what the user should know


def plan_cache(
    cache: CacheConfig,
    *,
    block_bytes: int,
    wanted_len: int | None,
    model_len: int,
    max_num_seqs: int,
    available_bytes: int,
) -> CachePlan:
    """Number of blocks and context length.

    block_bytes: one block over all layers. wanted_len: the context the user asked for, if any;
    then a cache too small for one such request raises ValueError, otherwise the context of the
    model, ``model_len``, is cut to what fits. available_bytes: free memory, model loaded.
    """
    length = wanted_len or model_len
    per_request = -(-length // cache.block_size)
    if cache.num_gpu_blocks_override is not None:
        num_blocks = cache.num_gpu_blocks_override
        reason = f"num_gpu_blocks_override is {num_blocks}"
    elif cache.kv_cache_memory_bytes is not None:
        num_blocks = cache.kv_cache_memory_bytes // block_bytes
        reason = f"kv_cache_memory_bytes is {_mib(cache.kv_cache_memory_bytes)}"
    else:
        share = min(_CPU_SHARE, cache.gpu_memory_utilization)
        budget = int(available_bytes * share)
        usual = min(_USUAL_REQUESTS, max_num_seqs) * -(-_USUAL_TOKENS // cache.block_size)
        wish = min(per_request + usual, max(per_request, _CPU_MOST_BYTES // block_bytes))
        num_blocks = min(budget // block_bytes, wish)
        num_blocks = min(num_blocks, per_request * max_num_seqs)
        reason = f"{_mib(available_bytes)} of memory are free, of which the cache may take {share}"
    if num_blocks < 1:
        raise ValueError(f"no K/V block fits: one takes {_mib(block_bytes)}, {reason}")
    if num_blocks * block_bytes > available_bytes:
        raise ValueError(
            f"{num_blocks} K/V blocks take {_mib(num_blocks * block_bytes)}, more than the "
            f"{_mib(available_bytes)} of free memory ({reason})"
        )
    if per_request <= num_blocks:
        return CachePlan(num_blocks=num_blocks, max_model_len=length)
    room = num_blocks * cache.block_size
    if wanted_len is not None:
        raise ValueError(
            f"max_model_len is {length} tokens, which take {per_request} K/V blocks "
            f"({_mib(per_request * block_bytes)}), and only {num_blocks} ({room} tokens) fit: "
            f"{reason}"
        )
    note = f"context cut from {length} to {room} tokens to fit the K/V cache ({reason})"
    return CachePlan(num_blocks=num_blocks, max_model_len=room, notes=(note,))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes < GIB else f"{num_bytes / GIB:.2f} GiB"


def max_num_batched_tokens(wanted: int | None, *, max_num_seqs: int) -> int:
    """Tokens of one step: as asked for, or enough to use the kernels well and no more."""
    return wanted if wanted is not None else max(_CPU_STEP_TOKENS, max_num_seqs)


def usable_cores(*, cgroups: Path = _CGROUPS, cpus: Path = _CPUS) -> int:
    """Physical cores that this process may use: of its affinity, or its container's quota if fewer.

    A core's second hardware thread computes nothing that its first could not: kernels fill a
    core's units alone.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    else:
        # CPUs of one core list the same siblings; a CPU of which nothing is known is a core.
        cores = len({_text(cpus / f"cpu{i}/topology/thread_siblings_list") or i for i in allowed})
    for folder in _own_cgroups(cgroups):
        quota = _cpu_quota(folder)
        if quota is not None:
            cores = min(cores, max(1, int(quota)))
    return cores


def available_memory(*, meminfo: Path = Path("/proc/meminfo"), cgroups: Path = _CGROUPS) -> int:
    """Bytes that can be used without swapping: the machine's, or its container's if fewer."""
    numbers = _key_values(meminfo, separator=":")
    if "MemAvailable" in numbers:
        free = numbers["MemAvailable"] * 1024
    else:  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for folder in _own_cgroups(cgroups):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None:
                stat = _key_values(folder / "memory.stat", separator=" ")
                # Clean file pages count as used and are given back on demand.
                reclaimable = stat.get("inactive_file", stat.get("total_inactive_file", 0))
                free = min(free, max(0, limit - used + reclaimable))
    return free


def _own_cgroups(root: Path) -> list[Path]:
    """Folders that may hold this process's limits: a container sees its own as the root."""
    return [root, root / "memory", root / "cpu", root / "cpu,cpuacct"]


def _cpu_quota(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
        return int(words[0]) / int(words[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and quota > 0 and period else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such limit on this system
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _key_values(path: Path, *, separator: str) -> dict[str, int]:
    found = {}
    for line in _text(path).splitlines():
        key, _, rest = line.partition(separator)
        words = rest.split()
        if words and words[0].isdigit():
            found[key] = int(words[0])
    return found
