"""The sampler: parameters per row, raw log-probabilities, errors that stay in their row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.sampling import LogitParamsTable, Sampler, SamplingBatch, SamplingColumns, score_rows
from octavo.sampling.logprobs import ROW_GROUP, score_hidden
from octavo.types import SamplingParams

VOCAB = 400


class Rows:
    """A little request table."""

    def __init__(self, requests: Sequence[tuple[Sequence[int], int, SamplingParams]]) -> None:
        num = len(requests)
        self.requests = requests
        self.token_ids = np.zeros((num, 50), np.int32)
        self.num_prompt = np.zeros(num, np.int32)
        self.num_tokens = np.zeros(num, np.int32)
        self.table = LogitParamsTable(
            self.token_ids, num_prompt_tokens=self.num_prompt, num_tokens=self.num_tokens
        )
        for row, (tokens, num_prompt, params) in enumerate(requests):
            self.token_ids[row, : len(tokens)] = tokens
            self.num_tokens[row], self.num_prompt[row] = len(tokens), num_prompt
            self.table.set(row, params)

    def batch(self, *rows: int) -> SamplingBatch:
        slots = np.array(rows, np.int32)
        params = [self.requests[row][2] for row in rows]
        active = self.table.is_active[slots]

        every = [request[2] for request in self.requests]

        def column(name: str, kind: Any) -> Any:
            return np.array([getattr(p, name) for p in every], kind)

        return SamplingBatch(
            slots=slots,
            columns=SamplingColumns(
                temperature=column("temperature", np.float32),
                top_k=column("top_k", np.int32),
                top_p=column("top_p", np.float32),
                min_p=column("min_p", np.float32),
                seeds=column("seed", np.int64),
            ),
            positions=self.num_tokens[slots].astype(np.int64),
            has_params=active,
            params=self.table.packed() if active.any() else None,
            num_logprobs=[p.logprobs for p in params],
        )


def logits_for(rows: int) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 3


REQUESTS = [
    ([1, 2, 3], 3, SamplingParams(temperature=0.0)),
    ([1, 2, 3, 3], 2, SamplingParams(temperature=0.0, repetition_penalty=1.4, logprobs=2)),
    ([9], 1, SamplingParams(seed=3, top_p=0.7, logprobs=0)),
    ([9], 1, SamplingParams(temperature=0.0, allowed_token_ids=(17, 18), logprobs=4)),
    ([8, 8], 1, SamplingParams(temperature=0.0, logit_bias=((5, 100.0),))),
    ([8, 8], 1, SamplingParams(temperature=0.0, bad_words_token_ids=((8, 31), (40,), ()))),
    ([7], 1, SamplingParams(seed=8, temperature=2.0, frequency_penalty=0.5, min_p=0.01)),
]


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    rows, logits, sampler = Rows(REQUESTS), logits_for(7), Sampler(VOCAB)
    together = sampler.sample(logits.clone(), rows.batch(*range(7)))
    assert not together.errors and set(together.logprobs) == {1, 2, 3}
    for row in range(7):
        apart = sampler.sample(logits[row : row + 1].clone(), rows.batch(row))
        assert apart.token_ids == [together.token_ids[row]]
        assert apart.logprobs.get(0) == together.logprobs.get(row)
    order = [3, 1, 6, 0, 2]
    mixed = sampler.sample(logits[order].clone(), rows.batch(*order))
    assert mixed.token_ids == [together.token_ids[row] for row in order]
    assert mixed.logprobs == {order.index(r): together.logprobs[r] for r in (1, 2, 3)}


def test_each_parameter_acts_on_its_row() -> None:
    logits = logits_for(7)
    logits[1, 3] = logits[1].max() + 0.1
    logits[5, 40] = logits[5, 31] = logits[5].max() + 1
    found = Sampler(VOCAB).sample(logits.clone(), Rows(REQUESTS).batch(*range(7)))
    assert found.token_ids[0] == int(logits[0].argmax())
    assert found.token_ids[1] != 3  # the likeliest, but seen
    assert found.token_ids[3] == (17 if logits[3, 17] >= logits[3, 18] else 18)
    assert found.token_ids[4] == 5
    assert found.token_ids[5] not in (31, 40)


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = logits_for(7)
    found = Sampler(VOCAB).sample(logits.clone(), Rows(REQUESTS).batch(*range(7)))
    raw = logits.double().log_softmax(1)
    for row, score in found.logprobs.items():
        token = found.token_ids[row]
        assert score.token_id == token
        assert score.logprob == pytest.approx(float(raw[row, token]), abs=1e-5)
        assert score.rank == 1 + int((logits[row] > logits[row, token]).sum())
        wanted = REQUESTS[row][2].logprobs or 0
        assert [i for i, _ in score.top] == raw[row].topk(wanted).indices.tolist()


def test_errors_stay_in_their_row() -> None:
    logits = logits_for(7)
    logits[2, 5] = float("nan")
    logits[3, :] = -float("inf")
    found = Sampler(VOCAB).sample(logits.clone(), Rows(REQUESTS).batch(*range(7)))
    assert set(found.errors) == {2, 3} and set(found.logprobs) == {1}
    assert found.errors[2] == "the model produced non-finite logits"
    clean = Sampler(VOCAB).sample(logits_for(7), Rows(REQUESTS).batch(*range(7)))
    for row in (0, 1, 4, 5, 6):
        assert found.token_ids[row] == clean.token_ids[row]


def test_lists_are_packed_again_only_when_they_change() -> None:
    rows = Rows(REQUESTS)
    first = rows.table.packed()
    assert rows.table.packed() is first
    rows.table.set(0, SamplingParams(presence_penalty=1.0))  # a number, read where it lies
    assert rows.table.packed() is first and first.presence_penalty[0] == 1.0
    rows.table.clear(4)
    assert not rows.table.is_active[4]
    packed = rows.table.packed()
    assert packed is not first and packed.bias_ids.numel() == 0
    assert packed.bad_ids.tolist() == [8, 31, 40] and packed.word_starts.tolist() == [0, 2, 3]
    assert packed.bad_starts.tolist() == [0, 0, 0, 0, 0, 0, 2, 2]


def test_packing_joins_every_row_in_order() -> None:
    given = [
        SamplingParams(allowed_token_ids=(7, 3, 9), logit_bias=((2, 0.5),)),
        SamplingParams(),
        SamplingParams(min_tokens=1, eos_token_ids=(1,), stop_token_ids=(4, 5)),
        SamplingParams(logit_bias=((8, -1.0), (9, 1.0)), bad_words_token_ids=((), (6, 7), (5,))),
        SamplingParams(allowed_token_ids=(1,)),
    ]
    packed = Rows([([0], 1, params) for params in given]).table.packed()
    assert packed.allowed_ids.tolist() == [7, 3, 9, 1]
    assert packed.allowed_starts.tolist() == [0, 3, 3, 3, 3, 4]
    assert packed.bias_ids.tolist() == [2, 8, 9]
    assert packed.bias_values.tolist() == [0.5, -1.0, 1.0]
    assert packed.bias_starts.tolist() == [0, 1, 1, 1, 3, 3]
    assert packed.stop_ids.tolist() == [1, 4, 5]
    assert packed.stop_starts.tolist() == [0, 0, 0, 3, 3, 3]
    assert packed.bad_ids.tolist() == [6, 7, 5] and packed.word_starts.tolist() == [0, 2, 3]
    assert packed.bad_starts.tolist() == [0, 0, 0, 0, 2, 2]


def test_minimum_length_names_every_stop() -> None:
    params = SamplingParams(
        temperature=0.0, min_tokens=2, eos_token_ids=(1,), stop_token_ids=(2, 3), ignore_eos=True
    )
    rows = Rows([([9, 9], 1, params), ([9, 9, 9], 1, params)])
    logits = logits_for(2)
    logits[:, 1:4] += 50
    found = Sampler(VOCAB).sample(logits, rows.batch(0, 1))
    assert found.token_ids[0] not in (1, 2, 3) and found.token_ids[1] in (1, 2, 3)


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (score,) = score_rows(torch.randn(1, 5), chosen=[3], num_best=[9])
    assert score is not None and sorted(i for i, _ in score.top) == [0, 1, 2, 3, 4]


def test_hidden_rows_are_scored_in_groups_of_one_size() -> None:
    hidden = torch.randn(3 * ROW_GROUP + 5, 16)
    head = torch.randn(VOCAB, 16)
    sizes = []

    def compute_logits(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return (rows[:, None] * head).sum(2)

    chosen = [i % VOCAB for i in range(len(hidden))]
    scores = score_hidden(hidden, compute_logits=compute_logits, chosen=chosen, num_best=1)
    assert sizes == [ROW_GROUP] * 3 + [5]
    want = (hidden.double() @ head.double().T).log_softmax(1)
    for row, score in enumerate(scores):
        assert score is not None
        assert score.logprob == pytest.approx(float(want[row, chosen[row]]), abs=1e-4)
