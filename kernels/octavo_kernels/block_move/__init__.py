"""Blocks of a cache to and from slots of host memory, with sums over their bits.

GPUs: `block_move.gpu`, one launch for any number of blocks. On a CPU the plain copies of
`block_move.reference` are as fast as memory, and the sums a fraction of that.
"""

from octavo_kernels.block_move.reference import (
    load_block,
    save_block,
    slot_sum,
    slot_words,
    word_weights,
)

__all__ = ["load_block", "save_block", "slot_sum", "slot_words", "word_weights"]
