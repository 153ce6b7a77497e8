"""Proof on the user's own machine: the conformance suite, and N ranks against one."""
