"""Tiny random transformers models, and a driver that runs ours step by step on its platform."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.attention import AttentionMetadata, KVLayer
from octavo.checkpoint import resolve
from octavo.config import ModelConfig
from octavo.models import Model, kv_cache_spec, load_model
from octavo.platforms.base import Platform
from octavo.platforms.cpu import CPUPlatform

BLOCK_SIZE = 16


class Driver:
    """Runs packed steps of several requests, each with blocks of its own in shuffled order.

    Caches begin as NaN, so reading a slot that was never written shows.
    """

    def __init__(
        self, model: Model, *, num_requests: int, dtype: torch.dtype, max_len: int
    ) -> None:
        self.model = model
        per_request = -(-max_len // BLOCK_SIZE)
        num_blocks = num_requests * per_request
        spec = kv_cache_spec(model.spec, block_size=BLOCK_SIZE, dtype=dtype)
        self.caches: list[KVLayer] = model.backend.allocate(spec, num_blocks=num_blocks)
        for kv in self.caches:
            kv.k.fill_(float("nan"))
            kv.v.fill_(float("nan"))
        ids = list(range(num_blocks))
        random.Random(0).shuffle(ids)
        self.tables = torch.tensor(ids, dtype=torch.int32).view(num_requests, per_request)
        self.device = model.platform.device
        self.num_computed = [0] * num_requests

    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Logits [n, V] of each (request, its next n tokens)."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lens = [0], []
        for request, new in work:
            first = self.num_computed[request]
            for position in range(first, first + len(new)):
                positions.append(position)
                block = int(self.tables[request, position // BLOCK_SIZE])
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            tokens += new
            self.num_computed[request] += len(new)
            starts.append(len(tokens))
            lens.append(self.num_computed[request])

        def ints(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        attn = AttentionMetadata(
            positions=ints(positions),
            slots=ints(slots),
            block_tables=self.tables[[request for request, _ in work]].to(self.device),
            query_start_loc=ints(starts),
            seq_lens=ints(lens),
        )
        hidden = self.model.forward(ints(tokens), attn, self.caches)
        logits = self.model.compute_logits(hidden).cpu()
        return [logits[a:b] for a, b in zip(starts, starts[1:], strict=False)]


def run_chunked(
    model: Model, prompts: Sequence[Sequence[int]], *, chunks: Sequence[int], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Logits [len, V] of every prompt, all of them packed into steps of ``chunks`` tokens each
    (cycled, each request starting elsewhere in the cycle)."""
    driver = Driver(model, num_requests=len(prompts), dtype=dtype, max_len=max(map(len, prompts)))
    pieces: list[list[torch.Tensor]] = [[] for _ in prompts]
    turn = 0
    while any(done < len(p) for done, p in zip(driver.num_computed, prompts, strict=True)):
        work = []
        for request, prompt in enumerate(prompts):
            done = driver.num_computed[request]
            size = chunks[(turn + request) % len(chunks)]
            if done < len(prompt) and size:
                work.append((request, prompt[done : done + size]))
        if work:
            for (request, _), logits in zip(work, driver.step(work), strict=True):
                pieces[request].append(logits)
        turn += 1
    return [torch.cat(parts) for parts in pieces]


@pytest.fixture
def chunked() -> Callable[..., list[torch.Tensor]]:
    return run_chunked


@pytest.fixture
def load() -> Callable[..., Model]:
    def load(
        path: Path,
        *,
        dtype: torch.dtype = torch.float32,
        platform: Platform | None = None,
        **options: Any,
    ) -> Model:
        max_model_len = options.pop("max_model_len", None)
        files = resolve(ModelConfig(model=str(path), **options))
        return load_model(
            files,
            files.spec,
            platform=platform or CPUPlatform(),
            dtype=dtype,
            max_model_len=max_model_len,
        )

    return load


def randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Weights large enough that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.dim() == 1 else 0.15))


@pytest.fixture
def reference() -> Callable[..., Any]:
    """config -> transformers' model in eval mode with seeded random weights."""
    transformers = pytest.importorskip("transformers")

    def build(config: Any, *, seed: int = 0) -> Any:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model, seed=seed)
        return model.eval()

    return build
