"""Sampling kernels: known answers, distributions, filters and penalties against transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo_kernels import parallel, sampling
from octavo_kernels.sampling import LogitParams, cpu
from octavo_kernels.testing import same_bits

INF = float("inf")


def columns(rows: int, **values: float) -> dict[str, Any]:
    kinds = {"top_k": torch.int32, "seeds": torch.int64, "positions": torch.int64}
    found = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 7} | values
    made = {k: torch.full((rows,), v, dtype=kinds.get(k, torch.float32)) for k, v in found.items()}
    return {"positions": torch.arange(rows)} | made


@pytest.mark.parametrize(
    ("counter_and_key", "words"),
    [
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter_and_key: list[int], words: list[int]) -> None:
    given = np.array(counter_and_key, np.uint32)
    found = np.zeros(4, np.uint32)
    cpu.philox_words(1, given.ctypes.data, 1, found.ctypes.data)
    assert found.tolist() == words
    assert list(sampling.philox_reference(counter_and_key[:4], counter_and_key[4:])) == words


def test_greedy_takes_the_lowest_of_equals_zeros_included() -> None:
    logits = torch.full((3, 700), -1.0)
    logits[0, [5, 300, 699]] = 2.0
    logits[1, [9, 400]] = torch.tensor([-0.0, 0.0])
    logits[2, 1:] = -INF
    tokens, status = sampling.sample(logits, **columns(3, temperature=0.0))
    assert tokens.tolist() == [5, 9, 0]
    assert status.tolist() == [sampling.OK] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_cannot_be_sampled_fail_alone(temperature: float) -> None:
    logits = torch.randn(6, 999)
    logits[1, 400], logits[2, 3], logits[4, 998] = float("nan"), INF, -float("nan")
    logits[3] = -INF
    logits[5, 7] = -INF
    tokens, status = sampling.sample(logits, **columns(6, temperature=temperature))
    bad = sampling.NON_FINITE
    assert status.tolist() == [0, bad, bad, sampling.ALL_FORBIDDEN, bad, 0]
    assert (tokens >= 0).tolist() == [True, False, False, False, False, True]
    scores = sampling.topn_logprobs(logits, chosen=torch.zeros(6, dtype=torch.int64), num_best=2)
    assert scores.status.tolist() == [0, bad, bad, bad, bad, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.5, 5, 1.0, 0.0), (1.0, 0, 0.8, 0.0)]
    + [(1.0, 0, 1.0, 0.1), (0.9, 8, 0.9, 0.05)],
)
def test_frequencies_follow_the_probabilities(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    row = torch.randn(20, generator=generator) * 1.5
    count = 40000
    given = columns(count, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, _ = sampling.sample(row.repeat(count, 1), **given)
    probs = sampling.filtered_probs_reference(
        row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    found = torch.bincount(tokens, minlength=20).double()
    assert bool((found[probs == 0] == 0).all())
    stays = probs > 0
    chi2 = ((found - count * probs)[stays] ** 2 / (count * probs[stays])).sum()
    degrees = int(stays.sum()) - 1
    assert float(chi2) < degrees + 4 * (2 * degrees) ** 0.5 + 8


def test_seed_and_position_make_the_draw() -> None:
    row = torch.randn(4000)
    base = columns(64, seeds=-5)
    tokens, _ = sampling.sample(row.repeat(64, 1), **base)
    assert len(set(tokens.tolist())) > 30
    far = base | {"positions": base["positions"] + 2**32}
    assert sampling.sample(row.repeat(64, 1), **far)[0].tolist() != tokens.tolist()
    other = base | {"seeds": base["seeds"] + 2**33}
    assert sampling.sample(row.repeat(64, 1), **other)[0].tolist() != tokens.tolist()
    assert torch.equal(sampling.sample(row.repeat(64, 1), **base)[0], tokens)


@pytest.mark.parametrize("vocab_size", [1, 17, 255, 1025, 5000])
def test_few_and_many_candidates_draw_alike(vocab_size: int) -> None:
    """A filter that keeps the drawn token must not change the draw: noise hangs on ids alone."""
    logits = torch.randn(50, vocab_size) * 2
    free, _ = sampling.sample(logits, **columns(50))
    ranks = sampling.topn_logprobs(logits, chosen=free, num_best=0).ranks
    for top_k in (1, 3, vocab_size // 20 + 1, vocab_size):
        kept, _ = sampling.sample(logits, **columns(50, top_k=top_k))
        stays = ranks <= top_k
        assert torch.equal(kept[stays], free[stays])
        again = sampling.topn_logprobs(logits, chosen=kept, num_best=0).ranks
        assert int(again.max()) <= top_k


def test_filters_match_transformers() -> None:
    from transformers import (  # slow import, for this test alone
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(0)
    logits = torch.randn(4, 800) * 3
    for temperature, top_k, top_p, min_p in [
        (0.7, 50, 0.9, 0.02), (1.0, 0, 0.5, 0.0), (2.0, 300, 1.0, 0.0), (1.0, 0, 0.99, 0.001)
    ]:  # fmt: skip
        unused: Any = None  # token ids, which these do not look at
        want = TemperatureLogitsWarper(temperature)(unused, logits)
        want = MinPLogitsWarper(min_p)(unused, want) if min_p else want
        want = TopKLogitsWarper(top_k)(unused, want) if top_k else want
        want = TopPLogitsWarper(top_p)(unused, want) if top_p < 1 else want
        for row in range(4):
            given = columns(
                3000, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=row
            )
            tokens, _ = sampling.sample(logits[row].repeat(3000, 1), **given)
            allowed = set(want[row].isfinite().nonzero()[:, 0].tolist())
            drawn = set(tokens.tolist())
            assert drawn <= allowed
            likely = want[row].softmax(0) > 0.005
            assert set(likely.nonzero()[:, 0].tolist()) <= drawn


def test_extreme_parameters() -> None:
    logits = torch.randn(5, 3000) * 5
    best = logits.argmax(1)
    for given in ({"temperature": 1e-30}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        assert torch.equal(sampling.sample(logits, **columns(5, **given))[0], best), given
    for given in ({"temperature": 1e30}, {"top_p": 0.9999999}, {"top_k": 2**31 - 1}):
        tokens, status = sampling.sample(logits, **columns(5, **given))
        assert status.tolist() == [0] * 5 and int(tokens.min()) >= 0
    flat = torch.zeros(5, 3000)
    kept, _ = sampling.sample(flat, **columns(5, top_k=1))  # all are tied with the best
    assert len(set(kept.tolist())) > 1


def slots(num: int, length: int, **changed: Any) -> LogitParams:
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    empty = torch.zeros(num + 1, dtype=torch.int32)
    neutral: dict[str, Any] = {
        "token_ids": torch.zeros(num, length, dtype=torch.int32),
        "num_prompt_tokens": torch.zeros(num, dtype=torch.int32),
        "num_tokens": torch.zeros(num, dtype=torch.int32),
        "repetition_penalty": torch.ones(num),
        "frequency_penalty": torch.zeros(num),
        "presence_penalty": torch.zeros(num),
        "min_tokens": torch.zeros(num, dtype=torch.int32),
        "bias_starts": empty,
        "bias_ids": ints(),
        "bias_values": torch.zeros(0),
        "allowed_starts": empty,
        "allowed_ids": ints(),
        "bad_starts": empty,
        "word_starts": ints(0),
        "bad_ids": ints(),
        "stop_starts": empty,
        "stop_ids": ints(),
    }
    return LogitParams(**neutral | changed)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def applied(logits: Tensor, params: LogitParams, rows: Tensor, at: Tensor) -> Tensor:
    changed = logits.clone()
    sampling.apply_logit_params(changed, params=params, rows=rows, slots=at)
    return changed


def test_penalties_match_transformers_and_the_openai_formula() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor  # slow import, for this test alone

    torch.manual_seed(1)
    vocab = 60
    tokens = torch.randint(0, vocab, (3, 40), dtype=torch.int32)
    logits = torch.randn(3, vocab)
    params = slots(
        3,
        40,
        token_ids=tokens,
        num_prompt_tokens=ids(10, 25, 40),
        num_tokens=ids(40, 33, 40),
        repetition_penalty=torch.tensor([1.3, 1.0, 0.7]),
        frequency_penalty=torch.tensor([0.0, 0.5, -0.25]),
        presence_penalty=torch.tensor([0.4, -0.2, 1.0]),
    )
    got = applied(logits, params, ids(0, 1, 2), ids(0, 1, 2))
    for row, (prompt, length) in enumerate([(10, 40), (25, 33), (40, 40)]):
        seen = tokens[row : row + 1, :length].long()
        repetition = float(params.repetition_penalty[row])
        want = RepetitionPenaltyLogitsProcessor(repetition)(seen, logits[row : row + 1].clone())[0]
        counts = torch.bincount(tokens[row, prompt:length].long(), minlength=vocab)
        want = want - params.frequency_penalty[row] * counts
        want = want - params.presence_penalty[row] * (counts > 0)
        torch.testing.assert_close(got[row], want, atol=1e-6, rtol=1e-6)
    shuffled = applied(logits.flip(0).contiguous(), params, ids(2, 0), ids(0, 2))
    assert same_bits(shuffled, torch.stack([got[2], logits[1], got[0]]))


def test_bias_allowed_and_minimum_length() -> None:
    logits = torch.randn(2, 30)
    params = slots(
        4,
        5,
        num_tokens=ids(0, 0, 2, 3),
        min_tokens=ids(0, 0, 3, 3),
        bias_starts=ids(0, 0, 2, 2, 2),
        bias_ids=ids(4, 99),
        bias_values=torch.tensor([2.5, 1.0]),
        allowed_starts=ids(0, 0, 3, 3, 3),
        allowed_ids=ids(4, 29, -1),
        stop_starts=ids(0, 0, 0, 2, 4),
        stop_ids=ids(8, 9, 8, 9),
    )
    got = applied(logits, params, ids(1), ids(1))
    assert same_bits(got[0], logits[0])
    assert got[1].isfinite().nonzero()[:, 0].tolist() == [4, 29]
    torch.testing.assert_close(got[1, 4], logits[1, 4] + 2.5)
    got = applied(logits, params, ids(0, 1), ids(2, 3))
    assert (~got[0].isfinite()).nonzero()[:, 0].tolist() == [8, 9]
    assert same_bits(got[1], logits[1])


def test_bad_words_look_at_the_output_alone() -> None:
    logits = torch.randn(3, 30)
    tokens = torch.zeros(3, 6, dtype=torch.int32)
    tokens[0, :5] = ids(1, 2, 3, 4, 5)
    tokens[1, :5] = ids(1, 2, 3, 4, 5)
    params = slots(
        3,
        6,
        token_ids=tokens,
        num_prompt_tokens=ids(2, 4, 0),
        num_tokens=ids(5, 5, 0),
        bad_starts=ids(0, 3, 6, 7),
        # 4 5 -> 10; 9 5 -> 11; single 12 | 4 5 -> 10 (4 is prompt); 5 -> 11; 6 -> 12 | single 7
        word_starts=ids(0, 3, 6, 7, 10, 12, 14, 15),
        bad_ids=ids(4, 5, 10, 9, 5, 11, 12, 4, 5, 10, 5, 11, 6, 12, 7),
    )
    got = applied(logits, params, ids(0, 1, 2), ids(0, 1, 2))
    forbidden = [(~row.isfinite()).nonzero()[:, 0].tolist() for row in got]
    assert forbidden == [[10, 12], [11], [7]]


def test_counts_do_not_leak_between_calls() -> None:
    params = slots(
        1,
        4,
        token_ids=ids(3, 3, 5, 5).view(1, 4),
        num_prompt_tokens=ids(1),
        num_tokens=ids(4),
        repetition_penalty=torch.tensor([2.0]),
        frequency_penalty=torch.tensor([1.0]),
    )
    workspace = sampling.Workspace.create(9)
    logits = torch.randn(1, 9)
    first, second = logits.clone(), logits.clone()
    for changed in (first, second):
        sampling.apply_logit_params(
            changed, params=params, rows=ids(0), slots=ids(0), workspace=workspace
        )
    assert same_bits(first, second)
    assert not bool(workspace.counts.any())


def test_wrong_shapes_are_refused() -> None:
    logits = torch.randn(2, 9)
    with pytest.raises(ValueError, match="contiguous float32"):
        sampling.sample(logits.double(), **columns(2))
    with pytest.raises(ValueError, match="top_k must be torch.int32"):
        sampling.sample(logits, **columns(2) | {"top_k": torch.zeros(2)})
    with pytest.raises(ValueError, match="num_best must be between 0 and 9, got 10"):
        sampling.topn_logprobs(logits, chosen=torch.zeros(2, dtype=torch.int64), num_best=10)
    with pytest.raises(ValueError, match="between 0 and 8"):
        sampling.topn_logprobs(logits, chosen=torch.tensor([0, 9]), num_best=1)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    logits = torch.randn(13, 2500) * 3
    before = parallel.num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            parallel.set_num_threads(threads)
            given = columns(13, temperature=0.9, top_p=0.95, min_p=0.001)
            tokens, _ = sampling.sample(logits, **given)
            scores = sampling.topn_logprobs(logits, chosen=tokens, num_best=6)
            found.append((tokens, scores.chosen, scores.ranks, scores.ids, scores.logprobs))
    finally:
        parallel.set_num_threads(before)
    for other in found[1:]:
        assert all(map(same_bits, found[0], other))
