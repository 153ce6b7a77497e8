"""Errors, atomic files, hashes, geometry, processes: used by every room, imports none of them."""
