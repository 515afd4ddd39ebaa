"""Prompt tokens scored on a GPU: the CPU's scores, in groups of any size."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from octavo.models.base import Model
from octavo.sampling.logprobs import score_hidden
from octavo.types import TokenLogprobs
from octavo.worker.gpu.landing import Landings
from octavo.worker.gpu.runtime import CudaRuntime, HostRuntime, Runtime
from octavo.worker.gpu.scores import PendingScores, PromptScorer
from octavo_kernels.launch import collecting

VOCAB, HIDDEN = 40, 16


RUNTIME: Runtime = CudaRuntime() if torch.cuda.is_available() else HostRuntime()
DEVICE = RUNTIME.device


class Head:
    """A model that is a head alone; says how many rows it was given at a time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(DEVICE)
        self.sizes: list[int] = []

    def compute_logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        self.sizes.append(len(hidden))
        logits = (hidden[:, None] * self.weight).sum(2)
        return logits if out is None else out.copy_(logits)


def read(scorer: PromptScorer, pending: PendingScores) -> list[TokenLogprobs | None]:
    event = RUNTIME.event()
    event.record()
    event.wait()
    return scorer.read(pending)


def close(got: TokenLogprobs | None, want: TokenLogprobs | None) -> bool:
    assert got is not None and want is not None
    assert (got.token_id, got.rank) == (want.token_id, want.rank)
    assert [i for i, _ in got.top] == [i for i, _ in want.top]
    assert [x for _, x in got.top] == pytest.approx([x for _, x in want.top], abs=1e-5)
    return got.logprob == pytest.approx(want.logprob, abs=1e-5)


@pytest.mark.parametrize("num_best", [0, 2, 50])
def test_scores_are_the_cpu_scores(num_best: int) -> None:
    generator = torch.Generator().manual_seed(num_best)
    hidden = torch.randn(8, HIDDEN, generator=generator).to(DEVICE)
    ids = torch.randint(0, VOCAB, (3, 20), generator=generator, dtype=torch.int32)
    tokens = ids.to(DEVICE)
    head, logits = Head(), torch.full((3, VOCAB), float("nan"), device=DEVICE)
    scorer = PromptScorer(tokens, logits=logits, runtime=RUNTIME)
    model = cast(Model, head)
    pending = [
        scorer.launch(model, hidden, row=1, start=5, num_best=num_best),
        scorer.launch(model, hidden[2:3], row=2, start=19, num_best=num_best),
    ]
    assert head.sizes == [3, 3, 2, 1]
    found = [read(scorer, scores) for scores in pending]
    for scores, rows, chosen in (
        (found[0], hidden, tokens[1, 5:13]),
        (found[1], hidden[2:3], tokens[2, 19:]),
    ):
        want = score_hidden(
            rows,
            compute_logits=lambda part: head.compute_logits(part).cpu(),
            chosen=chosen.tolist(),
            num_best=num_best,
        )
        assert len(scores) == len(want)
        assert all(map(close, scores, want))


def test_addresses_are_those_that_kernels_are_made_for() -> None:
    tokens = torch.zeros(3, 21, dtype=torch.int32, device=DEVICE)
    logits = torch.zeros(3, VOCAB, device=DEVICE)
    hidden = torch.zeros(9, HIDDEN, device=DEVICE)
    scorer = PromptScorer(tokens, logits=logits, runtime=RUNTIME)
    with collecting() as found:
        scorer.launch(cast(Model, Head()), hidden, row=1, start=2, num_best=1)
    tensors = [arg for launch in found for arg in launch.args if isinstance(arg, Tensor)]
    assert tensors and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def test_a_row_that_is_not_finite_has_no_score() -> None:
    hidden = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    hidden[2, 3] = float("nan")
    tokens = torch.zeros(1, 5, dtype=torch.int32, device=DEVICE)
    logits = torch.zeros(3, VOCAB, device=DEVICE)
    scorer = PromptScorer(tokens, logits=logits, runtime=RUNTIME)
    pending = scorer.launch(cast(Model, Head()), hidden.to(DEVICE), row=0, start=1, num_best=1)
    assert [score is None for score in read(scorer, pending)] == [False, False, True, False]


def test_memory_of_the_host_is_lent_once_at_a_time() -> None:
    landings = Landings(HostRuntime())
    words = torch.arange(5000, dtype=torch.int32)
    lent = [landings.fetch(words[:size]) for size in (10, 20, 5000)]
    assert len({host.data_ptr() for host in lent}) == 3
    assert lent[1][:20].tolist() == list(range(20)) and lent[2].shape[0] >= 5000
    for host in lent:
        landings.give_back(host)
    again = [landings.fetch(words[:size]).data_ptr() for size in (3000, 4, 5)]
    assert again[0] == lent[2].data_ptr() and set(again) == {host.data_ptr() for host in lent}
