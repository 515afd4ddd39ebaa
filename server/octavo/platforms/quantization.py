"""Which kind of blocks every matrix is kept in. Knows names and what files say of them; reads no
weight, knows no device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from octavo.checkpoint import ModelFiles
from octavo.config import ModelConfig
from octavo_kernels.quant_matmul.cpu_blocks_tile import Kind

Mode = Literal["none", "int8", "int4", "gguf"]

# Types of a GGUF file whose blocks are kept as they are, and as what.
KEPT: Mapping[str, Kind] = {"Q4_0": "q4_0", "Q4_1": "q4_1", "Q8_0": "q8_0"}
_FLOATS = ("F32", "F16", "BF16")
# What floats become, and which kinds of a file a mode leaves alone.
_MADE: Mapping[Mode, Kind] = {"int8": "q8_64", "int4": "q4_1", "gguf": "q8_0"}
_MADE_TABLES: Mapping[Mode, Kind] = {"int8": "q8_64", "int4": "q8_0", "gguf": "q8_0"}
_LEFT: Mapping[Mode, Sequence[Kind]] = {
    "int8": (),  # products with 64 codes a scale are faster than with any kind of a file
    "int4": ("q4_0", "q4_1"),
    "gguf": ("q4_0", "q4_1", "q8_0"),
}
_MOST_LISTED = 3  # matrices in a line of the log


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a model's matrices are kept: as floats, or as blocks of codes with a scale each.

    ``stored``: the GGUF type of each matrix that the checkpoint has, by its checkpoint name.
    """

    mode: Mode = "none"
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Every kind that `kind` may say."""
        if self.mode == "none":
            return ()
        left = {KEPT[t] for t in self.stored.values() if t in KEPT} & set(_LEFT[self.mode])
        return tuple(sorted({*left, _MADE_TABLES[self.mode], _MADE[self.mode]}))

    def kind(self, names: Sequence[str], *, is_table: bool = False) -> Kind | None:
        """Of the matrix that stacks these checkpoint tensors; None for floats.

        All of it has one kind: the file's where that is one and the mode leaves it alone, else
        what the mode makes of floats. A token table, which logits come from, is not brought below
        8 bits.
        """
        if self.mode == "none":
            return None
        stored = {KEPT.get(self.stored.get(name, "")) for name in names}
        kind = stored.pop() if len(stored) == 1 else None
        if kind in _LEFT[self.mode]:
            return kind
        return (_MADE_TABLES if is_table else _MADE)[self.mode]

    @property
    def smaller(self) -> tuple[str, ...]:
        """Modes that take less memory, the finest first."""
        has_four_bits = {"Q4_0", "Q4_1"} & set(self.stored.values())
        least = "gguf" if has_four_bits else "int4"
        return {"none": ("int8", least), "int8": (least,)}.get(self.mode, ())

    def changed(self, names: Sequence[str], *, kind: Kind | None) -> list[str]:
        """Those of a stack that are not kept as the file has them, though that was the mode:
        as ``name (type)``."""
        if self.mode != "gguf":
            return []
        types = {name: self.stored.get(name, "absent") for name in names}
        return [f"{name} ({type})" for name, type in types.items() if KEPT.get(type) != kind]


def choose(model: ModelConfig, *, files: ModelFiles) -> Quantization:
    """What ``--quantization`` comes to for these files on a CPU.

    ``auto`` is ``int8``, of a GGUF file's blocks too; where ``--dtype`` names a dtype it is
    ``none``. Raises ValueError for what does not go together.
    """
    wanted, stored = model.quantization, files.weight_types
    has_blocks = any(type in KEPT for type in stored.values())
    if wanted == "auto":
        if model.dtype != "auto":
            return Quantization()
        return Quantization(mode="int8", stored=stored)
    if wanted == "none":
        return Quantization()
    if model.dtype not in ("auto", "float32"):
        raise ValueError(f"quantization {wanted} takes dtype auto or float32, got {model.dtype}")
    if wanted == "gguf" and not has_blocks:
        found = ", ".join(sorted(set(stored.values()))) or files.format
        raise ValueError(
            f"quantization gguf needs a GGUF file with {', '.join(KEPT)} tensors, got {files.name} "
            f"({found}); there are auto, none, int8 and int4"
        )
    return Quantization(mode=wanted, stored=stored)


def listed(changed: Sequence[str]) -> str:
    """A few names, and how many more."""
    more = len(changed) - _MOST_LISTED
    return ", ".join(changed[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
