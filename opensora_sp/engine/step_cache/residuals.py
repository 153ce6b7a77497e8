"""What a step cache keeps of one video, and the comparison that its policy decides by.

On each rank that is one residual for each CFG branch that it computes, and the first pair's
residual of the conditional branch, each as large as the shard of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from opensora_sp.engine.blocks import AfterFirst, Stream
from opensora_sp.engine.step_cache.policy import NoCache, StepCache

# all_gather(this rank's values) → those of every rank of the video, the same list on all of them.
AllGather = Callable[[list[float]], list[list[float]]]
_DECIDING_BRANCH = 0  # the conditional one: with serial guidance it is the first to be computed


class Blocks(Protocol):
    """The block loop over streams that it was given: see `opensora_sp.engine.blocks.run_blocks`."""

    def __call__(self, *, after_first: AfterFirst | None = None) -> list[Tensor]:
        """All blocks, or the first pair only where after_first says so → each stream's x."""
        ...


class Residuals:
    """The cached residuals of one clip. Every rank of the video makes the same calls.

    reused: the steps at which the blocks were not computed, in order.
    """

    def __init__(self, policy: StepCache, all_gather: AllGather) -> None:
        self._policy, self._all_gather = policy, all_gather
        self.reused: list[int] = []
        self._step, self._t = -1, 0.0
        self._generate: Tensor | None = None
        self._decision: bool | None = None  # of this step, once the first branch has made it
        self._computed = False
        self._first: Tensor | None = None
        self._rest: dict[int, Tensor] = {}

    def begin_step(self, t: float, generate: Tensor | None) -> None:
        """The next step begins, at time t, with these frames generated (bool [B,T]; None is all).

        Where others were generated at the step before, nothing of it is reused: frames that are
        kept run through the blocks with the modulation of time 0.
        """
        self._step, self._t = self._step + 1, t
        self._decision = None
        if not _same(generate, self._generate):
            self._forget()
        self._generate = generate

    def run(self, branches: Sequence[int], streams: list[Stream], blocks: Blocks) -> list[Tensor]:
        """The blocks over the streams of these CFG branches, computed or reused → each one's x."""
        if isinstance(self._policy, NoCache):
            return blocks()
        entered: Tensor | None = None
        if _DECIDING_BRANCH in branches:
            entered = streams[branches.index(_DECIDING_BRANCH)].x.clone()
        after_pair: list[Tensor] = []

        def after_first(streams: list[Stream]) -> bool:
            if self._decision is None:
                x = None if entered is None else streams[branches.index(_DECIDING_BRANCH)].x
                self._decision = self._decide(entered, x)
            if not self._decision:
                for branch in branches:  # the old ones go before the new ones come
                    self._rest.pop(branch, None)
                after_pair.extend(stream.x.clone() for stream in streams)
            return self._decision

        outputs = blocks(after_first=after_first)
        if self._decision:
            return [x + self._rest[b] for b, x in zip(branches, outputs, strict=True)]
        for branch, x, before in zip(branches, outputs, after_pair, strict=True):
            self._rest[branch] = torch.sub(x, before, out=before)
        return outputs

    def _decide(self, entered: Tensor | None, x: Tensor | None) -> bool:
        """Whether this step is reused; x [B,T,S_local,C] is what the first pair made of entered.

        Both are None on ranks that do not compute the deciding branch. Collective.
        """
        first = None if x is None or entered is None else torch.sub(x, entered, out=entered)
        if self._computed:
            change = self._change(first)
            if self._policy.reuse(self._step, self._t, change):
                self.reused.append(self._step)
                return True
        self._first, self._computed = first, True
        return False

    def _change(self, first: Tensor | None) -> float:
        """The relative change of the first pair's residual, over all ranks. Collective."""
        mine = [0.0, 0.0]
        if first is not None and self._first is not None:
            mine = _difference(first, self._first)
        # Summed in the order of the ranks on every one of them: the same number everywhere.
        differences, sizes = (sum(each) for each in zip(*self._all_gather(mine), strict=True))
        if sizes == 0:
            return 0.0 if differences == 0 else float("inf")
        return differences / sizes

    def _forget(self) -> None:
        """Keep nothing, so that the next step is computed."""
        self._computed, self._first = False, None
        self._rest.clear()


def _difference(now: Tensor, before: Tensor) -> list[float]:
    """[Σ|now - before|, Σ|before|] of [B,T,S,C], frame by frame, so that it takes little memory."""
    total = torch.zeros(2, device=now.device)
    for a, b in zip(now.unbind(1), before.unbind(1), strict=True):
        b = b.float()
        total += torch.stack([(a.float() - b).abs().sum(), b.abs().sum()])
    difference, size = total.tolist()
    return [difference, size]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
