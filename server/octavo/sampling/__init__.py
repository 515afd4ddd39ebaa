"""From logits to tokens: parameters, draws and log-probabilities. Knows rows, not requests' ids."""

from __future__ import annotations

from octavo.sampling.logprobs import score_rows
from octavo.sampling.penalties import LogitParamsTable
from octavo.sampling.sampler import Sampled, Sampler, SamplingBatch
from octavo_kernels.sampling import SamplingColumns

__all__ = [
    "LogitParamsTable",
    "Sampled",
    "Sampler",
    "SamplingBatch",
    "SamplingColumns",
    "score_rows",
]
