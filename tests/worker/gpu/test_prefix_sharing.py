"""Steps whose requests begin alike: the same bits as without sharing, captured or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from octavo.attention.base import KVCacheSpec
from octavo.checkpoint import resolve
from octavo.config import ModelConfig
from octavo.models import Model, kv_cache_spec, load_model
from octavo.platforms.gpu import GPUPlatform
from octavo.types import ModelOutput, NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.gpu.arena import RequestArena, request_columns
from octavo.worker.gpu.buffers import StepBuffers, StepSizes
from octavo.worker.gpu.draft_planner import FixedPlanner, Speculation
from octavo.worker.gpu.graphs import ForwardKey, GraphSizes, StepGraphs
from octavo.worker.gpu.lookup import PromptLookup
from octavo.worker.gpu.prefix_sharing import PrefixSharing, min_saved_partitions
from octavo.worker.gpu.runner import GpuRunner
from octavo.worker.gpu.runtime import HostRuntime
from octavo.worker.gpu.sampler import GpuSampler
from octavo.worker.gpu.scores import PromptScorer
from octavo.worker.gpu.table import GpuRequestTable, StepBatch
from octavo.worker.gpu.upload import Upload, upload_words
from octavo.worker.kv_tensors import KVTensors
from octavo_kernels.paged_attention import numerics
from octavo_kernels.paged_attention.shared_prefix import attend_shared_prefix
from octavo_kernels.testing import gpu_device, same_bits
from tests.worker.conftest import CONFIG
from tests.worker.gpu.conftest import make_runtime

BLOCK, PARTITION = 16, 128
BLOCKS = PARTITION // BLOCK
SIZES: dict[str, Any] = {"max_num_seqs": 4, "max_num_tokens": 8, "max_model_len": 256}
DEVICE = torch.device(gpu_device())


@pytest.fixture(autouse=True)
def short_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "PARTITION", PARTITION)


@pytest.fixture
def num_attended(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a layer attended to shared prefixes since the last call."""
    calls: list[None] = []

    def counted(*args: Tensor, **options: Any) -> None:
        calls.append(None)
        attend_shared_prefix(*args, **options)

    def take() -> int:
        number = len(calls)
        calls.clear()
        return number

    monkeypatch.setattr("octavo.attention.triton.attend_shared_prefix", counted)
    return take


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of one layer: each takes seconds in the interpreter."""
    folder = tmp_path_factory.mktemp("one-layer")
    config = CONFIG | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    files = resolve(ModelConfig(model=str(folder), load_format="dummy"))
    made = load_model(files, files.spec, platform=GPUPlatform(DEVICE), dtype=torch.bfloat16, seed=5)
    generator = torch.Generator().manual_seed(3)
    for slot in made.slots().values():
        if slot.kind != "norm":
            slot.write(torch.empty(slot.shape).normal_(std=0.2, generator=generator), 0)
    return made


def step_sizes(**changed: Any) -> StepSizes:
    fixed = {"dtype": torch.bfloat16, "block_size": BLOCK, "num_blocks": 48}
    return StepSizes(**{"hidden_size": 8, "vocab_size": 9, **fixed, **SIZES, **changed})


def step_buffers() -> StepBuffers:
    sizes = step_sizes()
    return StepBuffers.create(sizes, num_words=upload_words(sizes), device=DEVICE)


class Engine:
    """A runner in bfloat16, and what tests look into."""

    def __init__(
        self,
        model: Model,
        *,
        shares: bool,
        graphs: GraphSizes | None = None,
        max_drafts: int = 0,
    ) -> None:
        sizes = step_sizes(
            hidden_size=model.spec.hidden_size,
            vocab_size=model.spec.vocab_size,
            max_drafts=max_drafts,
        )
        runtime = make_runtime()
        self.buffers = StepBuffers.create(sizes, num_words=upload_words(sizes), device=DEVICE)
        arena = RequestArena(request_columns(sizes), num_rows=sizes.max_num_seqs, device=DEVICE)
        sampler = GpuSampler(arena, sizes=sizes, runtime=runtime, max_logprobs=5)
        table = GpuRequestTable(sizes=sizes, params=sampler)
        self.graphs = StepGraphs(runtime, sizes=graphs or GraphSizes(), buffers=self.buffers)
        spec = kv_cache_spec(model.spec, block_size=BLOCK, dtype=torch.bfloat16)
        kv = KVTensors(model.backend, spec, num_blocks=sizes.num_blocks)
        generator = torch.Generator().manual_seed(9)
        for layer in kv.layers:
            for cache in layer:
                cache.copy_(torch.randn(cache.shape, generator=generator))
        prefixes = PrefixSharing(arena, table=table, sizes=sizes, min_saved=1) if shares else None
        lookup = PromptLookup(arena, min_length=2, max_length=5)
        planner = FixedPlanner(max_drafts, max_samples=sizes.max_samples)
        self.runner = GpuRunner(
            model,
            runtime=runtime,
            buffers=self.buffers,
            arena=arena,
            upload=Upload(runtime, sizes=sizes, words=self.buffers.words, arena=arena),
            table=table,
            sampler=sampler,
            scorer=PromptScorer(
                arena.view("token_ids"), logits=self.buffers.logits, runtime=runtime
            ),
            kv=kv,
            graphs=self.graphs,
            prefixes=prefixes,
            speculation=Speculation(lookup, planner) if max_drafts else None,
        )

    def run(self, step: SchedulerOutput) -> tuple[ModelOutput, Tensor]:
        """The results, and the hidden rows of the step's tokens."""
        output = self.runner.finish(self.runner.launch(step))
        assert not output.errors
        num_tokens = sum(step.num_scheduled_tokens.values())
        return output, self.buffers.hidden[:num_tokens].clone()


def request(name: str, *, own: int, blocks: list[int]) -> NewRequest:
    """A common prompt of one partition and a few tokens of its own, all but the last computed."""
    tokens = (*range(PARTITION), *((own * i) % 290 for i in range(5)))
    return NewRequest(
        request_id=name,
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        num_computed_tokens=len(tokens) - 1,
        block_ids=tuple(blocks),
        params=SamplingParams(temperature=0.0),
    )


def steps() -> list[SchedulerOutput]:
    """Three with a common prefix, the third a step late, and one without."""
    common = list(range(30, 30 + BLOCKS))
    lone = request("lone", own=5, blocks=list(range(BLOCKS + 1)))
    alike = [request(str(own), own=own, blocks=[*common, 20 + own]) for own in (3, 4, 6)]
    return [
        SchedulerOutput(
            step=0,
            new_requests=(alike[0], lone, alike[1]),
            num_scheduled_tokens={"3": 1, "lone": 1, "4": 1},
        ),
        SchedulerOutput(
            step=1,
            new_requests=(alike[2],),
            num_scheduled_tokens={"4": 1, "6": 1, "3": 1, "lone": 1},
        ),
    ]


def test_requests_that_begin_alike_get_the_bits_they_get_alone(
    model: Model, num_attended: Callable[[], int]
) -> None:
    plain = Engine(model, shares=False)
    sharing = Engine(model, shares=True, graphs=GraphSizes(decode=(4,)))
    for step in steps():
        want, hidden = plain.run(step)
        assert num_attended() == 0 and not hidden.isnan().any()
        found, found_hidden = sharing.run(step)
        is_replayed = step.step > 0 and DEVICE.type == "cuda"  # without a word of Python
        assert num_attended() == (0 if is_replayed else model.spec.num_layers)
        assert found.sampled_token_ids == want.sampled_token_ids
        assert same_bits(found_hidden, hidden)
        assert found.worker is not None and found.worker.graph_steps == step.step
        if step.step == 0:  # the graph that was missing comes first
            assert sharing.runner.capture_one() and sharing.graphs.num_missing == 1
            num_attended()


def test_requests_with_drafts_leave_the_others_to_share(
    model: Model, num_attended: Callable[[], int]
) -> None:
    plain = Engine(model, shares=False)
    sharing = Engine(model, shares=True, max_drafts=2)
    first, second = steps()
    assert sharing.run(first)[0].sampled_token_ids == plain.run(first)[0].sampled_token_ids
    num_attended()
    want, hidden = plain.run(second)
    counts = second.num_scheduled_tokens | {"lone": 3}
    found, found_hidden = sharing.run(
        replace(second, num_scheduled_tokens=counts, max_drafts={"lone": 2})
    )
    assert num_attended() == model.spec.num_layers
    tokens = dict(found.sampled_token_ids)
    assert tokens.pop("lone")[0] == want.sampled_token_ids["lone"][0]
    assert tokens.items() <= want.sampled_token_ids.items() and len(tokens) == 3
    assert same_bits(found_hidden[:4], hidden) and len(found_hidden) == 6


def test_a_graph_without_sharing_serves_until_the_other_is_there() -> None:
    sizes = GraphSizes(decode=(1, 2, 5, 6, 40, 48, 64))
    assert sizes.shared == (2, 6, 48, 64)
    graphs = StepGraphs(HostRuntime(), sizes=sizes, buffers=step_buffers())
    graphs.bind(lambda key: lambda: None)
    while graphs.capture_one():
        pass

    def key(num_tokens: int) -> ForwardKey | None:
        return graphs.forward_key(
            num_tokens=num_tokens,
            num_requests=num_tokens,
            is_decode=True,
            shares_prefixes=True,
        )

    assert key(5) == ForwardKey(5, True)
    assert graphs.capture_one() and not graphs.capture_one()
    assert key(5) == ForwardKey(6, True, shares_prefixes=True)
    mixed = graphs.forward_key(num_tokens=6, num_requests=5, is_decode=False, shares_prefixes=True)
    assert mixed is None and graphs.num_missing == 0


def batch(
    serials: list[int], starts: list[int], seq_lens: list[int], *, unsure: int = 0
) -> StepBatch:
    rows = np.array(serials, np.int64) % 4
    nothing: npt.NDArray[np.int64] = np.zeros(0, np.int64)
    return StepBatch(
        request_ids=[str(serial) for serial in serials],
        rows=rows,
        serials=np.array(serials, np.int64),
        starts=np.array(starts, np.int32),
        query_ends=np.zeros(len(rows), np.int32),
        seq_lens=np.array(seq_lens, np.int32),
        num_tokens=len(rows),
        max_query_len=1,
        samples=nothing,
        sample_rows=nothing,
        sample_tokens=np.zeros(0, np.int32),
        sample_positions=np.zeros(0, np.int32),
        least_lens=np.array(seq_lens, np.int32) - unsure,
    )


class Staged:
    """What was put, written at once."""

    def __init__(self, arena: RequestArena) -> None:
        self.arena, self.num_puts = arena, 0

    def put(self, column: str, row: int, values: npt.NDArray[np.int32], *, start: int = 0) -> None:
        self.num_puts += 1
        at = self.arena.offset(column, row, start=start)
        self.arena.words[at : at + len(values)] = torch.from_numpy(values.astype(np.int32))


def test_what_did_not_change_is_not_sent_again() -> None:
    sizes = step_sizes()
    arena = RequestArena(request_columns(sizes), num_rows=4, device=DEVICE)
    table = GpuRequestTable(sizes=sizes, params=None)  # type: ignore[arg-type]
    table.block_tables[:] = np.arange(4)[:, None]
    table.block_tables[:3, :BLOCKS] = 50
    sharing = PrefixSharing(arena, table=table, sizes=sizes, min_saved=1)
    staged: Any = Staged(arena)

    def stage(serials: list[int], starts: list[int], seq_lens: list[int]) -> bool:
        staged.num_puts = 0
        return sharing.stage(batch(serials, starts, seq_lens), staged)

    assert not stage([0, 3], [200, 200], [201, 201]) and staged.num_puts == 0
    assert stage([3, 0, 1, 2], [200, 128, 130, 150], [201, 129, 131, 151])
    assert staged.num_puts == 4
    views = sharing.views(4)
    assert views.request_partitions.tolist() == [0, 1, 1, 1]
    assert views.members.tolist()[:3] == [1, 2, 3]
    assert views.group_start_loc.tolist() == [0, 3, 3]
    assert views.group_partitions.tolist() == [1, 0]
    assert stage([3, 0, 1, 2], [201, 129, 131, 151], [202, 130, 132, 152]) and not staged.num_puts
    assert stage([1, 2], [131, 151], [132, 152]) and staged.num_puts == 4
    assert views.request_partitions.tolist() == [1, 1, 0, 0]
    assert views.group_start_loc.tolist() == [0, 2, 2]
    # The row of a new request, whose blocks are others; and prompts, which share nothing.
    table.block_tables[2] = 7
    assert not stage([1, 6], [132, 152], [133, 153])
    assert not stage([1, 2], [130, 100], [133, 153])
    assert sharing.views(2).members.data_ptr() == views.members.data_ptr()


def test_drafts_in_flight_share_what_is_there_without_them() -> None:
    """A partition that only drafts fill may not be there: no request counts on it."""
    sizes = step_sizes()
    arena = RequestArena(request_columns(sizes), num_rows=4, device=DEVICE)
    table = GpuRequestTable(sizes=sizes, params=None)  # type: ignore[arg-type]
    sharing = PrefixSharing(arena, table=table, sizes=sizes, min_saved=1)
    staged: Any = Staged(arena)
    assert not sharing.stage(batch([0, 1], [130, 130], [131, 131], unsure=3), staged)
    assert sharing.stage(batch([0, 1], [130, 130], [131, 131], unsure=2), staged)
    # Those that verify drafts read for themselves.
    assert not sharing.stage(batch([0, 1], [130, 130], [133, 131]), staged)


def test_sharing_pays_from_a_number_of_bytes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "PARTITION", 1024)
    spec = KVCacheSpec(
        num_layers=2, num_kv_heads=8, head_dim=128, block_size=16, dtype=torch.bfloat16
    )
    assert min_saved_partitions(spec) == 16
