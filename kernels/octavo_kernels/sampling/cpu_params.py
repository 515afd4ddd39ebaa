"""Applies request parameters to logits in place on the CPU. Knows one row and its tokens' ids.

Order: allowed ids, bad words, minimum length, bias, then penalties (repetition, frequency,
presence). Counts come from the request's own tokens each time, so no state can go stale.
"""

# mypy: ignore-errors
# The bodies are numba's dialect: fixed-width arithmetic that type stubs cannot follow.

from __future__ import annotations

import numpy as np
from numba import carray, float32, int32, int64

from octavo_kernels.parallel import device, kernel
from octavo_kernels.sampling.scalars import address_of

# Columns of `LogitParams` in the order in which the kernel takes their addresses.
COLUMNS = (
    "token_ids",
    "num_prompt_tokens",
    "num_tokens",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "min_tokens",
    "bias_starts",
    "bias_ids",
    "bias_values",
    "allowed_starts",
    "allowed_ids",
    "bad_starts",
    "word_starts",
    "bad_ids",
    "stop_starts",
    "stop_ids",
)
_NUM_COLUMNS = len(COLUMNS)
_PLACES = range(_NUM_COLUMNS)
(TOKEN_IDS, NUM_PROMPT, NUM_TOKENS, REPETITION, FREQUENCY, PRESENCE, MIN_TOKENS) = _PLACES[:7]
(BIAS_STARTS, BIAS_IDS, BIAS_VALUES, ALLOWED_STARTS, ALLOWED_IDS) = _PLACES[7:12]
(BAD_STARTS, WORD_STARTS, BAD_IDS, STOP_STARTS, STOP_IDS) = _PLACES[12:]

_MINUS_INF = np.float32(-np.inf)


@device
def _keep_allowed(x, allowed, marks):
    size = x.shape[0]
    for i in range(allowed.shape[0]):
        if 0 <= allowed[i] < size:
            marks[allowed[i]] = 1
    for i in range(size):
        x[i] = x[i] if marks[i] != 0 else _MINUS_INF
    for i in range(allowed.shape[0]):
        if 0 <= allowed[i] < size:
            marks[allowed[i]] = 0


@device
def _forbid_bad_words(x, output, first_word, end_word, word_starts, words):
    """Forbids the last token of each word whose beginning ends the output."""
    for word in range(first_word, end_word):
        start = word_starts[word]
        last = word_starts[word + 1] - 1
        length = last - start
        if length > output.shape[0]:
            continue
        tail = output.shape[0] - length
        matches = True
        for i in range(length):
            if output[tail + i] != words[start + i]:
                matches = False
                break
        if matches and 0 <= words[last] < x.shape[0]:
            x[words[last]] = _MINUS_INF


@device
def _penalise(x, prompt, output, repetition, frequency, presence, counts):
    """counts: [V] int32, zero before and after; -1 marks a token of the prompt alone."""
    size = x.shape[0]
    for i in range(output.shape[0]):
        if 0 <= output[i] < size:
            counts[output[i]] += 1
    if repetition != 1.0:
        for i in range(prompt.shape[0]):
            if 0 <= prompt[i] < size and counts[prompt[i]] == 0:
                counts[prompt[i]] = -1
    for side in range(2):
        tokens = prompt if side == 0 else output
        for i in range(tokens.shape[0]):
            token = tokens[i]
            if not 0 <= token < size or counts[token] == 0:
                continue
            value, count = x[token], counts[token]
            counts[token] = 0
            if repetition != 1.0:
                value = value / repetition if value > 0 else value * repetition
            if count > 0:
                value = value - frequency * np.float32(count)
                value = value - presence
            x[token] = value


@device
def _ints(table, place, size):
    return carray(address_of(int32, table[place]), (size,))


@device
def _floats(table, place, size):
    return carray(address_of(float32, table[place]), (size,))


@device
def _part(table, starts_place, ids_place, slot, num_slots):
    """The ids that belong to a slot."""
    starts = _ints(table, starts_place, num_slots + 1)
    return _ints(table, ids_place, starts[num_slots])[starts[slot] : starts[slot + 1]]


@device
def _apply_row(x, slot, num_drafts, num_slots, token_stride, table, counts):
    num_prompt = _ints(table, NUM_PROMPT, num_slots)[slot]
    num_tokens = _ints(table, NUM_TOKENS, num_slots)[slot] + num_drafts
    tokens = carray(address_of(int32, table[TOKEN_IDS]), (num_slots, token_stride))[slot]
    prompt, output = tokens[:num_prompt], tokens[num_prompt:num_tokens]
    allowed = _part(table, ALLOWED_STARTS, ALLOWED_IDS, slot, num_slots)
    if allowed.shape[0]:
        _keep_allowed(x, allowed, counts)
    bad_starts = _ints(table, BAD_STARTS, num_slots + 1)
    word_starts = _ints(table, WORD_STARTS, bad_starts[num_slots] + 1)
    bad_ids = _ints(table, BAD_IDS, word_starts[bad_starts[num_slots]])
    _forbid_bad_words(x, output, bad_starts[slot], bad_starts[slot + 1], word_starts, bad_ids)
    if output.shape[0] < _ints(table, MIN_TOKENS, num_slots)[slot]:
        stop_ids = _part(table, STOP_STARTS, STOP_IDS, slot, num_slots)
        for i in range(stop_ids.shape[0]):
            if 0 <= stop_ids[i] < x.shape[0]:
                x[stop_ids[i]] = _MINUS_INF
    bias_starts = _ints(table, BIAS_STARTS, num_slots + 1)
    bias_ids = _ints(table, BIAS_IDS, bias_starts[num_slots])
    bias_values = _floats(table, BIAS_VALUES, bias_starts[num_slots])
    for i in range(bias_starts[slot], bias_starts[slot + 1]):
        if 0 <= bias_ids[i] < x.shape[0]:
            x[bias_ids[i]] += bias_values[i]
    repetition = _floats(table, REPETITION, num_slots)[slot]
    frequency = _floats(table, FREQUENCY, num_slots)[slot]
    presence = _floats(table, PRESENCE, num_slots)[slot]
    if repetition != 1.0 or frequency != 0.0 or presence != 0.0:
        _penalise(x, prompt, output, repetition, frequency, presence, counts)


@kernel
def apply_params(
    part,  # listed rows part, part + num_parts, ... ; counts `part`
    num_parts,
    logits_at,  # [S, V] float32, changed
    num_rows,
    vocab_size,
    listed_at,  # [L] int32: rows of logits that have parameters
    slots_at,  # [L] int32: their slots
    drafts_at,  # [L] int32: tokens that count beyond the slot's num_tokens; 0 = none has any
    num_listed,
    table_at,  # [17] int64: addresses of the columns, in the order of COLUMNS
    num_slots,
    token_stride,  # tokens per slot
    counts_at,  # [num_parts, V] int32, zeros before and after
):
    logits = carray(address_of(float32, logits_at), (num_rows, vocab_size))
    listed = carray(address_of(int32, listed_at), (num_listed,))
    slots = carray(address_of(int32, slots_at), (num_listed,))
    table = carray(address_of(int64, table_at), (_NUM_COLUMNS,))
    counts = carray(address_of(int32, counts_at), (num_parts, vocab_size))[part]
    for i in range(part, num_listed, num_parts):
        row, slot = logits[listed[i]], int64(slots[i])
        num_drafts = carray(address_of(int32, drafts_at), (num_listed,))[i] if drafts_at else 0
        _apply_row(row, slot, num_drafts, num_slots, token_stride, table, counts)
