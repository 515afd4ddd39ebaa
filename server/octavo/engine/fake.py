"""An executor without a model: tokens from a hash of (seed, position). Knows no torch.

It keeps rows from the scheduler's diffs as a worker does and asserts that they are consistent, so
every test that runs on it also tests the scheduler. For tests, simulation and host benchmarks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from octavo.clock import VirtualClock
from octavo.types import (
    ModelOutput,
    NewRequest,
    SamplingParams,
    SchedulerOutput,
    TokenLogprobs,
)

_MASK = (1 << 64) - 1


def fake_token(seed: int, position: int, *, vocab_size: int) -> int:
    """The token that seed samples at that position (SplitMix64's finish of both)."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) % vocab_size


def fake_output(
    prompt_len: int,
    params: SamplingParams,
    *,
    max_model_len: int,
    vocab_size: int = 1000,
    script: Sequence[int] = (),
) -> list[int]:
    """Every token a request gets, computed without any batch: what tests compare with."""
    tokens: list[int] = []
    eos = () if params.ignore_eos else params.eos_token_ids
    stops = {*eos, *params.stop_token_ids}
    limit = min(params.max_tokens, max_model_len - prompt_len)
    while len(tokens) < limit:
        tokens.append(_sample(prompt_len, len(tokens), params, vocab_size, script))
        if tokens[-1] in stops and len(tokens) > params.min_tokens:
            break
    return tokens


def _sample(
    prompt_len: int, num_output: int, params: SamplingParams, vocab_size: int, script: Sequence[int]
) -> int:
    if num_output < len(script):
        return script[num_output]
    token = fake_token(params.seed, prompt_len + num_output, vocab_size=vocab_size)
    if num_output < params.min_tokens:
        while token in params.eos_token_ids or token in params.stop_token_ids:
            token = (token + 1) % vocab_size
    return token


@dataclass(slots=True)
class _Row:
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int
    block_ids: list[int]
    params: SamplingParams
    is_broken: bool = False  # failed in a step; the scheduler does not know yet


@dataclass(slots=True, kw_only=True)
class FakeDevice:
    """Takes ``step_us`` microseconds a step, ``row_us`` for each row in it and ``token_us`` for
    each token; waiting for it leaves the processor to others."""

    step_us: float
    row_us: float = 0.0
    token_us: float = 0.0
    _busy_until: float = 0.0
    _ends: deque[float] = field(default_factory=deque)

    def submit(self, step: SchedulerOutput) -> None:
        us = self.step_us + self.row_us * len(step.num_scheduled_tokens)
        us += self.token_us * step.num_tokens
        self._busy_until = max(self._busy_until, time.monotonic()) + us * 1e-6
        self._ends.append(self._busy_until)

    def wait(self) -> None:
        """Until the oldest step has ended."""
        left = self._ends.popleft() - time.monotonic()
        if left > 0:
            time.sleep(left)


@dataclass(slots=True)
class FakeExecutor:
    """Computes nothing, consistently. Implements `engine.protocols.Executor`.

    Args:
        block_size: of the scheduler's K/V blocks.
        vocab_size: tokens are ``0 .. vocab_size - 1``.
        scripts: request id -> its first output tokens; hashed ones follow.
        fail_steps: numbers of the steps that fail as a whole.
        fail_requests: request id -> message; each fails alone in its first step.
        track_kv: keep what each slot of the cache holds. A request that attends to anything but
            its own tokens then samples a wrong token, and ``num_bad_reads`` counts it. O(context).
        num_to_damage: so many of the next loads from the host tier yield garbage, and are told.
        clock, step_seconds: moves the clock by the cost of each step.
        device: steps take real time on it, one after the other, as on a device of its own.
    """

    block_size: int
    vocab_size: int = 1000
    scripts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    fail_steps: Collection[int] = ()
    fail_requests: Mapping[str, str] = field(default_factory=dict)
    track_kv: bool = False
    clock: VirtualClock | None = None
    step_seconds: Callable[[SchedulerOutput], float] = lambda step: 0.0
    device: FakeDevice | None = None
    rows: dict[str, _Row] = field(default_factory=dict)
    num_bad_reads: int = 0
    num_to_damage: int = 0
    num_damaged: int = 0
    _slots: dict[int, int] = field(default_factory=dict)  # slot -> hash of its token and all before
    _host: dict[int, tuple[int, list[int]]] = field(default_factory=dict)  # of the tier: tag, slots
    _queue: deque[SchedulerOutput] = field(default_factory=deque)
    next_step: int = 0

    def submit(self, step: SchedulerOutput) -> None:
        assert step.num_scheduled_tokens, "an empty step was submitted"
        assert step.step == self.next_step, f"step {step.step} where {self.next_step} was due"
        self.next_step += 1
        self._queue.append(step)
        if self.device is not None:
            self.device.submit(step)

    def collect(self) -> ModelOutput:
        step = self._queue.popleft()
        if self.device is not None:
            self.device.wait()
        if self.clock is not None:
            self.clock.advance(self.step_seconds(step))
        # A step that fails may not even get as far as this.
        damaged = () if step.step in self.fail_steps else self._move(step)
        self._apply(step)
        if step.step in self.fail_steps:
            for request_id in step.num_scheduled_tokens:
                self.rows[request_id].is_broken = True
            raise RuntimeError(f"step {step.step} was told to fail")
        sampled: dict[str, tuple[int, ...]] = {}
        logprobs: dict[str, tuple[TokenLogprobs, ...]] = {}
        prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = {}
        errors: dict[str, str] = {}
        for request_id, count in step.num_scheduled_tokens.items():
            row = self.rows[request_id]
            if request_id in self.fail_requests or row.is_broken:
                row.is_broken = True
                errors[request_id] = self.fail_requests.get(request_id, "failed in a step before")
                continue
            start, end = row.num_computed, row.num_computed + count
            token = self._compute(request_id, row, start, end)
            if row.params.prompt_logprobs is not None and start + 1 < row.num_prompt_tokens:
                prompt_logprobs[request_id] = self._prompt_logprobs(row, start, end)
            if token is not None:
                sampled[request_id] = (token,)
                if row.params.logprobs is not None:
                    logprobs[request_id] = (self._logprobs(row, token, row.params.logprobs),)
        return ModelOutput(
            step=step.step,
            sampled_token_ids=sampled,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            errors=errors,
            damaged_blocks=damaged,
        )

    def use_idle_time(self) -> bool:
        return False

    def close(self) -> None:
        self._queue.clear()

    def _move(self, step: SchedulerOutput) -> tuple[int, ...]:
        """Moves blocks to and from the host tier; those that did not come back as they went."""
        size = self.block_size
        for move in step.saves:
            first = move.block * size
            self._host[move.slot] = move.tag, [self._slots.get(first + i, 0) for i in range(size)]
        damaged = []
        for move in step.loads:
            tag, held = self._host.get(move.slot, (0, []))
            if tag != move.tag or self.num_to_damage > 0:
                self.num_to_damage = max(0, self.num_to_damage - 1)
                self.num_damaged += 1
                damaged.append(move.block)
                held = [0] * size
            slots = range(move.block * size, (move.block + 1) * size)
            self._slots.update(zip(slots, held, strict=True))
        return tuple(damaged)

    def _apply(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_request_ids:
            del self.rows[request_id]
        for new in step.new_requests:
            self._add_row(new)
        for request_id, block_ids in step.new_block_ids.items():
            assert block_ids and request_id in step.num_scheduled_tokens
            self.rows[request_id].block_ids += block_ids
        sources = {copy.src for copy in step.block_copies}
        for copy in step.block_copies:
            assert copy.dst not in sources, "copies of a step may run in any order"
            for offset in range(self.block_size if self.track_kv else 0):
                held = self._slots.get(copy.src * self.block_size + offset, 0)
                self._slots[copy.dst * self.block_size + offset] = held

    def _add_row(self, new: NewRequest) -> None:
        assert new.request_id not in self.rows, f"{new.request_id} has a row already"
        assert 0 <= new.num_computed_tokens < len(new.token_ids)
        assert new.num_prompt_tokens <= len(new.token_ids)
        self.rows[new.request_id] = _Row(
            token_ids=list(new.token_ids),
            num_prompt_tokens=new.num_prompt_tokens,
            num_computed=new.num_computed_tokens,
            block_ids=list(new.block_ids),
            params=new.params,
        )

    def _compute(self, request_id: str, row: _Row, start: int, end: int) -> int | None:
        """Computes tokens ``[start, end)`` of a row; the sampled token, if it samples."""
        assert start < end <= len(row.token_ids), f"{request_id}: computes unknown tokens"
        size = self.block_size
        assert len(row.block_ids) == -(-end // size), f"{request_id}: wrong number of blocks"
        is_intact = not self.track_kv or self._attend(row, start, end)
        row.num_computed = end
        if end < len(row.token_ids):
            return None
        num_output = end - row.num_prompt_tokens
        script = self.scripts.get(request_id, ())
        token = _sample(row.num_prompt_tokens, num_output, row.params, self.vocab_size, script)
        if not is_intact:
            self.num_bad_reads += 1
            token = (token + 1) % self.vocab_size
        row.token_ids.append(token)
        return token

    def _attend(self, row: _Row, start: int, end: int) -> bool:
        """Writes the slots of ``[start, end)``; whether ``[0, end)`` then holds this context."""
        context, is_intact = 1, True
        for position, token in enumerate(row.token_ids[:end]):
            context = hash((context, token))
            block, offset = divmod(position, self.block_size)
            slot = row.block_ids[block] * self.block_size + offset
            if position >= start:
                # What is computed on a wrong context is wrong as well, all the way down.
                self._slots[slot] = context if is_intact else 0
            elif self._slots.get(slot) != context:
                is_intact = False
        return is_intact

    def _prompt_logprobs(self, row: _Row, start: int, end: int) -> tuple[TokenLogprobs, ...]:
        num_top = row.params.prompt_logprobs or 0
        positions = range(start + 1, min(end + 1, row.num_prompt_tokens))
        return tuple(self._logprobs(row, row.token_ids[p], num_top) for p in positions)

    def _logprobs(self, row: _Row, token: int, num_top: int) -> TokenLogprobs:
        """The token is always the likeliest here; ranks halve in probability."""
        others = ((token + i) % self.vocab_size for i in range(num_top))
        top = tuple((other, -0.5 * (i + 1)) for i, other in enumerate(others))
        return TokenLogprobs(token_id=token, logprob=-0.5, rank=1, top=top)
