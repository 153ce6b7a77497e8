"""Checks on the user's machine: the conformance suite, parity of N ranks with one, the doctor."""
