"""The draft head as a torch module, and the files it is kept in. Knows no target but its sizes.

One decoder layer in the layout of published EAGLE-3 heads (`LlamaForCausalLMEagle3`). At place p
it sees the token of place p + 1 and the target's hidden states of place p, or its own output of
place p - 1 where the target has computed none yet, and guesses the token of place p + 2. A parallel
head (P-EAGLE, 2602.01469) needs no output of its own: in place of a token that is not known yet and
its hidden states it sees one token and one vector for all, which it learns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from octavo.checkpoint import RopeSpec
from octavo.models.rope import rotary_tables

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_NUM_TAPS = 3
_OURS = ("aux_layers", "window", "target", "mask_token_id")  # not keys of config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Sizes of a head; the names are its config.json's."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    draft_vocab_size: int
    max_position_embeddings: int
    aux_layers: tuple[int, ...]
    window: int = 0  # tokens that it sees at most; 0 = all
    mask_token_id: int | None = None  # for tokens that are not known yet; None = not parallel
    target: Mapping[str, Any] = field(default_factory=dict)  # for whom it was trained

    def to_json(self, *, acceptance: Mapping[str, Any] | None = None) -> dict[str, Any]:
        plain = asdict(self)
        for name in _OURS:
            del plain[name]
        if self.mask_token_id is not None:
            plain["pard_token"] = self.mask_token_id
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            **plain,
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": list(self.aux_layers),
                "use_aux_hidden_state": True,
            },
            "octavo": {
                "target": dict(self.target),
                "window": self.window,
                "acceptance": dict(acceptance or {}),
            },
        }

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> HeadConfig:
        """Raises ValueError for a field that is missing."""
        ours = config.get("octavo", {})
        names = [name for name in cls.__dataclass_fields__ if name not in _OURS]
        if missing := [name for name in names if name not in config]:
            raise ValueError(f"a draft head's config.json lacks {', '.join(missing)}")
        return cls(
            **{name: config[name] for name in names},
            aux_layers=tuple(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]),
            window=ours.get("window", 0),
            mask_token_id=config.get("pard_token"),
            target=ours.get("target", {}),
        )


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, in float32."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class _Attention(nn.Module):
    """Projections; the sum over keys is `Unrolled`'s."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        inputs, head = 2 * config.hidden_size, config.head_dim
        self.q_proj = _linear(inputs, config.num_attention_heads * head)
        self.k_proj = _linear(inputs, config.num_key_value_heads * head)
        self.v_proj = _linear(inputs, config.num_key_value_heads * head)
        self.o_proj = _linear(config.num_attention_heads * head, config.hidden_size)


class _MLP(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps=eps)
        self.hidden_norm = RMSNorm(size, eps=eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RMSNorm(size, eps=eps)
        self.mlp = _MLP(config)


class DraftHead(nn.Module):
    """The trained part: everything but token vectors and output rows, which are the target's.

    ``forward`` is one depth of drafting; see `octavo.distill.unroll` for how depths follow.
    """

    def __init__(self, config: HeadConfig, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.fc = _linear(_NUM_TAPS * config.hidden_size, config.hidden_size)
        self.midlayer = _Layer(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.mask_hidden: nn.Parameter | None = None
        if config.mask_token_id is not None:
            self.mask_hidden = nn.Parameter(torch.zeros(1, _NUM_TAPS * config.hidden_size))
        rope = RopeSpec(theta=config.rope_theta, rotary_dim=config.head_dim)
        cos, sin = rotary_tables(rope, max_positions=config.max_position_embeddings)
        self._cos: Tensor
        self._sin: Tensor
        self.register_buffer("_cos", cos, persistent=False)
        self.register_buffer("_sin", sin, persistent=False)

    def inputs(self, embedded: Tensor, feature: Tensor) -> Tensor:
        """Token vectors and features, [B, L, H] each -> what attention projects, [B, L, 2H]."""
        layer = self.midlayer
        both = (layer.input_layernorm(embedded), layer.hidden_norm(feature))
        return torch.cat(both, dim=-1)

    def queries(self, x: Tensor, *, places: Tensor) -> Tensor:
        """[B, L, 2H] -> [B, N, L, h], rotated."""
        return self._rotated(self.midlayer.self_attn.q_proj(x), places)

    def keys_values(self, x: Tensor, *, places: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, 2H] -> [B, K, L, h] each, keys rotated."""
        attention = self.midlayer.self_attn
        return self._rotated(attention.k_proj(x), places), self._heads(attention.v_proj(x))

    def finish(self, context: Tensor, feature: Tensor) -> Tensor:
        """Attention's result [M, N, h] and the features it is added to -> outputs [M, H]."""
        layer = self.midlayer
        stream = feature + self.dropout(layer.self_attn.o_proj(context.flatten(1)))
        out: Tensor = stream + layer.mlp(layer.post_attention_layernorm(stream))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        size = self.config.head_dim
        return x.view(*x.shape[:-1], x.shape[-1] // size, size).transpose(1, 2)

    def _rotated(self, x: Tensor, places: Tensor) -> Tensor:
        first, second = self._heads(x).chunk(2, dim=-1)
        cos, sin = self._cos[places], self._sin[places]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def save_head(
    folder: Path,
    head: DraftHead,
    *,
    draft_ids: Tensor,
    acceptance: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> int:
    """Writes config.json and model.safetensors, and returns the bytes of both.

    draft_ids: [Vd] int64, rising: the tokens of the draft vocabulary. The target's own rows of
    them are the output matrix, so it is not stored.
    """
    config = head.config
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in head.state_dict().items()
    }
    draft_ids = draft_ids.to("cpu", torch.int64)
    drafted = torch.zeros(config.vocab_size, dtype=torch.bool)
    drafted[draft_ids] = True
    tensors["d2t"] = draft_ids - torch.arange(len(draft_ids))
    tensors["t2d"] = drafted
    save_file(tensors, folder / WEIGHTS_FILE)
    text = json.dumps(config.to_json(acceptance=acceptance), indent=1)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return sum((folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))


def load_head(folder: Path, *, dropout: float = 0.0) -> tuple[DraftHead, Tensor]:
    """The head of a folder, in float32, and its draft vocabulary [Vd]. Raises ValueError."""
    try:
        config = HeadConfig.from_json(json.loads((folder / CONFIG_FILE).read_text("utf-8")))
        tensors = load_file(folder / WEIGHTS_FILE)
    except OSError as error:
        raise ValueError(f"the draft head {folder} cannot be read: {error}") from error
    offsets = tensors.pop("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
    for absent in ("t2d", "lm_head.weight", "embed_tokens.weight"):
        tensors.pop(absent, None)
    head = DraftHead(config, dropout=dropout)
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return head, offsets + torch.arange(len(offsets))


def start_like(head: DraftHead, *, final_norm: Tensor, seed: int) -> None:
    """Weights to begin with: the last tap passes through, and what the layer adds is nothing yet.

    final_norm: [H], the target's own, for the outputs live where its output matrix reads.
    """
    generator = torch.Generator().manual_seed(seed)
    size = head.config.hidden_size
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if weight.dim() == 2:
                std = weight.shape[1] ** -0.5
                weight.copy_(torch.empty(weight.shape).normal_(std=std, generator=generator))
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.1)
        head.fc.weight.mul_(0.1)
        head.fc.weight[:, -size:] += torch.eye(size)
        head.norm.weight.copy_(final_norm)


def default_layers(num_layers: int, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """Layers whose inputs a head sees. Raises ValueError for such as there are not."""
    layers = tuple(wanted) or (min(2, num_layers), num_layers // 2, max(num_layers - 3, 0))
    if list(layers) != sorted(layers) or min(layers) < 0 or max(layers) > num_layers:
        raise ValueError(
            f"--aux-layers must rise from 0 to at most {num_layers}, the layers of the model, "
            f"got {list(layers)}"
        )
    return layers
