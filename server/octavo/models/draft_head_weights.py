"""Fills a draft head from its files, once it is sure to fit the target. Knows names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor

import torch
from safetensors import safe_open
from torch import Tensor

from octavo.checkpoint.draft_head import NUM_TAPS, DraftHeadFiles
from octavo.models.base import Model
from octavo.models.draft_head import LAYER, DraftHead
from octavo.models.fingerprint import is_same_target, target_fingerprint
from octavo.models.loader import copy_rows, loading_threads, wait_for
from octavo.models.weights import CheckpointTensor, safetensors_tensors
from octavo.platforms.base import Platform

_HEAD, _VECTORS, _OFFSETS, _IS_DRAFTED = "lm_head.weight", "embed_tokens.weight", "d2t", "t2d"
_MASK = "mask_hidden"
_ROWS = 1024  # of the target's output matrix that are read at a time


def load_draft_head(
    files: DraftHeadFiles,
    *,
    target: Model,
    target_name: str,
    platform: Platform,
    dtype: torch.dtype,
    max_model_len: int,
) -> DraftHead:
    """The head, ready to run beside its target.

    Raises ValueError where it was made for another model, naming both, and for tensors that are
    missing, unexpected or misshapen.
    """
    with loading_threads() as pool:
        _check_target(files, target=target, target_name=target_name)
        tensors = {_plain_name(each.name): each for each in safetensors_tensors(files.weights)}
        tensors.pop(_IS_DRAFTED, None)
        offsets, mask = tensors.pop(_OFFSETS, None), tensors.pop(_MASK, None)
        head = DraftHead(
            files.spec,
            target=target,
            platform=platform,
            dtype=dtype,
            max_model_len=max_model_len,
            has_embedding=_VECTORS in tensors,
        )
        if offsets is not None:
            _set_token_ids(head, offsets)
        if mask is not None:
            _set_mask(head, mask)
        _fill(head, tensors, target=target, name=files.name, pool=pool)
    return head


def _fill(
    head: DraftHead,
    tensors: Mapping[str, CheckpointTensor],
    *,
    target: Model,
    name: str,
    pool: Executor,
) -> None:
    slots = head.slots()
    missing = sorted(set(slots) - set(tensors) - {_HEAD})
    if missing:
        raise ValueError(f"draft head {name} lacks {', '.join(missing)}")
    for key, tensor in tensors.items():
        if key not in slots:
            raise ValueError(
                f"a draft head has no place for the tensor {key} {list(tensor.shape)} in "
                f"{tensor.path}"
            )
    tasks = [pool.submit(copy_rows, tensor, slots[key]) for key, tensor in tensors.items()]
    if _HEAD not in tensors:  # the target's rows of the tokens that it drafts
        for start in range(0, len(head.token_ids), _ROWS):
            rows = target.head_rows(head.token_ids[start : start + _ROWS])
            tasks.append(pool.submit(slots[_HEAD].write, rows, start))
    wait_for(tasks)


def _check_target(files: DraftHeadFiles, *, target: Model, target_name: str) -> None:
    spec, theirs = files.spec, target.spec
    for what, own, other in (
        ("hidden size", spec.layer.hidden_size, theirs.hidden_size),
        ("vocabulary", spec.layer.vocab_size, theirs.vocab_size),
    ):
        if own != other:
            raise ValueError(
                f"draft head {files.name} is for a model with a {what} of {own}, and "
                f"{target_name} has {other}"
            )
    spec.taps_of(theirs)
    wanted = spec.target_fingerprint
    if wanted and not is_same_target(wanted, target_fingerprint(target)):
        trained_for = spec.target_name or "another model"
        raise ValueError(
            f"draft head {files.name} was trained for {trained_for}, whose weights are not those "
            f"of {target_name}"
        )


def _plain_name(name: str) -> str:
    name = name.removeprefix("model.")
    return LAYER + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _read(tensor: CheckpointTensor) -> Tensor:
    with safe_open(tensor.path, framework="pt") as file:
        names = {_plain_name(name): name for name in file.keys()}  # noqa: SIM118 (no mapping)
        found: Tensor = file.get_tensor(names[_plain_name(tensor.name)])
    return found


def _set_mask(head: DraftHead, tensor: CheckpointTensor) -> None:
    """What a token that is not known yet has for hidden states."""
    size = NUM_TAPS * head.spec.layer.hidden_size
    mask = _read(tensor).flatten().float()
    if mask.shape != (size,):
        raise ValueError(
            f"{tensor.path}: tensor {_MASK} has shape {list(tensor.shape)}, "
            f"the config says {[size]}"
        )
    if head.spec.mask_token_id is None:
        raise ValueError(
            f"{tensor.path}: there is a tensor {_MASK}, and config.json has no pard_token that "
            "it belongs to"
        )
    head.mask_taps = mask


def _set_token_ids(head: DraftHead, tensor: CheckpointTensor) -> None:
    """By the distance of each token of the draft vocabulary from its place in it."""
    size = head.spec.draft_vocab_size
    if tensor.shape != (size,):
        raise ValueError(
            f"{tensor.path}: tensor {_OFFSETS} has shape {list(tensor.shape)}, "
            f"the config says {[size]}"
        )
    token_ids = torch.arange(size) + _read(tensor).to(torch.int64)
    vocab_size = head.spec.layer.vocab_size
    if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size:
        raise ValueError(
            f"{tensor.path}: tensor {_OFFSETS} leads to tokens {int(token_ids.min())} to "
            f"{int(token_ids.max())}, and there are {vocab_size}"
        )
    head.token_ids = token_ids
