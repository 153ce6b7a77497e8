"""Open-Sora 1.2 on more than one accelerator.

    from opensora_sp import Pipeline, Request, open_session

    with open_session() as session:
        pipeline = Pipeline.load(session=session)
        result = pipeline.generate(Request(prompt="a red ball rolls to the left"))

The names in `__all__` are what Python code may rely on (docs/python.md). Each is imported at its
first use: `import opensora_sp` alone loads neither torch nor any model.
"""

from typing import TYPE_CHECKING, Any

from opensora_sp.base.waiting import let_waiting_threads_sleep

if TYPE_CHECKING:
    from opensora_sp.base.errors import Cancelled, CheckpointError, UserError
    from opensora_sp.engine.model_set import Parallelism
    from opensora_sp.engine.pipeline import Pipeline
    from opensora_sp.engine.result import Result
    from opensora_sp.parallel.session import Session, open_session
    from opensora_sp.request.request import Checkpoints, Request
    from opensora_sp.request.runtime import Runtime

__version__ = "0.1.0"
__all__ = [
    "Cancelled",
    "CheckpointError",
    "Checkpoints",
    "Parallelism",
    "Pipeline",
    "Request",
    "Result",
    "Runtime",
    "Session",
    "UserError",
    "__version__",
    "open_session",
]

# Where each of them is; mypy and editors read the imports above.
_HOMES = {
    "Cancelled": "base.errors",
    "CheckpointError": "base.errors",
    "Checkpoints": "request.request",
    "Parallelism": "engine.model_set",
    "Pipeline": "engine.pipeline",
    "Request": "request.request",
    "Result": "engine.result",
    "Runtime": "request.runtime",
    "Session": "parallel.session",
    "UserError": "base.errors",
    "open_session": "parallel.session",
}

# Here, because every way into the program passes here before it imports torch.
let_waiting_threads_sleep()


if not TYPE_CHECKING:  # a type checker would take any name for a public one

    def __getattr__(name: str) -> Any:
        """A public name, imported now. Raises AttributeError for any other."""
        if name not in _HOMES:
            raise AttributeError(f"module 'opensora_sp' has no attribute {name!r}")
        from importlib import import_module

        found = globals()[name] = getattr(import_module(f"opensora_sp.{_HOMES[name]}"), name)
        return found


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet, and what is loaded."""
    return sorted({*globals(), *__all__})
