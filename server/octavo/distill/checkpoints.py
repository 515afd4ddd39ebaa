"""A run's state on disk, and the optimizer whose state ranks share. Knows no data.

A checkpoint is whole or absent: it is written beside its place and then moved there. It has the
same form for any number of ranks.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from octavo.distill.head import DraftHead
from octavo.distill.options import TrainConfig
from octavo.distill.ranks import Ranks

_NAME = re.compile(r"checkpoint-(\d+)")
_FILE = "state.pt"


def make_optimizer(head: DraftHead, *, config: TrainConfig, ranks: Ranks) -> torch.optim.Optimizer:
    """AdamW, without decay of vectors; with several ranks each keeps a part of its state."""
    matrices = [p for p in head.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in head.parameters() if p.requires_grad and p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
    }
    if ranks.size == 1:
        return torch.optim.AdamW(groups, **options)
    # Lazy: the package compiles optimizers for TorchScript as it is imported, with warnings.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **options)


def save(
    folder: Path,
    state: Mapping[str, Any],
    *,
    head: DraftHead,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ranks: Ranks,
    limit: int,
) -> None:
    """Writes ``folder/checkpoint-STEP`` and keeps the ``limit`` newest."""
    if ranks.size > 1:
        optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
    if ranks.is_first:
        place = folder / f"checkpoint-{state['step']}"
        part = folder / f".{place.name}.part"
        part.mkdir(parents=True, exist_ok=True)
        whole = {
            **state,
            "head": head.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        torch.save(whole, part / _FILE)
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
        for old in _all(folder)[:-limit]:
            shutil.rmtree(old)
    ranks.wait()


def find(folder: Path, wanted: str) -> Path:
    """The folder of a checkpoint, or the newest for ``latest``. Raises ValueError."""
    if wanted == "latest":
        if not (found := _all(folder)):
            raise ValueError(f"--resume-from-checkpoint latest: {folder} holds no checkpoint")
        return found[-1]
    place = Path(wanted)
    if not (place / _FILE).is_file():
        raise ValueError(f"--resume-from-checkpoint: {place} is no checkpoint (it has no {_FILE})")
    return place


def load(
    folder: Path,
    *,
    run: Mapping[str, Any],
    head: DraftHead,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> int:
    """Fills all three and returns the step. Raises ValueError for another run's checkpoint."""
    state = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
    differing = {
        name: (value, run[name]) for name, value in state["run"].items() if value != run.get(name)
    }
    if differing:
        told = ", ".join(f"{name} {a!r}, here {b!r}" for name, (a, b) in differing.items())
        raise ValueError(f"--resume-from-checkpoint: {folder} is of another run ({told})")
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    step: int = state["step"]
    return step


def _all(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the newest last."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [place for _, place in sorted(found)]
