"""What drafting on a GPU means, in plain Python. Knows nothing of programs or bounds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def lookup(tokens: Sequence[int], *, max_length: int) -> tuple[int, int]:
    """Length of the longest run of last tokens that occurred before, and where the latest of these
    occurrences is continued; (0, the last token's place) if there is none."""
    for length in range(min(max_length, len(tokens) - 1), 0, -1):
        last = list(tokens[len(tokens) - length :])
        for end in range(len(tokens) - 1, length - 1, -1):
            if list(tokens[end - length : end]) == last:
                return length, end
    return 0, len(tokens) - 1


def propose_reference(
    batch_rows: Tensor,
    seq_lens: Tensor,
    *,
    sample_rows: Tensor,
    sample_positions: Tensor,
    token_table: Tensor,
    num_tokens: Tensor,
    num_found: Tensor,
    min_length: int,
    max_length: int,
) -> None:
    """See `gpu.propose`."""
    num_rows, width = token_table.shape
    for place, (row, word) in enumerate(
        zip(sample_rows.tolist(), sample_positions.tolist(), strict=True)
    ):
        if word < 0 and 0 <= row < num_rows:
            sample_positions[place] = num_tokens[row] + ~word
    num_found.zero_()
    for place, (row, word) in enumerate(zip(batch_rows.tolist(), seq_lens.tolist(), strict=True)):
        if word >= 0 or not 0 <= row < num_rows:
            continue
        known, num_drafts = int(num_tokens[row]), ~word
        seq_lens[place] = known + num_drafts
        if known < 1 or known + num_drafts > width:
            continue
        tokens = token_table[row, :known].tolist()
        length, begin = lookup(tokens, max_length=max_length)
        num_found[place] = num_drafts if length >= min_length else 0
        for draft in range(num_drafts):
            tokens.append(tokens[begin + draft])
        token_table[row, known : known + num_drafts] = token_table.new_tensor(tokens[known:])


def accept_reference(
    sample_rows: Tensor,
    tokens: Tensor,
    *,
    token_table: Tensor,
    num_tokens: Tensor,
    counts: Tensor,
    num_drawn: Tensor,
) -> None:
    """See `gpu.accept`."""
    num_rows, width = token_table.shape
    rows, drawn = sample_rows.tolist(), tokens.tolist()
    num_drawn.zero_()
    place = 0
    while place < len(rows):
        row, first = rows[place], place
        while place < len(rows) and rows[place] == row:
            place += 1
        if not 0 <= row < num_rows:
            continue
        for token in drawn[first:place]:
            length = int(num_tokens[row])
            if token < 0 or length >= width:
                break
            is_draft = int(token_table[row, length]) == token
            token_table[row, length] = token
            num_tokens[row] += 1
            num_drawn[first] += 1
            if token < counts.shape[1]:
                counts[row, token] += 2
            if not is_draft:
                break
