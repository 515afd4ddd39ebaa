"""Makes of ``speculative_config``'s model what drafts, once it is sure to fit the target.

Knows files, the request table and K/V memory; no step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import octavo
from octavo.attention.base import KVCacheSpec, KVLayer
from octavo.checkpoint import ModelFiles, resolve
from octavo.checkpoint.draft_head import (
    DraftHeadFiles,
    draft_folder,
    is_draft_head,
    parse_head_config,
    read_draft_head,
)
from octavo.checkpoint.source import read_json
from octavo.config import EngineConfig, SpeculativeConfig
from octavo.models import (
    Model,
    Taps,
    is_same_target,
    kv_cache_spec,
    load_model,
    target_fingerprint,
)
from octavo.models.draft_head import DraftHead
from octavo.models.draft_head_weights import load_draft_head
from octavo.platforms.cpu import CPUPlatform
from octavo.platforms.quantization import Quantization, choose
from octavo.speculative import MAX_REQUESTS
from octavo.worker.drafting.base import StepWatcher
from octavo.worker.drafting.batches import ModelProposer
from octavo.worker.drafting.draft_model import DraftModelGuesser
from octavo.worker.drafting.drawer import Drawer
from octavo.worker.drafting.head import HeadGuesser
from octavo.worker.drafting.parallel_head import ParallelHeadGuesser
from octavo.worker.request_table import RequestTable

_log = logging.getLogger(__name__)
# In steps of more its drafts bring less than the passes take, on the CPUs that it was tried on.
_MAX_BUNDLED = 2
_BUNDLED = Path(octavo.__file__).parent / "heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """What drafts, ready to run, and what the model runner does for it."""

    proposer: ModelProposer
    watcher: StepWatcher
    taps: Taps | None
    most_requests: int = MAX_REQUESTS  # of a step in which `auto` asks it


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedHead:
    """A draft head with its weights."""

    name: str
    head: DraftHead
    target: Model
    most_requests: int  # in a step that it looks at
    is_parallel: bool = False  # whether one pass gives all drafts

    def kv_spec(self, *, block_size: int, dtype: torch.dtype) -> KVCacheSpec:
        return kv_cache_spec(self.head.spec.layer, block_size=block_size, dtype=dtype)

    def attach(
        self, table: RequestTable, *, kv_caches: Sequence[KVLayer], max_num_tokens: int
    ) -> Drafting:
        """Beside a request table and caches; ``max_num_tokens``: of the target's steps."""
        spec, target = self.head.spec, self.target.spec
        layers = spec.taps_of(target)
        taps = Taps(
            layers=layers, out=torch.zeros(max_num_tokens, len(layers) * target.hidden_size)
        )
        guesser = (ParallelHeadGuesser if self.is_parallel else HeadGuesser)(
            self.head,
            table=table,
            kv_cache=kv_caches[0],
            taps=taps,
            most_requests=self.most_requests,
        )
        drawer = Drawer(table, vocab_size=target.vocab_size, token_ids=self.head.token_ids)
        return Drafting(
            proposer=ModelProposer(guesser, table=table, drawer=drawer),
            watcher=guesser,
            taps=taps,
            most_requests=self.most_requests,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDraftModel:
    """A draft model with its weights."""

    name: str
    model: Model

    def kv_spec(self, *, block_size: int, dtype: torch.dtype) -> KVCacheSpec:
        return kv_cache_spec(self.model.spec, block_size=block_size, dtype=dtype)

    def attach(
        self, table: RequestTable, *, kv_caches: Sequence[KVLayer], max_num_tokens: int
    ) -> Drafting:
        guesser = DraftModelGuesser(self.model, table=table, kv_caches=kv_caches)
        drawer = Drawer(table, vocab_size=self.model.spec.vocab_size)
        proposer = ModelProposer(guesser, table=table, drawer=drawer)
        return Drafting(proposer=proposer, watcher=guesser, taps=None)


def load_drafting(
    config: EngineConfig,
    *,
    files: ModelFiles,
    target: Model,
    quantization: Quantization,
    dtype: torch.dtype,
) -> LoadedHead | LoadedDraftModel | None:
    """What ``speculative_config`` names as its model, or else of heads the one that comes with
    Octavo for the target; None where there is neither and none is needed.

    Raises ValueError for what is missing or does not fit the target, naming both.
    """
    wanted = SpeculativeConfig.from_json(config.scheduler.speculative_config)
    load_head = partial(
        _load_head,
        config=config,
        target=target,
        target_name=files.name,
        mode=quantization.mode,
        dtype=dtype,
        parallel=wanted.parallel_drafting,
    )
    is_auto = wanted.method == "auto"
    most_requests = MAX_REQUESTS if is_auto else config.scheduler.max_num_seqs
    if wanted.model is None and wanted.method in ("auto", "eagle3"):
        bundled = bundled_head(target)
        if bundled is None and not is_auto:
            raise ValueError(
                f"speculative_config: method eagle3 takes a head as its model: none comes with "
                f"Octavo for {files.name}"
            )
        if bundled is None:
            return None
        return load_head(bundled, most_requests=_MAX_BUNDLED if is_auto else most_requests)
    if not wanted.model:
        return None
    folder = draft_folder(wanted.model, config=config.model)
    is_head = folder is not None and is_draft_head(read_json(folder / "config.json", default={}))
    if is_head and wanted.method == "draft_model":
        raise ValueError(
            f"speculative_config: method draft_model takes a model, and {wanted.model} is a draft "
            "head: that is method eagle3"
        )
    if wanted.method == "eagle3" or is_head:
        if folder is None:
            raise ValueError(
                f"speculative_config: method eagle3 takes a folder with a draft head, got the "
                f"GGUF file {wanted.model}"
            )
        files_of_head = read_draft_head(folder, name=wanted.model)
        return load_head(files_of_head, most_requests=most_requests)
    if wanted.parallel_drafting:
        raise ValueError(
            f"speculative_config: parallel_drafting is of draft heads, and {wanted.model} is a "
            "model"
        )
    return LoadedDraftModel(
        name=wanted.model,
        model=_load_draft_model(wanted.model, config=config, files=files, target=target),
    )


def bundled_head(target: Model) -> DraftHeadFiles | None:
    """The draft head that comes with Octavo for a model; None where none does."""
    sizes, own = (target.spec.hidden_size, target.spec.vocab_size), ""
    for path in sorted(_BUNDLED.glob("*/config.json")):
        spec = parse_head_config(read_json(path))
        if (spec.layer.hidden_size, spec.layer.vocab_size) != sizes:
            continue
        own = own or target_fingerprint(target)
        if is_same_target(spec.target_fingerprint, own):
            return read_draft_head(path.parent, name=f"Octavo's head for {path.parent.name}")
    return None


def _load_head(
    head_files: DraftHeadFiles,
    *,
    config: EngineConfig,
    target: Model,
    target_name: str,
    mode: str,
    dtype: torch.dtype,
    parallel: bool | None,
    most_requests: int,
) -> LoadedHead:
    own = Quantization(mode="none" if mode == "none" else "int4" if mode == "int4" else "int8")
    head = load_draft_head(
        head_files,
        target=target,
        target_name=target_name,
        platform=CPUPlatform(own),
        dtype=dtype,
        max_model_len=config.model.max_model_len or target.spec.max_model_len,
    )
    can_be_parallel = head.mask_taps is not None
    if parallel and not can_be_parallel:
        raise ValueError(
            f"speculative_config: parallel_drafting takes a head that was trained for it, with a "
            f"tensor mask_hidden and a pard_token, and {head_files.name} has none"
        )
    _log.info("draft head %s: %.1f MB", head_files.name, head.num_bytes / 1e6)
    return LoadedHead(
        name=head_files.name,
        head=head,
        target=target,
        most_requests=most_requests,
        is_parallel=can_be_parallel if parallel is None else parallel,
    )


def _load_draft_model(
    name: str, *, config: EngineConfig, files: ModelFiles, target: Model
) -> Model:
    own_config = replace(config.model, model=name, tokenizer=None, revision=None)
    if own_config.quantization == "gguf":
        own_config = replace(own_config, quantization="auto")
    if own_config.load_format == "gguf":
        own_config = replace(own_config, load_format="auto")
    own = resolve(own_config)
    if own.spec.vocab_size != target.spec.vocab_size:
        raise ValueError(
            f"draft model {own.name} has a vocabulary of {own.spec.vocab_size} tokens, and "
            f"{files.name} has {target.spec.vocab_size}"
        )
    token = _first_difference(own.tokenizer_dir, files.tokenizer_dir)
    if token is not None:
        raise ValueError(
            f"draft model {own.name} has another tokenizer than {files.name}: they differ in "
            f"{token!r}"
        )
    wanted = config.model.max_model_len or target.spec.max_model_len
    model = load_model(
        own,
        own.spec,
        platform=CPUPlatform(choose(own_config, files=own)),
        dtype=torch.float32 if config.model.dtype == "auto" else getattr(torch, config.model.dtype),
        seed=config.model.seed % 2**63,
        max_model_len=min(wanted, own.spec.max_model_len),
    )
    _log.info("draft model %s: %.1f MB", own.name, model.weight_bytes / 1e6)
    return model


def _first_difference(folder: Path, other: Path) -> str | None:
    """A token that two tokenizers do not both give the same id; None where there is none."""
    vocabularies = []
    for path in (folder / "tokenizer.json", other / "tokenizer.json"):
        if not path.is_file():
            return None  # by the size of the vocabulary alone
        content = read_json(path)
        tokens = (content.get("model") or {}).get("vocab") or {}
        if isinstance(tokens, list):  # with scores: the place is the id
            tokens = {token[0]: index for index, token in enumerate(tokens)}
        added = {each["content"]: each["id"] for each in content.get("added_tokens") or ()}
        vocabularies.append({**tokens, **added})
    if vocabularies[0] == vocabularies[1]:
        return None
    pairs = set(vocabularies[0].items()) ^ set(vocabularies[1].items())
    return str(min(pairs, key=lambda pair: (pair[1], pair[0]))[0])
