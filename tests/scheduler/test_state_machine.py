"""Whatever happens, in whatever order: nobody loses a token, no block is lost."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.types import FinishReason
from tests.scheduler.driver import Driver

# Half of them begin as others do, so that what was evicted is asked for again.
BASES = ([1, 2] * 10, [1, 2, 2, 1, 1] * 4, [2] * 20)
PROMPTS = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=20) | st.builds(
    lambda base, length: base[:length], st.sampled_from(BASES), st.integers(5, 20)
)
SELDOM = st.sampled_from([False] * 9 + [True])
CONFIG = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4]),
        "budget": st.sampled_from([1, 3, 8, 64]),
        "caching": st.sampled_from([True, True, False]),
        "max_inflight": st.sampled_from([1, 2, 2, 3]),
        "max_num_seqs": st.sampled_from([1, 3, 6]),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
        "long_prefill_token_threshold": st.sampled_from([0, 0, 3]),
    }
)
HOST_TIER_CONFIG = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2]),
        "budget": st.sampled_from([8, 64]),
        "num_host_slots": st.sampled_from([2, 8, 60]),
        "max_inflight": st.sampled_from([1, 2, 2, 3]),
        "max_num_seqs": st.sampled_from([1, 3]),
    }
)
# A few seeds, so that requests also share what they generate; tokens 0-30 of 97 stop half of them.
PARAMS = st.fixed_dictionaries(
    {
        "max_tokens": st.sampled_from([0, 1, 2, 7, 12]),
        "min_tokens": st.sampled_from([0, 0, 3]),
        "seed": st.integers(0, 4),
        "stop_token_ids": st.sampled_from([(), tuple(range(8))]),
        "eos_token_ids": st.sampled_from([(), tuple(range(20, 31))]),
        "ignore_eos": st.booleans(),
        "prompt_logprobs": st.sampled_from([None, None, None, 1]),
        "logprobs": st.sampled_from([None, 0]),
    }
)


class Life(RuleBasedStateMachine):
    """Arrivals, forks, aborts and failures between steps, on a cache that is always too small.

    The driver checks the K/V invariants in every step, and the fake executor that whoever attends
    finds its own tokens in its blocks.
    """

    @initialize(config=CONFIG, num_spare_blocks=st.integers(0, 6))
    def start(self, config: dict[str, Any], num_spare_blocks: int) -> None:
        max_model_len = 24
        num_blocks = max_model_len // int(str(config["block_size"])) + num_spare_blocks
        self.failing: dict[str, str] = {}
        self.failing_steps: set[int] = set()
        self.num_damages = 0
        self.d = Driver(
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            executor={"fail_requests": self.failing, "fail_steps": self.failing_steps},
            **config,
        )

    def submit(self, **request: Any) -> str:
        request_id = f"r{len(self.d.requests)}"
        self.d.add(request_id, **request)
        return request_id

    @rule(
        prompt=PROMPTS,
        params=PARAMS,
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "s"]),
        num_forks=st.sampled_from([0, 0, 0, 1, 3]),
        is_chain=st.booleans(),
        fails=st.sampled_from([False] * 7 + [True]),
    )
    def arrive(
        self,
        prompt: list[int],
        params: dict[str, Any],
        priority: int,
        salt: str | None,
        num_forks: int,
        is_chain: bool,
        fails: bool,
    ) -> None:
        request: dict[str, Any] = {"prompt": prompt, "priority": priority, "cache_salt": salt}
        first = self.submit(**request, **params)
        if fails:
            self.failing[first] = "told to fail"
        for i in range(num_forks):
            parent = f"r{len(self.d.requests) - 1}" if is_chain else first
            self.submit(**request, **{**params, "seed": 10 + i}, fork_of=parent)

    @precondition(lambda self: bool(self.d.requests))
    @rule(data=st.data(), num_steps=st.integers(0, 10))
    def ask_again(self, data: st.DataObject, num_steps: int) -> None:
        """The same prompt once more, or it and what was generated, as in a conversation."""
        earlier = data.draw(st.sampled_from(sorted(self.d.requests)))
        request = self.d.requests[earlier]
        prompt = [*request.prompt_token_ids, *self.d.tokens[earlier]][:22]
        self.submit(prompt=prompt, cache_salt=request.cache_salt, max_tokens=3, seed=7)
        for _ in range(num_steps):
            self.step()

    @rule()
    def step(self) -> None:
        self.d.take(self.d.core.step().outputs)

    @rule(count=st.integers(2, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: bool(self.d.requests))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.d.core.abort([data.draw(st.sampled_from(sorted(self.d.requests)))])

    @rule(num_loads=st.integers(1, 3), really=SELDOM)
    def damage(self, num_loads: int, really: bool) -> None:
        num_loads *= really
        self.d.executor.num_to_damage += num_loads
        self.num_damages += num_loads

    @rule(steps_ahead=st.integers(0, 3), really=SELDOM)
    def fail_a_step(self, steps_ahead: int, really: bool) -> None:
        """Never the next after another: three in a row end the engine."""
        step = self.d.executor.next_step + steps_ahead
        if really and not self.failing_steps & {step - 1, step + 1}:
            self.failing_steps.add(step)

    @rule(really=SELDOM)
    def reset_cache(self, really: bool) -> None:
        if really:
            self.d.core.reset_prefix_cache()

    @invariant()
    def blocks_are_in_order(self) -> None:
        if hasattr(self, "d"):
            self.d.scheduler.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "d"):
            return
        self.d.run()
        if not self.failing_steps:
            assert self.d.executor.num_damaged <= self.num_damages
        for request_id, request in self.d.requests.items():
            last, alone = self.d.last(request_id), self.d.alone(request_id)
            if last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert self.d.tokens[request_id] == alone
            else:
                is_failure = last.finish_reason is FinishReason.ERROR
                assert not is_failure or request_id in self.failing or self.failing_steps
                assert self.d.tokens[request_id] == alone[: len(self.d.tokens[request_id])]
                continue
            outputs = self.d.outputs[request_id]
            got = [item.token_id for out in outputs for item in out.new_prompt_logprobs]
            wants = request.params.prompt_logprobs is not None
            assert got == (list(request.prompt_token_ids[1:]) if wants else [])
            if request.params.logprobs is not None:
                named = [item.token_id for out in outputs for item in out.new_logprobs]
                assert named == alone


class LifeWithHostTier(Life):
    """The same, where most of what comes was there before, and is on the host by now."""

    @initialize(config=HOST_TIER_CONFIG, num_spare_blocks=st.integers(0, 2))
    def start(self, config: dict[str, Any], num_spare_blocks: int) -> None:
        super().start(config, num_spare_blocks)
        for base in BASES:
            self.submit(prompt=base, max_tokens=4, seed=7)

    @rule(
        base=st.sampled_from(BASES),
        length=st.integers(8, 20),
        num_steps=st.integers(0, 4),
        params=PARAMS,
    )
    def come_back(
        self, base: list[int], length: int, num_steps: int, params: dict[str, Any]
    ) -> None:
        self.submit(prompt=base[:length], **params)
        for _ in range(num_steps):
            self.step()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLifeWithHostTier = LifeWithHostTier.TestCase
TestLifeWithHostTier.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
