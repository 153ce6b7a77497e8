"""How the model runs, as one object; models and the block loop do not change with it."""

from opensora_sp.runtime.options import Runtime

__all__ = ["Runtime"]
