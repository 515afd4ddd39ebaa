"""Layers against torch in float64 on every platform, and the filling of their parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.layers import GatedMLP, Linear, RMSNorm, TokenEmbedding, WeightSlot
from octavo.platforms.base import Platform
from octavo.platforms.cpu import CPUPlatform
from octavo.platforms.gpu import GPUPlatform
from octavo_kernels.testing import gpu_device


@pytest.fixture(params=["cpu", "gpu"])
def platform(request: pytest.FixtureRequest) -> Platform:
    return CPUPlatform() if request.param == "cpu" else GPUPlatform(gpu_device())


def fill(slots: dict[str, WeightSlot], *, pieces: int = 1) -> dict[str, Tensor]:
    """Writes random values into every slot, in so many pieces; returns them by name."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, slot in slots.items():
        value = torch.randn(slot.shape, generator=generator)
        start = 0
        for rows in value.tensor_split(pieces):
            if rows.shape[0]:
                slot.write(rows, start)
            start += rows.shape[0]
        values[name] = value
    return values


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 3, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_linear(pieces: int, bias: bool, platform: Platform) -> None:
    parts = {"q": 50, "k": 1, "v": 19}
    linear = Linear(
        40, prefix="attn.", parts=parts, bias=bias, platform=platform, dtype=torch.float32
    )
    slots = linear.slots()
    assert list(slots)[0] == "attn.q.weight" and len(slots) == (6 if bias else 3)
    assert slots["attn.v.weight"].shape == (19, 40)
    assert linear.num_bytes >= 4 * (70 * 40 + (70 if bias else 0))
    values = fill(slots, pieces=pieces)
    x, residual = torch.randn(5, 40), torch.randn(5, 70)
    expected = torch.cat(
        [
            F.linear(
                x.double(),
                values[f"attn.{part}.weight"].double(),
                values[f"attn.{part}.bias"].double() if bias else None,
            )
            for part in "qkv"
        ],
        dim=1,
    )
    there = x.to(platform.device)
    close(linear(there), expected)
    added = linear(there, residual=residual.to(platform.device))
    close(added, expected + residual.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_is_its_own_head(dtype: torch.dtype, platform: Platform) -> None:
    embedding = TokenEmbedding(101, name="embed", hidden_size=24, platform=platform, dtype=dtype)
    table = fill(embedding.slots())["embed.weight"].to(dtype)
    ids = torch.tensor([0, 100, 50, 50])
    rows = embedding.embed(ids.to(platform.device))
    assert torch.equal(rows.cpu().float(), table[ids].float())
    hidden = torch.randn(3, 24).to(rows.dtype)
    expected = hidden.double() @ table.double().T
    there = hidden.to(platform.device)
    out = torch.full((3, 101), float("nan"), device=platform.device)
    close(embedding.logits(there, out=out), expected)
    close(out, expected)
    assert torch.equal(embedding.logits(there), out)
    assert embedding.logits(there[:0]).shape == (0, 101)


def test_rms_norm(platform: Platform) -> None:
    norm = RMSNorm(48, eps=1e-3, platform=platform, dtype=torch.float32)
    weight = fill(norm.slots("norm"))["norm.weight"].double()
    x = torch.randn(4, 48)
    expected = F.rms_norm(x.double(), (48,), weight, eps=1e-3)
    there = x.to(platform.device)
    out = torch.full_like(there, float("nan"))
    close(norm(there, out=out), expected)
    close(out, expected)
    assert torch.equal(norm(there), out)


def test_gated_mlp(platform: Platform) -> None:
    mlp = GatedMLP(
        16, prefix="mlp.", intermediate_size=30, bias=True, platform=platform, dtype=torch.float32
    )
    values = {k.split(".", 1)[1]: v.double() for k, v in fill(mlp.slots()).items()}
    x, residual = torch.randn(3, 16), torch.randn(3, 16)

    def apply(name: str, value: Tensor) -> Tensor:
        return F.linear(value, values[f"{name}.weight"], values[f"{name}.bias"])

    inner = F.silu(apply("gate_proj", x.double())) * apply("up_proj", x.double())
    ours = mlp(x.to(platform.device), residual=residual.to(platform.device))
    close(ours, residual.double() + apply("down_proj", inner))
