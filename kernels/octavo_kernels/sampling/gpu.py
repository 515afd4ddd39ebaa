"""Sampling ops on a GPU: shapes, scratch memory and launches. Knows no request and reads no value.

Nothing here waits for the GPU and every grid hangs on shapes alone, so a step can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels.launch import launch
from octavo_kernels.sampling import TopLogprobs
from octavo_kernels.sampling.gpu_draw_kernel import draw
from octavo_kernels.sampling.gpu_logprobs_kernel import score_rows, score_tiles
from octavo_kernels.sampling.gpu_narrow_kernel import narrow
from octavo_kernels.sampling.gpu_sample_kernel import cut, survey
from octavo_kernels.sampling.gpu_weigh_kernel import guess, weigh
from octavo_kernels.tuning import Choice, choose

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUB = 256  # tokens of a subtile
CAPACITY = 8192  # candidates of a row that are listed; more are searched for among all logits
MAX_VOCAB = 2**21
FEW_ROWS = 4
_WEIGH_TILE = 2048
_SCORE_TILE = 8192
_HELD_BY_WARP = 512  # tokens of a list
_BINS = 64  # of a turn
_TURNS = 2  # bins of where a guess missed, then bins, or the list, of a bracket


def _subs(vocab_size: int) -> int:
    return -(-vocab_size // SUB)


def _power(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuWorkspace:
    """Scratch memory of `sample` for up to `max_rows` rows, to be kept between calls."""

    max_rows: int
    vocab_size: int
    peaks: Tensor  # [R, subtiles] int32
    bounds: Tensor  # [R, subtiles] float32
    masses: Tensor  # [R, 4 * parts] int64
    counts: Tensor  # [R, turns * parts * 64] int32: tokens in bins of logits
    ranges: Tensor  # [R, 4] float32: low and end of the guessed and of the last bracket
    cursors: Tensor  # [R, 3] int32: tokens of either bracket, whether the last is listed
    subs: Tensor  # [R, subtiles] int32
    values: Tensor  # [R, CAPACITY] of the logits' dtype
    ids: Tensor  # [R, CAPACITY] int32
    cuts: Tensor  # [R, 2] int32

    @classmethod
    def create(
        cls, max_rows: int, *, vocab_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> GpuWorkspace:
        """About 95 KB a row (float32 logits, 128k tokens)."""
        subs = _subs(vocab_size)
        parts = -(-vocab_size // (2 * _WEIGH_TILE))

        def empty(width: int, kind: torch.dtype) -> Tensor:
            return torch.empty(max_rows, width, dtype=kind, device=device)

        return cls(
            max_rows=max_rows,
            vocab_size=vocab_size,
            peaks=empty(subs, torch.int32),
            bounds=empty(subs, torch.float32),
            masses=empty(4 * parts, torch.int64),
            counts=empty(_TURNS * parts * _BINS, torch.int32),
            ranges=empty(4, torch.float32),
            cursors=empty(3, torch.int32),
            subs=empty(subs, torch.int32),
            values=empty(CAPACITY, dtype),
            ids=empty(CAPACITY, torch.int32),
            cuts=empty(2, torch.int32),
        )


def check_logits(op: str, logits: Tensor) -> None:
    """Raises ValueError where the kernels have no code for such logits."""
    if logits.dtype not in DTYPES or logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(
            f"{op} takes contiguous float32, bfloat16 or float16 logits [S, V], got "
            f"{logits.dtype} {list(logits.shape)}"
        )
    if not 0 < logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"{op} takes 1 to {MAX_VOCAB} tokens, got {logits.shape[1]}")


def check_column(
    op: str, logits: Tensor, name: str, column: Tensor, dtype: torch.dtype, size: int
) -> None:
    """Raises ValueError unless column is a contiguous [size] of dtype beside the logits."""
    if column.dtype != dtype or column.shape != (size,) or not column.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be {dtype} [{size}], got {column.dtype} {list(column.shape)}"
        )
    if column.device != logits.device:
        raise ValueError(f"{op}: {name} must be on {logits.device}, got {column.device}")


def survey_key(num_rows: int, dtype: torch.dtype) -> str:
    """The tuned table's key: few rows are cut finer, so that they reach more multiprocessors."""
    return f"{'few' if num_rows < FEW_ROWS else 'many'}-{str(dtype).removeprefix('torch.')}"


def survey_default(num_rows: int) -> Choice:
    """Blocks of 1024 tokens and warps of a program where nothing was measured."""
    return {"group": 1, "num_warps": 4} if num_rows < FEW_ROWS else {"group": 1, "num_warps": 1}


def cut_default() -> Choice:
    """Warps, subtiles gathered at a time and candidates of a pass of `cut`."""
    return {"num_warps": 8, "group": 4, "block": 1024}


def read_all(
    logits: Tensor,
    peaks: Tensor,
    columns: tuple[Tensor | None, ...],
    bounds: Tensor | None,
    choice: Choice | None = None,
) -> None:
    """Subtiles' peaks and, given columns and bounds, what each can score; any choice: same bits."""
    num_rows, vocab_size = logits.shape
    if choice is None:
        key = survey_key(num_rows, logits.dtype)
        choice = choose("sampling_survey", key, survey_default(num_rows))
    tiles = -(-vocab_size // (1024 * choice["group"]))
    launch(
        survey,
        (num_rows * tiles,),
        logits,
        *columns,
        peaks,
        bounds,
        VOCAB=vocab_size,
        NUM_SUBS=_subs(vocab_size),
        GROUP=choice["group"],
        NUM_TILES=tiles,
        DRAWS=bounds is not None,
        num_warps=choice["num_warps"],
    )


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    workspace: GpuWorkspace | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row: (tokens [S] int64, status [S] int32), the CPU op's for the same logits.

    logits: [S, V] float32, bfloat16 or float16. temperature, top_p, min_p: [S] float32; top_k:
    [S] int32; seeds, positions: [S] int64, all on the logits' device. Which way a row takes is
    decided on the GPU. out: where tokens and status go. Raises ValueError for other shapes or
    dtypes.
    """
    check_logits("sample", logits)
    num_rows, vocab_size = logits.shape
    floats = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    for name, column in floats.items():
        check_column("sample", logits, name, column, torch.float32, num_rows)
    check_column("sample", logits, "top_k", top_k, torch.int32, num_rows)
    check_column("sample", logits, "seeds", seeds, torch.int64, num_rows)
    check_column("sample", logits, "positions", positions, torch.int64, num_rows)
    tokens, status = _outputs(logits) if out is None else out
    check_column("sample", logits, "out[0]", tokens, torch.int64, num_rows)
    check_column("sample", logits, "out[1]", status, torch.int32, num_rows)
    work = workspace
    if work is None:
        work = GpuWorkspace.create(
            num_rows, vocab_size=vocab_size, dtype=logits.dtype, device=logits.device
        )
    assert work.vocab_size == vocab_size and work.max_rows >= num_rows
    assert work.values.dtype == logits.dtype
    noise = (seeds, positions)
    read_all(logits, work.peaks, (temperature, top_k, *noise), work.bounds)
    filters = (temperature, top_k, top_p, min_p)
    guess_rows(logits, filters, work)
    narrow_rows(logits, filters, work)
    cut_rows(logits, filters, work)
    launch(
        draw,
        (num_rows,),
        logits,
        *filters,
        *noise,
        work.peaks,
        work.bounds,
        work.values,
        work.ids,
        work.cuts,
        tokens,
        status,
        VOCAB=vocab_size,
        NUM_SUBS=_subs(vocab_size),
        SUBS_PAD=_power(_subs(vocab_size)),
        CAPACITY=work.values.shape[1],
        BLOCK=1024,
        num_warps=4,
    )
    return tokens, status


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    size, device = logits.shape[0], logits.device
    tokens = torch.empty(size, dtype=torch.int64, device=device)
    return tokens, torch.empty(size, dtype=torch.int32, device=device)


def _parts(num_rows: int, vocab_size: int) -> dict[str, int]:
    """Sizes of the programs that share a row, and of what they leave, as constexprs."""
    tiles = -(-vocab_size // _WEIGH_TILE)
    # Most rows want none of this, and programs that end at once cost time too. A program can
    # hold the counts of 31 tiles.
    parts = -(-tiles // (2 if num_rows < FEW_ROWS else 16))
    return {"NUM_PARTS": parts}


def guess_rows(logits: Tensor, filters: tuple[Tensor, ...], work: GpuWorkspace) -> None:
    """Brackets that likely hold where rows with a top_p and no top_k cut."""
    num_rows, vocab_size = logits.shape
    num_subs = _subs(vocab_size)
    launch(
        guess,
        (num_rows,),
        logits,
        *filters,
        work.peaks,
        work.ranges,
        work.cursors,
        work.subs,
        VOCAB=vocab_size,
        NUM_SUBS=num_subs,
        SUBS_PAD=_power(num_subs),
        num_warps=8,
        maxnreg=128,
    )


def narrow_rows(logits: Tensor, filters: tuple[Tensor, ...], work: GpuWorkspace) -> None:
    """Where rows with a top_p and no top_k cut, and the tokens there, unless flat to the last."""
    num_rows, vocab_size = logits.shape
    num_subs = _subs(vocab_size)
    sizes = {"VOCAB": vocab_size, "NUM_SUBS": num_subs, "SUBS_PAD": _power(num_subs)}
    sizes["NUM_TILES"] = -(-vocab_size // _WEIGH_TILE)
    sizes |= _parts(num_rows, vocab_size)
    sizes["CAPACITY"] = work.values.shape[1]
    grid = (num_rows * sizes["NUM_PARTS"], 1)
    rows = (logits, *filters, work.peaks, work.masses)
    found = (work.ranges, work.cursors, work.values)
    launch(weigh, grid, *rows, *found, **sizes, num_warps=8, maxnreg=64)
    for turn in range(1, _TURNS + 1):
        launch(
            narrow,
            grid,
            *rows,
            work.counts,
            *found,
            **sizes,
            PARTS_PAD=_power(sizes["NUM_PARTS"]),
            TURN=turn,
            num_warps=8,
            maxnreg=80,
        )


def cut_rows(
    logits: Tensor,
    filters: tuple[Tensor, ...],
    work: GpuWorkspace,
    choice: Choice | None = None,
) -> None:
    """Least kept keys, and candidates where they are few; any choice gives the same bits."""
    num_rows, vocab_size = logits.shape
    num_subs, sizes = _subs(vocab_size), _parts(num_rows, vocab_size)
    if choice is None:
        choice = choose("sampling_cut", str(logits.dtype).removeprefix("torch."), cut_default())
    launch(
        cut,
        (num_rows,),
        logits,
        *filters,
        work.peaks,
        work.masses,
        work.counts,
        work.ranges,
        work.cursors,
        work.subs,
        work.values,
        work.ids,
        work.cuts,
        VOCAB=vocab_size,
        NUM_SUBS=num_subs,
        SUBS_PAD=_power(num_subs),
        PARTS_PAD=_power(sizes["NUM_PARTS"]),
        **sizes,
        CAPACITY=work.values.shape[1],
        HELD=_HELD_BY_WARP * choice["num_warps"],
        GROUP=choice["group"],
        BLOCK=choice["block"],
        num_warps=choice["num_warps"],
        maxnreg=128,  # left alone, ptxas spills to fit programs that there are no rows for
    )


def topn_logprobs(logits: Tensor, *, chosen: Tensor, num_best: int) -> TopLogprobs:
    """Log-softmax scores of logits [S, V]: of chosen [S] int64 and the num_best tokens.

    float32, bfloat16 or float16 logits. Nothing of size [S, V] is made; each of the num_best
    costs a row about a microsecond, up to V of them. A chosen token outside the vocabulary, such
    as a failed row's -1, has the logprob -inf (values are not read on the host). Raises ValueError
    for other shapes or dtypes, and where num_best is negative or above V.
    """
    op = "topn_logprobs"
    check_logits(op, logits)
    num_rows, vocab_size = logits.shape
    check_column(op, logits, "chosen", chosen, torch.int64, num_rows)
    if not 0 <= num_best <= vocab_size:
        raise ValueError(f"num_best must be between 0 and {vocab_size}, got {num_best}")
    num_subs, tiles = _subs(vocab_size), -(-vocab_size // _SCORE_TILE)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    found = TopLogprobs(
        chosen=empty(num_rows, dtype=torch.float32),
        ranks=empty(num_rows),
        ids=empty(num_rows, num_best),
        logprobs=empty(num_rows, num_best, dtype=torch.float32),
        status=empty(num_rows),
    )
    peaks = empty(num_rows, num_subs)
    sums = (empty(num_rows, tiles, dtype=torch.int64), empty(num_rows, tiles))
    read_all(logits, peaks, (None,) * 4, None)
    sizes = {"VOCAB": vocab_size, "NUM_SUBS": num_subs, "SUBS_PAD": _power(num_subs)}
    sizes["NUM_TILES"] = tiles
    launch(
        score_tiles,
        (num_rows * tiles,),
        logits,
        chosen,
        peaks,
        *sums,
        **sizes,
        TILE=_SCORE_TILE,
        num_warps=8,
    )
    outputs = (found.chosen, found.ranks, found.ids, found.logprobs, found.status)
    launch(
        score_rows,
        (num_rows,),
        logits,
        chosen,
        peaks,
        *sums,
        *outputs,
        num_best,
        **sizes,
        TILES_PAD=_power(tiles),
        num_warps=4,
    )
    return found
