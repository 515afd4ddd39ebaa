"""Builds a model and fills it from a checkpoint or with random numbers. Knows no layer's inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from octavo.checkpoint import ModelFiles, ModelSpec
from octavo.checkpoint.gguf_config import ROPE_FACTORS
from octavo.config import DType, KVDType
from octavo.layers import WeightSlot
from octavo.models.base import Model
from octavo.models.registry import MODELS
from octavo.models.weights import CheckpointTensor, gguf_tensors, safetensors_tensors
from octavo.platforms.base import Platform

# Elements a thread reads, converts and packs at a time: bounds what loading needs above the model.
_CHUNK = 1 << 21
# Random weights repeat with this period, prime so that no two rows of a matrix are alike.
_RANDOM_PERIOD = 1_299_709
_RANDOM_STD = 0.02


def weight_dtype(name: DType, *, device: str) -> torch.dtype:
    """Dtype that ``--dtype`` means: ``auto`` is float32 on CPU and bfloat16 on GPU."""
    if name == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"dtype must be auto, {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def kv_dtype(name: KVDType, *, device: str) -> torch.dtype:
    """Dtype that ``--kv-cache-dtype`` means, ``auto`` where the weights' is. Raises ValueError."""
    if name != "int8":
        return weight_dtype(name, device=device)
    if device != "cpu":
        raise ValueError("kv_cache_dtype must be auto or the model's dtype on a GPU, got int8")
    return torch.int8


class TooLarge(ValueError):
    """Weights that do not fit the memory."""


def load_model(
    files: ModelFiles,
    spec: ModelSpec,
    *,
    platform: Platform,
    dtype: torch.dtype,
    seed: int = 0,
    max_model_len: int | None = None,
    most_bytes: int | None = None,
) -> Model:
    """The model of ``files`` with weights as ``dtype``, or as the platform quantises them, ready
    to run on it.

    ``max_model_len``: longest request it will be asked for, default ``spec.max_model_len``.
    ``seed`` is that of random weights (format ``dummy``). Raises `ValueError` naming the file and
    tensor for what is missing, unexpected, misshapen or cut short, and `TooLarge` for weights of
    more than ``most_bytes``, before any is read.
    """
    model = MODELS[spec.architecture](
        spec,
        platform=platform,
        dtype=dtype,
        max_model_len=max_model_len or spec.max_model_len,
    )
    # Weights are zeros until now, which take no memory before they are written.
    if most_bytes is not None and model.weight_bytes > most_bytes:
        raise TooLarge(
            f"the weights of {files.name} take {model.weight_bytes / 2**30:.2f} GiB, more than the "
            f"{most_bytes / 2**30:.2f} GiB of memory that are free"
        )
    try:
        with loading_threads() as pool:
            if files.format == "dummy":
                _fill_randomly(model.slots(), seed=seed, device=platform.device, pool=pool)
            elif files.format == "gguf":
                _fill(model, gguf_tensors(files.weights, config=files.config), pool=pool)
            else:
                _fill(model, safetensors_tensors(files.weights), pool=pool)
    except OSError as error:
        raise ValueError(f"the weights of {files.name} cannot be read: {error}") from error
    return model


@contextmanager
def loading_threads() -> Iterator[Executor]:
    """As many threads as torch has, each with a tensor of its own and torch's helpers at rest.

    Torch's own threads wait for each other in busy loops after every piece: on a machine that has
    other work, loading then takes several times as long as on one thread.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="octavo-load") as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)


def wait_for(tasks: list[Future[None]]) -> None:
    """Returns when all are done. Raises what the first that failed raised, and drops those not
    begun."""
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _fill(model: Model, tensors: Iterable[CheckpointTensor], *, pool: Executor) -> None:
    slots = model.slots()
    tasks: list[Future[None]] = []
    missing = set(slots)
    unexpected: list[str] = []
    for tensor in tensors:
        slot = slots.get(tensor.name)
        if tensor.name == ROPE_FACTORS:
            model.set_frequency_factors(tensor.read(0, tensor.shape[0]))
        elif slot is not None:
            tasks.append(pool.submit(copy_rows, tensor, slot))
            missing.discard(tensor.name)
        elif not _is_redundant(tensor.name, model.spec):
            unexpected.append(f"{tensor.name} {list(tensor.shape)} in {tensor.path}")
    wait_for(tasks)
    if missing:
        raise ValueError(f"the checkpoint lacks {_some(sorted(missing))}")
    if unexpected:
        raise ValueError(
            f"{model.spec.architecture} has no place for tensors of the checkpoint: "
            f"{_some(unexpected)}"
        )


def _is_redundant(name: str, spec: ModelSpec) -> bool:
    """Tensors that some checkpoints carry although the config already says what they hold."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return name == "lm_head.weight" and spec.tie_word_embeddings


def _some(names: list[str], *, limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def copy_rows(tensor: CheckpointTensor, slot: WeightSlot) -> None:
    """Fills a slot from a tensor of its shape. Raises ValueError for another shape."""
    if tensor.shape != slot.shape:
        raise ValueError(
            f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, "
            f"the config says {list(slot.shape)}"
        )
    num_rows, read = tensor.shape[0], tensor.read
    if tensor.read_blocks is not None and tensor.block_kind in slot.block_kinds:
        read = tensor.read_blocks
    step = num_rows if tensor.whole else _chunk_rows(tensor.shape)
    for start in range(0, num_rows, step):
        slot.write(read(start, min(start + step, num_rows)), start)


def _chunk_rows(shape: tuple[int, ...]) -> int:
    row = shape[1] if len(shape) > 1 else 1
    return max(_CHUNK // row, 1)


def _fill_randomly(
    slots: Mapping[str, WeightSlot], *, seed: int, device: torch.device, pool: Executor
) -> None:
    """Small random weights, norms of one; equal for equal seeds on every device, at the speed of
    copying within it."""
    generator = torch.Generator().manual_seed(seed)
    period = torch.empty(_RANDOM_PERIOD).normal_(std=_RANDOM_STD, generator=generator)
    twice = torch.cat([period, period]).to(device)

    def write(slot: WeightSlot, start: int, shape: tuple[int, ...], offset: int) -> None:
        slot.write(_cycle(twice, offset=offset, shape=shape), start)

    tasks: list[Future[None]] = []
    offset = 0
    for slot in slots.values():
        if slot.kind == "norm":
            slot.write(torch.ones(slot.shape, device=device), 0)
            continue
        step = _chunk_rows(slot.shape)
        for start in range(0, slot.shape[0], step):
            shape = (min(step, slot.shape[0] - start), *slot.shape[1:])
            tasks.append(pool.submit(write, slot, start, shape, offset))
            offset = (offset + torch.Size(shape).numel()) % _RANDOM_PERIOD
    wait_for(tasks)


def _cycle(pool: Tensor, *, offset: int, shape: tuple[int, ...]) -> Tensor:
    """The endlessly repeated pool from ``offset`` on, in ``shape``."""
    size = torch.Size(shape).numel()
    if size <= _RANDOM_PERIOD:
        return pool[offset : offset + size].view(shape)
    period = pool[offset : offset + _RANDOM_PERIOD]
    return period.repeat(-(-size // _RANDOM_PERIOD))[:size].view(shape)
