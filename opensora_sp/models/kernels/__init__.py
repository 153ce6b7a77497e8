"""Arithmetic of the models that has more than one implementation."""
