"""``octavo plan``: what a GPU has room for, told on any machine. Knows GPUs' data sheets.

The plan of memory is the one that a server makes at its start. Bounds on speed are arithmetic: no
server is faster than its memory and its tensor cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.checkpoint import ModelSpec, resolve
from octavo.cli.options import add_engine_flags, engine_config
from octavo.flags import parse_int

if TYPE_CHECKING:
    from octavo.worker.gpu.memory_plan import MemoryPlan

HELP = "plan a GPU's memory for a model, and bound its speed; no GPU needed"
_GIB = 1 << 30
_BATCHES = (1, 8, 64, 256)
_CONTEXT = 1024  # tokens of each request, for the bounds on decoding
_PROMPT = 2048  # tokens, for the bound on prefill
_LENGTHS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Of a data sheet, without sparsity."""

    title: str
    memory_gib: float  # that a program sees
    tb_s: float  # memory bandwidth
    tflop_s: float  # bfloat16 and float16 on tensor cores
    fp32_tflop_s: float  # outside them


GPUS: Mapping[str, Gpu] = {
    "b200": Gpu(title="B200", memory_gib=178, tb_s=8.0, tflop_s=2250, fp32_tflop_s=75),
    "h200": Gpu(title="H200 SXM", memory_gib=139, tb_s=4.8, tflop_s=989, fp32_tflop_s=67),
    "h100": Gpu(title="H100 SXM", memory_gib=79, tb_s=3.35, tflop_s=989, fp32_tflop_s=67),
    "h100-pcie": Gpu(title="H100 PCIe", memory_gib=79, tb_s=2.0, tflop_s=756, fp32_tflop_s=51),
    "a100": Gpu(title="A100 80 GB", memory_gib=79, tb_s=2.04, tflop_s=312, fp32_tflop_s=19.5),
    "a100-40": Gpu(title="A100 40 GB", memory_gib=39, tb_s=1.55, tflop_s=312, fp32_tflop_s=19.5),
    "a10": Gpu(title="A10", memory_gib=22, tb_s=0.6, tflop_s=125, fp32_tflop_s=31),
    "l40s": Gpu(title="L40S", memory_gib=44, tb_s=0.864, tflop_s=362, fp32_tflop_s=91),
    "l4": Gpu(title="L4", memory_gib=22, tb_s=0.3, tflop_s=121, fp32_tflop_s=30),
    "rtx5090": Gpu(title="RTX 5090", memory_gib=31, tb_s=1.79, tflop_s=210, fp32_tflop_s=105),
    "rtx4090": Gpu(title="RTX 4090", memory_gib=23.5, tb_s=1.01, tflop_s=165, fp32_tflop_s=83),
    "rtx3090": Gpu(title="RTX 3090", memory_gib=23.5, tb_s=0.936, tflop_s=71, fp32_tflop_s=36),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "positional_model",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face id, local folder, or .gguf file; its weights are not needed",
    )
    parser.add_argument(
        "--gpu-memory", type=parse_int, metavar="X", help="such as 24GiB; default that of --gpu"
    )
    parser.add_argument("--gpu", choices=GPUS, help="for bounds on tokens per second")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    config = engine_config(args)
    gpu = GPUS.get(args.gpu)
    if args.gpu_memory is None and gpu is None:
        raise ValueError("give --gpu-memory, such as 24GiB, or --gpu")
    if config.model.device == "cpu":
        raise ValueError("this plans a GPU's memory; --device cpu has none")
    total = args.gpu_memory if gpu is None or args.gpu_memory else int(gpu.memory_gib * _GIB)
    if total < 1:
        raise ValueError(f"--gpu-memory must be at least 1, got {total}")
    # As dummy: the files of weights need not be there.
    files = resolve(dataclasses.replace(config.model, load_format="dummy"))
    # What is counted is what the engine would make, kernels' launches included.
    if importlib.util.find_spec("triton") is None:
        raise ValueError("octavo plan needs Triton: pip install 'octavo[gpu]'")
    # Lazy: torch and Triton; a wrong flag must be told at once.
    from octavo.worker.gpu.memory_plan import plan_gpu_memory

    plan = plan_gpu_memory(files.spec, config, total_bytes=total)
    bounds = None if gpu is None else speed_bounds(files.spec, plan, gpu)
    if args.json:
        print(json.dumps(_as_json(files.name, plan, gpu=args.gpu, bounds=bounds)))
    else:
        print(_as_text(files.name, plan, gpu=gpu, bounds=bounds))
    return 0


# ---- bounds ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBound:
    """Of ``batch`` requests of `_CONTEXT` tokens each, one token a step."""

    batch: int
    tokens_per_second: float
    is_by_memory: bool  # else by arithmetic


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedBounds:
    """What the data sheet allows."""

    decode: Sequence[DecodeBound]  # of the batches that fit
    prefill_tokens_per_second: float  # of prompts of `_PROMPT` tokens


def speed_bounds(spec: ModelSpec, plan: MemoryPlan, gpu: Gpu) -> SpeedBounds:
    """Weights are read once a step, each request's K and V once; every product is computed."""
    itemsize = plan.sizes.dtype.itemsize
    flops = 1e12 * (gpu.fp32_tflop_s if itemsize == 4 else gpu.tflop_s)
    head = spec.vocab_size * spec.hidden_size  # computed for the last token of a prompt alone
    parameters = plan.streamed_bytes / itemsize
    context = min(_CONTEXT, plan.sizes.max_model_len)
    kv_bytes = _seen(spec, context) * plan.block_bytes / spec.num_layers / plan.sizes.block_size
    found = []
    for batch in _BATCHES:
        if batch > min(plan.concurrency(context), plan.sizes.max_num_seqs):
            break
        by_memory = (plan.streamed_bytes + batch * kv_bytes) / (1e12 * gpu.tb_s)
        attention = 4 * spec.num_heads * spec.head_dim * _seen(spec, context)
        by_arithmetic = batch * (2 * parameters + attention) / flops
        seconds = max(by_memory, by_arithmetic)
        found.append(
            DecodeBound(
                batch=batch,
                tokens_per_second=batch / seconds,
                is_by_memory=by_memory >= by_arithmetic,
            )
        )
    length = min(_PROMPT, plan.sizes.max_model_len)
    seen = sum(_seen(spec, position + 1) for position in range(length))
    attention = 4 * spec.num_heads * spec.head_dim * seen
    total = 2 * (parameters - head) * length + 2 * head + attention
    return SpeedBounds(decode=found, prefill_tokens_per_second=length * flops / total)


def _seen(spec: ModelSpec, length: int) -> int:
    """Keys that the last of so many tokens attends to, over all layers."""
    return sum(min(length, window) if window else length for window in spec.layer_windows)


# ---- output ------------------------------------------------------------------------------------


def _lengths(plan: MemoryPlan) -> list[int]:
    longest = plan.sizes.max_model_len
    return [*(length for length in _LENGTHS if length < longest), longest]


def _running(plan: MemoryPlan, length: int) -> int:
    return min(int(plan.concurrency(length)), plan.sizes.max_num_seqs)


def _as_text(name: str, plan: MemoryPlan, *, gpu: Gpu | None, bounds: SpeedBounds | None) -> str:
    sizes = plan.sizes
    dtype = str(sizes.dtype).removeprefix("torch.")
    where = "" if gpu is None else f"{gpu.title}, "
    lines = [f"{name}, {dtype}, on {where}{plan.total_bytes / _GIB:.2f} GiB", ""]
    left = plan.total_bytes - plan.used_bytes
    width = max(len(part.name) for part in plan.parts)
    rows = [(part.name, part.num_bytes, part.note) for part in plan.parts if part.num_bytes]
    rows += [("total", plan.used_bytes, f"of {plan.usable_bytes / _GIB:.2f} GiB that may be used")]
    rows += [("left", left, "for others, and what no plan knows")]
    lines += [f"{n:<{width}}  {size / _GIB:>8.3f} GiB  {note}".rstrip() for n, size, note in rows]
    kib = plan.block_bytes / sizes.block_size / 1024
    lines += [
        "",
        f"context         {sizes.max_model_len:,} tokens",
        f"K/V cache       {plan.kv_tokens:,} tokens of {kib:.1f} KiB",
        f"a step          up to {sizes.max_num_tokens:,} tokens of {sizes.max_num_seqs:,} requests",
        f"on the host     {plan.pinned_bytes / 2**20:.1f} MiB pinned",
    ]
    lines += ["", "requests at once, by their length"]
    for length in _lengths(plan):
        lines.append(f"{length:>9,} tokens  {_running(plan, length):>6,}")
    if bounds is not None:
        lines += ["", "tokens per second at most, by the data sheet"]
        for bound in bounds.decode:
            by = "memory" if bound.is_by_memory else "arithmetic"
            requests = f"{bound.batch} request{'s' if bound.batch > 1 else ''}"
            lines.append(f"{requests:>16}  {bound.tokens_per_second:>9,.0f} output  (by {by})")
        rate = bounds.prefill_tokens_per_second
        lines.append(f"{'prompts':>16}  {rate:>9,.0f} input   (by arithmetic)")
        lines.append(
            f"requests have {min(_CONTEXT, sizes.max_model_len):,} tokens, "
            f"prompts {min(_PROMPT, sizes.max_model_len):,}"
        )
    if plan.notes:
        lines += ["", *plan.notes]
    return "\n".join(lines)


def _as_json(
    name: str, plan: MemoryPlan, *, gpu: str | None, bounds: SpeedBounds | None
) -> dict[str, Any]:
    sizes = plan.sizes
    return {
        "model": name,
        "gpu": gpu,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(plan.cache_dtype).removeprefix("torch."),
        "gpu_memory_bytes": plan.total_bytes,
        "usable_bytes": plan.usable_bytes,
        "used_bytes": plan.used_bytes,
        "parts": [dataclasses.asdict(part) for part in plan.parts],
        "pinned_host_bytes": plan.pinned_bytes,
        "max_model_len": sizes.max_model_len,
        "max_num_seqs": sizes.max_num_seqs,
        "max_num_batched_tokens": sizes.max_num_tokens,
        "block_size": sizes.block_size,
        "num_blocks": sizes.num_blocks,
        "kv_cache_tokens": plan.kv_tokens,
        "concurrency": {str(length): _running(plan, length) for length in _lengths(plan)},
        "bounds": None if bounds is None else dataclasses.asdict(bounds),
        "notes": list(plan.notes),
    }
