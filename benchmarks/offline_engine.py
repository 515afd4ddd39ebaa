"""An engine in this process, driven by token ids alone; its workloads and what they took.

Knows no GPU: the device is the engine's business. Imports none of the HTTP packages.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.checkpoint import parse_config
from octavo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from octavo.types import EngineRequest, SamplingParams, TokenLogprobs

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts that come at once, and how long their answers are."""

    name: str
    prompts: Sequence[Prompt]
    output_lens: Sequence[int]
    counts_prompts: bool = False  # its figure is of prompt tokens
    times: int = 1  # to be run; the figure is the median

    @property
    def num_tokens(self) -> int:
        """That its figure counts."""
        return sum(map(len, self.prompts)) if self.counts_prompts else sum(self.output_lens)


def workloads(vocab_size: int, *, shrink: int = 1, is_short: bool = False) -> list[Workload]:
    """The workloads that vLLM was measured with; ``shrink``: all lengths and counts by that."""
    rng = random.Random(0)

    def ids(length: int) -> Prompt:
        return tuple(rng.randrange(2, vocab_size) for _ in range(max(1, length // shrink)))

    def alike(name: str, count: int, num_in: int, num_out: int, **extra: Any) -> Workload:
        count, num_out = max(1, count // shrink), max(1, num_out // shrink)
        prompts = [ids(num_in) for _ in range(count)]
        return Workload(name=name, prompts=prompts, output_lens=[num_out] * count, **extra)

    lens = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(max(2, 256 // shrink))]
    few = 1 if is_short or shrink > 1 else 3
    mixed = Workload(
        name="256 mixed",
        prompts=[ids(num_in) for num_in, _ in lens],
        output_lens=[max(1, num_out // shrink) for _, num_out in lens],
    )
    common, own = ids(1024), [ids(64) for _ in range(max(2, 128 // shrink))]
    prefix = Workload(
        name="shared prefix",
        prompts=[common + mine for mine in own],
        output_lens=[max(1, 64 // shrink)] * len(own),
        times=few,
    )
    found = [
        alike("batch 1", 1, 128, 256, times=few),
        alike("batch 8", 8, 1024, 256, times=few),
        alike("batch 64", 64, 1024, 256),
        alike("prefill", 64, 2048, 1, counts_prompts=True),
        prefix,
    ]
    return found if is_short else [*found, mixed]


@dataclass(slots=True)
class Answer:
    """What came of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None


class OfflineEngine:
    """`EngineCore` over the device that the options name, by default with random weights."""

    def __init__(self, folder: Path, **options: Any) -> None:
        # Lazy: torch takes seconds, which count as the engine's start.
        from octavo.engine.build import build_engine

        given = {"model": str(folder), "load_format": "dummy", "device": "cuda", **options}

        def part(config: type[Any]) -> Any:
            names = [each.name for each in dataclasses.fields(config)]
            return config(**{name: given.pop(name) for name in names if name in given})

        self.config = EngineConfig(
            model=part(ModelConfig), cache=part(CacheConfig), scheduler=part(SchedulerConfig)
        )
        assert not given, f"no such options: {given}"
        self.spec = parse_config(json.loads((folder / "config.json").read_text()))
        self.core, self.info = build_engine(self.config)
        self.counts: dict[str, int] = {}  # of `WorkerStats`, and preemptions, since the start
        self._number = 0

    def add(self, prompt: Prompt, params: SamplingParams) -> str:
        self._number += 1
        request_id = f"r{self._number}"
        self.core.add_request(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=prompt,
                params=params,
                arrival_time=time.monotonic(),
            )
        )
        return request_id

    def step(self, answers: Mapping[str, Answer] | None = None) -> None:
        """One turn of the loop; what is new goes to the answers that are asked for."""
        step = self.core.step()
        for output in step.outputs:
            answer = None if answers is None else answers.get(output.request_id)
            if answer is not None:
                answer.token_ids += output.new_token_ids
                answer.logprobs += output.new_logprobs
                answer.error = output.error
            if output.error is not None and answer is None:
                raise RuntimeError(f"{output.request_id} failed: {output.error}")
        if step.stats is not None:
            self._count("preemptions", step.stats.preemptions)
            worker = getattr(step.stats, "worker", None)
            for name in () if worker is None else worker.__slots__:
                value = getattr(worker, name)
                if isinstance(value, int):
                    self._count(name, value)

    def _count(self, name: str, more: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + more

    def answer(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Answer]:
        """Answers to all prompts, which run together."""
        answers = {
            self.add(prompt, each): Answer() for prompt, each in zip(prompts, params, strict=True)
        }
        while self.core.has_work:
            self.step(answers)
        return list(answers.values())

    def run(self, workload: Workload) -> float:
        """Seconds until every token of it was there; nothing of it is in the prefix cache."""
        self.core.reset_prefix_cache()
        began = time.perf_counter()
        for prompt, length in zip(workload.prompts, workload.output_lens, strict=True):
            self.add(prompt, SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True))
        while self.core.has_work:
            self.step()
        return time.perf_counter() - began

    def capture_all(self) -> int:
        """Captures every graph that is missing; how many there were."""
        number = 0
        while self.core.use_idle_time():
            number += 1
        return number

    def close(self) -> None:
        self.core.close()
