"""The GPU platform: its weights hold what the CPU's hold, and it launches what warming lists."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.attention import AttentionMetadata
from octavo.checkpoint import ModelSpec, RopeSpec, resolve
from octavo.config import ModelConfig
from octavo.models import Model, kv_cache_spec, load_model
from octavo.models.decoder import Decoder
from octavo.platforms import gpu
from octavo.platforms.base import Platform
from octavo.platforms.cpu import CPUPlatform
from octavo.platforms.gpu import GPUPlatform, model_shape
from octavo_kernels import launches
from octavo_kernels.launch import collecting
from octavo_kernels.matmul import gpu as matmul
from octavo_kernels.testing import gpu_device, same_bits

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
}
LLAMA_8B = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rms_norm_eps=1e-5,
    rope=RopeSpec(theta=500000.0, rotary_dim=128),
    max_position_embeddings=8192,
    layer_windows=(0, 0),
)
SPECS = {
    "llama-8b": LLAMA_8B,
    "all-options": replace(
        LLAMA_8B,
        vocab_size=5000,
        hidden_size=1024,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=3072,
        rope=RopeSpec(theta=1e6, rotary_dim=32),
        layer_windows=(0, 512),
        tie_word_embeddings=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=True,
    ),
}
# Tokens, requests and the longest query of a step.
STEPS = [(1, 1, 1), (7, 7, 1), (256, 256, 1), (40, 10, 4), (300, 5, 200), (8192, 20, 8192)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_those_of_the_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    files = resolve(ModelConfig(model=str(tmp_path), load_format="dummy"))

    def load(platform: Platform, *, seed: int) -> Any:
        return load_model(files, files.spec, platform=platform, dtype=dtype, seed=seed)

    cpu = load(CPUPlatform(), seed=3)
    ours, other = (load(GPUPlatform(gpu_device()), seed=seed) for seed in (3, 4))

    def matrices(model: Any) -> list[torch.Tensor]:
        parts = [model.embedding.weight, model.head.weight]
        for layer in model.layers:
            parts += [layer.attention.qkv.weight, layer.attention.output.weight]
            parts += [layer.mlp.gate_up.weight, layer.mlp.down.weight]
        device = model.platform.device
        ids = [torch.arange(0, part.n, 7, device=device) for part in parts]
        return [part.rows(some).cpu().float() for part, some in zip(parts, ids, strict=True)]

    for mine, same, others in zip(*map(matrices, (ours, cpu, other)), strict=True):
        assert torch.equal(mine, same) and not torch.equal(mine, others)
    biases = [model.layers[1].attention.qkv.bias.cpu() for model in (ours, cpu)]
    assert torch.equal(biases[0], biases[1].to(dtype)) and biases[0].any()
    assert ours.layers[0].input_norm.weight.eq(1).all()


def test_the_bytes_of_a_model_are_those_of_its_tensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    spec = resolve(ModelConfig(model=str(tmp_path), load_format="dummy")).spec
    for tied in (False, True):
        model: Model = Decoder(
            replace(spec, tie_word_embeddings=tied),
            platform=GPUPlatform("meta"),
            dtype=torch.bfloat16,
            max_model_len=64,
        )
        elements = sum(torch.Size(slot.shape).numel() for slot in model.slots().values())
        assert model.weight_bytes == 2 * elements + 2 * 64 * 8 * 4  # and two rotary tables


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_launched_that_is_not_listed(name: str, dtype: torch.dtype) -> None:
    """Of steps at full size, without memory for them: plain and early launches, by tiles and by
    cuBLAS, and what proves cuBLAS."""
    spec = SPECS[name]
    shape = model_shape(spec, dtype=dtype, cache_dtype=dtype, block_size=16)
    listed = {launch.key for launch in launches(shape)}
    for use_pdl in (False, True):
        platform = GPUPlatform("meta", use_pdl=use_pdl)
        model = Decoder(spec, platform=platform, dtype=dtype, max_model_len=8192)
        cache = kv_cache_spec(spec, block_size=16, dtype=dtype)
        caches = model.backend.allocate(cache, num_blocks=600)

        def ints(*sizes: int) -> torch.Tensor:
            return torch.empty(sizes, dtype=torch.int32, device="meta")

        for num_tokens, num_requests, max_query_len in STEPS:
            attn = AttentionMetadata(
                positions=ints(num_tokens),
                slots=ints(num_tokens),
                block_tables=ints(num_requests, 513),
                query_start_loc=ints(num_requests + 1),
                seq_lens=ints(num_requests),
                max_query_len=max_query_len,
            )
            proven = [(n, k) for n, k, _ in platform.products]
            with collecting() as found:
                for products in ((), proven):
                    with matmul.assuming_cublas(products, dtype, rows=num_tokens):
                        hidden = model.forward(ints(num_tokens), attn, caches)
                        model.compute_logits(hidden[:num_requests])
                for n, k in proven:
                    x, weight, out = (
                        torch.empty(sizes, dtype=dtype, device="meta")
                        for sizes in ((num_tokens, k), (n, k), (num_tokens, n))
                    )
                    tile = matmul.tile_for(n, k, dtype, num_tokens, gated=False)
                    matmul.by_tile(x, weight, tile, out=out)
            assert len(found) > 30
            for launch in found:
                assert launch.key in listed, f"{launch.name} {launch.options}"


def test_products_name_what_cublas_may_multiply() -> None:
    platform = GPUPlatform("meta")
    Decoder(LLAMA_8B, platform=platform, dtype=torch.bfloat16, max_model_len=64)
    sizes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert platform.products == tuple((n, k, torch.bfloat16) for n, k in sizes)
    assert platform.prove([256]) == []


def test_rows_may_come_from_many_threads_in_any_order() -> None:
    """On a GPU through pinned memory, which every thread refills while its last rows travel."""
    platform = GPUPlatform(gpu_device())
    weight = platform.table(320, 48, dtype=torch.bfloat16)
    values = torch.randn(320, 48)
    starts = [(37 * i) % 80 * 4 for i in range(80)]

    def write(start: int) -> None:
        rows = values[start : start + 4].clone()
        weight.write(rows, start)
        rows.zero_()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, starts))
    ids = torch.arange(320, device=platform.device)
    assert same_bits(weight.rows(ids).cpu(), values.bfloat16())


class _FakeCuda:
    """Stands in for CUDA's copies and events: a copy happens when its event is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        cuda = self

        class Event:
            def __init__(self) -> None:
                self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

            def record(self, stream: object) -> None:
                self.copies, cuda.waiting = cuda.waiting, []

            def synchronize(self) -> None:
                for target, source in self.copies:
                    target.data.copy_(source)
                self.copies = []

        self.events: list[Event] = []
        empty, copy = torch.empty, torch.Tensor.copy_

        def later(
            target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
        ) -> torch.Tensor:
            if not non_blocking:
                return copy(target, source)
            self.waiting.append((target, source))
            return target

        def made() -> Event:
            self.events.append(Event())
            return self.events[-1]

        monkeypatch.setattr(torch.cuda, "Event", made)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **k: empty(*size, **k))
        monkeypatch.setattr(torch.Tensor, "copy_", later)

    def finish(self) -> None:
        for event in self.events:
            event.synchronize()


def test_pinned_memory_is_not_refilled_while_its_rows_travel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = torch.randn(40, 6)
    target = torch.zeros(40, 6, dtype=torch.bfloat16)
    cuda = _FakeCuda(monkeypatch)
    staging = gpu._Staging()
    for start, stop in ((0, 4), (4, 5), (5, 20), (20, 30), (30, 40)):
        staging.send(values[start:stop].clone(), target[start:stop])
    assert len(cuda.events) == 2 and not target.eq(values.bfloat16()).all(), "the last two travel"
    cuda.finish()
    assert torch.equal(target, values.bfloat16())
