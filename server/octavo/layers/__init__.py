"""Building blocks of models: what they compute and which checkpoint tensors fill them."""

from octavo.layers.attention import SelfAttention
from octavo.layers.embedding import TokenEmbedding
from octavo.layers.linear import Linear
from octavo.layers.mlp import GatedMLP
from octavo.layers.norm import RMSNorm
from octavo.layers.slot import WeightSlot

__all__ = ["GatedMLP", "Linear", "RMSNorm", "SelfAttention", "TokenEmbedding", "WeightSlot"]
