"""Models that draft leave every token as it is without them, and are right where they must be.

The real scheduler, cache, worker and kernels; every cache, of what drafts too, starts as NaN.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.checkpoint.draft_head import read_draft_head
from octavo.config import SpeculativeConfig
from octavo.models import Model, kv_cache_spec, target_fingerprint
from octavo.models.draft_head_weights import load_draft_head
from octavo.platforms.cpu import CPUPlatform
from octavo.sampling import Sampler
from octavo.speculative import make_drafter
from octavo.types import EngineRequest, SamplingParams
from octavo.worker.drafting.startup import LoadedDraftModel, LoadedHead
from octavo.worker.kv_tensors import KVTensors
from octavo.worker.kv_transfer import NO_TRANSFER
from octavo.worker.model_runner import ModelRunner
from octavo.worker.request_table import RequestTable
from tests.worker.test_verify import PARAMS, Outcome, run

pytestmark = pytest.mark.usefixtures("one_torch_thread")

VOCAB_SIZE, SIZE, NUM_DRAFTED = 300, 64, 100
DEPTH = 4
MASK_TOKEN = 7
Make = Callable[..., tuple[ModelRunner, Any]]
HEAD_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": SIZE,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB_SIZE,
    "draft_vocab_size": NUM_DRAFTED,
    "max_position_embeddings": 256,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
}


def head_tensors(seed: int = 0, *, prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    layer = f"{prefix}midlayer."
    matrices = {
        f"{prefix}fc": (SIZE, 3 * SIZE),
        f"{layer}self_attn.q_proj": (64, 2 * SIZE),
        f"{layer}self_attn.k_proj": (32, 2 * SIZE),
        f"{layer}self_attn.v_proj": (32, 2 * SIZE),
        f"{layer}self_attn.o_proj": (SIZE, 64),
        f"{layer}mlp.gate_proj": (96, SIZE),
        f"{layer}mlp.up_proj": (96, SIZE),
        f"{layer}mlp.down_proj": (SIZE, 96),
    }
    tensors = {f"{name}.weight": normal(*shape) for name, shape in matrices.items()}
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    for name in (*(layer + each for each in norms), f"{prefix}norm"):
        tensors[f"{name}.weight"] = 1 + normal(SIZE)
    ids = torch.randperm(VOCAB_SIZE, generator=generator)[:NUM_DRAFTED].sort().values
    tensors[f"{prefix}d2t"] = ids - torch.arange(NUM_DRAFTED)
    tensors[f"{prefix}t2d"] = torch.isin(torch.arange(VOCAB_SIZE), ids)
    return tensors


def write_head(
    folder: Path, *, tensors: dict[str, torch.Tensor] | None = None, **changes: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**HEAD_CONFIG, **changes}))
    save_file(head_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def write_parallel_head(folder: Path) -> Path:
    """One that was trained to guess behind tokens that are not known yet."""
    mask = torch.randn(1, 3 * SIZE, generator=torch.Generator().manual_seed(9)) * 0.5
    return write_head(
        folder, tensors={**head_tensors(), "mask_hidden": mask}, pard_token=MASK_TOKEN
    )


def load_head(folder: Path, model: Model, *, most_requests: int = 8) -> LoadedHead:
    head = load_draft_head(
        read_draft_head(folder, name=str(folder)),
        target=model,
        target_name="the target",
        platform=CPUPlatform(),
        dtype=torch.float32,
        max_model_len=256,
    )
    return LoadedHead(
        name="head",
        head=head,
        target=model,
        most_requests=most_requests,
        is_parallel=head.mask_taps is not None,
    )


@pytest.fixture
def make_drafting_runner(model: Model) -> Make:
    """(what drafts, method, num_blocks) -> (runner, its drafter)."""

    def make(
        loaded: LoadedHead | LoadedDraftModel,
        *,
        method: Any = "draft_model",
        num_blocks: int = 400,
    ) -> tuple[ModelRunner, Any]:
        def caches(spec: Any) -> KVTensors:
            kv = KVTensors(model.backend, spec, num_blocks=num_blocks)
            for layer in kv.layers:
                layer.k.fill_(float("nan"))
                layer.v.fill_(float("nan"))
            return kv

        table = RequestTable(max_num_seqs=40, max_model_len=256, block_size=16)
        own = caches(loaded.kv_spec(block_size=16, dtype=torch.float32))
        drafting = loaded.attach(table, kv_caches=own.layers, max_num_tokens=512)
        drafter = make_drafter(
            SpeculativeConfig(method=method, model="m", num_speculative_tokens=DEPTH),
            model=drafting.proposer,
        )
        runner = ModelRunner(
            model,
            table=table,
            kv=caches(kv_cache_spec(model.spec, block_size=16, dtype=torch.float32)),
            sampler=Sampler(VOCAB_SIZE),
            transfer=NO_TRANSFER,
            max_num_tokens=512,
            drafter=drafter,
            watcher=drafting.watcher,
            taps=drafting.taps,
        )
        return runner, drafter

    return make


def requests_of(kind: str, *, lengths: Sequence[int] = (50, 1, 33)) -> list[EngineRequest]:
    rng = random.Random(kind)
    params: Any = PARAMS[kind]
    return [
        EngineRequest(
            request_id=f"r{i}",
            prompt_token_ids=tuple(rng.randrange(2, VOCAB_SIZE) for _ in range(length)),
            params=SamplingParams(max_tokens=40, logprobs=3, **params),
        )
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("kind", PARAMS)
def test_the_target_as_its_own_draft_model_is_always_right(
    kind: str,
    model: Model,
    make_runner: Callable[..., ModelRunner],
    make_drafting_runner: Make,
) -> None:
    requests = requests_of(kind)
    want, _ = run(make_runner(num_blocks=400), requests)
    runner, drafter = make_drafting_runner(LoadedDraftModel(name="model", model=model))
    found, _ = run(runner, requests, max_drafts=DEPTH, max_inflight=2)
    assert found == want
    counts = drafter.counts
    assert counts.num_requests_failed == counts.num_requests_slow == 0
    assert counts.num_accepted_tokens == counts.num_draft_tokens > 30


@pytest.mark.parametrize("write", [write_head, write_parallel_head])
@pytest.mark.parametrize("method", ["eagle3", "auto"])
@pytest.mark.parametrize("kind", PARAMS)
def test_a_head_changes_nothing_but_the_number_of_steps(
    kind: str,
    method: str,
    write: Callable[[Path], Path],
    tmp_path: Path,
    model: Model,
    make_runner: Callable[..., ModelRunner],
    make_drafting_runner: Make,
) -> None:
    requests = requests_of(kind)
    want, _ = run(make_runner(num_blocks=400), requests)
    loaded = load_head(write(tmp_path / "head"), model)
    runner, drafter = make_drafting_runner(loaded, method=method)
    found, _ = run(runner, requests, max_drafts=DEPTH, max_inflight=2)
    assert found == want
    assert drafter.counts.num_requests_failed == 0
    if method == "eagle3":
        assert drafter.counts.num_draft_tokens > 100


@pytest.mark.parametrize("max_inflight", [1, 2])
@pytest.mark.parametrize("what", ["head", "parallel head", "model"])
def test_everything_at_once_in_a_cache_that_is_too_small(
    what: str,
    max_inflight: int,
    tmp_path: Path,
    model: Model,
    make_runner: Callable[..., ModelRunner],
    make_drafting_runner: Make,
) -> None:
    """Chunks, prefix hits, forks, preemption, and drafts from K/V in the same blocks."""
    rng = random.Random(3)
    shared = tuple(rng.randrange(2, VOCAB_SIZE) for _ in range(60))
    requests = []
    for i in range(12):
        params: Any = list(PARAMS.values())[i % len(PARAMS)]
        requests.append(
            EngineRequest(
                request_id=f"r{i}",
                prompt_token_ids=shared if i % 3 else (*shared, i),
                params=SamplingParams(max_tokens=30 + i, logprobs=1, **params),
                fork_of="r1" if i in (2, 4) else None,
            )
        )
    want, _ = run(make_runner(num_blocks=400), requests)
    loaded: Any = LoadedDraftModel(name="model", model=model)
    if what != "model":
        write = write_head if what == "head" else write_parallel_head
        loaded = load_head(write(tmp_path / "head"), model, most_requests=40)
    runner, drafter = make_drafting_runner(
        loaded, method="draft_model" if what == "model" else "eagle3", num_blocks=18
    )
    found, preemptions = run(
        runner, requests, num_blocks=18, step_tokens=37, max_drafts=DEPTH, max_inflight=max_inflight
    )
    assert found == want and preemptions > 0
    counts = drafter.counts
    assert counts.num_requests_failed == 0 and counts.num_draft_tokens > 100
    if what == "model":
        assert counts.num_accepted_tokens > 0.7 * counts.num_draft_tokens


class Reference:
    """The head in plain torch over whole sequences, in float64."""

    def __init__(self, tensors: dict[str, torch.Tensor], model: Model) -> None:
        self.weights = {name: each.double() for name, each in tensors.items()}
        self.ids = torch.arange(NUM_DRAFTED) + tensors["d2t"]
        self.vectors = model.embed(torch.arange(VOCAB_SIZE)).double()

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def outputs(self, tokens: list[int], features: torch.Tensor, *, window: int) -> torch.Tensor:
        """[L] tokens behind each place, [L, D] features -> [L, D]."""
        x = torch.cat(
            [
                self.norm(self.vectors[tokens], "midlayer.input_layernorm"),
                self.norm(features, "midlayer.hidden_norm"),
            ],
            dim=1,
        )
        length, places = len(tokens), torch.arange(len(tokens))
        angles = places[:, None] * 10000.0 ** (-torch.arange(8) / 8.0)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def heads(name: str, *, rotates: bool) -> torch.Tensor:
            each = self.linear(x, f"midlayer.self_attn.{name}").view(length, -1, 16)
            first, second = each.chunk(2, dim=-1)
            if rotates:
                each = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
            return each.transpose(0, 1)

        q, k, v = heads("q_proj", rotates=True), heads("k_proj", rotates=True), None
        v = heads("v_proj", rotates=False)
        k, v = k.repeat_interleave(2, dim=0), v.repeat_interleave(2, dim=0)
        distance = places[:, None] - places
        is_seen = (distance >= 0) & ((distance < window) if window else True)
        scores = (q @ k.transpose(1, 2) / 4.0).masked_fill(~is_seen, -torch.inf)
        context = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        stream = features + self.linear(context, "midlayer.self_attn.o_proj")
        y = self.norm(stream, "midlayer.post_attention_layernorm")
        gate = torch.nn.functional.silu(self.linear(y, "midlayer.mlp.gate_proj"))
        up = self.linear(y, "midlayer.mlp.up_proj")
        return stream + self.linear(gate * up, "midlayer.mlp.down_proj")

    def parallel_drafts(
        self, known: list[int], taps: torch.Tensor, *, depth: int
    ) -> tuple[list[int], list[float]]:
        """As `drafts`, of one pass over places whose tokens are not known yet."""
        num_masks = depth - 1
        mask = self.weights["mask_hidden"].expand(num_masks, -1)
        features = self.linear(torch.cat([taps.double(), mask]), "fc")
        tokens = [*known[1:], *[MASK_TOKEN] * num_masks]
        outputs = self.outputs(tokens, features, window=0)[-depth:]
        probs = (self.norm(outputs, "norm") @ self.vectors[self.ids].T).softmax(-1)
        best = probs.argmax(-1)
        return self.ids[best].tolist(), probs[torch.arange(depth), best].tolist()

    def drafts(
        self, known: list[int], taps: torch.Tensor, *, depth: int, window: int
    ) -> tuple[list[int], list[float]]:
        """Of all known tokens but the last there are taps [L - 1, 3 D]."""
        tokens, probs = list(known), []
        features = self.linear(taps.double(), "fc")
        for _ in range(depth):
            outputs = self.outputs(tokens[1:], features, window=window)
            logits = self.norm(outputs[-1], "norm") @ self.vectors[self.ids].T
            best = int(logits.argmax())
            probs.append(float(logits.softmax(0)[best]))
            tokens.append(int(self.ids[best]))
            features = torch.cat([features, outputs[-1:]])
        return tokens[len(known) :], probs


def watched_drafts(runner: ModelRunner, drafter: Any) -> list[tuple[str, list[int], Any, Any]]:
    """Of three greedy requests, each time that drafts were made: request, known tokens, the
    target's hidden states of all but the last, proposal."""
    proposer = drafter._source._proposer
    guesser: Any = runner._watcher
    propose, see = proposer.propose, guesser.see
    seen: list[tuple[str, list[int], Any, Any]] = []
    all_taps: dict[str, torch.Tensor] = {}

    def spy(outlooks: Any, *, depths: Any, goes_on: Any) -> Any:
        known = [each.token_ids.tolist() for each in outlooks]
        found = propose(outlooks, depths=depths, goes_on=goes_on)
        for outlook, tokens in zip(outlooks, known, strict=True):
            name = outlook.request_id
            seen.append((name, tokens, all_taps[name].clone(), found.proposals[name]))
        return found

    def watch(batch: Any) -> None:
        starts = batch.attn.query_start_loc.tolist()
        for index, name in enumerate(batch.request_ids):
            first = int(batch.attn.positions[starts[index]])
            rows = torch.from_numpy(guesser._taps[starts[index] : starts[index + 1]].copy())
            kept = all_taps.get(name, torch.empty(0, 3 * SIZE))
            all_taps[name] = torch.cat([kept[:first], rows])
        see(batch)

    proposer.propose, guesser.see = spy, watch
    run(runner, requests_of("greedy", lengths=(19, 2, 40)), max_drafts=DEPTH)
    return [each for each in seen if each[3].token_ids]


def assert_same_drafts(proposal: Any, tokens: list[int], probs: list[float]) -> None:
    assert list(proposal.token_ids) == tokens
    torch.testing.assert_close(
        torch.tensor(proposal.probs), torch.tensor(probs), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("window", [0, 20])
def test_a_heads_drafts_are_those_of_plain_torch(
    window: int, tmp_path: Path, model: Model, make_drafting_runner: Make
) -> None:
    """All of it: taps, the pass that reads, passes that go on, places, blocks and windows."""
    folder = write_head(tmp_path / "head", octavo={"window": window})
    runner, drafter = make_drafting_runner(load_head(folder, model), method="eagle3")
    reference = Reference(head_tensors(), model)
    starts_at = {"r0": 0, "r1": 0, "r2": 32 if window else 0}  # the first block within the window
    seen = watched_drafts(runner, drafter)
    for name, known, taps, proposal in seen:
        first, depth = starts_at[name], len(proposal.token_ids)
        own = taps[first : len(known) - 1]
        assert_same_drafts(
            proposal, *reference.drafts(known[first:], own, depth=depth, window=window)
        )
    assert len(seen) > 60


def test_a_parallel_heads_drafts_are_those_of_plain_torch(
    tmp_path: Path, model: Model, make_drafting_runner: Make
) -> None:
    loaded = load_head(write_parallel_head(tmp_path / "head"), model)
    runner, drafter = make_drafting_runner(loaded, method="eagle3")
    mask = loaded.head.mask_taps
    assert mask is not None
    reference = Reference({**head_tensors(), "mask_hidden": mask}, model)
    seen = watched_drafts(runner, drafter)
    for _, known, taps, proposal in seen:
        depth = len(proposal.token_ids)
        assert_same_drafts(
            proposal, *reference.parallel_drafts(known, taps[: len(known) - 1], depth=depth)
        )
    assert len(seen) > 60 and max(len(each[3].token_ids) for each in seen) == DEPTH


def test_names_may_have_a_prefix_and_tables_of_their_own(tmp_path: Path, model: Model) -> None:
    tensors = head_tensors(prefix="model.")
    plain = load_head(write_head(tmp_path / "a"), model).head
    ids = plain.token_ids
    vectors = model.embed(torch.arange(VOCAB_SIZE, dtype=torch.int32))
    tensors |= {"lm_head.weight": vectors[ids], "embed_tokens.weight": vectors}
    tensors = {name.replace("midlayer", "layers.0"): each for name, each in tensors.items()}
    own = load_head(write_head(tmp_path / "b", tensors=tensors), model).head
    assert torch.equal(own.token_ids, ids)
    rows = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(own.compute_logits(rows), plain.compute_logits(rows))
    assert torch.equal(own.features(rows.repeat(1, 3)), plain.features(rows.repeat(1, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96}, "hidden size of 96, and the target has 64"),
        ({"vocab_size": 301}, "vocabulary of 301, and the target has 300"),
        ({"draft_vocab_size": 400}, "draft_vocab_size must be 1 to vocab_size=300, got 400"),
        ({"num_hidden_layers": 2}, "num_hidden_layers must be 1, got 2"),
        ({"target_hidden_size": 128}, "got 64 for a target of 128"),
        ({"architectures": ["X"], "draft_vocab_size": None}, "lacks|is no draft head|d2t"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 7]}},
            r"layers \[0, 1, 7\], the target has 0 to 2",
        ),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 1, 0]}},
            "rising order",
        ),
        (
            {"octavo": {"target": {"name": "Other-7B", "fingerprint": "ab:cd"}}},
            "trained for Other-7B, whose weights are not those of the target",
        ),
    ],
)
def test_a_head_for_another_target_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, model: Model
) -> None:
    folder = write_head(tmp_path / "head", **changes)
    with pytest.raises(ValueError, match=message):
        load_head(folder, model)


def test_a_head_knows_its_target_and_misses_its_tensors(tmp_path: Path, model: Model) -> None:
    ours = {"target": {"name": "t", "fingerprint": target_fingerprint(model)}}
    load_head(write_head(tmp_path / "head", octavo=ours), model)
    tensors = head_tensors()
    del tensors["fc.weight"]
    with pytest.raises(ValueError, match=r"lacks fc\.weight"):
        load_head(write_head(tmp_path / "less", tensors=tensors), model)
    more = {**head_tensors(), "other.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"no place for the tensor other\.weight \[3\]"):
        load_head(write_head(tmp_path / "more", tensors=more), model)
    wrong = {**head_tensors(), "d2t": torch.full((NUM_DRAFTED,), 290)}
    with pytest.raises(ValueError, match="leads to tokens 290 to 389, and there are 300"):
        load_head(write_head(tmp_path / "wrong", tensors=wrong), model)
    short = {**head_tensors(), "mask_hidden": torch.zeros(1, SIZE)}
    with pytest.raises(ValueError, match=rf"mask_hidden has shape \[1, {SIZE}\], the config says"):
        load_head(write_head(tmp_path / "short", tensors=short, pard_token=1), model)
    alone = {**head_tensors(), "mask_hidden": torch.zeros(1, 1, 3 * SIZE)}
    with pytest.raises(ValueError, match=r"config\.json has no pard_token"):
        load_head(write_head(tmp_path / "alone", tensors=alone), model)
    with pytest.raises(ValueError, match="ptd_token_id must be 0 to 299, got 300"):
        load_head(write_head(tmp_path / "far", tensors=alone, ptd_token_id=300), model)


def test_a_model_that_fails_on_a_request_leaves_the_others_their_drafts(
    model: Model, make_runner: Callable[..., ModelRunner], make_drafting_runner: Make
) -> None:
    requests = requests_of("greedy")
    want, _ = run(make_runner(num_blocks=400), requests)
    runner, drafter = make_drafting_runner(LoadedDraftModel(name="model", model=model))
    proposer = drafter._source._proposer
    propose = proposer.propose

    def trap(outlooks: Any, **options: Any) -> Any:
        if any(each.request_id == "r1" for each in outlooks):
            raise RuntimeError("a kernel met a bad token")
        return propose(outlooks, **options)

    proposer.propose = trap
    found, _ = run(runner, requests, max_drafts=DEPTH)
    assert found == want
    assert drafter.counts.num_requests_failed == 1 and drafter.counts.num_accepted_tokens > 50
    assert isinstance(found["r1"], Outcome)
