"""Start-up with a model that drafts: what it takes, and what is refused, naming both sides."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.models import target_fingerprint
from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.drafting import startup
from octavo.worker.executor import InlineExecutor
from octavo.worker.worker import build_worker
from octavo_kernels import parallel
from tests.worker.conftest import CONFIG
from tests.worker.test_model_drafts import write_head


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A worker owns its process; this one has other tests to run."""
    before = parallel.num_threads(), torch.get_num_threads()
    yield
    parallel.set_num_threads(before[0])
    torch.set_num_threads(before[1])


def config_of(folder: Path, speculative: dict[str, Any], **cache: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=str(folder), load_format="dummy", num_threads=2),
        cache=CacheConfig(**(cache or {"num_gpu_blocks_override": 20})),
        scheduler=SchedulerConfig(
            max_num_seqs=4, async_scheduling=False, speculative_config=json.dumps(speculative)
        ),
    )


Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """(name, config fields) -> a model's folder."""

    def make(name: str, **changes: Any) -> Path:
        made = tmp_path / name
        made.mkdir()
        (made / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        return made

    return make


@pytest.mark.parametrize("method", ["auto", "eagle3", "draft_model", "auto with a model"])
def test_a_worker_with_a_drafting_model_answers(
    method: str, model_folder: Path, tmp_path: Path
) -> None:
    drafts = model_folder if "model" in method else write_head(tmp_path / "head")
    speculative = {"method": method.split()[0], "model": str(drafts), "num_speculative_tokens": 3}
    executor, info = build_worker(config_of(model_folder, speculative))
    assert info.max_drafts == 3 and info.speculation == f"{method.split()[0]} with {drafts}"
    request = NewRequest(
        request_id="a",
        token_ids=(5, 6, 7),
        num_prompt_tokens=3,
        num_computed_tokens=0,
        block_ids=(0, 1),
        params=SamplingParams(temperature=0.0),
    )
    executor.submit(SchedulerOutput(step=0, new_requests=(request,), num_scheduled_tokens={"a": 3}))
    assert not executor.collect().errors
    tokens = drafted = accepted = 0
    for step in range(1, 6):
        executor.submit(
            SchedulerOutput(step=step, num_scheduled_tokens={"a": 4}, max_drafts={"a": 3})
        )
        output = executor.collect()
        assert not output.errors
        tokens += len(output.sampled_token_ids["a"])
        if output.worker is not None:
            drafted += output.worker.draft_tokens
            accepted += output.worker.accepted_tokens
            assert output.worker.failed_proposers == 0
    executor.close()
    assert tokens == 5 + accepted
    if method == "draft_model":  # the target itself
        assert drafted == accepted == 15


def test_its_kv_counts_in_the_size_of_a_block(model_folder: Path, tmp_path: Path) -> None:
    def num_blocks(**speculative: Any) -> int:
        wanted = config_of(model_folder, speculative, kv_cache_memory_bytes=1 << 20)
        executor, info = build_worker(wanted)
        executor.close()
        return info.num_blocks

    plain = num_blocks(method="off")
    head = write_head(tmp_path / "head")  # one layer beside two, of heads as large
    assert abs(num_blocks(method="eagle3", model=str(head)) - plain * 2 / 3) < 1
    assert num_blocks(method="draft_model", model=str(model_folder)) == plain // 2


def test_auto_takes_the_head_that_comes_with_octavo(
    model_folder: Path, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speculation(served: Path, **speculative: Any) -> str:
        executor, info = build_worker(config_of(served, speculative))
        executor.close()
        return info.speculation

    executor, info = build_worker(config_of(model_folder, {}))
    assert info.speculation == "auto"
    own = target_fingerprint(cast("InlineExecutor", executor)._runner._model)
    executor.close()
    (tmp_path / "heads").mkdir()
    write_head(tmp_path / "heads" / "another", octavo={"target": {"fingerprint": "0:0"}})
    monkeypatch.setattr(startup, "_BUNDLED", tmp_path / "heads")
    assert speculation(model_folder) == "auto"
    write_head(tmp_path / "heads" / "tiny", octavo={"target": {"fingerprint": own}})
    assert speculation(model_folder) == "auto with Octavo's head for tiny"
    assert speculation(model_folder, method="auto", model="") == "auto"
    assert speculation(model_folder, method="suffix") == "suffix"
    assert speculation(model_folder, method="eagle3") == "eagle3 with Octavo's head for tiny"
    assert speculation(folder("wider", vocab_size=301)) == "auto"


def refusal(model_folder: Path, **speculative: Any) -> str:
    with pytest.raises(ValueError) as error:
        build_worker(config_of(model_folder, speculative))
    return str(error.value)


def test_what_does_not_fit_is_refused(model_folder: Path, folder: Folder, tmp_path: Path) -> None:
    other = folder("other", vocab_size=301)
    message = refusal(model_folder, method="draft_model", model=str(other))
    assert f"{other} has a vocabulary of 301" in message and f"{model_folder} has 300" in message
    head = write_head(tmp_path / "head", hidden_size=96)
    message = refusal(model_folder, method="eagle3", model=str(head))
    assert f"{head} is for a model with a hidden size of 96" in message
    assert f"{model_folder} has 64" in message
    message = refusal(model_folder, method="eagle3")
    assert f"none comes with Octavo for {model_folder}" in message
    message = refusal(model_folder, method="eagle3", model=str(model_folder))
    assert "is no draft head (LlamaForCausalLMEagle3): its architecture is LlamaForC" in message
    head = write_head(tmp_path / "good")
    message = refusal(model_folder, method="draft_model", model=str(head))
    assert "is a draft head: that is method eagle3" in message
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    message = refusal(model_folder, method="eagle3", model=str(tmp_path / "m.gguf"))
    assert "takes a folder with a draft head, got the GGUF file" in message
    message = refusal(model_folder, method="eagle3", model=str(head), parallel_drafting=True)
    assert "parallel_drafting takes a head that was trained for it" in message
    assert str(head) in message
    message = refusal(
        model_folder, method="draft_model", model=str(model_folder), parallel_drafting=True
    )
    assert "parallel_drafting is of draft heads" in message
    message = refusal(model_folder, method="ngram", parallel_drafting=False)
    assert "parallel_drafting is of a head, which model names, got no model" in message
    message = refusal(model_folder, method="auto", model="nowhere")
    assert "model 'nowhere' not found" in message


def test_another_tokenizer_is_refused(model_folder: Path, folder: Folder) -> None:
    def with_tokens(name: str, *tokens: str) -> Path:
        made = folder(name)
        vocabulary = {token: index for index, token in enumerate(tokens)}
        (made / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        return made

    target, same = with_tokens("target", "a", "b", "c"), with_tokens("same", "a", "b", "c")
    other = with_tokens("other", "a", "x", "c")
    message = refusal(target, method="draft_model", model=str(other))
    assert f"{other} has another tokenizer than {target}: they differ in 'b'" in message
    wanted = config_of(target, {"method": "draft_model", "model": str(same)})
    executor, _ = build_worker(dataclasses.replace(wanted))
    executor.close()
