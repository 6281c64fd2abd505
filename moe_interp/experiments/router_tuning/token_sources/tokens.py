"""The tokens of a run: which there are, and what a step asks of some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_interp.experiments.inputs.sequences import ScoredSequence
from moe_interp.experiments.router_tuning.routers import Weights
from moe_interp.stats import derive_rng


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Tokens whose next token is predicted.

    Attributes:
        sequences: The sequences.
        sequence: ``[token]``, which of them a token is of.
        pos: ``[token]``, its position there.
        ce: ``[token]``, the cross-entropy of the untuned model, in nats (float64).
    """

    sequences: list[ScoredSequence]
    sequence: NDArray[np.int64]
    pos: NDArray[np.int64]
    ce: Tensor

    def __len__(self) -> int:
        return len(self.pos)

    def targets(self, rows: Tensor) -> Tensor:
        """``[row]`` ids of the realized next tokens."""
        return torch.tensor(
            [self.sequences[self.sequence[row]].tokens[self.pos[row] + 1] for row in rows.tolist()], dtype=torch.int64
        )

    def keys(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the tokens' random numbers are fixed by: their sequences' keys and their positions, ``[row]`` each."""
        sequence, pos = self.sequence[rows.numpy()], self.pos[rows.numpy()]
        return torch.tensor([self.sequences[s].key for s in sequence.tolist()]), torch.from_numpy(pos)

    def by_sequence(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """The rows of one sequence after the other."""
        for s in np.unique(self.sequence[rows]):
            yield rows[self.sequence[rows] == s]


class OpenTokens(Protocol):
    """Some tokens, with everything that a step asks of them.

    Attributes:
        inputs: By layer, what the router reads, ``[token, d_in]``.
    """

    inputs: dict[int, Tensor]

    def scores(self, layer: int, routes: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropies ``[token, route]`` under routes ``[token, route, slot]`` at one layer, weighted by the
        family's rule for ``logits [token, expert]``; NaN for a route of -1 only. No gradient."""
        ...

    def own_ce(self, logits: dict[int, Tensor]) -> Tensor:
        """Cross-entropies ``[token]`` under the routers' own routes. No gradient."""
        ...

    def own_loss(self, weights: Weights) -> Tensor:
        """The mean of these, with its gradient by the weights."""
        ...


class TokenSource(Protocol):
    """All tokens of a run or of its held-out part.

    Attributes:
        table: The tokens.
        keeps_sequences: Whether opening tokens of one sequence together is cheaper.
    """

    table: TokenTable
    keeps_sequences: bool

    def open(self, rows: Tensor, weights: Weights) -> OpenTokens:
        """Some of the tokens, as they are with these weights in the routers."""
        ...


def epoch_order(source: TokenSource, seed: int, epoch: int) -> NDArray[np.int64]:
    """All tokens in the order of an epoch; those of a sequence together where that is cheaper."""
    draw = derive_rng(seed, "order of an epoch", epoch)
    rows = draw.permutation(len(source.table))
    if not source.keeps_sequences:
        return rows
    place = draw.permutation(len(source.table.sequences))
    return rows[np.argsort(place[source.table.sequence[rows]], kind="stable")]


def chunks(source: TokenSource, n: int) -> Iterator[Tensor]:
    """All tokens in their order, so many at a time, or whole sequences where these are kept together."""
    rows = np.arange(len(source.table))
    if not source.keeps_sequences:
        yield from torch.from_numpy(rows).split(n)
        return
    held: list[NDArray[np.int64]] = []
    for part in source.table.by_sequence(rows):
        if held and sum(map(len, held)) + len(part) > n:
            yield torch.from_numpy(np.concatenate(held))
            held = []
        held.append(part)
    yield torch.from_numpy(np.concatenate(held))
