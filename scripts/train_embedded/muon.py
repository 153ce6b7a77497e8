"""The optimizer of the blocks' matrices: Muon (K. Jordan and others, 2024).

Its updates are the momentum with all of its singular values near 1.
torch has a Muon of its own since 2.9. Its iteration runs in bfloat16, which a processor without
such instructions computes so slowly that a step took three times as long; this one stays in
float32, takes matrices of one shape together and runs on torch 2.3 too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
# Of the quintic whose repetition brings singular values from (0, 1] to 0.7..1.2 in five steps.
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of an update's entries, about what AdamW's have: both then share one learning rate


class Muon(torch.optim.Optimizer):
    """Steps along the momentum with all of its singular values near 1.

    params: matrices. pieces: into how many matrices, one below the other, each of them is to be
    divided first, as queries, keys and values in one weight are three; 1 for those not named.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        pieces: dict[Tensor, int] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.pieces = pieces or {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every matrix; all have gradients."""
        assert closure is None
        for group in self.param_groups:
            weights = group["params"]
            for weight, update in zip(weights, self._updates(weights), strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"])

    def _updates(self, weights: list[Tensor]) -> list[Tensor]:
        """What each weight is moved along, of its shape."""
        parts: dict[tuple[int, int], list[Tensor]] = {}
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            gradient = weight.grad
            assert gradient is not None
            ahead = gradient.lerp(state["momentum"].lerp_(gradient, 1 - MOMENTUM), MOMENTUM)
            for part in ahead.chunk(self.pieces.get(weight, 1)):
                # Wide rather than tall: the iteration multiplies rows with rows.
                parts.setdefault(_wide(part).shape, []).append(_wide(part))  # type: ignore[arg-type]
        done = {
            shape: iter(orthogonal(torch.stack(of_shape)) * RMS * max(shape) ** 0.5)
            for shape, of_shape in parts.items()
        }
        updates = []
        for weight in weights:
            count = self.pieces.get(weight, 1)
            rows, columns = weight.shape[0] // count, weight.shape[1]
            shape = (min(rows, columns), max(rows, columns))
            pieces = [next(done[shape]) for _ in range(count)]
            updates.append(torch.cat([x if rows <= columns else x.T for x in pieces]))
        return updates


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonal(matrices: Tensor) -> Tensor:
    """The matrices with singular values near 1 and the same singular vectors.

    matrices: [N,rows,columns], rows ≤ columns. By Newton and Schulz's iteration: products alone.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x
