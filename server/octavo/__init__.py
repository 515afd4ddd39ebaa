"""Octavo: a high-throughput LLM inference server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from octavo.llm import LLM
    from octavo.types import SamplingParams


def __getattr__(name: str) -> Any:
    # Lazy: `octavo --help` and the HTTP process must not pay for importing torch.
    if name == "LLM":
        from octavo.llm import LLM

        return LLM
    if name == "SamplingParams":
        from octavo.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'octavo' has no attribute {name!r}")
