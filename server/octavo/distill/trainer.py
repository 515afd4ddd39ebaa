"""The training loop: steps, logs, checkpoints. Knows head and batches; generates nothing.

Everything random is a function of (seed, step, rank), and everything else is in a checkpoint, so
that a run which goes on from one takes the steps that it would have taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from octavo.distill import checkpoints
from octavo.distill.features import StateSource, make_batch
from octavo.distill.head import DraftHead
from octavo.distill.loss import match_loss
from octavo.distill.options import TrainConfig
from octavo.distill.ranks import Ranks
from octavo.distill.samples import Sample
from octavo.distill.schedule import Order, learning_rate
from octavo.distill.unroll import Chains

_log = logging.getLogger(__name__)
_STEP_SEEDS = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """What the head takes from the target, frozen."""

    tokens: Tensor  # [V, H]
    rows: Tensor  # [Vd, H] of the output matrix
    draft_ids: Tensor  # [Vd] rising
    metric: Tensor  # [H, H] see `logit_metric`

    def numbers(self, token_ids: Tensor) -> Tensor:
        """Token ids as numbers of the draft vocabulary, -1 where it lacks them."""
        found = torch.searchsorted(self.draft_ids, token_ids)
        found.clamp_(max=len(self.draft_ids) - 1)
        return torch.where(self.draft_ids[found] == token_ids, found, -1)

    def to(self, device: torch.device) -> Vectors:
        return Vectors(
            tokens=self.tokens.to(device),
            rows=self.rows.to(device),
            draft_ids=self.draft_ids.to(device),
            metric=self.metric.to(device),
        )


def logit_metric(rows: Tensor, frequency: Tensor) -> Tensor:
    """[H, H] M such that the square of ``x M`` is the variance of x's logits over the tokens whose
    output rows [Vd, H] these are: half of it by their frequency [Vd], half of all alike.

    So hidden states are compared by what they do to logits, without making any.
    """
    share = (0.5 * frequency / frequency.sum() + 0.5 / len(rows)).double()
    apart = rows.double() - (share[:, None] * rows.double()).sum(0)
    values, axes = torch.linalg.eigh((share[:, None] * apart).T @ apart)
    metric: Tensor = (axes * values.clamp(min=0).sqrt()).float()
    return metric


@dataclass(slots=True)
class _Sums:
    """Of places since the last line of the log, by depth: [depth, 5] (places, distance of hidden
    states, cross-entropy, chance of acceptance, same likeliest token)."""

    by_depth: Tensor
    began: float

    def told(self, ranks: Ranks) -> str:
        total = ranks.summed(self.by_depth.clone()).double()
        count = total[:, 0].clamp(min=1)
        parts = (
            ("distance", total[:, 1] / count),
            ("cross-entropy", total[:, 2] / count),
            ("accepted", total[:, 3] / count),
            ("same best", total[:, 4] / count),
        )
        # A depth that no step has come to yet has nothing to tell.
        told = [
            f"{name} {' '.join(f'{v:.3f}' for v in values[values != 0].tolist())}"
            for name, values in parts
            if values.any()
        ]
        rate = float(total[0, 0]) / max(time.monotonic() - self.began, 1e-9)
        return ", ".join(told) + f", {rate:.0f} places/s"


def _distance(outputs: Tensor, hidden: Tensor, *, metric: Tensor) -> Tensor:
    """Sum over places of the squared distance [M, H] relative to the hidden state's square."""
    scale = (hidden @ metric).square().sum(-1).clamp(min=1e-12)
    return (((outputs.float() - hidden) @ metric).square().sum(-1) / scale).sum()


class Trainer:
    """One rank's part in training a head. ``samples`` and their order are the same on all."""

    def __init__(
        self,
        head: DraftHead,
        vectors: Vectors,
        samples: Sequence[Sample],
        source: StateSource,
        *,
        config: TrainConfig,
        ranks: Ranks,
        folder: Path,
        device: torch.device,
        fingerprint: str = "",
        show_bar: bool = False,
    ) -> None:
        self.head = head.to(device)
        self.vectors = vectors.to(device)
        self._samples, self._source = samples, source
        self._config, self._ranks, self._folder = config, ranks, folder
        self._device, self._show_bar = device, show_bar
        batch = config.per_device_batch_size * config.gradient_accumulation_steps * ranks.size
        if len(samples) < batch:
            raise ValueError(
                f"--per-device-batch-size times --gradient-accumulation-steps times ranks is "
                f"{batch}, more than the {len(samples)} texts to train on"
            )
        lengths = [len(sample.token_ids) for sample in samples]
        self._order = Order(lengths, batch, config.seed)
        self.num_steps = config.max_steps or config.num_epochs * self._order.steps_per_epoch
        # What a checkpoint must have been trained with for its steps to go on here.
        self._run = {"samples": len(samples), "batch": batch, "seed": config.seed,
                     "num_steps": self.num_steps, "target": fingerprint}  # fmt: skip
        self._parameters = [p for p in self.head.parameters() if p.requires_grad]
        self._optimizer = checkpoints.make_optimizer(self.head, config=config, ranks=ranks)
        self._amp = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.fp16)
        self.step = 0
        self._sums = self._fresh_sums()

    def _fresh_sums(self) -> _Sums:
        shape = (self._config.unroll_steps, 5)
        return _Sums(torch.zeros(shape, device=self._device), time.monotonic())

    # ---- checkpoints -----------------------------------------------------------------------

    def save(self) -> None:
        """Writes checkpoint-STEP, and removes those that are too many."""
        state: dict[str, Any] = {"step": self.step, "run": self._run}
        checkpoints.save(
            self._folder,
            state,
            head=self.head,
            optimizer=self._optimizer,
            scaler=self._scaler,
            ranks=self._ranks,
            limit=self._config.save_total_limit,
        )

    def resume(self, wanted: str) -> None:
        """Goes on from a checkpoint: its folder, or ``latest``. Raises ValueError."""
        folder = checkpoints.find(self._folder, wanted)
        self.step = checkpoints.load(
            folder,
            run=self._run,
            head=self.head,
            optimizer=self._optimizer,
            scaler=self._scaler,
        )

    # ---- steps -----------------------------------------------------------------------------

    def train(self, *, measure: Callable[[int], object] | None = None) -> None:
        """All steps that are left; ``measure(step)`` is called every ``eval_steps``."""
        config, per_epoch = self._config, self._order.steps_per_epoch
        batches: list[list[int]] = []
        epoch = -1
        self.head.train()
        with tqdm(
            total=self.num_steps, initial=self.step, desc="steps", disable=not self._show_bar
        ) as bar:
            while self.step < self.num_steps:
                if epoch != self.step // per_epoch:
                    epoch = self.step // per_epoch
                    batches = self._order.epoch(epoch)
                self._take(batches[self.step % per_epoch])
                self.step += 1
                bar.update()
                if self.step % config.logging_steps == 0 or self.step == self.num_steps:
                    told = self._sums.told(self._ranks)
                    if self._ranks.is_first:
                        _log.info("step %d of %d: %s", self.step, self.num_steps, told)
                    self._sums = self._fresh_sums()
                if self.step % config.save_steps == 0 or self.step == self.num_steps:
                    self.save()
                is_time = config.eval_steps and self.step % config.eval_steps == 0
                if measure is not None and is_time and self.step < self.num_steps:
                    measure(self.step)

    def _take(self, numbers: Sequence[int]) -> None:
        """One optimizer step on these samples, of which this rank runs its share."""
        config = self._config
        # As if drawn anew: what a step draws does not depend on the steps before it.
        torch.manual_seed((config.seed * _STEP_SEEDS + self.step) * 4096 + self._ranks.rank)
        total = sum(len(self._samples[number].token_ids) for number in numbers)
        mine = numbers[self._ranks.rank :: self._ranks.size]
        size = config.per_device_batch_size
        for start in range(0, len(mine), size):
            loss = self._loss(mine[start : start + size]) / total
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._ranks.sum_gradients(self._parameters)
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm)
        rate = learning_rate(
            self.step,
            num_steps=self.num_steps,
            peak=config.learning_rate,
            warmup_ratio=config.warmup_ratio,
            min_ratio=config.min_lr_ratio,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _loss(self, numbers: Sequence[int]) -> Tensor:
        """Weighted sum over all places and depths of these samples."""
        config, rows = self._config, self.vectors.rows
        batch = make_batch(
            [self._samples[number] for number in numbers],
            self._source.states(numbers),
            token_vectors=self.vectors.tokens,
            window=self.head.config.window,
            mask_token_id=self.head.config.mask_token_id,
        )
        done = self.step / self.num_steps
        has_labels = done >= config.hidden_warmup_ratio
        depth = config.unroll_steps if done >= config.unroll_warmup_ratio else 1
        weight = config.hidden_weight * (1 - done) if has_labels else 1.0
        true_ids = self.vectors.numbers(batch.true_ids)
        loss = torch.zeros((), device=self._device)
        with torch.autocast(self._device.type, dtype=self._amp, enabled=self._amp is not None):
            chains = Chains(self.head, batch.features)
            for j in range(depth):
                outputs, at = chains.outputs, chains.at
                if not len(at):
                    break
                seen = self._sums.by_depth[j]
                seen[0] += len(at)
                found = outputs.new_zeros(())
                if weight:
                    apart = _distance(outputs, batch.hidden[at], metric=self.vectors.metric)
                    seen[1] += apart.detach()
                    found = weight * apart
                goes_on = torch.ones(len(at), dtype=torch.bool, device=self._device)
                if has_labels:
                    assert batch.labels is not None
                    match = match_loss(
                        outputs,
                        batch.labels.at(at),
                        true_ids=true_ids[at],
                        rows=rows,
                        acceptance_weight=config.acceptance_weight,
                    )
                    found = found + match.loss
                    seen[2:] += match.sums
                    goes_on = match.is_right
                loss = loss + config.unroll_decay**j * found
                if j + 1 < depth:
                    chains.go_on(goes_on)
        return loss
