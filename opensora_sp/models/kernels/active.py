"""The kernels that the models call now: a context that a run enters, as it does for arithmetic.

Outside of one everything is plain torch. The choices in it are made once, before the first step,
and are the same on every rank; the models only look them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType

from opensora_sp.models.kernels.attention import DEFAULT, Choice


@dataclass(frozen=True, order=True)
class Lengths:
    """A kind of attention: among `keys` tokens, or from other tokens to `keys` of them.

    How many sequences there are, and how many tokens look at others, is left out: both depend on
    how many ranks share a video, and the choice must not. Lengths of texts are rounded up to a
    power of 2, or every prompt would be a kind of its own.
    """

    crossed: bool
    keys: int

    @classmethod
    def of(cls, queries: int, keys: int) -> Lengths:
        """The kind of an attention of so many queries and keys."""
        return cls.text(keys) if queries != keys else cls(False, keys)

    @classmethod
    def text(cls, keys: int) -> Lengths:
        """The kind of a cross-attention to so many text tokens."""
        return cls(True, 1 << max(0, keys - 1).bit_length())


@dataclass
class Kernels:
    """What one pipeline's models call.

    attention: the choice for each kind of attention; `anywhere` is that of all others.
    fused: the module with fused kernels, None for plain torch. fused_why: what decided that,
    None before it was decided.
    """

    anywhere: Choice | None = None
    attention: dict[Lengths, Choice] = field(default_factory=dict)
    fused: ModuleType | None = None
    fused_why: str | None = None

    def choice(self, queries: int, keys: int, width: int) -> Choice:
        """The choice for q of so many queries, k and v of so many keys, and heads of a width."""
        found = self.attention.get(Lengths.of(queries, keys))
        if found is None:  # a text may be as long as what looks at it
            found = self.attention.get(Lengths.text(keys))
        return found or self.anywhere or Choice(DEFAULT, width)


_PLAIN = Kernels()
_active: ContextVar[Kernels] = ContextVar("kernels", default=_PLAIN)


def active() -> Kernels:
    """The kernels of the context that this is called in."""
    return _active.get()


@contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """A block in which the models call these kernels."""
    token = _active.set(kernels)
    try:
        yield
    finally:
        _active.reset(token)
