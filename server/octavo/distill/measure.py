"""How many of a head's drafts the target would accept, on texts that the target wrote.

Drafts are greedy chains of a fixed depth. A draft counts only while all before it were right, and
then the chain's tokens are the text's own: so all chains of a text are computed at once, fed the
text, and are exactly those that serving would draft. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo.distill.features import States, StateSource, make_batch
from octavo.distill.head import DraftHead
from octavo.distill.samples import Sample
from octavo.distill.trainer import Vectors
from octavo.distill.unroll import Chains

_TOGETHER = 8  # texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Of one set of texts."""

    depth: int
    num_texts: int
    num_steps: int  # of the target
    num_tokens: int  # that these steps yielded
    reached: tuple[int, ...]  # steps whose drafts were all right before this depth
    accepted: tuple[int, ...]  # and at it

    @property
    def tokens_per_step(self) -> float:
        """1 of the target's own, and the accepted drafts."""
        return self.num_tokens / max(self.num_steps, 1)

    @property
    def by_depth(self) -> tuple[float, ...]:
        """Chance that the draft of a depth is accepted where all before it were."""
        return tuple(a / max(r, 1) for a, r in zip(self.accepted, self.reached, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "depth": self.depth,
            "texts": self.num_texts,
            "tokens_per_step": round(self.tokens_per_step, 4),
            "acceptance_by_depth": [round(rate, 4) for rate in self.by_depth],
        }

    def __str__(self) -> str:
        rates = " ".join(f"{rate:.3f}" for rate in self.by_depth)
        return (
            f"{self.tokens_per_step:.3f} tokens a step at depth {self.depth}, "
            f"accepted by depth {rates} ({self.num_texts} texts, {self.num_steps} steps)"
        )


@torch.no_grad()
def measure(
    head: DraftHead,
    vectors: Vectors,
    samples: Sequence[Sample],
    source: StateSource,
    *,
    depth: int,
) -> Acceptance:
    """Acceptance of chains of ``depth`` drafts over the answers of all samples."""
    was_training = head.training
    head.eval()
    steps: list[int] = []
    rooms: list[int] = []
    for start in range(0, len(samples), _TOGETHER):
        numbers = range(start, min(start + _TOGETHER, len(samples)))
        part = samples[start : start + _TOGETHER]
        hits = _hits(head, vectors, part, source.states(numbers), depth=depth)
        for sample, right in zip(part, hits, strict=True):
            for count, room in walk(right, num_tokens=len(sample.token_ids)):
                steps.append(count)
                rooms.append(room)
    head.train(was_training)
    return Acceptance(
        depth=depth,
        num_texts=len(samples),
        num_steps=len(steps),
        num_tokens=sum(min(count + 1, room) for count, room in zip(steps, rooms, strict=True)),
        reached=tuple(
            sum(j <= count and j < room for count, room in zip(steps, rooms, strict=True))
            for j in range(depth)
        ),
        accepted=tuple(sum(j < count for count in steps) for j in range(depth)),
    )


def walk(right: Sequence[Sequence[bool]], *, num_tokens: int) -> Iterator[tuple[int, int]]:
    """Of each step of the target over an answer: drafts accepted, and tokens that were left.

    ``right[j][r]``: whether depth j, at place r, guesses what follows answer token r. A step at
    place r drafts at r, r + 1, ...; it yields the accepted tokens and one of the target's own.
    """
    place, end = 0, num_tokens - 1
    while place < end:
        room = end - place
        count = 0
        while count < min(len(right), room) and right[count][place + count]:
            count += 1
        yield count, room
        place += count + 1


def _hits(
    head: DraftHead,
    vectors: Vectors,
    samples: Sequence[Sample],
    states: Sequence[States],
    *,
    depth: int,
) -> list[list[list[bool]]]:
    """By sample, depth and place: whether all drafts up to this depth are the text's."""
    batch = make_batch(
        samples,
        states,
        token_vectors=vectors.tokens,
        window=head.config.window,
        mask_token_id=head.config.mask_token_id,
    )
    chains = Chains(head, batch.features)
    found = torch.zeros(depth, len(batch.true_ids), dtype=torch.bool)
    for step in range(depth):
        drafts = vectors.draft_ids[torch.matmul(chains.outputs, vectors.rows.T).argmax(-1)]
        is_right = drafts == batch.true_ids[chains.at]
        found[step, chains.at.cpu()] = is_right.cpu()
        if step + 1 < depth:
            chains.go_on(is_right)
    counts = [len(sample.token_ids) for sample in samples]
    return [part.tolist() for part in torch.split(found, counts, dim=1)]
