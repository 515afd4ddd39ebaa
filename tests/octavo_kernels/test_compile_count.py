"""Kernels made are counted: compiled ones, ones of the disk cache, and each once a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import octavo_kernels

SCRIPT = """
import json
import torch
import triton
heard = []
triton.knobs.compilation.listener = lambda **news: heard.append(news["cache_hit"])
from octavo_kernels.compile_count import num_compiled
from octavo_kernels.launch import collecting, compiling_for, launch
from scale_rows_kernel import scale_rows

x = torch.empty(4, 1000, device="meta")
counts = [num_compiled()]
with collecting() as found:
    for rows, warps in ((4, 1), (5, 1), (4, 2)):
        launch(scale_rows, (4,), x, x, rows, 2.0, D=1000, BLOCK=1024, num_warps=warps)
with compiling_for(90):
    for one in (*found, found[0]):
        one.compile()
        counts.append(num_compiled())
print(json.dumps([counts, heard]))
"""


def test_a_kernel_is_counted_when_it_is_made(tmp_path: Path) -> None:
    roots = [str(Path(octavo_kernels.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(roots), "TRITON_CACHE_DIR": str(tmp_path)}
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    # The second process finds both in the disk cache, which another machine may not have.
    assert told == [[[0, 1, 1, 2, 2], [False, False]], [[0, 1, 1, 2, 2], [True, True]]]
