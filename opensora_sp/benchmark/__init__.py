"""Measured runs of the main path: warm-up, repetition, records per rank, sweeps, traces."""
