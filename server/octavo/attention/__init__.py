"""Attention backends, one per kind of device, and the batch description they share."""

from octavo.attention.base import (
    AttentionBackend,
    AttentionLayer,
    AttentionMetadata,
    KVCacheSpec,
    KVLayer,
    SharedPrefixes,
)
from octavo.attention.cpu import CPUAttention

__all__ = [
    "AttentionBackend",
    "AttentionLayer",
    "AttentionMetadata",
    "CPUAttention",
    "KVCacheSpec",
    "KVLayer",
    "SharedPrefixes",
]
