"""Models: their wiring, and how they get their weights."""

from octavo.models.base import Model, kv_cache_spec
from octavo.models.loader import kv_dtype, load_model, weight_dtype

__all__ = ["Model", "kv_cache_spec", "kv_dtype", "load_model", "weight_dtype"]
