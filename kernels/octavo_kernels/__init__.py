"""CPU kernels of Octavo, one folder per op; knows tensors, nothing of the server around them."""

from octavo_kernels.parallel import num_threads, set_num_threads

__all__ = ["num_threads", "set_num_threads"]
