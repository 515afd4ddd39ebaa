"""Samples as the head sees them: hidden states around each answer, computed or kept in a file.

Of a sample with a prompt of P tokens and an answer of A, place P - 1 is the first to draft at: it
sees the answer's first token and guesses the second. Before it come at most ``window - 1`` places
of context, whose keys alone are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from octavo.distill.loss import Labels
from octavo.distill.samples import Sample
from octavo.distill.target import Target
from octavo.distill.unroll import Features

_READ_TOGETHER = 64  # texts between two movements of the bar


Labeller = Callable[[Tensor, Tensor], Labels]  # of hidden states [M, H] and log norms [M]


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Of one sample with n places of taps and an answer of A tokens."""

    taps: Tensor  # [n, 3H] float32
    hidden: Tensor  # [A, H] float32, which say what comes after each token of the answer
    labels: Labels | None  # of the same places, where they are wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B samples side by side: C places of context, R of answers, of which M are not padding."""

    features: Features
    hidden: Tensor  # [M, H]
    labels: Labels | None  # of M places
    true_ids: Tensor  # [M] what does come; -1 where the answer has ended


class StateSource(Protocol):
    """Gives samples' hidden states by their number."""

    def states(self, numbers: Sequence[int]) -> list[States]: ...


def places(sample: Sample, *, window: int) -> tuple[Sequence[int], int, int]:
    """Of a sample: token ids, the first place with taps, and the first with a label."""
    prompt = len(sample.prompt_token_ids)
    return sample.all_ids, max(prompt - window, 0), prompt


class ComputedStates:
    """Runs the target anew whenever it is asked."""

    def __init__(
        self,
        target: Target,
        samples: Sequence[Sample],
        *,
        window: int,
        labeller: Labeller | None = None,
    ) -> None:
        self._target = target
        self._samples = samples
        self._window = window
        self._labeller = labeller

    def states(self, numbers: Sequence[int]) -> list[States]:
        texts = [places(self._samples[number], window=self._window) for number in numbers]
        read = self._target.read(texts)
        labels: Sequence[Labels | None] = [None] * len(read)
        if self._labeller is not None:
            norms = torch.cat([found.log_norm for found in read])
            joined = self._labeller(torch.cat([found.hidden for found in read]), norms)
            labels = joined.split([len(found.hidden) for found in read])
        return [
            States(taps=found.taps, hidden=found.hidden, labels=part)
            for found, part in zip(read, labels, strict=True)
        ]


class CachedStates:
    """Reads what `write_cache` kept."""

    def __init__(self, folder: Path, samples: Sequence[Sample], *, window: int) -> None:
        self._layout = _Layout(samples, window=window)
        what = json.loads((folder / "states.json").read_text("utf-8"))
        self._arrays = self._layout.open(
            folder, size=what["hidden_size"], top_k=what["top_k"], mode="r"
        )

    def states(self, numbers: Sequence[int]) -> list[States]:
        arrays, layout = self._arrays, self._layout

        def rows(array: np.memmap, bounds: np.ndarray, number: int, dtype: type) -> Tensor:
            part = array[bounds[number] : bounds[number + 1]]
            return torch.from_numpy(np.array(part, dtype=dtype))

        return [
            States(
                taps=rows(arrays.taps, layout.taps, number, np.float32),
                hidden=rows(arrays.hidden, layout.labels, number, np.float32),
                labels=Labels(
                    ids=rows(arrays.ids, layout.labels, number, np.int64),
                    probs=rows(arrays.probs, layout.labels, number, np.float32),
                ),
            )
            for number in numbers
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrays:
    """The files of a cache, by place."""

    taps: np.memmap
    hidden: np.memmap
    ids: np.memmap
    probs: np.memmap


class _Layout:
    """Where each sample's rows lie in the files."""

    def __init__(self, samples: Sequence[Sample], *, window: int) -> None:
        spans = [places(sample, window=window) for sample in samples]
        self.taps = np.cumsum([0, *(len(ids) - first for ids, first, _ in spans)])
        self.labels = np.cumsum([0, *(len(ids) - label for ids, _, label in spans)])

    def open(self, folder: Path, *, size: int, top_k: int, mode: str) -> _Arrays:
        taps, labels = int(self.taps[-1]), int(self.labels[-1])

        def array(name: str, dtype: type, *shape: int) -> np.memmap:
            return np.memmap(folder / name, dtype, mode=mode, shape=shape)  # type: ignore[call-overload, no-any-return]

        return _Arrays(
            taps=array("taps.f16", np.float16, taps, 3 * size),
            hidden=array("hidden.f16", np.float16, labels, size),
            ids=array("label_ids.i32", np.int32, labels, top_k),
            probs=array("label_probs.f16", np.float16, labels, top_k),
        )


def write_cache(
    folder: Path,
    target: Target,
    samples: Sequence[Sample],
    *,
    window: int,
    labeller: Labeller,
    top_k: int,
    key: str,
    show_bar: bool,
) -> None:
    """Keeps all samples' states in float16 in a folder, unless they are there already.

    ``key`` names all that they depend on beside samples, window and top_k, the labels of a place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = target.model.spec.hidden_size
    layout = _Layout(samples, window=window)
    what = {
        "key": key,
        "window": window,
        "hidden_size": size,
        "top_k": top_k,
        "places": [int(layout.taps[-1]), int(layout.labels[-1])],
    }
    mark = folder / "states.json"
    if mark.is_file() and json.loads(mark.read_text("utf-8")) == what:
        return
    mark.unlink(missing_ok=True)
    arrays = layout.open(folder, size=size, top_k=top_k, mode="w+")
    computed = ComputedStates(target, samples, window=window, labeller=labeller)
    largest = float(np.finfo(np.float16).max)
    with tqdm(total=len(samples), desc="hidden states", disable=not show_bar) as bar:
        for start in range(0, len(samples), _READ_TOGETHER):
            numbers = range(start, min(start + _READ_TOGETHER, len(samples)))
            for number, states in zip(numbers, computed.states(numbers), strict=True):
                assert states.labels is not None
                rows = slice(layout.taps[number], layout.taps[number + 1])
                arrays.taps[rows] = states.taps.clamp(-largest, largest).cpu().numpy()
                rows = slice(layout.labels[number], layout.labels[number + 1])
                arrays.hidden[rows] = states.hidden.clamp(-largest, largest).cpu().numpy()
                arrays.ids[rows] = states.labels.ids.cpu().numpy()
                arrays.probs[rows] = states.labels.probs.cpu().numpy()
            bar.update(len(numbers))
    for array in (arrays.taps, arrays.hidden, arrays.ids, arrays.probs):
        array.flush()
    mark.write_text(json.dumps(what), encoding="utf-8")


def make_batch(
    samples: Sequence[Sample],
    states: Sequence[States],
    *,
    token_vectors: Tensor,
    window: int,
    mask_token_id: int | None = None,
) -> Batch:
    """Pads samples and their states into one batch, on the token vectors' device."""
    spans = [places(sample, window=window) for sample in samples]
    num_context = max(label - 1 - first for _, first, label in spans)
    num_answer = max(len(sample.token_ids) for sample in samples)
    count, device = len(samples), token_vectors.device
    shape = count, num_context + num_answer
    taps = torch.zeros(*shape, states[0].taps.shape[1], device=device)
    next_ids = torch.zeros(shape, dtype=torch.int64)
    is_text = torch.zeros(shape, dtype=torch.bool)
    is_answer = torch.zeros(count, num_answer, dtype=torch.bool)
    true_ids = []
    for row, (sample, state, (ids, first, label)) in enumerate(
        zip(samples, states, spans, strict=True)
    ):
        start = num_context - (label - 1 - first)
        # Places first .. n - 2: the last token's own place has no next token to see.
        used = slice(start, start + len(ids) - 1 - first)
        taps[row, used] = state.taps[:-1]
        next_ids[row, used] = torch.tensor(ids[first + 1 :])
        is_text[row, used] = True
        is_answer[row, : len(sample.token_ids)] = True
        true_ids += [*sample.token_ids[1:], -1]
    labels = [state.labels for state in states if state.labels is not None]
    return Batch(
        features=Features(
            taps=taps,
            embedded=token_vectors[next_ids.to(device)],
            is_text=is_text.to(device),
            num_context=num_context,
            is_answer=is_answer.to(device),
            unknown=None if mask_token_id is None else token_vectors[mask_token_id],
        ),
        hidden=torch.cat([state.hidden for state in states]).to(device),
        labels=Labels.joined(labels).to(device) if labels else None,
        true_ids=torch.tensor(true_ids, device=device),
    )
