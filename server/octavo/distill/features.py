"""Samples as the head sees them: hidden states around each answer, computed or kept in a file.

Of a sample with a prompt of P tokens and an answer of A, place P - 1 is the first to draft at: it
sees the answer's first token and guesses the second. Before it come at most ``window - 1`` places
of context, whose keys alone are needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from octavo.distill.samples import Sample
from octavo.distill.target import States, Target
from octavo.distill.unroll import Features

_READ_TOGETHER = 64  # texts between two movements of the bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B samples side by side: C places of context, R of answers."""

    features: Features
    hidden: Tensor  # [B, R, H] the target's, which say what comes after place r
    log_norm: Tensor  # [B, R]
    is_label: Tensor  # [B, R] bool, False where padded
    true_ids: Tensor  # [B, R] what does come; -1 where the answer has ended


class StateSource(Protocol):
    """Gives samples' hidden states by their number."""

    def states(self, numbers: Sequence[int]) -> list[States]: ...


def places(sample: Sample, *, window: int) -> tuple[Sequence[int], int, int]:
    """Of a sample: token ids, the first place with taps, and the first with a label."""
    prompt = len(sample.prompt_token_ids)
    return sample.all_ids, max(prompt - window, 0), prompt


class ComputedStates:
    """Runs the target anew whenever it is asked."""

    def __init__(self, target: Target, samples: Sequence[Sample], *, window: int) -> None:
        self._target = target
        self._samples = samples
        self._window = window

    def states(self, numbers: Sequence[int]) -> list[States]:
        texts = [places(self._samples[number], window=self._window) for number in numbers]
        return self._target.read(texts)


class CachedStates:
    """Reads what `write_cache` kept."""

    def __init__(self, folder: Path, samples: Sequence[Sample], *, window: int) -> None:
        self._layout = _Layout(samples, window=window)
        size = json.loads((folder / "states.json").read_text("utf-8"))["hidden_size"]
        self._taps, self._hidden, self._norms = self._layout.open(folder, size=size, mode="r")

    def states(self, numbers: Sequence[int]) -> list[States]:
        taps, labels = self._layout.taps, self._layout.labels

        def rows(array: np.memmap, bounds: np.ndarray, number: int) -> Tensor:
            part = array[bounds[number] : bounds[number + 1]]
            return torch.from_numpy(np.array(part, dtype=np.float32))

        return [
            States(
                taps=rows(self._taps, taps, number),
                hidden=rows(self._hidden, labels, number),
                log_norm=rows(self._norms, labels, number),
            )
            for number in numbers
        ]


class _Layout:
    """Where each sample's rows lie in the three files."""

    def __init__(self, samples: Sequence[Sample], *, window: int) -> None:
        spans = [places(sample, window=window) for sample in samples]
        self.taps = np.cumsum([0, *(len(ids) - first for ids, first, _ in spans)])
        self.labels = np.cumsum([0, *(len(ids) - label for ids, _, label in spans)])

    def open(self, folder: Path, *, size: int, mode: str) -> tuple[np.memmap, np.memmap, np.memmap]:
        taps, labels = int(self.taps[-1]), int(self.labels[-1])
        parts = (
            ("taps.f16", np.float16, (taps, 3 * size)),
            ("hidden.f16", np.float16, (labels, size)),
            ("norms.f32", np.float32, (labels,)),
        )
        one, two, three = (
            np.memmap(folder / name, dtype, mode=mode, shape=shape)  # type: ignore[call-overload]
            for name, dtype, shape in parts
        )
        return one, two, three


def write_cache(
    folder: Path,
    target: Target,
    samples: Sequence[Sample],
    *,
    window: int,
    key: str,
    show_bar: bool,
) -> None:
    """Keeps all samples' states in float16 in a folder, unless they are there already.

    ``key`` names all that they depend on beside samples and window.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = target.model.spec.hidden_size
    layout = _Layout(samples, window=window)
    what = {
        "key": key,
        "window": window,
        "hidden_size": size,
        "places": [int(layout.taps[-1]), int(layout.labels[-1])],
    }
    mark = folder / "states.json"
    if mark.is_file() and json.loads(mark.read_text("utf-8")) == what:
        return
    mark.unlink(missing_ok=True)
    taps, hidden, norms = layout.open(folder, size=size, mode="w+")
    computed = ComputedStates(target, samples, window=window)
    largest = float(np.finfo(np.float16).max)
    with tqdm(total=len(samples), desc="hidden states", disable=not show_bar) as bar:
        for start in range(0, len(samples), _READ_TOGETHER):
            numbers = range(start, min(start + _READ_TOGETHER, len(samples)))
            for number, states in zip(numbers, computed.states(numbers), strict=True):
                rows = slice(layout.taps[number], layout.taps[number + 1])
                taps[rows] = states.taps.clamp(-largest, largest).cpu().numpy()
                rows = slice(layout.labels[number], layout.labels[number + 1])
                hidden[rows] = states.hidden.clamp(-largest, largest).cpu().numpy()
                norms[rows] = states.log_norm.cpu().numpy()
            bar.update(len(numbers))
    for array in (taps, hidden, norms):
        array.flush()
    mark.write_text(json.dumps(what), encoding="utf-8")


def make_batch(
    samples: Sequence[Sample],
    states: Sequence[States],
    *,
    token_vectors: Tensor,
    window: int,
) -> Batch:
    """Pads samples and their states into one batch, on the token vectors' device."""
    spans = [places(sample, window=window) for sample in samples]
    num_context = max(label - 1 - first for _, first, label in spans)
    num_answer = max(len(sample.token_ids) for sample in samples)
    count, size, device = len(samples), token_vectors.shape[1], token_vectors.device
    shape = count, num_context + num_answer
    taps = torch.zeros(*shape, states[0].taps.shape[1], device=device)
    next_ids = torch.zeros(shape, dtype=torch.int64)
    is_text = torch.zeros(shape, dtype=torch.bool)
    hidden = torch.zeros(count, num_answer, size, device=device)
    log_norm = torch.zeros(count, num_answer, device=device)
    is_label = torch.zeros(count, num_answer, dtype=torch.bool)
    true_ids = torch.full((count, num_answer), -1)
    for row, (sample, state, (ids, first, label)) in enumerate(
        zip(samples, states, spans, strict=True)
    ):
        start = num_context - (label - 1 - first)
        # Places first .. n - 2: the last token's own place has no next token to see.
        used = slice(start, start + len(ids) - 1 - first)
        taps[row, used] = state.taps[:-1]
        next_ids[row, used] = torch.tensor(ids[first + 1 :])
        is_text[row, used] = True
        answer = len(sample.token_ids)
        hidden[row, :answer] = state.hidden
        log_norm[row, :answer] = state.log_norm
        is_label[row, :answer] = True
        true_ids[row, : answer - 1] = torch.tensor(sample.token_ids[1:])
    return Batch(
        features=Features(
            taps=taps,
            embedded=token_vectors[next_ids.to(device)],
            is_text=is_text.to(device),
            num_context=num_context,
        ),
        hidden=hidden,
        log_norm=log_norm,
        is_label=is_label.to(device),
        true_ids=true_ids.to(device),
    )
