"""Parameters of rows of logits, as the request table has them. Knows the table; draws nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from octavo.sampling import SamplingBatch
from octavo.worker.request_table import RequestTable


def sampling_batch(
    table: RequestTable,
    rows: npt.NDArray[np.int64],
    *,
    depths: npt.NDArray[np.int32],
    has_drafts: bool,
    has_logprobs: bool = True,
) -> SamplingBatch:
    """For the token behind each request's (``rows`` [S] of the table) known tokens and its first
    ``depths`` [S] drafts, which are in the table where there are any."""
    has_params = table.logit_params.is_active[rows]
    asks = has_logprobs and bool(table.wants_logprobs[rows].any())
    return SamplingBatch(
        slots=rows.astype(np.int32),
        columns=table.sampling_columns,
        positions=(table.num_tokens[rows] + depths).astype(np.int64),
        has_params=has_params,
        params=table.logit_params.packed() if has_params.any() else None,
        num_logprobs=[table.params(row).logprobs for row in rows] if asks else (),
        num_drafts=depths if has_drafts else None,
    )
