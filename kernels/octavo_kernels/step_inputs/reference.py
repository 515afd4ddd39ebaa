"""What the step's own ops mean, in plain torch. Knows nothing of programs or bounds."""

from __future__ import annotations

from torch import Tensor


def scatter_words_reference(words: Tensor, *, ranges: Tensor, arena: Tensor) -> None:
    """See `gpu.scatter_words`."""
    for source, target, count in ranges.tolist():
        fits = min(count, len(words) - source, len(arena) - target)
        if source >= 0 and target >= 0 and fits > 0:
            arena[target : target + fits] = words[source : source + fits]


def build_step_inputs_reference(
    batch_rows: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    token_table: Tensor,
    block_table: Tensor,
    block_size: int,
    num_tokens: int,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_tables: Tensor,
) -> None:
    """See `gpu.build_step_inputs`."""
    token_ids[:num_tokens], positions[:num_tokens], slots[:num_tokens] = 0, 0, -1
    starts = query_start_loc.tolist()
    for request, (row, seq_len) in enumerate(
        zip(batch_rows.tolist(), seq_lens.tolist(), strict=True)
    ):
        if not 0 <= row < len(token_table):
            continue
        for token in range(max(starts[request], 0), min(starts[request + 1], num_tokens)):
            position = seq_len - (starts[request + 1] - token)
            block_index = position // block_size
            if not 0 <= position < token_table.shape[1] or block_index >= block_table.shape[1]:
                continue
            token_ids[token] = token_table[row, position]
            positions[token] = position
            block = int(block_table[row, block_index])
            if block >= 0:
                slots[token] = block * block_size + position % block_size
        held = min(-(-max(seq_len, 0) // block_size), block_table.shape[1], block_tables.shape[1])
        block_tables[request, :held] = block_table[row, :held]


def gather_sampling_reference(
    rows: Tensor, *, positions: Tensor, **columns: Tensor
) -> dict[str, Tensor]:
    """See `gpu.gather_sampling`; what its `out` holds, by name."""
    neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0}
    live = [0 <= row < len(columns["temperature"]) for row in rows.tolist()]
    found = {"positions": positions.long()}
    for name, column in columns.items():
        found[name] = column[rows.long().clamp(0, len(column) - 1)]
    for place, is_live in enumerate(live):
        if not is_live:
            for name, values in found.items():
                values[place] = neutral.get(name, 0)
    return found


def gather_rows_reference(hidden: Tensor, index: Tensor) -> Tensor:
    """See `gpu.gather_rows`."""
    return hidden[index.long().clamp(0, len(hidden) - 1)]
