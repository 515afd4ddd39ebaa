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


@kernel
def apply_params(
    part,  # listed rows part, part + num_parts, ... ; counts `part`
    num_parts,
    logits_at,  # [S, V] float32, changed
    num_rows,
    vocab_size,
    listed_at,  # [L] int32: rows of logits that have parameters
    slots_at,  # [L] int32: their rows in everything below
    num_listed,
    token_ids_at,  # [N, token_stride] int32
    token_stride,
    num_prompt_at,  # [N] int32
    num_tokens_at,  # [N] int32
    num_slots,
    repetition_at,  # [N] float32
    frequency_at,  # [N] float32
    presence_at,  # [N] float32
    min_tokens_at,  # [N] int32
    bias_starts_at,  # [N + 1] int32
    bias_ids_at,
    bias_values_at,  # float32
    num_bias,
    allowed_starts_at,  # [N + 1] int32
    allowed_ids_at,
    num_allowed,
    bad_starts_at,  # [N + 1] int32, into words
    num_words,
    word_starts_at,  # [W + 1] int32, into ids
    bad_ids_at,
    num_bad,
    stop_starts_at,  # [N + 1] int32
    stop_ids_at,
    num_stop,
    counts_at,  # [num_parts, V] int32, zeros
):
    logits = carray(address_of(float32, logits_at), (num_rows, vocab_size))
    listed = carray(address_of(int32, listed_at), (num_listed,))
    slots = carray(address_of(int32, slots_at), (num_listed,))
    token_ids = carray(address_of(int32, token_ids_at), (num_slots, token_stride))
    num_prompt = carray(address_of(int32, num_prompt_at), (num_slots,))
    num_tokens = carray(address_of(int32, num_tokens_at), (num_slots,))
    repetition = carray(address_of(float32, repetition_at), (num_slots,))
    frequency = carray(address_of(float32, frequency_at), (num_slots,))
    presence = carray(address_of(float32, presence_at), (num_slots,))
    min_tokens = carray(address_of(int32, min_tokens_at), (num_slots,))
    bias_starts = carray(address_of(int32, bias_starts_at), (num_slots + 1,))
    bias_ids = carray(address_of(int32, bias_ids_at), (num_bias,))
    bias_values = carray(address_of(float32, bias_values_at), (num_bias,))
    allowed_starts = carray(address_of(int32, allowed_starts_at), (num_slots + 1,))
    allowed_ids = carray(address_of(int32, allowed_ids_at), (num_allowed,))
    bad_starts = carray(address_of(int32, bad_starts_at), (num_slots + 1,))
    word_starts = carray(address_of(int32, word_starts_at), (num_words + 1,))
    bad_ids = carray(address_of(int32, bad_ids_at), (num_bad,))
    stop_starts = carray(address_of(int32, stop_starts_at), (num_slots + 1,))
    stop_ids = carray(address_of(int32, stop_ids_at), (num_stop,))
    counts = carray(address_of(int32, counts_at), (num_parts, vocab_size))[part]
    for i in range(part, num_listed, num_parts):
        x, slot = logits[listed[i]], int64(slots[i])
        prompt = token_ids[slot, : num_prompt[slot]]
        output = token_ids[slot, num_prompt[slot] : num_tokens[slot]]
        if allowed_starts[slot] < allowed_starts[slot + 1]:
            allowed = allowed_ids[allowed_starts[slot] : allowed_starts[slot + 1]]
            _keep_allowed(x, allowed, counts)
        first_word, end_word = bad_starts[slot], bad_starts[slot + 1]
        _forbid_bad_words(x, output, first_word, end_word, word_starts, bad_ids)
        if output.shape[0] < min_tokens[slot]:
            for j in range(stop_starts[slot], stop_starts[slot + 1]):
                if 0 <= stop_ids[j] < vocab_size:
                    x[stop_ids[j]] = _MINUS_INF
        for j in range(bias_starts[slot], bias_starts[slot + 1]):
            if 0 <= bias_ids[j] < vocab_size:
                x[bias_ids[j]] += bias_values[j]
        if repetition[slot] != 1.0 or frequency[slot] != 0.0 or presence[slot] != 0.0:
            _penalise(x, prompt, output, repetition[slot], frequency[slot], presence[slot], counts)
