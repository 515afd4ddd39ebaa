"""Describes a draft head: a folder with the layout that EAGLE-3 heads are published in.

Knows names and numbers of its config.json; reads no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.checkpoint.hf_config import ModelSpec, parse_config
from octavo.checkpoint.hub import download, is_hub_id
from octavo.checkpoint.source import read_json, safetensors_files
from octavo.config import ModelConfig

ARCHITECTURE = "LlamaForCausalLMEagle3"
NUM_TAPS = 3
_MASK_TOKEN_KEYS = ("pard_token", "ptd_token_id", "mask_token_id")
_READ = 64  # tokens of a prompt that a head reads, its last, unless it sees fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftHeadSpec:
    """Everything about a draft head that code needs to know."""

    layer: ModelSpec  # its one layer; ``vocab_size`` is the target's
    draft_vocab_size: int
    tap_layers: tuple[int, ...]  # of the target, whose inputs it reads; () = by the target's depth
    norm_before_residual: bool
    window: int  # places that it sees at most; 0 = all
    target_name: str  # as its trainer called it; "" = not said
    target_fingerprint: str  # "" = not said
    # Stands for a token that is not known yet, where the head was trained to guess behind such
    # ones, so that one pass gives several drafts (P-EAGLE, 2602.01469); None = it was not.
    mask_token_id: int | None = None

    @property
    def num_read(self) -> int:
        """Tokens of a prompt that the head reads, its last."""
        return min(self.window, _READ) if self.window else _READ

    def taps_of(self, target: ModelSpec) -> tuple[int, ...]:
        """Layers of the target whose inputs the head reads, rising. Raises ValueError."""
        depth = target.num_layers
        layers = self.tap_layers or (2, depth // 2, depth - 3)
        if len(layers) != NUM_TAPS or sorted(set(layers)) != list(layers):
            raise ValueError(
                f"a draft head reads {NUM_TAPS} layers in rising order, got {list(layers)}"
            )
        if not 0 <= layers[0] <= layers[-1] <= depth:
            raise ValueError(
                f"the draft head reads layers {list(layers)}, the target has 0 to {depth}"
            )
        return layers


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftHeadFiles:
    """Where a draft head is."""

    name: str  # as the user gave it
    spec: DraftHeadSpec
    weights: tuple[Path, ...]


def is_draft_head(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a draft head's, and not a model's that runs by itself."""
    named = config.get("architectures") or []
    return any("Eagle3" in str(name) for name in named) or "draft_vocab_size" in config


def draft_folder(name: str, *, config: ModelConfig) -> Path | None:
    """The local folder of what drafts, downloaded if need be; None for a GGUF file.

    Raises ValueError saying what was looked for and not found.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return None
    if is_hub_id(name):
        return download(name, revision=None, download_dir=config.download_dir, with_weights=True)
    raise ValueError(
        f"speculative_config: model {name!r} not found: it is no local folder, no .gguf file and "
        "no Hugging Face id (org/name)"
    )


def read_draft_head(folder: Path, *, name: str) -> DraftHeadFiles:
    """The head in a folder. Raises ValueError naming what is missing or wrong."""
    config = read_json(folder / "config.json")
    if not is_draft_head(config):
        named = ", ".join(map(str, config.get("architectures") or ["none"]))
        raise ValueError(f"{name} is no draft head ({ARCHITECTURE}): its architecture is {named}")
    weights = safetensors_files(folder)
    if not weights:
        raise ValueError(f"draft head {name} has no weights: looked for *.safetensors in {folder}")
    try:
        spec = parse_head_config(config)
    except ValueError as error:
        raise ValueError(f"draft head {name}: {error}") from error
    return DraftHeadFiles(name=name, spec=spec, weights=weights)


def parse_head_config(config: Mapping[str, Any]) -> DraftHeadSpec:
    """`DraftHeadSpec` of a config.json dict. Raises ValueError naming the field at fault."""
    layer = parse_config({**config, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1})
    depth = config.get("num_hidden_layers", 1)
    if depth != 1:
        raise ValueError(f"num_hidden_layers must be 1, got {depth}")
    eagle = config.get("eagle_config") or {}
    if not eagle.get("use_aux_hidden_state", True):
        raise ValueError("use_aux_hidden_state must be true, got false")
    ours = config.get("octavo") or {}
    target = ours.get("target") or {}
    size = config.get("target_hidden_size") or target.get("hidden_size") or layer.hidden_size
    if size != layer.hidden_size:
        raise ValueError(
            f"hidden_size must be the target's, got {layer.hidden_size} for a target of {size}"
        )
    draft_vocab_size = config.get("draft_vocab_size") or layer.vocab_size
    if not isinstance(draft_vocab_size, int) or not 0 < draft_vocab_size <= layer.vocab_size:
        raise ValueError(
            f"draft_vocab_size must be 1 to vocab_size={layer.vocab_size}, got {draft_vocab_size!r}"
        )
    return DraftHeadSpec(
        layer=layer,
        draft_vocab_size=draft_vocab_size,
        tap_layers=tuple(map(int, eagle.get("eagle_aux_hidden_state_layer_ids") or ())),
        norm_before_residual=bool(
            config.get("norm_before_residual", eagle.get("norm_before_residual", False))
        ),
        window=int(ours.get("window") or 0),
        target_name=str(target.get("name") or ""),
        target_fingerprint=str(target.get("fingerprint") or ""),
        mask_token_id=_mask_token_id(config, vocab_size=layer.vocab_size),
    )


def _mask_token_id(config: Mapping[str, Any], *, vocab_size: int) -> int | None:
    for key in _MASK_TOKEN_KEYS:
        if config.get(key) is None:
            continue
        token_id = int(config[key])
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{key} must be 0 to {vocab_size - 1}, got {token_id}")
        return token_id
    return None
