"""Finds a model's files: the default model, a hub id, a folder or a GGUF file.

Knows names and paths; reads configs and headers, never a weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from octavo.checkpoint.cache import cached_folder
from octavo.checkpoint.default_model import DEFAULT_MODEL_NAME, default_model_path
from octavo.checkpoint.gguf_config import (
    checkpoint_name,
    config_from_metadata,
    generation_config_from_metadata,
)
from octavo.checkpoint.gguf_file import QUANT_TYPES, GGUFFile, GGUFTensor, fingerprint
from octavo.checkpoint.gguf_tokenizer import (
    dummy_tokenizer,
    tokenizer_config_from_metadata,
    tokenizer_from_metadata,
)
from octavo.checkpoint.hf_config import ModelSpec, parse_config
from octavo.checkpoint.hub import download, is_hub_id
from octavo.config import ModelConfig

# Raised when the conversion changes, so that older conversions are not read.
_CONVERSION = "v2"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where everything of one model is."""

    name: str  # as the user gave it; the default model by its own name
    config: Mapping[str, Any]  # config.json, or its like made of GGUF metadata
    generation_config: Mapping[str, Any]  # generation_config.json; empty if there is none
    weights: tuple[Path, ...]
    format: Literal["safetensors", "gguf", "dummy"]
    tokenizer_dir: Path  # tokenizer.json, tokenizer_config.json, chat_template.jinja
    # Hugging Face's name of each matrix of a GGUF file -> its type, such as Q4_1
    weight_types: Mapping[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        """The model's shape. Raises `ValueError` when this server cannot run it."""
        return parse_config(self.config, generation_config=self.generation_config)


def resolve(config: ModelConfig) -> ModelFiles:
    """Files of the model that ``config`` names, downloaded where they must be.

    Raises `ValueError` saying what was looked for and not found, or cannot be read.
    """
    name = config.model or DEFAULT_MODEL_NAME
    path = Path(config.model).expanduser() if config.model else default_model_path()
    try:
        if path.is_file():
            return _from_file(path, name=name, config=config)
        if path.is_dir():
            return _from_folder(path, name=name, config=config)
        if is_hub_id(name):
            return _from_folder(_from_hub(name, config=config), name=name, config=config)
    except OSError as error:
        raise ValueError(f"model {name!r} cannot be read: {error}") from error
    raise ValueError(
        f"model {name!r} not found: it is no local folder, no .gguf file and no "
        "Hugging Face id (org/name)"
    )


def _from_hub(name: str, *, config: ModelConfig) -> Path:
    if config.load_format == "gguf":
        raise ValueError(
            f"load_format gguf takes a local .gguf file or a folder with one, got the hub id {name}"
        )
    return download(
        name,
        revision=config.revision,
        download_dir=config.download_dir,
        with_weights=config.load_format != "dummy",
    )


def _from_file(path: Path, *, name: str, config: ModelConfig) -> ModelFiles:
    if path.suffix != ".gguf":
        raise ValueError(
            f"model file {path} must be a .gguf file; for safetensors name the folder that also "
            "holds config.json"
        )
    if config.load_format == "safetensors":
        raise ValueError(f"load_format safetensors does not fit {path}, a GGUF file")
    weights = _gguf_parts(path)

    def convert(folder: Path) -> None:
        _convert_gguf(weights, folder=folder, with_tokenizer=config.tokenizer is None)

    kind = "" if config.tokenizer is None else "-without-tokenizer"
    folder = cached_folder(f"gguf/{fingerprint(path)}-{_CONVERSION}{kind}", build=convert)
    is_dummy = config.load_format == "dummy"
    return ModelFiles(
        name=name,
        config=read_json(folder / "config.json"),
        generation_config=read_json(folder / "generation_config.json"),
        weights=() if is_dummy else weights,
        weight_types={} if is_dummy else read_json(folder / "weight_types.json"),
        format="dummy" if is_dummy else "gguf",
        tokenizer_dir=folder if config.tokenizer is None else _named_tokenizer(config),
    )


def _gguf_parts(path: Path) -> tuple[Path, ...]:
    """All files of a model split by llama.cpp, whichever of them was named."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, total = match[1], int(match[3])
    parts = [path.with_name(f"{stem}-{i:05}-of-{total:05}.gguf") for i in range(1, total + 1)]
    for part in parts:
        if not part.is_file():
            raise ValueError(f"{path} is one of {total} parts, and {part.name} is missing")
    return tuple(parts)


def _convert_gguf(weights: tuple[Path, ...], *, folder: Path, with_tokenizer: bool) -> None:
    metadata: dict[str, Any] = {}
    tensors: dict[str, GGUFTensor] = {}
    for path in weights:
        file = GGUFFile(path)
        metadata = metadata or file.metadata
        tensors.update(file.tensors)
        file.close()
    try:
        made = {
            "config.json": config_from_metadata(metadata, tensors),
            "generation_config.json": generation_config_from_metadata(metadata),
            "weight_types.json": _weight_types(tensors.values()),
        }
        if with_tokenizer:
            made["tokenizer.json"] = tokenizer_from_metadata(metadata)
            made["tokenizer_config.json"] = tokenizer_config_from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"{weights[0]}: {error}") from error
    for file_name, content in made.items():
        text = json.dumps(content, ensure_ascii=False)
        (folder / file_name).write_text(text, encoding="utf-8")


def _weight_types(tensors: Iterable[GGUFTensor]) -> dict[str, str]:
    """Of matrices. One of a type that cannot be read is refused by name when it is loaded."""
    return {
        checkpoint_name(tensor.name): QUANT_TYPES[tensor.type_id].name
        for tensor in tensors
        if len(tensor.shape) == 2 and tensor.type_id in QUANT_TYPES
    }


def _from_folder(folder: Path, *, name: str, config: ModelConfig) -> ModelFiles:
    gguf = sorted(folder.glob("*.gguf"))
    if config.load_format == "gguf" or (gguf and not (folder / "config.json").is_file()):
        return _from_file(_only_gguf(folder, gguf), name=name, config=config)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {folder} has neither config.json nor a .gguf file")
    dummy = config.load_format == "dummy"
    weights = () if dummy else safetensors_files(folder)
    if not dummy and not weights:
        if gguf and config.load_format == "auto":
            return _from_file(_only_gguf(folder, gguf), name=name, config=config)
        others = sorted({p.suffix for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")})
        hint = f" (its {', '.join(others)} files are pickles, not read here)" if others else ""
        raise ValueError(
            f"model folder {folder} has no weights: looked for model.safetensors.index.json, "
            f"*.safetensors and *.gguf{hint}"
        )
    model_config = read_json(folder / "config.json")
    return ModelFiles(
        name=name,
        config=model_config,
        generation_config=read_json(folder / "generation_config.json", default={}),
        weights=weights,
        format="dummy" if dummy else "safetensors",
        tokenizer_dir=_folder_tokenizer(folder, config=config, model_config=model_config),
    )


def _only_gguf(folder: Path, gguf: list[Path]) -> Path:
    firsts = [p for p in gguf if (m := _SPLIT.fullmatch(p.name)) is None or int(m[2]) == 1]
    if len(firsts) != 1:
        names = ", ".join(p.name for p in firsts) or "none"
        raise ValueError(f"model folder {folder} must have one .gguf model, got {names}")
    return firsts[0]


def safetensors_files(folder: Path) -> tuple[Path, ...]:
    """A folder's weights, all shards; none if there are none. Raises ValueError."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return tuple(
            p
            for p in sorted(folder.glob("*.safetensors"))
            if not p.name.startswith(("consolidated", "adapter"))
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    parts = [folder / part for part in sorted(set(weight_map.values()))]
    for part in parts:
        if not part.is_file():
            raise ValueError(f"{index} names {part.name}, which is missing")
    return tuple(parts)


def _folder_tokenizer(
    folder: Path, *, config: ModelConfig, model_config: Mapping[str, Any]
) -> Path:
    if config.tokenizer is not None:
        return _named_tokenizer(config)
    if config.load_format != "dummy" or any((folder / f).is_file() for f in _TOKENIZER_FILES):
        return folder
    vocab_size = parse_config(model_config).vocab_size

    def build(target: Path) -> None:
        text = json.dumps(dummy_tokenizer(vocab_size), ensure_ascii=False)
        (target / "tokenizer.json").write_text(text, encoding="utf-8")
        (target / "tokenizer_config.json").write_text("{}")

    return cached_folder(f"dummy-tokenizer/{vocab_size}-{_CONVERSION}", build=build)


def _named_tokenizer(config: ModelConfig) -> Path:
    name = config.tokenizer
    assert name is not None
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.name == "tokenizer.json":
        return path.parent
    if path.is_file() and path.suffix == ".gguf":
        return _from_file(path, name=name, config=ModelConfig(model=name)).tokenizer_dir
    if is_hub_id(name):
        return download(name, revision=None, download_dir=config.download_dir, with_weights=False)
    raise ValueError(
        f"tokenizer {name!r} not found: it is no local folder, no .gguf file and no "
        "Hugging Face id (org/name)"
    )


def read_json(path: Path, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file's JSON object; ``default`` where there is no file. Raises ValueError."""
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
