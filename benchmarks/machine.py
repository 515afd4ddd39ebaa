"""The passport of a result row: machine, versions, commit. Knows no benchmark."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numba", "triton", "numpy", "transformers")


def cpu_model() -> str:
    """Model name as the kernel reports it, with the SIMD level that matters to our kernels."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in info.splitlines())
    }
    flags = set(lines.get("flags", "").split())
    level = next(
        (f for f in ("amx_int8", "avx512_vnni", "avx512f", "avx2") if f in flags), "generic"
    )
    return f"{lines.get('model name', platform.machine())} ({level})"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def commit() -> str:
    """Commit of this checkout, with ``+`` when the tree has changes; ``unknown`` outside git.

    A tree that travels without its history is told by OCTAVO_COMMIT.
    """
    if "OCTAVO_COMMIT" in os.environ:
        return os.environ["OCTAVO_COMMIT"]
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        is_changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if is_changed else "")


def passport() -> dict[str, Any]:
    """Fields every result row carries."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES if version(package)},
    }


def results_folder(row: Mapping[str, Any]) -> Path:
    """Where rows of the machine that a row's passport names are kept."""
    folder = re.sub(r"\W+", "_", str(row.get("gpu", row["cpu"]))).strip("_")
    return Path(__file__).resolve().parent / "results" / folder


def keep_row(name: str, row: Mapping[str, Any]) -> None:
    """Appends a row, which holds its `passport`, to ``results/<GPU or else CPU>/<name>.jsonl``."""
    path = results_folder(row) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(dict(row)) + "\n")
