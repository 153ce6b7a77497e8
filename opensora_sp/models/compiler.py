"""Compiled pieces of a block: what lies between two attentions, traced once and used by all blocks.

A piece is a function of tensors: a block's method, whose weights become inputs, or a function that
is given its weights. So all blocks of a model share one graph, and weights that are folded anew at
each step are only other inputs. Attention and the exchange between ranks stay outside: the kernel
that was chosen for attention is called as ever, and graphs do not depend on the length of the text.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora_sp.models.kernels.active import active, using
from opensora_sp.models.kernels.fused import LIMITS

_log = logging.getLogger(__name__)

# run(piece, *arguments) → what the piece computes of them.
Run = Callable[..., Any]


def directly(piece: Callable[..., Any], *arguments: Any) -> Any:
    """The piece as it is written, operation by operation."""
    return piece(*arguments)


@dataclass(frozen=True)
class Backend:
    """A compiler of `torch.compile`: its name there, and its options."""

    name: str
    options: Mapping[str, Any] | None = None


# Shapes of videos whose graphs are kept: a server may be asked for any number of them.
MOST_SHAPES = 16
# Numbers that are compared at once.
_AT_ONCE = 1 << 22

# By type of device. GCU's is registered by torch_gcu, and its options are the vendor's.
BACKENDS: dict[str, Backend] = {
    "cpu": Backend("inductor"),
    "cuda": Backend("inductor"),
    "gcu": Backend("topsgraph", {"subgraph_mode": True}),
}


class Compiler:
    """Runs the pieces of one transformer's blocks from compiled graphs; called as `directly`.

    A graph is made for each piece and each form of its inputs: shapes, strides, numbers that are
    no tensors. Those of the last `MOST_SHAPES` shapes of videos are kept. At its first call a graph
    is compared with the piece itself. One that cannot be made, or that computes something else,
    ends compilation: `trouble` says why, and every piece is computed directly from then on.

    seconds: spent on making graphs, their first calls included. compilations: calls of the
    backend; as many as graphs, unless something was compiled twice. quiet: trouble is not logged,
    because somebody else says it.
    """

    def __init__(self, device: torch.device) -> None:
        self.backend = BACKENDS.get(device.type, BACKENDS["cpu"])
        self.trouble: str | None = None
        self.seconds = 0.0
        self.compilations = 0
        self.quiet = False
        self._graphs: dict[Any, _Graph] = {}
        # The graphs of each shape that was rehearsed, by key; what was asked for last is last.
        self._shapes: dict[Any, set[Any]] = {}
        self._latest: set[Any] = set()
        self._rehearsing = False
        _set_up_inductor()

    @property
    def graphs(self) -> int:
        """Graphs that are kept."""
        return len(self._graphs)

    def described(self) -> str:
        """As "inductor, 5 graphs in 12.3 s", or as "off: " and why."""
        if self.trouble is not None:
            return f"off: {self.trouble}"
        count = f"{self.graphs} graph{'' if self.graphs == 1 else 's'}"
        return f"{self.backend.name}, {count} in {self.seconds:.1f} s"

    def knows(self, shape: Any) -> bool:
        """Whether a shape was rehearsed and its graphs are kept; it is the last one used then."""
        keys = self._shapes.pop(shape, None)
        if keys is None:
            return False
        self._shapes[shape] = self._latest = keys
        return True

    @contextmanager
    def rehearsing(self, shape: Any) -> Iterator[None]:
        """A block whose calls are all that a shape needs; drops graphs that only old shapes need.

        See `opensora_sp.engine.compiling`.
        """
        self._shapes[shape] = self._latest = set()
        self._rehearsing = True
        try:
            yield
        finally:
            self._rehearsing = False
        while len(self._shapes) > MOST_SHAPES:
            old = self._shapes.pop(next(iter(self._shapes)))
            for key in old.difference(*self._shapes.values()):
                self._graphs.pop(key, None)

    def stop(self, trouble: str) -> None:
        """Compute every piece directly from now on, for this reason."""
        self.trouble = trouble
        self._graphs.clear()
        if not self.quiet:
            _log.warning("compilation: %s: the run goes on without it", trouble)

    def __call__(self, piece: Callable[..., Any], *arguments: Any) -> Any:
        """The piece's result; what it updates where it lies is updated."""
        if self.trouble is not None or torch.is_grad_enabled():
            return piece(*arguments)
        tensors: list[Tensor] = []
        form = _taken_apart(arguments, tensors)
        if any(tensor.numel() == 0 for tensor in tensors):  # a rank may have no part of a frame
            return piece(*arguments)
        owner = getattr(piece, "__self__", None)
        weights = [] if owner is None else [weight.detach() for weight in owner.parameters()]
        # Weights are alike in all blocks. Were they not, the graph would be compiled again.
        key = (
            getattr(piece, "__func__", piece),
            form,
            tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors),
            tuple(w.dtype for w in weights[:1]),
        )
        graph = self._graphs.get(key)
        if graph is not None:
            if self._rehearsing:
                self._latest.add(key)
            return graph([*weights, *tensors])
        started = time.perf_counter()
        try:
            return self._first(key, piece, form, weights, tensors)
        finally:
            self.seconds += time.perf_counter() - started

    def _first(
        self,
        key: Any,
        piece: Callable[..., Any],
        form: Any,
        weights: list[Tensor],
        tensors: list[Tensor],
    ) -> Any:
        """Compute the piece directly, make its graph, and compare what the two compute.

        The piece's own result counts. Until the graph was called, what the piece updates is held
        once more, and then the results of both. Whatever fails on the way, running out of memory
        included, ends compilation and not the run.
        """
        before: dict[int, Tensor] = {}
        updated: dict[int, Tensor] = {}
        expected = None
        try:
            # Fused kernels cannot be traced. The piece does without them too: with them it may
            # return other tensors, whose products alone are equal.
            with using(replace(active(), fused=None)):
                graph = _Graph(piece, form, weights, tensors, self._compile)
                before = {i: tensors[i].clone() for i in graph.updated}
                expected = piece(*_put_together(form, iter(tensors)))
                for i in graph.updated:
                    updated[i] = tensors[i].clone()
                    tensors[i].copy_(before.pop(i))
                # On the inputs themselves: a copy of a tile has other strides.
                far = _farthest(
                    [*_all(graph([*weights, *tensors])), *(tensors[i] for i in updated)],
                    [*_all(expected), *updated.values()],
                )
            if far <= LIMITS[_all(expected)[0].dtype]:  # not so for NaN
                self._graphs[key] = graph
                self._latest.add(key)
            else:
                self.stop(
                    f"{self.backend.name} computes something else in {graph.name}, by {far:.1e}"
                )
        except Exception as error:  # whatever a compiler may raise: the run needs none
            said = " ".join(str(error).split())[:160]
            self.stop(f"{self.backend.name} failed: {type(error).__name__}: {said}")
        # Not before the error and what its frames hold are gone.
        for i, tensor in (before if expected is None else updated).items():
            tensors[i].copy_(tensor)
        if expected is not None:
            return expected
        before.clear()
        return piece(*_put_together(form, iter(tensors)))

    def _compile(self, graph: Any) -> Callable[..., Any]:
        """A traced graph by the backend: never for symbolic shapes, never silently eager."""
        from torch._dynamo.backends.registry import lookup_backend

        backend: Any = lookup_backend(self.backend.name)
        options = {} if self.backend.options is None else {"options": dict(self.backend.options)}

        def counted(module: Any, inputs: Sequence[Tensor]) -> Any:
            self.compilations += 1
            return backend(module, inputs, **options)

        # With fullgraph torch raises where it would go on without the compiler.
        made: Callable[..., Any] = torch.compile(
            graph.forward, backend=counted, dynamic=False, fullgraph=True
        )
        return made


def _set_up_inductor() -> None:
    """Its cache of graphs and its processes, unless its own variables say otherwise.

    With one thread it starts no processes. Before torch 2.5 it forks them, which a process with a
    device or a watchdog must not do.
    """
    forks = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 5)
    threads = 1 if forks else torch.get_num_threads()
    # Variables are read when it is imported, which another library may have done.
    config = sys.modules.get("torch._inductor.config")
    for variable, name, value in (
        ("TORCHINDUCTOR_COMPILE_THREADS", "compile_threads", threads),
        ("TORCHINDUCTOR_FX_GRAPH_CACHE", "fx_graph_cache", True),
    ):
        if variable not in os.environ:
            os.environ[variable] = str(int(value))
            if config is not None:
                setattr(config, name, value)


class _Graph:
    """One piece, traced for one form of inputs and compiled; called with all of its tensors.

    updated: which of the inputs that are no weights it updates where they lie.
    """

    def __init__(
        self,
        piece: Callable[..., Any],
        form: Any,
        weights: Sequence[Tensor],
        tensors: Sequence[Tensor],
        compiled: Callable[[Any], Callable[..., Any]],
    ) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx

        self.name = getattr(piece, "__qualname__", str(piece))
        owner = getattr(piece, "__self__", None)
        names = [] if owner is None else [name for name, _ in owner.named_parameters()]
        self.updated: list[int] = []

        def flat(*given: Tensor) -> list[Tensor]:
            own, inputs = given[: len(names)], given[len(names) :]
            versions = [each._version for each in inputs]
            arguments = _put_together(form, iter(inputs))
            if owner is None:
                out = piece(*arguments)
            else:
                call = _Method(owner, piece.__name__)
                stand_in = {f"owner.{name}": w for name, w in zip(names, own, strict=True)}
                out = torch.func.functional_call(call, stand_in, arguments)
            self.updated = [
                i
                for i, (each, version) in enumerate(zip(inputs, versions, strict=True))
                if each._version != version
            ]
            made = _all(out)
            places = [next((i for i, e in enumerate(inputs) if e is one), None) for one in made]
            self._single, self._places = isinstance(out, Tensor), places
            return [one for one, place in zip(made, places, strict=True) if place is None]

        traced = make_fx(flat, tracing_mode="fake")(*weights, *tensors)
        self._inputs, self._first_tensor = _drop_unused(traced), len(names)
        self._run = compiled(traced)

    def __call__(self, given: Sequence[Tensor]) -> Any:
        # Operations that a mode widens were widened when they were traced.
        with torch._C.DisableTorchFunction():
            made = iter(self._run(*(given[i] for i in self._inputs)))
        out = [
            next(made) if place is None else given[self._first_tensor + place]
            for place in self._places
        ]
        return out[0] if self._single else tuple(out)


class _Method(nn.Module):
    """A method of a module as a module of its own, whose weights can be stood in for."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self._name = owner, name

    def forward(self, *arguments: Any) -> Any:
        """The method's result."""
        return getattr(self.owner, self._name)(*arguments)


def _drop_unused(graph: Any) -> list[int]:
    """Remove the inputs that a traced graph does not read; the numbers of those that it does."""
    kept = []
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for number, node in enumerate(inputs):
        if node.users:
            kept.append(number)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return kept


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The form of a value, hashable, without its tensors, which are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor
    if isinstance(value, tuple):
        return (tuple, *(_taken_apart(each, tensors) for each in value))
    if is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, field.name) for field in fields(value))
        return (type(value), *(_taken_apart(each, tensors) for each in parts))
    return value


def _put_together(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The value of a form, with these tensors in it."""
    if form is Tensor:
        return next(tensors)
    if not isinstance(form, tuple):
        return form
    kind, *parts = form
    made = [_put_together(part, tensors) for part in parts]
    return tuple(made) if kind is tuple else kind(*made)


def _all(out: Any) -> list[Tensor]:
    """A piece's results: it returns one tensor or several."""
    return [out] if isinstance(out, Tensor) else list(out)


def _farthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative RMS difference of two tensors of a pair."""
    return max((_distance(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _distance(one: Tensor, other: Tensor) -> float:
    """The relative RMS difference, in float32, of which only a part is held at once."""
    axis = max(range(other.ndim), key=other.shape.__getitem__)
    length = max(1, _AT_ONCE * other.shape[axis] // other.numel())
    errors, sizes = [], []
    for a, b in zip(one.split(length, axis), other.split(length, axis), strict=True):
        sizes.append(b.float().norm())
        errors.append((a.float() - b.float()).norm())
    size = float(torch.stack(sizes).norm())
    return float(torch.stack(errors).norm()) / (size or 1.0)
