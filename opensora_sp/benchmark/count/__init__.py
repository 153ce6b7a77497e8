"""Kernels and memory traffic of a computation, counted operation by operation, without memory."""
