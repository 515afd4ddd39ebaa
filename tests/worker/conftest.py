"""A tiny model with random weights, and runners around it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.attention.base import KVCacheSpec
from octavo.checkpoint import resolve
from octavo.config import ModelConfig
from octavo.models import Model, kv_cache_spec, load_model
from octavo.platforms.cpu import CPUPlatform
from octavo.sampling import Sampler
from octavo.speculative import BatchProposer, Drafter
from octavo.worker.drafting.startup import Drafting, LoadedDraftModel, LoadedHead
from octavo.worker.kv_tensors import KVTensors
from octavo.worker.kv_transfer import NO_TRANSFER, CPUTransfer
from octavo.worker.model_runner import ModelRunner
from octavo.worker.request_table import RequestTable

VOCAB_SIZE = 300
MAX_MODEL_LEN = 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json alone, for ``load_format=dummy``."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path) -> Model:
    files = resolve(ModelConfig(model=str(model_folder), load_format="dummy"))
    made = load_model(files, files.spec, platform=CPUPlatform(), dtype=torch.float32, seed=5)
    generator = torch.Generator().manual_seed(11)
    for slot in made.slots().values():  # larger weights: every token matters to every logit
        if slot.kind != "norm":
            slot.write(torch.empty(slot.shape).normal_(std=0.2, generator=generator), 0)
    return made


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """As in a server: torch's threads would wait in busy loops on the cores of the kernels'."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def void_cache(model: Model, spec: KVCacheSpec, *, num_blocks: int) -> KVTensors:
    """Whoever reads what was never written gets NaN."""
    kv = KVTensors(model.backend, spec, num_blocks=num_blocks)
    for layer in kv.layers:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    return kv


@pytest.fixture
def make_runner(model: Model) -> Callable[..., ModelRunner]:
    """(num_blocks, block_size, max_num_seqs, model) -> runner with NaN in every K/V slot.

    ``drafter``, or what ``drafter_with`` makes of the proposer that a ``loaded`` model is.
    """

    def make(
        *,
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_seqs: int = 40,
        num_host_slots: int = 0,
        using: Any = None,
        drafter: Drafter | None = None,
        seconds: Callable[[], float] = time.perf_counter,
        loaded: LoadedHead | LoadedDraftModel | None = None,
        drafter_with: Callable[[BatchProposer], Drafter] | None = None,
    ) -> ModelRunner:
        spec = kv_cache_spec(model.spec, block_size=block_size, dtype=torch.float32)
        kv = void_cache(model, spec, num_blocks=num_blocks)
        table = RequestTable(
            max_num_seqs=max_num_seqs, max_model_len=MAX_MODEL_LEN, block_size=block_size
        )
        used = model if using is None else using
        has_tier = num_host_slots > 0
        transfer = CPUTransfer(kv.layers, num_slots=num_host_slots) if has_tier else NO_TRANSFER
        sampler = Sampler(VOCAB_SIZE)
        drafting: Drafting | None = None
        if loaded is not None and drafter_with is not None:
            own_spec = loaded.kv_spec(block_size=block_size, dtype=torch.float32)
            own = void_cache(model, own_spec, num_blocks=num_blocks)
            drafting = loaded.attach(table, kv_caches=own.layers, max_num_tokens=512)
            drafter = drafter_with(drafting.proposer)
        return ModelRunner(
            used,
            table=table,
            kv=kv,
            sampler=sampler,
            transfer=transfer,
            max_num_tokens=512,
            drafter=drafter,
            seconds=seconds,
            watcher=None if drafting is None else drafting.watcher,
            taps=None if drafting is None else drafting.taps,
        )

    return make
