"""Runs every GPU op as a server of a model's shape would; this file alone knows how each is called.

`RUNS` has an entry for every `<op>/gpu.py`. On tensors of the device "meta" nothing is computed;
`launch.collecting` then lists what would have been launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octavo_kernels.scene import Batch, Scene, batches, decode, prefill
from octavo_kernels.shape import ModelShape

if TYPE_CHECKING:
    from octavo_kernels.paged_attention.gpu_plan import AttentionPlan
    from octavo_kernels.paged_attention.shared_prefix import PrefixGroups
    from octavo_kernels.quant_matmul import QuantWeight

__all__ = ["RUNS", "Batch", "Scene", "batches", "decode", "prefill"]

# Plain launches and early ones, which are other kernels: a step's first has nothing to overlap.
_EARLY = (False, True)


def _block_copy(scene: Scene) -> None:
    from octavo_kernels.block_copy import gpu

    gpu.block_copy([*scene.caches()], src=scene.ints([0]), dst=scene.ints([1]))


def _block_move(scene: Scene) -> None:
    from octavo_kernels.block_move import gpu, slot_words

    caches = scene.caches()
    slot = scene.ints([0] * slot_words(caches), torch.int64)
    for to_slots in (False, True):
        gpu.block_move(
            caches,
            cache_addresses=gpu.addresses_of(caches, device=scene.device),
            slot_addresses=gpu.addresses_of([slot], device=scene.device),
            moves=scene.ints([0, 0, 0], torch.int64).view(1, 3),
            to_slots=to_slots,
        )


def _drafting(scene: Scene) -> None:
    from octavo_kernels.drafting import gpu

    rows = scene.ints(range(scene.batch.num_requests))
    words = scene.ints([-1] * scene.batch.num_requests)
    table = scene.ints([0]).expand(scene.batch.num_requests, 8).contiguous()
    counts = scene.ints([0]).expand(scene.batch.num_requests, scene.shape.vocab)
    gpu.propose(
        rows,
        words,
        sample_rows=rows,
        sample_positions=words.clone(),
        token_table=table,
        num_tokens=rows.clone(),
        num_found=rows.clone(),
        min_length=2,
        max_length=5,
    )
    gpu.accept(
        rows,
        rows.to(torch.int64),
        token_table=table,
        num_tokens=rows.clone(),
        counts=counts.contiguous(),
        num_drawn=rows.clone(),
        max_drafts=scene.shape.num_drafts,
    )


def _embedding(scene: Scene) -> None:
    from octavo_kernels.embedding import gpu

    shape = scene.shape
    weight = scene.activations(shape.vocab, shape.hidden)
    for dtype in (torch.int32, torch.int64):
        ids = scene.ints([0] * scene.batch.num_tokens, dtype)
        gpu.embedding(ids, weight)
        gpu.embedding(ids, weight, scale=2.0)


def _matmul(scene: Scene) -> None:
    from octavo_kernels.matmul import gpu

    shape, tokens = scene.shape, scene.batch.num_tokens
    heads = shape.num_heads * shape.head_dim
    x = scene.activations(tokens, shape.hidden)
    residual = scene.activations(tokens, shape.hidden)
    qkv = scene.activations(shape.qkv_width, shape.hidden)
    bias = scene.activations(shape.qkv_width) if shape.has_qkv_bias else None
    attended = scene.activations(tokens, heads)
    gated = scene.activations(tokens, shape.ffn)
    gate_up = scene.activations(2 * shape.ffn, shape.hidden)
    gate_bias = scene.activations(2 * shape.ffn) if shape.has_mlp_bias else None
    hidden_bias = scene.activations(shape.hidden)
    back = scene.activations(shape.hidden, heads)
    back_bias = hidden_bias if shape.has_output_bias else None
    down = scene.activations(shape.hidden, shape.ffn)
    down_bias = hidden_bias if shape.has_mlp_bias else None
    head = scene.activations(shape.vocab, shape.hidden)
    for use_pdl in _EARLY:
        linear = functools.partial(gpu.linear, use_pdl=use_pdl)
        linear(x, qkv)
        linear(x, qkv, bias=bias)
        for y, weight, its_bias in ((attended, back, back_bias), (gated, down, down_bias)):
            linear(y, weight)
            linear(y, weight, bias=its_bias, residual=residual)
        linear(x, gate_up)
        product = linear(x, gate_up, bias=gate_bias, activation=shape.gate)  # type: ignore[arg-type]
        linear(x[: scene.batch.num_requests], head, out_dtype=torch.float32)
    # What follows cuBLAS, which takes over where it is faster and proven.
    gpu.finish(residual, residual=x, out=residual)
    both = scene.activations(tokens, 2 * shape.ffn)
    gpu.finish(both, bias=gate_bias, activation=shape.gate, out=product)
    if bias is not None:
        wide = scene.activations(tokens, shape.qkv_width)
        gpu.finish(wide, bias=bias, out=wide)
    if back_bias is not None or down_bias is not None:
        gpu.finish(residual, bias=hidden_bias, residual=x, out=residual)


def _layer_norm(scene: Scene) -> None:
    from octavo_kernels.layer_norm import gpu

    if scene.shape.norm == "layer_norm":
        x = scene.activations(scene.batch.num_tokens, scene.shape.hidden)
        weight = scene.activations(scene.shape.hidden)
        for use_pdl in _EARLY:
            norm = functools.partial(gpu.layer_norm, eps=1e-5, use_pdl=use_pdl)
            norm(x, weight, weight)
            norm(x, weight, weight, residual=x.clone())


def _packed_attention(scene: Scene) -> None:
    from octavo_kernels.packed_attention import gpu

    shape, batch = scene.shape, scene.batch
    if not shape.has_encoder:
        return
    qkv = scene.activations(batch.num_tokens, shape.qkv_width)
    q, k, v = _heads(shape, qkv)
    for is_causal in (False, True):
        gpu.packed_attention(
            q,
            k,
            v,
            query_start_loc=scene.starts(),
            key_start_loc=scene.starts(),
            max_query_len=max(batch.query_lens),
            scale=shape.head_dim**-0.5,
            is_causal=is_causal,
        )


def _heads(shape: ModelShape, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    keys = shape.num_heads + shape.num_kv_heads
    return heads[:, : shape.num_heads], heads[:, shape.num_heads : keys], heads[:, keys:]


def _paged_attention(scene: Scene) -> None:
    from octavo_kernels.paged_attention import gpu, shared_prefix

    shape, batch = scene.shape, scene.batch
    q, _, _ = _heads(shape, scene.activations(batch.num_tokens, shape.qkv_width))
    k_cache, v_cache = scene.caches()
    blocks = scene.ints(range(scene.blocks_a_request)).expand(batch.num_requests, -1)
    starts, seq_lens = scene.starts(), scene.ints(batch.seq_lens)
    common: dict[str, Any] = {
        "block_tables": blocks.contiguous(),
        "scale": shape.head_dim**-0.5,
        "soft_cap": shape.soft_cap,
    }
    scales = scene.cache_scales()
    k_scale = {name: scale for name, scale in scales.items() if name == "k_scale"}
    lengths: dict[str, Any] = {"query_start_loc": starts, "seq_lens": seq_lens}
    sinks: dict[str, Any] = {"sinks": scene.floats(shape.num_heads)} if shape.has_sinks else {}
    members = scene.ints(range(batch.num_requests))
    for window in {0, shape.sliding_window}:
        plan, groups = _shared(scene, members, starts, seq_lens, window)
        for prefixes in (None, groups):
            if prefixes is not None:
                shared_prefix.attend_shared_prefix(
                    q, k_cache, v_cache, plan=plan, groups=prefixes, **common, **k_scale
                )
            gpu.paged_attention(
                q,
                k_cache,
                v_cache,
                max_query_len=max(batch.query_lens),
                sliding_window=window,
                plan=None if prefixes is None else plan,
                **common,
                **lengths,
                **sinks,
                **scales,
            )


def _shared(
    scene: Scene, members: Tensor, starts: Tensor, seq_lens: Tensor, window: int
) -> tuple[AttentionPlan, PrefixGroups]:
    """A plan in which all requests have one prefix in common, of no partition."""
    from octavo_kernels.paged_attention import gpu, shared_prefix

    shape, batch = scene.shape, scene.batch
    plan = gpu.make_plan(
        starts,
        seq_lens,
        num_tokens=batch.num_tokens,
        max_query_len=max(batch.query_lens),
        max_seq_len=scene.blocks_a_request * shape.block_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        cache_dtype=shape.cache_dtype,
        sliding_window=window,
        shared_partitions=scene.ints([0] * batch.num_requests),
    )
    groups = shared_prefix.group_prefixes(
        plan,
        group_start_loc=scene.ints([0, batch.num_requests]),
        members=members,
        group_partitions=scene.ints([0]),
        max_partitions=1,
    )
    return plan, groups


def _quant_matmul(scene: Scene) -> None:
    from octavo_kernels.quant_matmul import gpu

    shape, tokens = scene.shape, scene.batch.num_tokens
    if not shape.weight_format:
        return
    heads = shape.num_heads * shape.head_dim
    bias = scene.activations(shape.qkv_width) if shape.has_qkv_bias else None
    for n, k, extra in (
        (shape.qkv_width, shape.hidden, {"bias": bias}),
        (shape.hidden, heads, {"residual": scene.activations(tokens, shape.hidden)}),
        (shape.hidden, heads, {}),
        (2 * shape.ffn, shape.hidden, {}),
        (shape.hidden, shape.ffn, {"residual": scene.activations(tokens, shape.hidden)}),
        (shape.hidden, shape.ffn, {}),
    ):
        gpu.quant_matmul(
            scene.activations(tokens, k),
            _packed(shape.weight_format, shape.has_zero_points, n, k, scene.device),
            quantise_activations=shape.quantises_activations,
            **extra,
        )


@functools.lru_cache(maxsize=16)
def _packed(weight_format: str, has_zero_points: bool, n: int, k: int, device: str) -> QuantWeight:
    from octavo_kernels import quant_matmul

    weight = torch.randn(n, k, device=device)
    kind, _, group = weight_format.partition("_")
    if kind == "int4":
        return quant_matmul.pack_int4(weight, group=int(group), symmetric=not has_zero_points)
    if kind == "int8":
        return quant_matmul.pack_int8(weight)
    return quant_matmul.pack_fp8_blocks(weight) if group else quant_matmul.pack_fp8(weight)


def _rms_norm(scene: Scene) -> None:
    from octavo_kernels.rms_norm import gpu

    if scene.shape.norm == "rms_norm":
        x = scene.activations(scene.batch.num_tokens, scene.shape.hidden)
        weight = scene.activations(scene.shape.hidden)
        offset = float(scene.shape.norm_offset)
        for use_pdl in _EARLY:
            norm = functools.partial(gpu.rms_norm, eps=1e-5, weight_offset=offset, use_pdl=use_pdl)
            norm(x, weight)
            norm(x, weight, residual=x.clone())


def _rotary_kv_write(scene: Scene) -> None:
    from octavo_kernels.rotary_kv_write import gpu

    shape, batch = scene.shape, scene.batch
    k_cache, v_cache = scene.caches()
    norms = (scene.activations(shape.head_dim) for _ in range(2))
    q_norm, k_norm = norms if shape.has_qk_norm else (None, None)
    table = scene.floats(max(batch.seq_lens), shape.turned // 2)
    for use_pdl in _EARLY:
        gpu.rotary_kv_write(
            scene.activations(batch.num_tokens, shape.qkv_width),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            positions=scene.positions(),
            cos=table,
            sin=table,
            slots=scene.positions(),
            k_cache=k_cache,
            v_cache=v_cache,
            q_norm=q_norm,
            k_norm=k_norm,
            weight_offset=float(shape.norm_offset),
            use_pdl=use_pdl,
            **scene.cache_scales(),
        )


def _sampling(scene: Scene) -> None:
    from octavo_kernels.sampling import gpu, gpu_params

    rows, vocab = scene.batch.num_requests, scene.shape.vocab
    ones = torch.ones(rows, device=scene.device)
    numbers = scene.ints(range(rows), torch.int64)
    slots = scene.ints(range(rows))
    logits = scene.floats(rows, vocab)
    params = gpu_params.GpuLogitParams.create(
        num_slots=1, vocab_size=vocab, max_tokens=8, list_capacity=8, device=scene.device
    )
    gpu_params.load_slots(params, slots)
    for drafts in (None, slots):
        gpu_params.apply_logit_params(
            logits, params=params, rows=slots, slots=slots, num_drafts=drafts
        )
    gpu.sample(
        logits,
        temperature=ones,
        top_k=scene.ints([5] * rows),
        top_p=ones,
        min_p=ones,
        seeds=numbers,
        positions=numbers,
    )
    gpu_params.extend(params, slots=slots, tokens=numbers)
    if scene.shape.num_drafts:
        accepted = numbers[:, None].repeat(1, 1 + scene.shape.num_drafts)
        gpu_params.extend(params, slots=slots, tokens=accepted)
    # Not "% vocab": on "meta" that imports torch's compiler, two seconds of a server's start.
    chosen = scene.ints((row % vocab for row in range(rows)), torch.int64)
    gpu.topn_logprobs(logits, chosen=chosen, num_best=1)


def _silu_mul(scene: Scene) -> None:
    from octavo_kernels.silu_mul import gpu

    x = scene.activations(scene.batch.num_tokens, 2 * scene.shape.ffn)
    for use_pdl in _EARLY:
        getattr(gpu, scene.shape.gate)(x, use_pdl=use_pdl)


def _step_inputs(scene: Scene) -> None:
    from octavo_kernels.step_inputs import gpu

    batch, shape = scene.batch, scene.shape
    rows = scene.ints(range(batch.num_requests))
    length = max(batch.seq_lens) + 1
    words = scene.ints(range(8))
    gpu.scatter_words(
        words, ranges=scene.ints([0, 0, 2]).view(1, 3), arena=words.clone(), max_len=2
    )
    blocks = scene.ints(range(scene.blocks_a_request)).expand(batch.num_requests, -1).contiguous()
    gpu.build_step_inputs(
        rows,
        scene.starts(),
        scene.ints(batch.seq_lens),
        token_table=scene.ints([0]).expand(batch.num_requests, length).contiguous(),
        block_table=blocks,
        block_size=shape.block_size,
        num_tokens=batch.num_tokens,
        max_query_len=max(batch.query_lens),
        token_ids=scene.positions(),
        positions=scene.positions(),
        slots=scene.positions(),
        block_tables=blocks.clone(),
    )
    columns = gpu.SamplingColumns.create(batch.num_requests, device=scene.device)
    table = columns.arguments() | {"positions": rows}
    gpu.gather_sampling(rows, out=columns, **table)
    hidden = scene.activations(batch.num_tokens, shape.hidden)
    out = scene.activations(batch.num_requests, shape.hidden)
    for use_pdl in _EARLY:
        gpu.gather_rows(hidden, rows, out=out, use_pdl=use_pdl)


RUNS: Mapping[str, Callable[[Scene], None]] = MappingProxyType(
    {
        "block_copy": _block_copy,
        "block_move": _block_move,
        "drafting": _drafting,
        "embedding": _embedding,
        "layer_norm": _layer_norm,
        "matmul": _matmul,
        "packed_attention": _packed_attention,
        "paged_attention": _paged_attention,
        "quant_matmul": _quant_matmul,
        "rms_norm": _rms_norm,
        "rotary_kv_write": _rotary_kv_write,
        "sampling": _sampling,
        "silu_mul": _silu_mul,
        "step_inputs": _step_inputs,
    }
)
