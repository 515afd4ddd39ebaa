"""Arithmetic of the sampling kernels on the GPU: keys, weights, draws. Knows numbers, not rows.

Every function repeats `scalars.py` operation by operation (no contraction, divisions rounded to
nearest), so that a token's weight and draw have the same bits on both devices.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_KEY = tl.constexpr(0x7F800000)  # order_key(+inf); every NaN lies above it
MIN_KEY = tl.constexpr(-0x7F800001)  # order_key(-inf)
NO_KEY = tl.constexpr(-0x80000000)  # below every key: no token
SUB = tl.constexpr(256)  # tokens of a subtile: it has one word of each of 256 Philox counters


@triton.jit
def order_key(x):
    """An integer that orders as the float does; both zeros have one key, every NaN the highest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def key_value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0 to 1 ulp; exactly 0 below -87 and for -inf."""
    low = x < -87.0
    x = tl.where(low, -87.0, x)
    n = (x * 1.4426950408889634 + 12582912.0) - 12582912.0  # to the nearest integer, ties even
    r = tl.fma(n, -0.693145751953125, x)
    r = tl.fma(n, -1.428606765330187e-06, r)
    p = tl.fma(r, 0.0013941117795184255, 0.008363179862499237)
    p = tl.fma(p, r, 0.04166637361049652)
    p = tl.fma(p, r, 0.16666576266288757)
    p = tl.fma(p, r, 0.5)
    tail = tl.fma(r * r, p, r)
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(low, 0.0, (tail + 1.0) * scale)


@triton.jit
def weight(x, peak, temperature):
    """A token's weight against the likeliest token's."""
    return exp_negative(tl.div_rn(x - peak, temperature))


@triton.jit
def weight_over(x, peak, temperature, inverse):
    """`weight`, bit by bit, given div_rn(1, temperature): a quotient corrected twice is rounded.

    Markstein: a quotient within an ulp, its exact remainder and the rounded reciprocal give the
    rounded quotient. Remainders that underflow are of quotients whose exponential is 1.
    """
    gap = tl.maximum(x - peak, -1e30)  # far below the least that weighs anything, yet finite
    ratio = gap * inverse
    ratio = tl.fma(tl.fma(-ratio, temperature, gap), inverse, ratio)
    ratio = tl.fma(tl.fma(-ratio, temperature, gap), inverse, ratio)
    if (temperature < 1e-6) | (temperature > 1e6):
        ratio = tl.div_rn(x - peak, temperature)
    return exp_negative(ratio)


@triton.jit
def fixed_point(x):
    """x * 2^40 as an integer, for x in [0, 1]: sums of these are exact in any order."""
    return (x * 1099511627776.0).to(tl.int64)


@triton.jit
def exponential(bits):
    """-log((bits + 1/2) / 2^32) of uint32 bits, computed from 1 - u near u = 1."""
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    near_one = bits >= 0xC0000000
    pattern = u.to(tl.int32, bitcast=True)
    k = (pattern - 0x3F400000) >> 23
    m = (pattern - (k << 23)).to(tl.float32, bitcast=True)
    k = tl.where(near_one, 0, k)
    f = tl.where(near_one, -rest, m - 1.0)
    q = tl.fma(f, -0.046204276382923126, 0.10592105984687805)
    q = tl.fma(q, f, -0.13192836940288544)
    q = tl.fma(q, f, 0.14467807114124298)
    q = tl.fma(q, f, -0.16642938554286957)
    q = tl.fma(q, f, 0.19990992546081543)
    q = tl.fma(q, f, -0.25000229477882385)
    q = tl.fma(q, f, 0.3333345055580139)
    q = tl.fma(q, f, -0.5)
    log1p = tl.fma(f * f, q, f)
    return -tl.fma(k.to(tl.float32), 0.6931471805599453, log1p)


@triton.jit
def philox(c0, c2, c3, k0, k1):
    """Philox4x32-10 of counter (c0, 0, c2, c3) under key (k0, k1), all uint32: four words."""
    c1 = c0 * 0
    c2 += c1
    c3 += c1
    for turn in tl.static_range(10):
        if turn > 0:
            k0 += 0x9E3779B9
            k1 += 0xBB67AE85
        # Products of 64 bits are one instruction for both halves.
        left = c0.to(tl.uint64) * 0xD2511F53
        right = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (right >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = right.to(tl.uint32)
        c2 = (left >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = left.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def row_noise(seeds_ptr, positions_ptr, row):
    """The last two counter words and the key of a row's draws."""
    seed = tl.load(seeds_ptr + row)
    place = tl.load(positions_ptr + row)
    return (
        (place & 0xFFFFFFFF).to(tl.uint32),
        ((place >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )


@triton.jit
def token_draw(token, c2, c3, k0, k1):
    """The exponential draw of each token id."""
    counter = ((token >> 10) * 256 + (token & 255)).to(tl.uint32)
    w0, w1, w2, w3 = philox(counter, c2, c3, k0, k1)
    word = (token >> 8) & 3
    bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return exponential(bits)


@triton.jit
def lists_candidates(top_k, NUM_SUBS: tl.constexpr, VOCAB: tl.constexpr):
    """Whether the subtiles' peaks alone bound a row's kept tokens, so that a race lists them."""
    return (top_k > 0) & (top_k <= NUM_SUBS) & (top_k < VOCAB)


@triton.jit
def load_peaks(peaks_ptr, row, NUM_SUBS: tl.constexpr, SUBS_PAD: tl.constexpr):
    """[SUBS_PAD] peaks of a row, NO_KEY past the end."""
    subs = tl.arange(0, SUBS_PAD)
    return tl.load(peaks_ptr + row * NUM_SUBS + subs, mask=subs < NUM_SUBS, other=NO_KEY)


@triton.jit
def peaks_bound(peaks, k, most):
    """A key that at least k subtiles, hence k tokens, reach; near the greatest such."""
    low = tl.min(tl.where(peaks == NO_KEY, most, peaks), 0).to(tl.int64)
    high = most.to(tl.int64)
    for _ in range(16):
        middle = low + (high - low + 1) // 2
        enough = tl.sum((peaks >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, tl.maximum(middle - 1, low))
    return low.to(tl.int32)
