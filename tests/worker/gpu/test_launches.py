"""No step launches a kernel that `warming.launches` does not list: nothing compiles after ready.

Steps of full size run on the device "meta", as on a Hopper GPU: every launch is made, none is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.checkpoint import ModelSpec
from octavo.checkpoint.hf_config import parse_config
from octavo.config import EngineConfig, ModelConfig, SchedulerConfig
from octavo.models.registry import MODELS
from octavo.platforms.gpu import GPUPlatform, model_shape
from octavo.types import BlockCopy, NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.gpu import startup
from octavo.worker.gpu.graphs import GraphSizes, StepGraphs
from octavo.worker.gpu.landing import Landings
from octavo.worker.gpu.runner import GpuRunner
from octavo.worker.gpu.runtime import HostRuntime
from octavo_kernels import device, warming
from octavo_kernels.launch import Launch, collecting

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
EVERYTHING = SamplingParams(
    top_p=0.9,
    top_k=40,
    min_p=0.01,
    repetition_penalty=1.1,
    logit_bias=((0, 1.0),),
    allowed_token_ids=(1, 2, 3),
    bad_words_token_ids=((5, 6),),
    min_tokens=2,
    eos_token_ids=(7,),
    logprobs=5,
    prompt_logprobs=3,
)


PLAIN = SamplingParams()
SMOL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class _Nowhere(HostRuntime):
    device = torch.device("meta")


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fetch(self: Landings, words: Tensor) -> Tensor:
        return torch.zeros(words.shape, dtype=words.dtype)

    monkeypatch.setattr(Landings, "fetch", fetch)  # there is nothing to bring
    with device.pretending((9, 0)):
        yield


def _engine(spec: ModelSpec, **scheduler: Any) -> tuple[GpuRunner, StepGraphs, startup.Plan]:
    config = EngineConfig(
        model=ModelConfig(dtype="bfloat16"),
        scheduler=SchedulerConfig(cudagraph_capture_sizes=(1, 2, 8, 64, 256, 512), **scheduler),
    )
    memory = 80 << 30
    gpu = startup.GpuDevice(runtime=_Nowhere(), name="none", total_bytes=memory, free_bytes=memory)
    plan = startup.make_plan(config, spec=spec, device=gpu)
    with gpu.runtime.device:  # for the rotary tables, which are computed on the CPU
        model = MODELS[spec.architecture](
            spec,
            platform=GPUPlatform(gpu.runtime.device),
            dtype=plan.memory.sizes.dtype,
            max_model_len=plan.memory.sizes.max_model_len,
        )
    runner, graphs = startup.make_runner(config, model=model, plan=plan, device=gpu)
    return runner, graphs, plan


def _request(name: str, length: int, params: SamplingParams, *, blocks: int) -> NewRequest:
    return NewRequest(
        request_id=name,
        token_ids=(1,) * length,
        num_prompt_tokens=length,
        num_computed_tokens=0,
        block_ids=tuple(range(blocks)),
        params=params,
    )


def _mix() -> Iterator[SchedulerOutput]:
    """Prompts short and long, chunks, decode beside them, copies, every parameter."""
    plain = SamplingParams()
    requests = [_request(f"plain {i}", 1 + i, plain, blocks=2) for i in range(20)]
    yield SchedulerOutput(
        step=0,
        new_requests=tuple(requests),
        num_scheduled_tokens={r.request_id: len(r.token_ids) for r in requests},
    )
    long = _request("long", 6000, EVERYTHING, blocks=400)
    yield SchedulerOutput(
        step=1,
        new_requests=(long,),
        num_scheduled_tokens={r.request_id: 1 for r in requests[:7]} | {"long": 5000},
        block_copies=(BlockCopy(src=3, dst=9), BlockCopy(src=4, dst=10)),
    )
    yield SchedulerOutput(step=2, num_scheduled_tokens={"long": 1000, "plain 1": 1})
    yield SchedulerOutput(step=3, num_scheduled_tokens={"long": 1, "plain 1": 1})
    for step, count in enumerate((1, 3, 9, 17), 4):
        yield SchedulerOutput(
            step=step, num_scheduled_tokens={r.request_id: 1 for r in requests[2 : 2 + count]}
        )
    yield SchedulerOutput(
        step=8,
        new_requests=(_request("one", 33, plain, blocks=3),),
        num_scheduled_tokens={"one": 33},
        new_block_ids={"plain 1": (11,)},
        finished_request_ids=("long",),
    )


def _unlisted(found: list[Launch], spec: ModelSpec) -> set[tuple[str, object]]:
    dtype = torch.bfloat16
    shape = model_shape(spec, dtype=dtype, cache_dtype=dtype, block_size=16)
    listed = {launch.key for launch in warming.launches(shape)}
    return {(launch.name, launch.key) for launch in found if launch.key not in listed}


@pytest.mark.parametrize("context", [7000, 131072])
@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_a_served_mix_launches_what_is_listed(config: dict[str, object], context: int) -> None:
    spec = parse_config({**config, "max_position_embeddings": context})
    runner, graphs, plan = _engine(spec)
    with collecting() as found:
        startup.warm(
            runner,
            graphs,
            plan=plan,
            device=startup.GpuDevice(
                runtime=_Nowhere(), name="none", total_bytes=0, free_bytes=0, is_interpreted=True
            ),
        )
        for step in _mix():
            runner.launch(step)
    names = {launch.name for launch in found}
    assert {"attend_hopper", "decode_hopper", "penalise_rows", "extend_slots"} <= names
    assert {"copy_blocks", "score_rows", "scatter_ranges", "gather_columns"} <= names
    assert not _unlisted(found, spec)


@pytest.mark.parametrize("context", [500, 8192, 40960])
def test_graphs_launch_what_is_listed(context: int) -> None:
    spec = parse_config({**QWEN3, "max_position_embeddings": context})
    _, graphs, plan = _engine(spec)
    assert plan.graphs == GraphSizes.of((1, 2, 8, 64, 256, 512), 256, 8192)
    keys = [*plan.graphs.keys(), *plan.graphs.late_keys()]
    with collecting() as found:
        for key in keys:
            graphs.run_blank(key)
    assert len(found) > 10 * len(keys)
    assert not _unlisted(found, spec)


def _drafting(most: int) -> Iterator[SchedulerOutput]:
    """A request with all parameters and a plain one, both with every number of drafts."""
    requests = [_request(n, 30, p, blocks=9) for n, p in (("a", EVERYTHING), ("b", PLAIN))]
    prompts = {request.request_id: 30 for request in requests}
    yield SchedulerOutput(step=0, new_requests=tuple(requests), num_scheduled_tokens=prompts)
    for number in range(most + 1):
        for room in ({"a": number, "b": most}, {"b": number}):
            yield SchedulerOutput(
                step=1,
                num_scheduled_tokens={name: 1 + drafts for name, drafts in room.items()},
                max_drafts={name: drafts for name, drafts in room.items() if drafts},
            )


@pytest.mark.parametrize("number", [5, 7])
@pytest.mark.parametrize("config", [LLAMA, QWEN3, SMOL], ids=["llama", "qwen3", "smol"])
def test_drafts_launch_what_is_listed(config: dict[str, object], number: int) -> None:
    """Kernel by kernel, and in every graph that may be captured."""
    spec = parse_config(config)
    method = {"method": "ngram", "num_speculative_tokens": number}
    runner, graphs, plan = _engine(spec, speculative_config=json.dumps(method))
    assert plan.memory.sizes.max_samples == 512 and plan.graphs.depths[-1] == number
    with collecting() as found:
        for step in _drafting(number):
            runner.launch(step)
        num_eager = len(found)
        for key in (*plan.graphs.late_keys(), *plan.graphs.keys()):
            graphs.run_blank(key)
    names = [launch.name for launch in found[:num_eager]]
    assert names.count("propose_rows") == names.count("accept_runs") == 2 * number + 3
    assert {"propose_rows", "accept_runs", "decode_hopper"} <= {x.name for x in found[num_eager:]}
    assert not _unlisted(found, spec)
