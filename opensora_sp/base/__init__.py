"""Errors, atomic files, hashes, geometry, processes. Every room may use them."""
