"""Open-Sora 1.2 on more than one accelerator. See README.md for the file map."""

__version__ = "0.1.0"
