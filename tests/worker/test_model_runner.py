"""Steps on a tiny model: what is sampled and scored, and that failures stay with their request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.attention import AttentionMetadata, KVLayer
from octavo.models import Model
from octavo.sampling.logprobs import ROW_GROUP
from octavo.types import (
    BlockCopy,
    ModelOutput,
    NewRequest,
    SamplingParams,
    SchedulerOutput,
    TokenLogprobs,
)
from octavo.worker.model_runner import ModelRunner
from octavo_kernels.paged_attention import kv_cache_shapes

GREEDY = SamplingParams(temperature=0.0)
RAISES, POISONS = 13, 14  # tokens


class Trap:
    """A model that raises on one token, makes NaN of another, and counts rows of logits."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.spec, self.backend = model.spec, model.backend
        self.num_calls = 0
        self.logit_rows: list[int] = []

    def forward(
        self, token_ids: Tensor, attn: AttentionMetadata, kv_caches: Sequence[KVLayer]
    ) -> Tensor:
        self.num_calls += 1
        if bool((token_ids == RAISES).any()):
            raise RuntimeError("a kernel met a bad token")
        hidden = self._model.forward(token_ids, attn, kv_caches)
        hidden[token_ids == POISONS] = float("nan")
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        self.logit_rows.append(len(hidden))
        return self._model.compute_logits(hidden)


def request(name: str, tokens: Sequence[int], block: int = 0, **changed: Any) -> NewRequest:
    given: dict[str, Any] = {
        "token_ids": tuple(tokens),
        "num_prompt_tokens": len(tokens),
        "num_computed_tokens": 0,
        "block_ids": tuple(range(block, block + 16)),
        "params": GREEDY,
    }
    return NewRequest(request_id=name, **given | changed)


def first_step(*requests: NewRequest, counts: Sequence[int] | None = None) -> SchedulerOutput:
    sizes = counts or [len(r.token_ids) for r in requests]
    return SchedulerOutput(
        step=0,
        new_requests=requests,
        num_scheduled_tokens={r.request_id: n for r, n in zip(requests, sizes, strict=True)},
    )


def reference_logits(model: Model, tokens: Sequence[int]) -> Tensor:
    """[T, V] of one request computed in one go, in a cache of its own."""
    shapes = kv_cache_shapes(20, block_size=16, num_kv_heads=2, head_dim=16)
    caches = [KVLayer(torch.zeros(shapes[0]), torch.zeros(shapes[1])) for _ in range(2)]
    size = len(tokens)
    attn = AttentionMetadata(
        positions=torch.arange(size, dtype=torch.int32),
        slots=torch.arange(size, dtype=torch.int32),
        block_tables=torch.arange(20, dtype=torch.int32)[None],
        query_start_loc=torch.tensor([0, size], dtype=torch.int32),
        seq_lens=torch.tensor([size], dtype=torch.int32),
    )
    ids = torch.tensor(tokens, dtype=torch.int32)
    return model.compute_logits(model.forward(ids, attn, caches))


Make = Callable[..., ModelRunner]


def test_tokens_and_logprobs_are_those_of_the_logits(make_runner: Make, model: Model) -> None:
    runner = make_runner()
    tokens = [5, 6, 7, 8]
    params = SamplingParams(temperature=0.0, logprobs=3, repetition_penalty=1.2)
    out = runner.execute(first_step(request("a", tokens, params=params)))
    for step in range(1, 5):
        (token,) = out.sampled_token_ids["a"]
        logits = reference_logits(model, tokens)[-1].double()
        changed = logits.clone()
        seen = torch.tensor(sorted(set(tokens)))
        changed[seen] = torch.where(changed[seen] > 0, changed[seen] / 1.2, changed[seen] * 1.2)
        assert token == int(changed.argmax())
        raw = logits.log_softmax(0)
        (score,) = out.logprobs["a"]
        assert (score.token_id, score.rank) == (token, 1 + int((logits > logits[token]).sum()))
        assert score.logprob == pytest.approx(float(raw[token]), abs=1e-5)
        want = raw.topk(3)
        assert [i for i, _ in score.top] == want.indices.tolist()
        assert [p for _, p in score.top] == pytest.approx(want.values.tolist(), abs=1e-5)
        tokens.append(token)
        out = runner.execute(SchedulerOutput(step=step, num_scheduled_tokens={"a": 1}))


def test_a_chunk_that_does_not_end_the_tokens_samples_nothing(make_runner: Make) -> None:
    runner = make_runner()
    out = runner.execute(first_step(request("a", range(20, 40)), counts=[7]))
    assert out == ModelOutput(step=0)
    out = runner.execute(SchedulerOutput(step=1, num_scheduled_tokens={"a": 13}))
    whole = make_runner().execute(first_step(request("a", range(20, 40))))
    assert out.sampled_token_ids == whole.sampled_token_ids


def test_prompt_logprobs_cover_each_position_once(make_runner: Make, model: Model) -> None:
    tokens = [20 + (i * 37) % 250 for i in range(90)]
    params = SamplingParams(temperature=0.0, prompt_logprobs=2)
    trap = Trap(model)
    runner = make_runner(using=trap)
    scores: list[TokenLogprobs] = []
    steps = [7, 40, 42, 1]  # the last of these computes the position that samples
    out = runner.execute(first_step(request("a", tokens, params=params), counts=steps[:1]))
    scores += out.prompt_logprobs["a"]
    for number, count in enumerate(steps[1:], 1):
        out = runner.execute(SchedulerOutput(step=number, num_scheduled_tokens={"a": count}))
        scores += out.prompt_logprobs.get("a", ())
    assert len(out.sampled_token_ids["a"]) == 1 and "a" not in out.prompt_logprobs
    out = runner.execute(SchedulerOutput(step=9, num_scheduled_tokens={"a": 1}))
    assert not out.prompt_logprobs
    raw = reference_logits(model, tokens).double().log_softmax(1)
    assert [score.token_id for score in scores] == tokens[1:]
    for position, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(raw[position, tokens[position + 1]]), abs=1e-5)
        assert [i for i, _ in score.top] == raw[position].topk(2).indices.tolist()
    assert max(trap.logit_rows) <= ROW_GROUP


def test_a_long_prompt_is_scored_in_bounded_memory(make_runner: Make, model: Model) -> None:
    trap = Trap(model)
    runner = make_runner(using=trap)
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    out = runner.execute(first_step(request("a", [3] * 250, params=params)))
    assert len(out.prompt_logprobs["a"]) == 249
    assert max(trap.logit_rows) <= ROW_GROUP and sum(trap.logit_rows) == 250


def test_only_the_request_that_breaks_the_batch_fails(make_runner: Make, model: Model) -> None:
    good = [request(f"g{i}", range(30 + i, 60), block=16 * (i + 1)) for i in range(2)]
    bad = request("bad", [4, RAISES, 6])
    want = make_runner().execute(first_step(*good)).sampled_token_ids
    trap = Trap(model)
    runner = make_runner(using=trap)
    out = runner.execute(first_step(good[0], bad, good[1]))
    assert out.sampled_token_ids == want
    assert out.errors == {"bad": "the model failed on this request (RuntimeError)"}
    assert trap.num_calls == 4
    # The next step may have been scheduled before the failure was known.
    step = SchedulerOutput(step=1, num_scheduled_tokens={"bad": 1, "g0": 1, "g1": 1})
    out = runner.execute(step)
    assert set(out.sampled_token_ids) == {"g0", "g1"} and set(out.errors) == {"bad"}
    assert trap.num_calls == 5
    again = SchedulerOutput(
        step=2,
        finished_request_ids=("bad",),
        new_requests=(request("bad", [4, 5, 6]),),
        num_scheduled_tokens={"bad": 3},
    )
    assert "bad" in runner.execute(again).sampled_token_ids


def test_non_finite_logits_fail_their_request_alone(make_runner: Make, model: Model) -> None:
    message = "the model produced non-finite logits"
    good, ends = request("good", [2, 3, 4], block=16), request("ends", [4, 5, POISONS], block=32)
    scored = request(
        "scored", [4, POISONS, 6], params=SamplingParams(temperature=0.5, prompt_logprobs=1)
    )
    runner = make_runner(using=Trap(model))
    out = runner.execute(first_step(scored, good, ends))
    assert out.errors == {"scored": message, "ends": message}
    assert set(out.sampled_token_ids) == {"good"} and not out.prompt_logprobs
    want = make_runner().execute(first_step(good)).sampled_token_ids
    assert out.sampled_token_ids == want


def test_forbidding_every_token_is_the_requests_own_error(make_runner: Make) -> None:
    params = SamplingParams(allowed_token_ids=(1,), min_tokens=2, eos_token_ids=(1,))
    runner = make_runner()
    out = runner.execute(first_step(request("a", [3], params=params), request("b", [3], block=16)))
    assert "forbid every token" in out.errors["a"]
    assert set(out.sampled_token_ids) == {"b"}


def test_copied_blocks_serve_as_the_original(make_runner: Make) -> None:
    tokens = list(range(40, 60))
    runner = make_runner()
    whole = runner.execute(first_step(request("a", tokens)))
    fork = request("b", tokens, num_computed_tokens=19, block_ids=(0, 50))
    out = runner.execute(
        SchedulerOutput(
            step=1,
            new_requests=(fork,),
            num_scheduled_tokens={"b": 1, "a": 1},
            block_copies=(BlockCopy(src=1, dst=50),),
        )
    )
    assert out.sampled_token_ids["b"] == whole.sampled_token_ids["a"]
