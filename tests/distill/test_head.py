"""The files of a head: the published layout, there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.distill.head import DraftHead, default_layers, load_head, save_head


def test_layout_there_and_back(make_head: Callable[..., DraftHead], tmp_path: Path) -> None:
    head = make_head(window=16)
    draft_ids = torch.arange(0, 80, 2)
    acceptance = {"held out": {"tokens_per_step": 1.5}}
    num_bytes = save_head(tmp_path, head, draft_ids=draft_ids, acceptance=acceptance)
    assert num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["num_hidden_layers"] == 1 and config["draft_vocab_size"] == 40
    assert config["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [0, 1, 3],
        "use_aux_hidden_state": True,
    }
    assert config["octavo"] == {
        "target": {"name": "tiny", "fingerprint": "f"},
        "window": 16,
        "acceptance": acceptance,
    }
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "fc.weight": [32, 96],
        "midlayer.input_layernorm.weight": [32],
        "midlayer.hidden_norm.weight": [32],
        "midlayer.post_attention_layernorm.weight": [32],
        "midlayer.self_attn.q_proj.weight": [32, 64],
        "midlayer.self_attn.k_proj.weight": [16, 64],
        "midlayer.self_attn.v_proj.weight": [16, 64],
        "midlayer.self_attn.o_proj.weight": [32, 32],
        "midlayer.mlp.gate_proj.weight": [48, 32],
        "midlayer.mlp.up_proj.weight": [48, 32],
        "midlayer.mlp.down_proj.weight": [32, 48],
        "norm.weight": [32],
        "d2t": [40],
        "t2d": [300],
    }
    assert (torch.arange(40) + tensors["d2t"]).tolist() == draft_ids.tolist()
    assert tensors["t2d"].nonzero().flatten().tolist() == draft_ids.tolist()
    again, ids = load_head(tmp_path)
    assert again.config == head.config
    assert ids.tolist() == draft_ids.tolist()
    for name, parameter in head.named_parameters():
        expected = parameter.detach().half().float()
        assert torch.equal(again.get_parameter(name).detach(), expected), name


def test_missing_and_wrong_files(make_head: Callable[..., DraftHead], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_head(tmp_path / "nowhere")
    save_head(tmp_path, make_head(), draft_ids=torch.arange(40))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks intermediate_size"):
        load_head(tmp_path)


def test_tensors_that_are_the_targets_may_be_there(
    make_head: Callable[..., DraftHead], tmp_path: Path
) -> None:
    save_head(tmp_path, make_head(), draft_ids=torch.arange(40))
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.zeros(40, 32)}, path)
    load_head(tmp_path)


def test_layers() -> None:
    assert default_layers(30) == (2, 15, 27)
    assert default_layers(3, [0, 1, 3]) == (0, 1, 3)
    for wrong in ([2, 1, 3], [0, 1, 31], [-1, 2, 3]):
        with pytest.raises(ValueError, match="--aux-layers must rise"):
            default_layers(30, wrong)
