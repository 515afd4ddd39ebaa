"""The GPU's sampler against the CPU's: the same logits and parameters, the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from octavo.models.base import Model
from octavo.sampling import LogitParamsTable, Sampled, Sampler, SamplingBatch, SamplingColumns
from octavo.types import SamplingParams, TokenLogprobs
from octavo.worker.gpu.arena import RequestArena, request_columns
from octavo.worker.gpu.buffers import StepBuffers, StepSizes
from octavo.worker.gpu.logit_lists import LogitLists
from octavo.worker.gpu.runtime import CudaRuntime, HostRuntime, Runtime
from octavo.worker.gpu.sampler import GpuSampler, PendingSamples, Rows
from octavo.worker.gpu.upload import Upload, upload_words
from octavo_kernels import op_runs
from octavo_kernels.launch import collecting
from octavo_kernels.op_runs import RUNS, Scene
from octavo_kernels.shape import ModelShape

VOCAB, HIDDEN, ROWS = 300, 16, 8
SIZES = StepSizes(
    max_num_seqs=ROWS,
    max_num_tokens=20,
    max_model_len=60,
    block_size=16,
    num_blocks=32,
    hidden_size=HIDDEN,
    vocab_size=VOCAB,
    dtype=torch.float32,
)
GREEDY = SamplingParams(temperature=0.0)
KINDS: Mapping[str, SamplingParams] = {
    "greedy": GREEDY,
    "seeded": SamplingParams(seed=2**63 + 5, logprobs=0),
    "filters": SamplingParams(seed=3, top_k=20, top_p=0.9, min_p=0.02, temperature=1.3),
    "penalties": SamplingParams(
        temperature=0.0,
        repetition_penalty=1.7,
        frequency_penalty=0.8,
        presence_penalty=0.5,
        logprobs=3,
    ),
    "bias": SamplingParams(seed=-4, logit_bias=((5, 6.0), (9, -100.0), (299, 6.5)), logprobs=2),
    "allowed": SamplingParams(seed=8, allowed_token_ids=(17, 18, 200, 299, 31), top_p=0.8),
    "bad words": SamplingParams(temperature=0.0, bad_words_token_ids=((7, 31), (40,), (), (31, 7))),
    "min tokens": SamplingParams(
        temperature=0.0, min_tokens=2, eos_token_ids=(1,), stop_token_ids=(2, 3), logprobs=1
    ),
}
ALL = list(KINDS.values())


class LookUp:
    """A model whose hidden rows name rows of a table of logits."""

    def __init__(self, device: torch.device) -> None:
        self.table = torch.zeros(SIZES.max_num_tokens, VOCAB, device=device)

    def compute_logits(self, hidden: Tensor, *, out: Tensor) -> Tensor:
        return out.copy_(self.table[hidden[:, 0].long()])


def new_runtime() -> Runtime:
    return CudaRuntime() if torch.cuda.is_available() else HostRuntime()


class Rig:
    """A sampler with what stands around it, and the CPU's beside it with the same requests."""

    def __init__(self, sizes: StepSizes = SIZES) -> None:
        self.runtime = runtime = new_runtime()
        rows = sizes.max_num_seqs
        columns = request_columns(sizes)
        self.arena = RequestArena(columns, num_rows=rows, device=runtime.device)
        self.buffers = StepBuffers.create(
            sizes, num_words=upload_words(sizes), device=runtime.device
        )
        self.upload = Upload(runtime, sizes=sizes, words=self.buffers.words, arena=self.arena)
        self.sampler = GpuSampler(self.arena, sizes=sizes, runtime=runtime, max_logprobs=5)
        self.lookup = LookUp(runtime.device)
        self.model = cast(Model, self.lookup)
        self.buffers.hidden[:, 0] = torch.arange(sizes.max_num_tokens)
        self.token_ids = np.zeros((rows, sizes.max_model_len + 1), np.int32)
        self.num_prompt = np.zeros(rows, np.int32)
        self.num_tokens = np.zeros(rows, np.int32)
        self.params: dict[int, SamplingParams] = {}
        self.table = LogitParamsTable(
            self.token_ids, num_prompt_tokens=self.num_prompt, num_tokens=self.num_tokens
        )

    def add(
        self, row: int, params: SamplingParams, *, prompt: Sequence[int], output: Sequence[int] = ()
    ) -> None:
        tokens = [*prompt, *output]
        self.upload.put("token_ids", row, tokens)
        self.upload.put("num_prompt_tokens", row, len(prompt))
        self.upload.put("num_tokens", row, len(tokens))
        self.sampler.set_row(row, params, self.upload)
        self.token_ids[row, : len(tokens)] = tokens
        self.num_prompt[row], self.num_tokens[row] = len(prompt), len(tokens)
        self.table.set(row, params)
        self.params[row] = params

    def remove(self, row: int) -> None:
        self.sampler.clear_row(row)
        self.table.clear(row)
        del self.params[row]

    def launch(self, logits: Tensor, rows: Sequence[int], *, padding: int = 0) -> PendingSamples:
        """Draws for rows from logits [S, V], which belong to tokens in the reverse order."""
        table_rows = self.fill(logits, rows)
        size, scores = len(rows), None
        if self.sampler.is_plain(table_rows):
            self.upload.send()
            self.sampler.launch_plain(self.model, self.buffers, size + padding)
        else:
            staged = self.sampler.stage(table_rows, self.upload)
            self.upload.send()
            scores = self.sampler.launch(self.model, self.buffers, staged)
        return self.sampler.fetch(self.buffers, size, scores)

    def fill(self, logits: Tensor, rows: Sequence[int]) -> Rows:
        """Stages the batch; the rows as an array."""
        size = len(rows)
        places = np.arange(size)[::-1].astype(np.int32)
        where = torch.from_numpy(places.astype(np.int64)).to(self.runtime.device)
        self.lookup.table[where] = logits.to(self.runtime.device)
        table_rows = np.array(rows, np.int64)
        self.upload.batch.fill(
            rows=table_rows,
            query_ends=np.arange(1, size + 1),
            seq_lens=self.num_tokens[table_rows],
            sample_tokens=places,
            sample_rows=table_rows,
            sample_positions=self.num_tokens[table_rows],
        )
        return table_rows

    def read(self, pending: PendingSamples) -> Sampled:
        event = self.runtime.event()
        event.record()
        event.wait()
        return self.sampler.read(pending)

    def on_cpu(self, logits: Tensor, rows: Sequence[int]) -> Sampled:
        slots = np.array(rows, np.int32)
        params = [self.params[row] for row in rows]
        active = self.table.is_active[slots]

        slots_held = range(len(self.num_tokens))
        every = [self.params.get(slot, SamplingParams()) for slot in slots_held]

        def column(name: str, kind: Any) -> Any:
            return np.array([getattr(p, name) for p in every], kind)

        batch = SamplingBatch(
            slots=slots,
            columns=SamplingColumns(
                temperature=column("temperature", np.float32),
                top_k=column("top_k", np.int32),
                top_p=column("top_p", np.float32),
                min_p=column("min_p", np.float32),
                seeds=np.array([(p.seed + 2**63) % 2**64 - 2**63 for p in every], np.int64),
            ),
            positions=self.num_tokens[slots].astype(np.int64),
            has_params=active,
            params=self.table.packed() if active.any() else None,
            num_logprobs=[p.logprobs for p in params],
        )
        return Sampler(VOCAB).sample(logits.clone(), batch)

    def append(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """The CPU's turn to remember what was drawn."""
        for row, token in zip(rows, tokens, strict=True):
            if token >= 0:
                self.token_ids[row, self.num_tokens[row]] = token
                self.num_tokens[row] += 1

    def step(self, logits: Tensor, rows: Sequence[int]) -> Sampled:
        """One step of both, which must agree."""
        got = self.read(self.launch(logits, rows))
        assert_same(got, self.on_cpu(logits, rows))
        self.append(rows, got.token_ids)
        return got

    def known(self) -> list[list[int]]:
        """Tokens of every row, as the device has them."""
        lengths = self.arena.view("num_tokens").tolist()
        table = self.arena.view("token_ids").tolist()
        return [tokens[:length] for tokens, length in zip(table, lengths, strict=True)]


def assert_same(got: Sampled, want: Sampled) -> None:
    assert got.token_ids == want.token_ids
    assert dict(got.errors) == dict(want.errors)
    assert set(got.logprobs) == {row for row in want.logprobs if row not in want.errors}
    for row, score in got.logprobs.items():
        assert_close(score, want.logprobs[row])


def assert_close(got: TokenLogprobs, want: TokenLogprobs) -> None:
    assert (got.token_id, got.rank) == (want.token_id, want.rank)
    assert got.logprob == pytest.approx(want.logprob, abs=1e-5)
    assert [i for i, _ in got.top] == [i for i, _ in want.top]
    assert [x for _, x in got.top] == pytest.approx([x for _, x in want.top], abs=1e-5)


def logits_for(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * 3


def filled(kinds: Sequence[SamplingParams] = ALL) -> Rig:
    rig = Rig()
    for row, params in enumerate(kinds):
        rig.add(row, params, prompt=[7, row, 7], output=[31] if row % 2 else [])
    return rig


def test_every_parameter_acts_as_on_the_cpu_step_after_step() -> None:
    rig, order = filled(), [3, 0, 7, 5, 1, 6, 2, 4]
    want = [[7, row, 7] + [31] * (row % 2) for row in range(ROWS)]
    for step in range(3):
        logits = logits_for(ROWS, step)
        logits[order.index(3), 7] = 20.0  # again and again, but for the penalties
        logits[order.index(6), 7 if step % 2 else 31] = 30.0  # ends a bad word
        logits[order.index(7), 1:4] = 25.0  # stops
        found = rig.step(logits, order)
        assert not found.errors
        assert {order[place] for place in found.logprobs} == {1, 3, 4, 7}
        for row, token in zip(order, found.token_ids, strict=True):
            want[row].append(token)
    assert rig.known() == want
    stops = [tokens in (1, 2, 3) for tokens in want[7][4:]]
    assert stops == [False, True, True]  # one token of output, then two


def test_a_row_draws_the_same_alone_plain_or_among_rows_with_parameters() -> None:
    logits = logits_for(5, 1)
    together = filled().step(logits, range(5))
    assert filled().sampler.is_plain(np.array([0, 2]))
    assert not filled().sampler.is_plain(np.array([0, 1]))
    for rows in ([0, 2], [3, 2, 1]):
        apart = filled().step(logits[list(rows)], rows)
        assert apart.token_ids == [together.token_ids[row] for row in rows]
        for place, score in apart.logprobs.items():
            assert score == together.logprobs[rows[place]]


def test_nothing_of_a_row_is_left_to_its_next_holder() -> None:
    rig = filled()
    rig.step(logits_for(4, 0), [1, 3, 5, 7])
    for row in range(ROWS):
        rig.remove(row)
    # Each takes a place in which something else was forbidden, counted or wanted.
    for row, params in enumerate(reversed(ALL)):
        rig.add(row, params, prompt=[row + 20], output=[40, 31, 31])
    rig.step(logits_for(4, 1), [0, 2, 4, 7])
    for row in (0, 3, 7):
        rig.remove(row)
        rig.add(row, SamplingParams(temperature=0.0, presence_penalty=0.1), prompt=[1])
    rig.remove(5)
    rig.add(5, GREEDY, prompt=[5])
    found = rig.step(logits_for(6, 2), [0, 3, 4, 5, 6, 7])
    assert set(found.logprobs) == {2, 4}


def test_padding_draws_for_nobody() -> None:
    rig = filled()
    rig.upload.send()
    before = rig.known()
    for buffer in (rig.buffers.sampled, rig.buffers.status):
        buffer.fill_(-5)
    found = rig.read(rig.launch(logits_for(2, 0), [2, 0], padding=3))
    want = rig.on_cpu(logits_for(2, 0), [2, 0])
    assert found.token_ids == want.token_ids and not found.errors
    after = rig.known()
    assert after[2] == [*before[2], want.token_ids[0]]
    assert after[0] == [*before[0], want.token_ids[1]]
    assert [after[row] for row in (1, 3, 4, 5, 6, 7)] == [before[r] for r in (1, 3, 4, 5, 6, 7)]
    assert rig.buffers.sampled[5:].tolist() == [-5] * 3


def test_a_captured_draw_draws_for_any_batch() -> None:
    filters = KINDS["filters"]
    rig = filled([GREEDY, filters, filters, GREEDY, GREEDY])
    rig.read(rig.launch(logits_for(2, 5), [4, 3], padding=1))
    rig.append([4, 3], rig.buffers.sampled[:2].tolist())
    graph = rig.runtime.capture(lambda: rig.sampler.launch_plain(rig.model, rig.buffers, 3))
    for step, rows in enumerate(([2, 0, 1], [3, 1])):
        logits = logits_for(len(rows), step)
        want = rig.on_cpu(logits, rows)
        rig.fill(logits, rows)
        rig.upload.send()
        graph.replay()
        assert_same(rig.read(rig.sampler.fetch(rig.buffers, len(rows), None)), want)
        rig.append(rows, want.token_ids)
    on_cpu = zip(rig.token_ids, rig.num_tokens, strict=True)
    assert rig.known() == [tokens[:length].tolist() for tokens, length in on_cpu]


def test_errors_stay_in_their_row_and_append_nothing() -> None:
    forbidden = SamplingParams(
        temperature=0.0, allowed_token_ids=(4,), bad_words_token_ids=((4,),), logprobs=1
    )
    rig = filled([GREEDY, forbidden, GREEDY, ALL[1], GREEDY, ALL[3]])
    logits = logits_for(6, 3)
    logits[2, 5] = float("nan")
    logits[3, 299] = float("inf")
    logits[4] = -float("inf")
    before = [4 if row % 2 else 3 for row in range(6)] + [0, 0]
    found = rig.step(logits, range(6))
    assert set(found.errors) == {1, 2, 3, 4} and set(found.logprobs) == {5}
    assert "non-finite" in found.errors[2] and "forbid every token" in found.errors[1]
    assert [found.token_ids[row] for row in (1, 2, 3, 4)] == [-1] * 4
    drawn = [len(after) - known for after, known in zip(rig.known(), before, strict=True)]
    assert drawn == [1, 0, 0, 0, 0, 1, 0, 0]


def test_results_of_several_steps_wait_for_their_reading() -> None:
    rig, pending, want = filled([ALL[3], GREEDY, ALL[7], GREEDY]), [], []
    for step in range(3):
        rows = list(range(4 - step))
        logits = logits_for(len(rows), step)
        want.append(rig.on_cpu(logits, rows))
        pending.append(rig.launch(logits, rows))
        rig.append(rows, want[-1].token_ids)
    for results, expected in zip(pending, want, strict=True):
        assert_same(rig.read(results), expected)


def test_a_bias_given_twice_counts_twice() -> None:
    rig = Rig()
    twice = SamplingParams(temperature=0.0, logit_bias=((8, 15.0), (3, 20.0), (8, 15.0)))
    rig.add(0, twice, prompt=[1])
    assert rig.step(torch.zeros(1, VOCAB), [0]).token_ids == [8]


def test_lists_longer_than_any_before() -> None:
    lists = LogitLists(num_rows=3, runtime=new_runtime())
    first = lists.columns()
    assert lists.columns() is first and first["bias_ids"].data_ptr() % 16 == 0
    rig = Rig()
    rig.add(0, SamplingParams(temperature=0.0, allowed_token_ids=(5,) * 9000 + (6,)), prompt=[1])
    many = tuple((i, i + 1) for i in range(1, 4000))
    rig.add(1, SamplingParams(temperature=0.0, bad_words_token_ids=many), prompt=[1], output=[9])
    rig.add(2, SamplingParams(temperature=0.0, logit_bias=((11, 50.0),)), prompt=[1])
    logits = logits_for(3, 0)
    logits[0, 5], logits[0, 6], logits[1, 10] = 1.0, 2.0, 40.0
    found = rig.step(logits, [0, 1, 2])
    assert found.token_ids[0] == 6 and found.token_ids[1] != 10 and found.token_ids[2] == 11
    rig.remove(0)
    rig.add(0, SamplingParams(temperature=0.0, allowed_token_ids=(77,)), prompt=[1])
    assert rig.step(logits, [0, 1, 2]).token_ids[0] == 77


class SlowRuntime(HostRuntime):
    """Whose events say how often they were waited for since they were recorded."""

    def __init__(self) -> None:
        self.events: list[SlowEvent] = []

    def event(self) -> SlowEvent:
        self.events.append(SlowEvent())
        return self.events[-1]


class SlowEvent:
    def __init__(self) -> None:
        self.is_pending = False
        self.waits = 0

    def record(self) -> None:
        assert not self.is_pending, "memory was used again before its copy had run"
        self.is_pending = True

    def wait(self) -> None:
        self.waits += self.is_pending
        self.is_pending = False

    def is_done(self) -> bool:
        return not self.is_pending


def test_staged_lists_are_not_overwritten_on_their_way() -> None:
    from octavo.sampling.token_lists import TokenLists

    runtime = SlowRuntime()
    lists = LogitLists(num_rows=2, runtime=runtime)
    for token in range(7):
        lists.set(1, TokenLists.of(SamplingParams(allowed_token_ids=(token,))))
        columns = lists.columns()
        assert columns["allowed_starts"].tolist() == [0, 0, 1]
        assert columns["allowed_ids"][0] == token
    assert [event.waits for event in runtime.events] == [2, 1, 1]


def test_every_kernel_is_among_those_made_before_serving() -> None:
    shape = ModelShape(
        hidden=HIDDEN,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        ffn=16,
        vocab=VOCAB,
        activation_dtype=torch.float32,
    )
    with collecting() as listed:
        for batch in op_runs.batches():
            for name in ("sampling", "step_inputs"):
                RUNS[name](Scene(shape, batch, "meta"))
    keys = {launch.key for launch in listed}
    rig, sizes = filled(), (1, 2, 3, 5, 8)
    with collecting() as found:
        for size in sizes:
            rig.launch(logits_for(size, 0), range(size))
        for size in sizes:
            rig.sampler.launch_plain(rig.model, rig.buffers, size)
    used = {launch.key for launch in found}
    assert len(used) > 14 and used <= keys
    # Others are compiled for addresses that are not multiples of 16.
    tensors = [arg for launch in found for arg in launch.args if isinstance(arg, Tensor)]
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
