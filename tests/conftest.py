"""Triton kernels run in Triton's interpreter where there is no GPU; decided before any import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
