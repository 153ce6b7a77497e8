"""Counts the bytes of live tensors, exactly and without the allocator's help."""

from opensora_sp.verification.tracing import PeakBytes, peak_bytes

__all__ = ["PeakBytes", "peak_bytes"]
