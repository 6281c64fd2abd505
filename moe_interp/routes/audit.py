"""What a screen missed: its recall of the best route and the share of the oracle's gain that it kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moe_interp.errors import DataError
from moe_interp.stats import cluster_interval


@dataclass(frozen=True, eq=False)
class ScreenAudit:
    """Tokens all of whose routes were scored exactly, ``[token]`` each.

    Attributes:
        sequence: The sequence that a token belongs to.
        advantage: Of the best of all its routes over the standard one, in nats; negative where none is better.
        advantage_kept: Of the best of its routes that passed the screen.
    """

    sequence: np.ndarray
    advantage: np.ndarray
    advantage_kept: np.ndarray

    @property
    def n_tokens(self) -> int:
        return len(self.sequence)

    @property
    def recall(self) -> float:
        """Share of the tokens whose best route passed the screen (or one that is exactly as good)."""
        return float(np.mean(self._found)) if self.n_tokens else float("nan")

    @property
    def gain_kept(self) -> float:
        """``sum max(0, advantage_kept) / sum max(0, advantage)``; NaN where no route of any token is better."""
        return float(_ratio(self._kept.sum(), self._gain.sum()))

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Of ``recall`` and ``gain_kept``, over sequences (:func:`moe_interp.stats.cluster_interval`), within [0, 1].

        NaN below two sequences. Sequences without any gain have no part in the interval of ``gain_kept``.
        """
        _, owner = np.unique(self.sequence, return_inverse=True)
        n = int(owner.max(initial=-1)) + 1
        if n < 2:
            return {name: (float("nan"), float("nan")) for name in ("recall", "gain_kept")}
        parts = np.stack([self._found, np.ones(self.n_tokens), self._kept, self._gain], axis=-1)
        sums = np.stack([np.bincount(owner, weights=part, minlength=n) for part in parts.T], axis=-1)
        found = cluster_interval(
            [sums], lambda s: _ratio(s[..., ::2], s[..., 1::2]), sizes=sums[:, 1::2], level=level, bounds=(0.0, 1.0)
        )
        bounds = zip(("recall", "gain_kept"), found.low.tolist(), found.high.tolist())
        return {name: (low, high) for name, low, high in bounds}

    def summary(self) -> str:
        """One sentence."""
        bounds = self.intervals()

        def shown(name: str, value: float) -> str:
            low, high = bounds[name]
            return f"{value:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")

        return (
            f"The screen kept the best route of {shown('recall', self.recall)} and the share "
            f"{shown('gain_kept', self.gain_kept)} of the oracle's gain, on {self.n_tokens} tokens scored exhaustively."
        )

    @staticmethod
    def merge(audits: Iterable[ScreenAudit]) -> ScreenAudit:
        """Several batches' audits as one; their sequences are taken to be different.

        Raises:
            DataError: no audit.
        """
        parts, offset = list(audits), 0
        if not parts:
            raise DataError("no audit", "at least one", "Screen a batch first.")
        sequences = []
        for part in parts:
            sequences.append(part.sequence + offset)
            offset = int(sequences[-1].max(initial=offset - 1)) + 1
        return ScreenAudit(
            np.concatenate(sequences),
            np.concatenate([part.advantage for part in parts]),
            np.concatenate([part.advantage_kept for part in parts]),
        )

    @property
    def _found(self) -> np.ndarray:
        return (self.advantage_kept >= self.advantage).astype(float)

    @property
    def _gain(self) -> np.ndarray:
        return np.maximum(self.advantage, 0.0)

    @property
    def _kept(self) -> np.ndarray:
        return np.maximum(self.advantage_kept, 0.0)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)
