"""The GPU engine: Numba kernels that update the rows of a table in the memory of CUDA devices."""
