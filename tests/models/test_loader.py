"""Loading: what is wrong with a checkpoint is said by name; random weights are seeded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from octavo.checkpoint import resolve
from octavo.checkpoint.hf_config import ARCHITECTURES
from octavo.config import ModelConfig
from octavo.models import Model, load_model, loader, weight_dtype, weights
from octavo.models.registry import MODELS
from octavo.platforms.cpu import CPUPlatform

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path: Path, reference: Callable[..., Any]) -> Path:
    reference(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def test_registry_and_configs_know_the_same_architectures() -> None:
    assert set(MODELS) == set(ARCHITECTURES)


def test_missing_tensor(folder: Path, load: Callable[..., Model]) -> None:
    edit(folder, **{"model.layers.1.mlp.up_proj.weight": None, "lm_head.weight": None})
    with pytest.raises(
        ValueError, match=r"lacks lm_head\.weight, model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load(folder)


def test_unexpected_tensor(folder: Path, load: Callable[..., Model]) -> None:
    edit(folder, **{"model.layers.2.extra.weight": torch.zeros(3, 2)})
    with pytest.raises(
        ValueError, match=r"no place for .*model\.layers\.2\.extra\.weight \[3, 2\]"
    ):
        load(folder)


def test_tensors_that_say_nothing_new_are_skipped(folder: Path, load: Callable[..., Model]) -> None:
    edit(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    load(folder)  # lm_head.weight is there, and tied


def test_wrong_shape(folder: Path, load: Callable[..., Model]) -> None:
    edit(folder, **{"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 16)})
    with pytest.raises(
        ValueError, match=r"q_proj\.weight has shape \[32, 16\], .* says \[32, 32\]"
    ):
        load(folder)


def test_wrong_dtype(folder: Path, load: Callable[..., Model]) -> None:
    edit(folder, **{"model.norm.weight": torch.ones(32, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight has dtype I64; known are"):
        load(folder)


def test_truncated_safetensors_names_the_tensor(folder: Path, load: Callable[..., Model]) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header_size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + header_size])
    ends = {n: 8 + header_size + i["data_offsets"][1] for n, i in header.items() if n[0] != "_"}
    for name, end in ends.items():
        path.write_bytes(whole[: end - 1])
        with pytest.raises(ValueError, match=rf"truncated: tensor {name} ends at byte {end}, the"):
            load(folder)
    for size in (0, 7, 8, 100, header_size + 7):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"model\.safetensors is (truncated|not a safetensors)"
        ):
            load(folder)


def test_corrupt_safetensors_header(folder: Path, load: Callable[..., Model]) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[9:14] = b"\xff" * 5
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
        load(folder)


def test_tensors_are_read_in_bounded_pieces(
    folder: Path,
    load: Callable[..., Model],
    chunked: Callable[..., list[torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What loading needs above the model is a piece, not a tensor; the pieces change no bit."""
    (whole,) = chunked(load(folder), [[5, 6, 7]], chunks=(3,), dtype=torch.float32)
    sizes: list[int] = []
    original = weights.CheckpointTensor.__init__

    def spying(self: weights.CheckpointTensor, **fields: Any) -> None:
        def read(start: int, stop: int) -> torch.Tensor:
            rows: torch.Tensor = fields["read"](start, stop)
            sizes.append(rows.numel())
            return rows

        original(self, **{**fields, "read": read})

    monkeypatch.setattr(weights.CheckpointTensor, "__init__", spying)
    monkeypatch.setattr(loader, "_CHUNK", 700)
    (pieces,) = chunked(load(folder), [[5, 6, 7]], chunks=(3,), dtype=torch.float32)
    assert len(sizes) > 50 and max(sizes) <= 700
    assert torch.equal(whole, pieces)


def test_dtype_words() -> None:
    assert weight_dtype("auto", device="cpu") == torch.float32
    assert weight_dtype("auto", device="cuda") == torch.bfloat16
    assert weight_dtype("float16", device="cpu") == torch.float16


def test_random_weights(
    folder: Path, tmp_path: Path, chunked: Callable[..., list[torch.Tensor]]
) -> None:
    """Equal for equal seeds, different for others, and sane."""
    (folder / "model.safetensors").unlink()

    def logits(seed: int) -> torch.Tensor:
        files = resolve(ModelConfig(model=str(folder), load_format="dummy"))
        model = load_model(
            files, files.spec, platform=CPUPlatform(), dtype=torch.float32, seed=seed
        )
        (row,) = chunked(model, [[1, 2, 3, 250]], chunks=(4,), dtype=torch.float32)
        return row

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))
    assert logits(0).isfinite().all() and logits(0).std() > 0
    assert len({row.argmax().item() for row in logits(0)}) > 1
