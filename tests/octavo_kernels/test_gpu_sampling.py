"""GPU sampling: the CPU op's very tokens, draws, hard rows, and parameters kept on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from octavo_kernels import sampling
from octavo_kernels.launch import jit, launch
from octavo_kernels.sampling import LogitParams, gpu, gpu_params, tunable
from octavo_kernels.sampling.gpu_numbers_kernel import exp_negative, philox, row_noise, token_draw
from octavo_kernels.testing import gpu_device, same_bits

DEVICE = gpu_device()
INF = float("inf")
KINDS = {"top_k": torch.int32, "seeds": torch.int64, "positions": torch.int64}


def columns(rows: int, **values: Any) -> dict[str, Any]:
    """Parameters of rows on the CPU: one value for all, or a list."""
    found: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    found |= {"seeds": list(range(-3, rows - 3)), "positions": list(range(rows))} | values
    return {
        name: torch.tensor(value if isinstance(value, list) else [value] * rows).to(
            KINDS.get(name, torch.float32)
        )
        for name, value in found.items()
    }


def on_gpu(logits: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    moved: dict[str, Any] = {name: x.to(DEVICE) for name, x in given.items()}
    tokens, status = gpu.sample(logits.to(DEVICE), **moved)
    return tokens.cpu(), status.cpu()


def assert_as_on_cpu(logits: Tensor, given: dict[str, Any]) -> None:
    tokens, status = on_gpu(logits, given)
    want, want_status = sampling.sample(logits.float(), **given)
    assert status.tolist() == want_status.tolist()
    assert tokens.tolist() == want.tolist()


@jit
def draws_kernel(seeds_ptr, positions_ptr, words_ptr, draws_ptr, exps_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # grid: (1,)
    c2, c3, k0, k1 = row_noise(seeds_ptr, positions_ptr, 0)
    lanes = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox(lanes.to(tl.uint32), c2, c3, k0, k1)
    at = words_ptr + lanes * 4
    tl.store(at, w0.to(tl.int32, bitcast=True))
    tl.store(at + 1, w1.to(tl.int32, bitcast=True))
    tl.store(at + 2, w2.to(tl.int32, bitcast=True))
    tl.store(at + 3, w3.to(tl.int32, bitcast=True))
    tl.store(draws_ptr + lanes, token_draw(lanes, c2, c3, k0, k1))
    tl.store(exps_ptr + lanes, exp_negative(-lanes.to(tl.float32) * 0.05))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-5, 77), (2**62 + 3, 2**40 + 9)])
def test_draws_are_the_reference_draws(seed: int, position: int) -> None:
    size = 2048
    words = torch.empty(size, 4, dtype=torch.int32, device=DEVICE)
    draws, exps = (torch.empty(size, device=DEVICE) for _ in range(2))
    ints = [torch.tensor([x], device=DEVICE) for x in (seed, position)]
    launch(draws_kernel, (1,), *ints, words, draws, exps, BLOCK=size, num_warps=4)
    low, high = position & 0xFFFFFFFF, position >> 32
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    for counter in (0, 1, 255, 2047):
        want = sampling.philox_reference((counter, 0, low, high), key)
        assert [x & 0xFFFFFFFF for x in words[counter].tolist()] == list(want)
    reference = sampling.draws_reference(size, seed=seed, position=position)
    torch.testing.assert_close(draws.cpu().double(), reference, rtol=5e-7, atol=0.0)
    wide = torch.exp(torch.arange(size, dtype=torch.float64) * -0.05)
    got = exps.cpu().double()  # of which the last above zero is at -87
    torch.testing.assert_close(got[:1740], wide[:1740], rtol=5e-6, atol=0.0)
    assert not got[1742:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_draws_the_cpu_tokens(dtype: torch.dtype) -> None:
    ways = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 0, 0.9, 0.0), (1.3, 3, 1.0, 0.0)]
    ways += [(0.7, 4, 0.8, 0.02), (1.0, 0, 1.0, 0.1), (1.0, 90, 0.9, 0.0), (1e-30, 0, 1.0, 0.0)]
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {
        name: list(column) for name, column in zip(names, zip(*ways, strict=True), strict=True)
    }
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(len(ways), 1301, generator=generator) * 3).to(dtype)
    assert_as_on_cpu(logits, columns(len(ways), **given))


def test_flat_rows_and_ties_at_the_threshold() -> None:
    logits = torch.zeros(4, 900)
    logits[1, 100:400] = 1.0
    logits[2] = torch.arange(900) % 3  # 300 tokens share the best place
    logits[3, :] = -INF
    logits[3, 700:] = -5.0
    given = columns(4, top_k=[3, 2, 0, 4], top_p=[0.5, 1.0, 0.4, 0.9])
    assert_as_on_cpu(logits, given)


def test_greedy_takes_the_lowest_of_equals_zeros_included() -> None:
    logits = torch.full((3, 700), -1.0)
    logits[0, [5, 300, 699]] = 2.0
    logits[1, [9, 400]] = torch.tensor([-0.0, 0.0])
    logits[2, 1:] = -INF
    assert on_gpu(logits, columns(3, temperature=0.0))[0].tolist() == [5, 9, 0]


def test_extreme_parameters_and_scratch_that_holds_anything() -> None:
    ways = {"temperature": [1e30, 1.0, 1.0, 1.0], "top_p": [1.0, 1e-9, 0.9999999, 1.0]}
    ways |= {"min_p": [0.0, 0.0, 0.0, 1.0], "top_k": [2**31 - 1, 0, 0, -1]}
    given = columns(4, **ways)
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(9)) * 5
    work = gpu.GpuWorkspace.create(6, vocab_size=300, dtype=torch.float32, device=DEVICE)
    for name in (
        "peaks",
        "bounds",
        "masses",
        "counts",
        "ranges",
        "cursors",
        "subs",
        "values",
        "ids",
        "cuts",
    ):
        scratch = getattr(work, name)
        scratch.fill_(float("nan") if scratch.is_floating_point() else 2**30)
    moved = {name: x.to(DEVICE) for name, x in given.items()}
    tokens, status = gpu.sample(logits.to(DEVICE), **moved, workspace=work)
    assert status.tolist() == [0] * 4
    assert tokens.tolist() == sampling.sample(logits, **given)[0].tolist()
    assert tokens.tolist()[1] == int(logits[1].argmax())


def test_more_candidates_than_the_list_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 1100, generator=torch.Generator().manual_seed(1)) * 0.1
    given = columns(3, top_k=[0, 4, 5], top_p=[0.9, 0.7, 1.0])
    monkeypatch.setattr(gpu, "CAPACITY", 16)
    logits[1] = torch.floor(logits[1] * 10)  # hundreds of equals
    assert_as_on_cpu(logits, given)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_cuts_hang_on_no_guess(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Guesses right, wrong and useless, lists long and short find the same least kept key."""
    generator = torch.Generator().manual_seed(3)
    vocab_size = 3000
    logits = torch.randn(4, vocab_size, generator=generator)
    logits *= torch.tensor([3.0, 0.3, 0.01, 6.0])[:, None]
    logits[2] += 20.0
    logits[3, 2000:] = -INF
    given = columns(num_rows, top_p=0.9)
    given |= {"min_p": torch.tensor([0.0, 0.0, 0.0, 0.01])[:num_rows]}
    moved = {name: x.to(DEVICE) for name, x in given.items()}
    found, ways = [], set()
    guesses = [(None, 8192), (None, 1), ((-9e37, INF), 200), ((-9e37, INF), 8)]
    guesses += [((30.0, 40.0), 4096), ((-9e37, -9e36), 200), ((21.0, INF), 8)]
    guess_rows = gpu.guess_rows
    for bracket, capacity in guesses:

        def misguess(
            x: Tensor,
            filters: tuple[Tensor, ...],
            work: gpu.GpuWorkspace,
            bracket: tuple[float, float] | None = bracket,
        ) -> None:
            guess_rows(x, filters, work)
            if bracket is not None:
                work.ranges[:, 0], work.ranges[:, 1] = bracket

        monkeypatch.setattr(gpu, "guess_rows", misguess)
        monkeypatch.setattr(gpu, "CAPACITY", capacity)
        work = gpu.GpuWorkspace.create(
            num_rows, vocab_size=vocab_size, dtype=torch.float32, device=DEVICE
        )
        work.cursors.fill_(-1)
        gpu.sample(logits[:num_rows].to(DEVICE), **moved, workspace=work)
        found.append(work.cuts[:, 0].tolist())
        listed = work.cuts[:, 1] >= 0
        ways |= {(bool(a), int(b)) for a, b in zip(listed, work.cursors[:, 2], strict=True)}
    assert all(cuts == found[0] for cuts in found)
    assert {(True, 0), (True, 1)} <= ways
    for row in range(num_rows):
        weights = (logits[row].double() - logits[row].max().double()).exp()
        weights = weights[weights >= given["min_p"][row]].sort(descending=True).values
        num_kept = int((weights.cumsum(0) < 0.9 * weights.sum()).sum()) + 1
        least = torch.tensor(found[0][row], dtype=torch.int32)
        value = torch.where(least < 0, least ^ 0x7FFFFFFF, least).view(torch.float32)
        assert int((logits[row] >= value).sum()) == num_kept


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_cannot_be_sampled_fail_alone(temperature: float) -> None:
    logits = torch.randn(5, 600)
    logits[0, 400], logits[1, 3], logits[2] = float("nan"), INF, -INF
    logits[3, 7], logits[4, 0] = -INF, -float("nan")
    given = columns(5, temperature=temperature, top_k=[2, 0, 2, 0, 0], top_p=[0.9, 0.9, 1, 0.9, 1])
    tokens, status = on_gpu(logits, given)
    bad = sampling.NON_FINITE
    assert status.tolist() == [bad, bad, sampling.ALL_FORBIDDEN, 0, bad]
    want, _ = sampling.sample(logits, **given)
    assert tokens.tolist() == want.tolist() and tokens[2] == -1
    chosen = torch.tensor([0, 0, 0, 5, -1], device=DEVICE)
    scores = gpu.topn_logprobs(logits.to(DEVICE), chosen=chosen, num_best=2)
    assert scores.status.tolist() == [bad, bad, bad, 0, bad]
    assert int(scores.ids[3, 0]) == int(logits[3].argmax())


def test_the_cut_of_a_pass_changes_nothing() -> None:
    logits = torch.randn(2, 3000, device=DEVICE) * 3
    moved = {name: x.to(DEVICE) for name, x in columns(2).items()}
    noise = (moved["temperature"], moved["top_k"], moved["seeds"], moved["positions"])
    found = []
    for group, warps in ((1, 1), (2, 4), (4, 8), (8, 4)):
        peaks = torch.empty(2, 12, dtype=torch.int32, device=DEVICE)
        bounds = torch.empty(2, 12, device=DEVICE)
        gpu.read_all(logits, peaks, noise, bounds, {"group": group, "num_warps": warps})
        found.append((peaks, bounds))
    assert all(same_bits(a, b) for pair in found for a, b in zip(pair, found[0], strict=True))


def test_tunables_list_the_default_first() -> None:
    for one in tunable.TUNABLES:
        for key in one.keys:
            choices = list(one.candidates(key))
            assert len(choices) > 1 and choices.count(choices[0]) == 1


def test_scores_are_those_of_the_cpu() -> None:
    logits = torch.randn(4, 1100, generator=torch.Generator().manual_seed(2)) * 4
    logits[1] = logits[1].round()  # many ties
    logits[2, 4:] = -INF
    chosen = torch.tensor([0, 17, 900, 1099])
    got = gpu.topn_logprobs(logits.to(DEVICE), chosen=chosen.to(DEVICE), num_best=9)
    want = sampling.topn_logprobs(logits, chosen=chosen, num_best=9)
    for name in ("ranks", "ids", "status"):
        assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
    for name in ("chosen", "logprobs"):
        torch.testing.assert_close(
            getattr(got, name).cpu(), getattr(want, name), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, "float32, bfloat16 or float16"),
        ({"logits": torch.zeros(8, 2).T}, "contiguous"),
        ({"top_k": torch.zeros(2)}, "top_k must be torch.int32"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds must be"),
    ],
)
def test_what_has_no_kernel_is_refused(change: dict[str, Tensor], match: str) -> None:
    given: dict[str, Any] = {"logits": torch.zeros(2, 8)} | columns(2) | change
    with pytest.raises(ValueError, match=match):
        gpu.sample(**given)
    with pytest.raises(ValueError, match="num_best must be between 0 and 8"):
        gpu.topn_logprobs(torch.zeros(2, 8), chosen=torch.zeros(2, dtype=torch.int64), num_best=9)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def request_params(num_slots: int, vocab_size: int) -> LogitParams:
    """Three slots with everything, the others neutral."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, vocab_size, (num_slots, 40), generator=generator, dtype=torch.int32)
    tokens[1, 8:11] = ints(5, 6, 7)
    tokens[0, 2] = vocab_size + 5  # unknown to the model

    def floats(first: list[float], rest: float) -> Tensor:
        return torch.tensor(first + [rest] * (num_slots - 3))

    return LogitParams(
        token_ids=tokens,
        num_prompt_tokens=ints(10, 5, 40, *(num_slots - 3) * [2]),
        num_tokens=ints(37, 11, 40, *(num_slots - 3) * [4]),
        repetition_penalty=floats([1.3, 1.0, 0.7], 1.0),
        frequency_penalty=floats([0.0, 0.5, -0.25], 0.0),
        presence_penalty=floats([0.4, -0.2, 1.0], 0.0),
        min_tokens=ints(0, 7, 1, *(num_slots - 3) * [0]),
        bias_starts=ints(0, 2, 3, 3, *(num_slots - 3) * [3]),
        bias_ids=ints(4, vocab_size, 8),
        bias_values=torch.tensor([2.5, 1.0, -3.0]),
        allowed_starts=ints(0, 0, 5, 5, *(num_slots - 3) * [5]),
        allowed_ids=ints(4, 8, 7, -1, vocab_size - 1),
        bad_starts=ints(0, 0, 3, 3, *(num_slots - 3) * [3]),
        word_starts=ints(0, 1, 4, 6),
        bad_ids=ints(3, 6, 7, 8, 6, 4),
        stop_starts=ints(0, 0, 2, 4, *(num_slots - 3) * [4]),
        stop_ids=ints(1, 2, 1, vocab_size),
    )


def to_gpu(lists: LogitParams, vocab_size: int) -> gpu_params.GpuLogitParams:
    params = gpu_params.GpuLogitParams.create(
        num_slots=len(lists.num_tokens),
        vocab_size=vocab_size,
        max_tokens=lists.token_ids.shape[1],
        list_capacity=16,
        device=DEVICE,
    )
    for name in LogitParams.__slots__:
        source, target = getattr(lists, name), getattr(params.lists, name)
        target[: len(source)] = source.to(DEVICE)
    params.counts.fill_(77)
    params.grammar.fill_(0x55555555)
    gpu_params.load_slots(params, torch.arange(len(lists.num_tokens), dtype=torch.int32).to(DEVICE))
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_change_logits_as_on_the_cpu(dtype: torch.dtype) -> None:
    vocab_size = 75
    lists = request_params(4, vocab_size)
    params = to_gpu(lists, vocab_size)
    logits = torch.randn(6, vocab_size).to(dtype)
    # Rows and slots in any order; the last entries hold nothing, or nothing that exists.
    rows, slots = ints(5, 0, 3, 2, -1, 1, 6), ints(0, 2, 1, 3, 1, -1, 0)
    got = logits.clone().to(DEVICE)
    gpu_params.apply_logit_params(got, params=params, rows=rows.to(DEVICE), slots=slots.to(DEVICE))
    want = logits.clone().float()
    sampling.apply_logit_params(want, params=lists, rows=rows[:4], slots=slots[:4])
    if dtype == torch.float32:
        assert same_bits(got.cpu(), want)
    torch.testing.assert_close(got.cpu().float(), want, rtol=2e-3, atol=2e-3)
    assert same_bits(got.cpu()[[1, 4]], logits[[1, 4]])


def test_drafts_before_a_row_count_as_its_output() -> None:
    """Rows of one slot behind 0 to 3 drafts, which complete a bad word, reach the minimum length
    and are penalised; the counts stay what they were."""
    vocab_size = 75
    lists = request_params(4, vocab_size)
    lists.token_ids[1, 10:14] = ints(6, 7, 3, 6)
    params = to_gpu(lists, vocab_size)
    logits = torch.randn(8, vocab_size)
    rows, slots, drafts = ints(5, 0, 3, 2, 1, 6), ints(1, 1, 1, 1, 0, 3), ints(0, 1, 2, 3, 2, 1)
    got, counts = logits.clone().to(DEVICE), params.counts.clone()
    gpu_params.apply_logit_params(
        got,
        params=params,
        rows=rows.to(DEVICE),
        slots=slots.to(DEVICE),
        num_drafts=drafts.to(DEVICE),
    )
    want = logits.clone()
    sampling.apply_logit_params(want, params=lists, rows=rows, slots=slots, num_drafts=drafts)
    assert same_bits(got.cpu(), want)
    assert len({tuple(row) for row in (got - logits.to(DEVICE)).tolist()}) == 6
    assert torch.equal(params.counts, counts)


def test_a_grammar_forbids_what_its_mask_lacks() -> None:
    params = to_gpu(request_params(4, 75), 75)
    logits = torch.zeros(2, 75, device=DEVICE)
    at = ints(1, -1).to(DEVICE)
    for has_grammar in (0, 1):
        assert not logits.any()
        params.has_grammar[3] = has_grammar
        gpu_params.apply_logit_params(logits, params=params, rows=at, slots=at + 2)
    assert not logits[0].any()
    assert (logits[1] == 0).nonzero()[:, 0].tolist() == list(range(0, 75, 2))


def test_drawn_tokens_are_counted_as_if_they_had_been_there() -> None:
    vocab_size = 75
    lists = request_params(4, vocab_size)
    params = to_gpu(lists, vocab_size)
    steps = torch.tensor([[3, 3, -1], [70, -1, -1], [5, 6, 7], [-1, -1, -1]])
    slots = ints(1, 3, 2, -1)
    gpu_params.extend(params, slots=slots.to(DEVICE), tokens=steps.to(DEVICE))
    token_ids, num_tokens = lists.token_ids.clone(), lists.num_tokens.clone()
    token_ids[1, 11:13], token_ids[3, 4] = 3, 70  # slot 2 is full
    num_tokens += ints(0, 2, 0, 1)
    assert torch.equal(params.lists.token_ids.cpu(), token_ids)
    assert torch.equal(params.lists.num_tokens.cpu(), num_tokens)
    fresh = to_gpu(replace(lists, token_ids=token_ids, num_tokens=num_tokens), vocab_size)
    assert torch.equal(params.counts, fresh.counts)
    one = torch.tensor([9, -1, 2, 1], device=DEVICE)
    gpu_params.extend(params, slots=ints(0, 1, -1, 9).to(DEVICE), tokens=one)
    assert params.lists.num_tokens.cpu().tolist() == [38, 13, 40, 5]


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_vocabularies_draw_the_cpu_tokens(spread: float, dtype: torch.dtype) -> None:
    ways = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 50, 0.9, 0.0), (1.0, 0, 0.9, 0.0)]
    ways += [(1.2, 0, 1.0, 0.05), (1.0, 1000, 0.95, 0.0), (2.0, 0, 0.01, 0.0), (1.0, 1, 1.0, 0.0)]
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: list(x) * 4 for name, x in zip(names, zip(*ways, strict=True), strict=True)}
    generator = torch.Generator().manual_seed(6)
    logits = (torch.randn(len(ways) * 4, 128256, generator=generator) * spread).to(dtype)
    assert_as_on_cpu(logits, columns(len(ways) * 4, **given))


def test_results_go_where_they_are_wanted_and_no_further() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    given = columns(3, temperature=[0.0, 1.0, 0.0])
    out = torch.full((6,), -9, device=DEVICE), torch.full((8,), -9, device=DEVICE).int()
    moved: dict[str, Any] = {name: x.to(DEVICE) for name, x in given.items()}
    places = out[0][2:5], out[1][4:7]
    tokens, status = gpu.sample(logits.to(DEVICE), **moved, out=places)
    assert tokens is places[0] and status is places[1]
    want = sampling.sample(logits, **given)[0].tolist()
    assert out[0].tolist() == [-9, -9, *want, -9] and out[1].tolist() == [*[-9] * 4, 0, 0, 0, -9]
    with pytest.raises(ValueError, match=r"out\[1\] must be torch.int32 \[3\]"):
        gpu.sample(logits.to(DEVICE), **moved, out=(out[0][:3], out[1]))


def test_every_list_of_parameters_has_its_own_size() -> None:
    """One stop and no bias beside many bad words: a short list cuts no other short."""
    params = gpu_params.GpuLogitParams.create(
        num_slots=2, vocab_size=300, max_tokens=8, list_capacity=1, device=DEVICE
    )

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    lists = replace(
        params.lists,
        min_tokens=ints(0, 4),
        bad_starts=ints(0, 0, 3),
        word_starts=ints(0, 1, 2, 3),
        bad_ids=ints(20, 30, 40),
        stop_starts=ints(0, 0, 1),
        stop_ids=ints(50),
        bias_starts=ints(0, 1, 1),
        bias_ids=ints(60),
    )
    logits = torch.zeros(1, 300, device=DEVICE)
    row, slot = ints(0), ints(1)
    gpu_params.apply_logit_params(logits, params=replace(params, lists=lists), rows=row, slots=slot)
    assert (logits[0] == -INF).nonzero()[:, 0].tolist() == [20, 30, 40, 50]
