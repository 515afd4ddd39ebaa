"""Models: their wiring, and how they get their weights."""

from octavo.models.base import Model, Pass, TappedPass, Taps, kv_cache_spec
from octavo.models.fingerprint import is_same_target, target_fingerprint
from octavo.models.loader import TooLarge, kv_dtype, load_model, weight_dtype

__all__ = [
    "Model",
    "Pass",
    "TappedPass",
    "Taps",
    "TooLarge",
    "is_same_target",
    "kv_cache_spec",
    "kv_dtype",
    "load_model",
    "target_fingerprint",
    "weight_dtype",
]
