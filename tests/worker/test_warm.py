"""No compiler on live traffic: after start-up every kernel that serving calls is machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json
import sys
from octavo_kernels import parallel
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.types import BlockCopy, NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.worker import build_worker

executor, info = build_worker(EngineConfig(
    model=ModelConfig(model=sys.argv[1], load_format="dummy", num_threads=2,
                      **json.loads(sys.argv[2])),
    cache=CacheConfig(num_gpu_blocks_override=600),
    scheduler=SchedulerConfig(async_scheduling=False),
))

def refuse(body, *_):
    raise AssertionError(f"{body.__module__}.{body.__name__} was compiled after start-up")

parallel._compile = refuse
everything = SamplingParams(
    temperature=0.7, top_k=30, top_p=0.9, min_p=0.01, seed=3, repetition_penalty=1.2,
    presence_penalty=0.1, frequency_penalty=0.1, logit_bias=((4, 1.0),), min_tokens=3,
    eos_token_ids=(1,), bad_words_token_ids=((5,), (6, 7)), logprobs=5, prompt_logprobs=2,
)
lengths = [*range(1, 34), 64, 100, 128, 200, 250]
for step, length in enumerate(lengths):
    params = (everything, SamplingParams(temperature=0.0), SamplingParams())[step % 3]
    requests = [
        NewRequest(
            request_id=f"r{step}-{i}", token_ids=(7,) * length, num_prompt_tokens=length,
            num_computed_tokens=0, block_ids=tuple(range(16 * i, 16 * i + 16)), params=params,
        )
        for i in range(1 + step % 7)
    ]
    for new, count in ((tuple(requests), length), ((), 1)):
        executor.submit(SchedulerOutput(
            step=step, new_requests=new, block_copies=(BlockCopy(src=500, dst=501),),
            num_scheduled_tokens={r.request_id: count for r in requests},
            finished_request_ids=tuple(f"r{step - 1}-{i}" for i in range(7)),
        ))
        output = executor.collect()
        assert not output.errors, output.errors
        assert len(output.sampled_token_ids) == len(requests)
print("nothing was compiled")
"""


@pytest.mark.parametrize(
    "options", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "int4"}]
)
def test_nothing_is_compiled_after_start_up(model_folder: Path, options: dict[str, str]) -> None:
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("server", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model_folder), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "nothing was compiled\n", done.stderr
