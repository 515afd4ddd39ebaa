"""``octavo compile``: every GPU kernel that a server of a model needs, on a machine without a GPU.

What is compiled goes into Triton's cache: a server that finds it there compiles nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

from octavo.cli.options import positional_model
from octavo.config import CacheConfig, ModelConfig
from octavo.flags import add_flags, from_namespace, parse_int

HELP = "compile a model's GPU kernels ahead of its first start; needs no GPU"
_ARCHITECTURES = tuple(f"sm_{number}" for number in (80, 86, 87, 89, 90, 100, 103, 120, 121))
# Options that no kernel depends on, or that only a server has a use for.
_TAKEN = {"model", "revision", "download_dir", "dtype", "block_size", "kv_cache_dtype"}


def _others(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)} - _TAKEN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "positional_model",
        metavar="MODEL",
        nargs="?",
        help="Hugging Face id, local folder, or .gguf file; weights are not read",
    )
    parser.add_argument(
        "--arch",
        required=True,
        choices=_ARCHITECTURES,
        help="the GPU: sm_80 A100, sm_86 A10 and RTX 30, sm_89 L4 and RTX 40, sm_90 H100 and H200",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where to keep them: a server takes it by TRITON_CACHE_DIR. Default Triton's cache",
    )
    parser.add_argument(
        "--processes", metavar="N", type=parse_int, help="that compile; default one per core"
    )
    skip = sorted(_others(ModelConfig) | _others(CacheConfig))
    add_flags(parser, (ModelConfig, CacheConfig), skip=skip)


def run(args: argparse.Namespace) -> int:
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {args.processes}")
    if args.cache_dir is not None:
        os.environ["TRITON_CACHE_DIR"] = str(Path(args.cache_dir).expanduser().absolute())
    args.model = positional_model(args)
    # Weights need not be there: what `dummy` reads is what decides the kernels.
    args.load_format = "dummy"
    model, cache = from_namespace(ModelConfig, args), from_namespace(CacheConfig, args)
    # Lazy: torch and Triton; a wrong flag must be told at once.
    try:
        import triton
    except ImportError:
        raise ValueError("octavo compile needs Triton: pip install 'octavo[gpu]'") from None
    from octavo.checkpoint import resolve
    from octavo.models import kv_dtype, weight_dtype
    from octavo.platforms.gpu import model_shape
    from octavo_kernels import device, warming

    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: interpreted kernels are not compiled")
    files = resolve(model)
    dtype = weight_dtype(model.dtype, device="cuda")
    is_same = cache.kv_cache_dtype == "auto"
    cache_dtype = dtype if is_same else kv_dtype(cache.kv_cache_dtype, device="cuda")
    shape = model_shape(
        files.spec, dtype=dtype, cache_dtype=cache_dtype, block_size=cache.block_size
    )
    capability = int(args.arch.removeprefix("sm_"))
    began = time.monotonic()
    with device.pretending(divmod(capability, 10)):
        launches = warming.launches(shape)
        where = triton.knobs.cache.dir
        print(f"{files.name}: {len(launches)} kernels for {args.arch}, {str(dtype)[6:]}", end="")
        print(f", cache {str(cache_dtype)[6:]} in blocks of {cache.block_size}", flush=True)
        if warming.is_compiled(launches, capability=capability):
            print(f"all of them are in {where}")
            return 0
        failed = warming.compile_into_cache(
            launches, capability=capability, processes=args.processes
        )
    for index, why in failed.items():
        print(f"{launches[index].name} does not compile: {why}", file=sys.stderr)
    seconds = time.monotonic() - began
    print(f"{len(launches) - len(failed)} of them compiled in {seconds:.1f} s, kept in {where}")
    return 1 if failed else 0
