"""What there is of the CPU's quantised matmuls, and the shapes they are timed on."""

from __future__ import annotations

from octavo_kernels.op import OpSpec
from octavo_kernels.quant_matmul.block_spec import block_specs

# SmolLM2-135M: q, k and v; o; gate and up; down; head
SMOLLM2 = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))
BENCH_ROWS = (1, 4, 16, 32, 128)


SPECS: tuple[OpSpec, ...] = block_specs(SMOLLM2, BENCH_ROWS)
