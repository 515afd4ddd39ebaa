"""Norms, gates, rotary + cache write and block copies: bits, bounds and refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels import layer_norm as layer_norm_op
from octavo_kernels import rms_norm as rms_norm_op
from octavo_kernels import silu_mul as silu_mul_op
from octavo_kernels.block_copy.gpu import block_copy
from octavo_kernels.layer_norm.gpu import layer_norm
from octavo_kernels.rms_norm.gpu import rms_norm
from octavo_kernels.rotary_kv_write.gpu import rotary_kv_write
from octavo_kernels.silu_mul.gpu import gelu_mul, gelu_tanh_mul, silu_mul
from octavo_kernels.testing import assert_canaries, gpu_device, guarded_empty, same_bits

DEVICE = gpu_device()
Norm = Callable[..., Tensor]
Gate = Callable[..., Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_a_residual_is_summed_then_normalised_as_stored(norm: Norm) -> None:
    x, residual = normal(5, 96, dtype=torch.float16), normal(5, 96, dtype=torch.float16, seed=1)
    weight, before = normal(96, dtype=torch.float16, seed=2), residual.clone()
    got = norm(x, weight, eps=1e-6, residual=residual)
    assert same_bits(residual, before + x)
    assert same_bits(got, norm(residual, weight, eps=1e-6))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("dim", [15, 96])
def test_rows_have_the_bits_they_have_elsewhere_in_memory(norm: Norm, dim: int) -> None:
    x, weight = normal(7, dim, dtype=torch.bfloat16), normal(dim, seed=1)
    whole = norm(x, weight, eps=1e-6)
    for row in range(7):
        assert same_bits(norm(x[row:], weight, eps=1e-6), whole[row:])
    assert same_bits(norm(x, weight, eps=1e-6, out=x), whole)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_norms_refuse_what_they_do_not_take(norm: Norm) -> None:
    x, weight = normal(2, 64), normal(64)
    for bad in (
        {"x": x[0]},
        {"x": x.double()},
        {"x": normal(2, 128)[:, ::2]},
        {"x": normal(64, 2).T},
        {"x": normal(129)[1:].view(2, 64)},
        {"x": torch.empty(1, 16385, device=DEVICE), "weight": torch.empty(16385, device=DEVICE)},
        {"weight": normal(63)},
        {"weight": normal(128)[::2]},
        {"residual": normal(3, 64)},
        {"residual": normal(2, 64).half()},
        {"out": normal(2, 64).half()},
    ):
        with pytest.raises(ValueError, match=r"must|takes"):
            norm(**({"x": x, "weight": weight, "eps": 1e-6} | bad))
    with pytest.raises(ValueError, match="weight_offset must be 0 or 1"):
        rms_norm(x, weight, eps=1e-6, weight_offset=0.5)


def test_the_cpu_refuses_what_only_gpus_have() -> None:
    x, weight = torch.ones(1, 8), torch.ones(8)
    with pytest.raises(ValueError, match="it has cuda"):
        layer_norm_op.layer_norm(x, weight, eps=1e-6)
    with pytest.raises(ValueError, match="it has cuda"):
        silu_mul_op.gelu_mul(x)
    with pytest.raises(ValueError, match="weight_offset on CPU must be 0"):
        rms_norm_op.rms_norm(x, weight, eps=1e-6, weight_offset=1.0)


@pytest.mark.parametrize("gate", [silu_mul, gelu_tanh_mul, gelu_mul])
def test_gates_of_extremes(gate: Gate) -> None:
    gates = torch.tensor([-1e12, -200.0, 0.0, 200.0, 1e12, float("nan")], device=DEVICE)
    x = torch.cat([gates, torch.full_like(gates, 2.0)])[None]
    want = torch.tensor([[0.0, 0.0, 0.0, 400.0, 2e12, float("nan")]])
    torch.testing.assert_close(gate(x).cpu(), want, equal_nan=True)
    for bad in (normal(2, 3), normal(4), normal(2, 4).double(), normal(4, 2).T):
        with pytest.raises(ValueError, match="takes contiguous"):
            gate(bad)
    with pytest.raises(ValueError, match="out must be"):
        gate(x, out=x)


def rotary_inputs(num_tokens: int, *, dtype: torch.dtype, fp8: bool) -> dict[str, Any]:
    """N 4, K 2, H 32, all of it turning, QK-norm, 3 blocks of 16."""
    generator = torch.Generator().manual_seed(7)
    angle = torch.rand(40, 16, generator=generator) * 6.3
    cache_dtype = torch.float8_e4m3fn if fp8 else dtype
    inputs: dict[str, Any] = {
        "qkv": normal(num_tokens, 8 * 32, dtype=dtype),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "positions": torch.randint(40, (num_tokens,), generator=generator).to(DEVICE),
        "cos": angle.cos().to(DEVICE),
        "sin": angle.sin().to(DEVICE),
        "slots": torch.randperm(48, generator=generator)[:num_tokens].to(DEVICE),
        "k_cache": torch.zeros(3, 2, 16, 32, device=DEVICE).to(cache_dtype),
        "v_cache": torch.zeros(3, 2, 16, 32, device=DEVICE).to(cache_dtype),
        "q_norm": normal(32, dtype=dtype, seed=1),
        "k_norm": normal(32, dtype=dtype, seed=2),
    }
    if fp8:
        inputs |= {name: torch.rand(2, device=DEVICE) for name in ("k_scale", "v_scale")}
    return inputs


@pytest.mark.parametrize("fp8", [False, True])
def test_a_token_writes_the_same_bits_in_every_batch(fp8: bool) -> None:
    inputs = rotary_inputs(6, dtype=torch.bfloat16, fp8=fp8)
    scales = {name: inputs[name] for name in ("k_scale", "v_scale") if fp8}

    def run(*batches: list[int]) -> tuple[Tensor, Tensor]:
        written = rotary_inputs(6, dtype=torch.bfloat16, fp8=fp8) | scales
        for rows in batches:
            mine = dict(written)
            for name in ("qkv", "positions", "slots"):
                mine[name] = inputs[name][rows].contiguous()
            rotary_kv_write(**mine)
        return written["k_cache"], written["v_cache"]

    whole = run([0, 1, 2, 3, 4, 5])
    assert any(cache.float().abs().sum() > 0 for cache in whole)
    for other in (run([3, 5, 0, 2, 4, 1]), run([4], [1, 2, 3], [5, 0])):
        assert all(map(same_bits, whole, other))


@pytest.mark.parametrize("factors", [None, (1.0, 0.3)])
def test_e4m3_is_rounded_to_nearest_even_and_saturates(factors: tuple[float, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (every[1:127] + every[:126]) / 2
    special = torch.tensor([0.0, -0.0, 448.0, 449.0, 463.9, 464.0, 465.0, 1e30, -1e30, 2.0**-10])
    spread = torch.randn(800, generator=generator) * torch.logspace(-4, 4, 800)
    values = torch.cat([every, ties, -ties, special, -special, spread])
    values = torch.nn.functional.pad(values, (0, -len(values) % 1024)).view(-1, 512)
    num_tokens = values.shape[0]
    qkv = torch.cat([values, values, values.flip(1)], dim=1).to(DEVICE)
    caches = [torch.zeros(1, 1, 16, 512).to(DEVICE, torch.float8_e4m3fn) for _ in range(2)]
    table = torch.empty(1, 0, device=DEVICE)
    scales = [torch.tensor([f], device=DEVICE) for f in factors] if factors else [None, None]
    index = torch.arange(num_tokens, device=DEVICE)
    rotary_kv_write(
        qkv,
        num_heads=1,
        num_kv_heads=1,
        head_dim=512,
        positions=index,
        cos=table,
        sin=table,
        slots=index,
        k_cache=caches[0],
        v_cache=caches[1],
        k_scale=scales[0],
        v_scale=scales[1],
    )
    for cache, want, scale in zip(caches, (values, values.flip(1)), factors or (1, 1), strict=True):
        want = (want / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
        got = cache[0, 0, :num_tokens].cpu()
        number = ~want.float().isnan()
        assert torch.equal(got.float().isnan(), ~number)
        assert torch.equal(got.view(torch.uint8)[number], want.view(torch.uint8)[number])


def test_slots_and_positions_outside_are_not_touched() -> None:
    inputs = rotary_inputs(6, dtype=torch.float32, fp8=False)
    caches = [guarded_empty((3, 2, 16, 32), torch.float32, DEVICE) for _ in range(2)]
    inputs["k_cache"], inputs["v_cache"] = caches[0][0], caches[1][0]
    inputs["slots"] = torch.tensor([-1, 48, -(2**31), 2**31 - 1, 2**40, 47], device=DEVICE)
    inputs["positions"] = torch.tensor([-1, 40, -(2**31), 2**31 - 1, 2**40, 39], device=DEVICE)
    twin = rotary_inputs(6, dtype=torch.float32, fp8=False)
    twin["positions"] = torch.tensor([0, 39, 0, 39, 39, 39], device=DEVICE)
    assert same_bits(rotary_kv_write(**inputs), rotary_kv_write(**twin))
    for cache, store in caches:
        assert_canaries(store, "cache")
        written = ~cache.isnan().all(dim=3).all(dim=1)
        assert written.nonzero().tolist() == [[2, 15]]


def test_q_out_and_k_in_place() -> None:
    want = rotary_inputs(4, dtype=torch.float16, fp8=False)
    q = rotary_kv_write(**want)
    assert q.data_ptr() == want["qkv"].data_ptr()
    apart = rotary_inputs(4, dtype=torch.float16, fp8=False)
    before = apart["qkv"].clone()
    out, store = guarded_empty((4, 4, 32), torch.float16, DEVICE)
    assert rotary_kv_write(**apart, q_out=out) is out
    assert_canaries(store, "q_out")
    assert same_bits(out, q) and same_bits(apart["qkv"], before)
    assert same_bits(apart["k_cache"], want["k_cache"])

    encoder = rotary_inputs(4, dtype=torch.float16, fp8=False)
    slots = encoder.pop("slots")
    del encoder["k_cache"], encoder["v_cache"]
    rotary_kv_write(**encoder, k_in_place=True)
    heads = encoder["qkv"].view(4, 8, 32)
    assert same_bits(heads[:, :4], q)
    block, offset = slots // 16, slots % 16
    assert same_bits(heads[:, 4:6], want["k_cache"][block, :, offset])
    assert same_bits(heads[:, 6:], before.view(4, 8, 32)[:, 6:])


def test_rotary_refuses_what_does_not_fit() -> None:
    good = rotary_inputs(2, dtype=torch.float16, fp8=False)
    scale = torch.ones(2, device=DEVICE)
    for bad in (
        {"qkv": good["qkv"].double()},
        {"qkv": good["qkv"][:, :-1]},
        {"num_heads": 3, "num_kv_heads": 2},
        {"num_heads": 0, "num_kv_heads": 4},
        {"positions": good["positions"][:1]},
        {"slots": good["slots"].short()},
        {"slots": None},
        {"cos": good["cos"][:, :8]},
        {"cos": good["cos"][:0], "sin": good["sin"][:0]},
        {"cos": good["cos"].half()},
        {"q_norm": good["q_norm"][:16]},
        {"k_cache": good["k_cache"].transpose(2, 3)},
        {"k_cache": good["k_cache"][:, :, :8], "v_cache": good["v_cache"][:, :, :8]},
        {"v_cache": good["v_cache"].float()},
        {"k_scale": scale},
        {"weight_offset": 2.0},
        {"q_out": good["qkv"]},
    ):
        with pytest.raises(ValueError, match=r"must|needs|together"):
            rotary_kv_write(**(good | bad))
    fp8 = rotary_inputs(2, dtype=torch.float16, fp8=True)
    with pytest.raises(ValueError, match="go together"):
        rotary_kv_write(**(fp8 | {"v_scale": None}))


def test_block_copy_skips_what_is_outside() -> None:
    caches = [guarded_empty((4, 24), torch.float16, DEVICE) for _ in range(3)]
    for number, (cache, _) in enumerate(caches):
        cache.copy_(normal(4, 24, seed=number))
    before = [cache.clone() for cache, _ in caches]
    src = torch.tensor([0, 4, -1, 1, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    dst = torch.tensor([3, 1, 1, -2, 0], dtype=torch.int32, device=DEVICE)
    block_copy([cache for cache, _ in caches], src=src, dst=dst)
    for (cache, store), old in zip(caches, before, strict=True):
        assert_canaries(store, "cache")
        assert same_bits(cache[:3], old[:3]) and same_bits(cache[3], old[0])
    with pytest.raises(ValueError, match="one length"):
        block_copy([caches[0][0]], src=src, dst=dst[:1])
    with pytest.raises(ValueError, match="contiguous"):
        block_copy([caches[0][0].T], src=src, dst=dst)
    with pytest.raises(ValueError, match="src must be int32"):
        block_copy([caches[0][0]], src=src.short(), dst=dst)
    block_copy([], src=src, dst=dst)
    block_copy([caches[0][0][:0]], src=src, dst=dst)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("dim", [64, 576, 1024, 4096, 16384])
def test_large_batches_have_the_bits_of_single_rows(norm: Norm, dim: int) -> None:
    x, weight = normal(2048, dim, dtype=torch.bfloat16), normal(dim, dtype=torch.bfloat16, seed=1)
    whole = norm(x, weight, eps=1e-6)
    for row in (0, 1, 17, 1023, 2047):
        assert same_bits(norm(x[row : row + 1], weight, eps=1e-6), whole[row : row + 1])
    order = torch.randperm(2048, device=DEVICE)
    assert same_bits(norm(x[order], weight, eps=1e-6), whole[order])


@pytest.mark.parametrize(
    ("num_rows", "dim", "length"), [(3, 64, 2), pytest.param(300, 4096, 20, marks=pytest.mark.gpu)]
)
def test_dependent_launches_give_the_same_bits(num_rows: int, dim: int, length: int) -> None:
    weight = normal(dim, dtype=torch.bfloat16, seed=1)

    def chain(use_pdl: bool) -> Tensor:
        x = normal(num_rows, 2 * dim, dtype=torch.bfloat16)
        residual = torch.zeros(num_rows, dim, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(length):
            half = silu_mul(x, use_pdl=use_pdl)
            y = rms_norm(half, weight, eps=1e-6, residual=residual, use_pdl=use_pdl)
            y = layer_norm(y, weight, weight, eps=1e-6, use_pdl=use_pdl)
            x = torch.cat([y, residual], dim=1)
        return x

    assert same_bits(chain(True), chain(False))
    early, plain = (rotary_inputs(3, dtype=torch.float16, fp8=False) for _ in range(2))
    q = rotary_kv_write(**early, use_pdl=True)
    assert same_bits(q, rotary_kv_write(**plain))
    assert same_bits(early["k_cache"], plain["k_cache"])
