"""How long a server of an 8B shape waits for its GPU kernels: compiled anew, and from the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from benchmarks.gpu_recorder import Recorder

SCRIPT = """
import json, time
import torch
import octavo_kernels
from octavo_kernels import ModelShape
torch.zeros(1, device="cuda")
shape = ModelShape(
    hidden=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn=14336, vocab=128256
)
start = time.perf_counter()
found = octavo_kernels.warm(shape)
print(json.dumps([time.perf_counter() - start, len(found)]))
"""


def run_warm(recorder: Recorder, *, is_short: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "cached"):
            case = f"8B, {state}"
            with recorder.case("warm", case):
                done = subprocess.run(
                    [sys.executable, "-c", SCRIPT],
                    env={**os.environ, "TRITON_CACHE_DIR": folder},
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    raise RuntimeError(done.stderr[-300:])
                seconds, kernels = json.loads(done.stdout.splitlines()[-1])
                times = dict.fromkeys(("median_s", "p10_s", "p90_s"), seconds)
                recorder.keep_times("warm", case, times, kernels=kernels)
