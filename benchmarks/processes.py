"""What a tree of processes is and costs, from /proc. Knows no server and no benchmark."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def stat_fields(text: str) -> list[str]:
    """The fields of a ``stat`` file from the state on: the name before may hold spaces and ")"."""
    return text.rpartition(")")[2].split()


def tree(pid: int) -> list[int]:
    """The process and its descendants, parents first; those that ended are left out."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int(stat_fields((folder / "stat").read_text())[1])
            except OSError:  # ended meanwhile
                continue
            children[parent].append(int(folder.name))
    found = [pid]
    for each in found:
        found += children[each]
    return found


def pss_bytes(pid: int) -> int:
    """Memory of a tree of processes, every page divided by the number of processes that map it."""
    total = 0
    for each in tree(pid):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def cpu_seconds(pid: int) -> dict[str, float]:
    """What each thread of a tree of processes has used so far, by ``process/thread name``."""
    used: dict[str, float] = {}
    for each in tree(pid):
        for task in Path(f"/proc/{each}/task").glob("*/stat"):
            try:
                text = task.read_text()
            except OSError:
                continue
            name = text.partition("(")[2].rpartition(")")[0]
            fields = stat_fields(text)
            used[f"{each}/{task.parent.name} {name}"] = (int(fields[11]) + int(fields[12])) / _TICKS
    return used


class OtherCores:
    """How busy processes other than this one have kept the machine since this was made."""

    def __init__(self) -> None:
        self._start = self._times()

    @staticmethod
    def _times() -> tuple[float, float, float]:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:8]
        user, nice, system, _, _, irq, softirq = map(int, first)
        busy = (user + nice + system + irq + softirq) / _TICKS
        return time.monotonic(), busy, time.process_time()

    def busy(self) -> float:
        """In cores, on average."""
        wall, busy, own = (now - then for now, then in zip(self._times(), self._start, strict=True))
        return round(max(0.0, busy - own) / max(wall, 1e-3), 2)


def send_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Signals processes; one that ended is passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
