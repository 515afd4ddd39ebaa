"""Learning rates and the order of samples, both functions of the step alone: a run that goes on
from a checkpoint needs nothing but its number. Knows no model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

_SORTED_BATCHES = 16  # as many batches' samples are sorted by length, so that few are padded


def learning_rate(
    step: int, *, num_steps: int, peak: float, warmup_ratio: float, min_ratio: float
) -> float:
    """Of optimizer step ``step`` (from 0): a linear rise to the peak, then half a cosine."""
    warmup = math.ceil(num_steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(num_steps - 1 - warmup, 1)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


@dataclass(frozen=True, slots=True)
class Order:
    """Which samples an optimizer step sees: ``batch`` of them, of like length, each once an epoch.

    ``lengths`` are the samples' own; a step has the same samples however many ranks share them.
    """

    lengths: Sequence[int]
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return max(len(self.lengths) // self.batch, 1)

    def epoch(self, number: int) -> list[list[int]]:
        """Samples of each step. Those that do not fill a last batch wait for the next epoch."""
        rng = random.Random(f"{self.seed}-{number}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        size = self.batch * _SORTED_BATCHES
        alike = [
            sorted(order[start : start + size], key=lambda i: (self.lengths[i], i))
            for start in range(0, len(order), size)
        ]
        flat = [number for part in alike for number in part]
        batches = [flat[start : start + self.batch] for start in range(0, len(flat), self.batch)]
        if len(batches) > 1 and len(batches[-1]) < self.batch:
            batches.pop()
        rng.shuffle(batches)
        return batches
