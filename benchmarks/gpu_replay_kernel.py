"""Makes drafts agree with what was drawn as often as they did on texts: random weights never repeat
themselves. Knows rows of tokens, no request.
"""

from __future__ import annotations

import triton.language as tl

from octavo_kernels.launch import jit


@jit
def agree(
    sample_rows,  # [S] int32, negative: none; a run of equal ones is one row's
    tokens_ptr,  # [S] int64
    token_table,  # [N, L] int32, rows token_stride apart, changed behind a row's tokens
    num_tokens_of,  # [N] int32
    chances_ptr,  # [MOST] float32: of each draft, if all before it agreed
    num_samples,
    num_rows,
    token_stride,
    max_drafts,
    BLOCK: tl.constexpr,
):
    """Whether a draft agrees hangs on its row and position alone."""
    # grid: (cdiv(S, BLOCK),); a lane is a sample, those that begin a run do its work
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = place < num_samples
    row = tl.load(sample_rows + place, mask=real, other=-1).to(tl.int64)
    before = tl.load(sample_rows + place - 1, mask=real & (place > 0), other=-1)
    alive = (row >= 0) & (row < num_rows) & (row != before)
    length = tl.load(num_tokens_of + row, mask=alive, other=0)
    for step in range(max_drafts):
        behind = place + step + 1
        after = tl.load(sample_rows + behind, mask=alive & (behind < num_samples), other=-1)
        alive = alive & (after == row)
        token = tl.load(tokens_ptr + place + step, mask=alive, other=-1).to(tl.int32)
        draw = tl.rand(7, row.to(tl.int32) * 131071 + length)
        agrees = alive & (draw < tl.load(chances_ptr + step))
        at = token_table + row * token_stride + length
        tl.store(at, tl.where(agrees, token, -2), mask=alive)
        length += alive.to(tl.int32)
        alive = agrees
