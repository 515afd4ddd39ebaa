"""Rows follow the scheduler's diffs, in the documented order."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.types import NewRequest, SamplingParams, SchedulerOutput
from octavo.worker.request_table import RequestTable


def request(request_id: str, num_tokens: int = 5, **changed: object) -> NewRequest:
    given = {
        "token_ids": tuple(range(10, 10 + num_tokens)),
        "num_prompt_tokens": num_tokens,
        "num_computed_tokens": 0,
        "block_ids": (3,),
        "params": SamplingParams(),
    } | changed
    return NewRequest(request_id=request_id, **given)  # type: ignore[arg-type]


def table(max_num_seqs: int = 2) -> RequestTable:
    return RequestTable(max_num_seqs=max_num_seqs, max_model_len=64, block_size=16)


def test_finished_rows_are_free_for_the_new_of_the_same_step() -> None:
    rows = table()
    rows.apply(SchedulerOutput(step=0, new_requests=(request("a"), request("b"))))
    rows.apply(
        SchedulerOutput(
            step=1,
            finished_request_ids=("a", "unknown"),
            new_requests=(request("c", block_ids=(7,)),),
            new_block_ids={"c": (8, 9), "b": (1,)},
        )
    )
    assert len(rows) == 2
    with pytest.raises(KeyError):
        rows.row("a")
    row = rows.row("c")
    assert rows.block_tables[row, : rows.num_blocks[row]].tolist() == [7, 8, 9]
    assert rows.block_tables[rows.row("b"), :2].tolist() == [3, 1]


def test_a_resumed_request_brings_all_its_tokens() -> None:
    rows = table()
    rows.apply(SchedulerOutput(step=0, new_requests=(request("a"),)))
    rows.append_tokens([rows.row("a")], [99])
    resumed = request("a", 6, num_prompt_tokens=5, num_computed_tokens=2, block_ids=(4,))
    rows.apply(SchedulerOutput(step=1, finished_request_ids=("a",), new_requests=(resumed,)))
    row = rows.row("a")
    assert rows.token_ids[row, :6].tolist() == [10, 11, 12, 13, 14, 15]
    assert (rows.num_tokens[row], rows.num_prompt_tokens[row]) == (6, 5)
    assert (rows.num_computed_tokens[row], rows.num_blocks[row]) == (2, 1)


def test_an_id_that_comes_again_gets_a_fresh_row() -> None:
    rows = table(max_num_seqs=1)
    for _ in range(3):
        rows.apply(SchedulerOutput(step=0, new_requests=(request("a"),)))
        rows.failed["a"] = "broken"
        assert len(rows) == 1
    rows.apply(SchedulerOutput(step=1, new_requests=(request("a"),)))
    assert not rows.failed


def test_parameters_belong_to_the_row_only_while_the_request_lives() -> None:
    rows = table(max_num_seqs=1)
    loud = SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.8,
        min_p=0.1,
        seed=2**64 - 1,
        repetition_penalty=1.5,
        logit_bias=((4, -2.0),),
        logprobs=0,
        prompt_logprobs=3,
    )
    rows.apply(SchedulerOutput(step=0, new_requests=(request("a", params=loud),)))
    assert rows.seeds[0] == -1 and rows.top_k[0] == 7
    assert rows.logit_params.is_active[0] and rows.wants_logprobs[0]
    plain = request("b", params=SamplingParams(temperature=0.0))
    rows.apply(SchedulerOutput(step=1, finished_request_ids=("a",), new_requests=(plain,)))
    assert rows.temperature[0] == 0 and rows.top_k[0] == 0 and rows.top_p[0] == 1
    assert not (rows.logit_params.is_active[0] or rows.wants_logprobs[0])
    assert not rows.wants_prompt_logprobs[0]
    packed = rows.logit_params.packed()
    assert packed.bias_ids.numel() == 0 and packed.repetition_penalty.tolist() == [1.0]


def test_a_large_table_reserves_but_does_not_touch_memory() -> None:
    rows = RequestTable(max_num_seqs=256, max_model_len=1 << 20, block_size=16)
    assert rows.token_ids.nbytes == 4 * 256 * ((1 << 20) + 1)
    rows.apply(SchedulerOutput(step=0, new_requests=(request("a"),)))
    assert np.count_nonzero(rows.token_ids[rows.row("a"), :100]) == 5
