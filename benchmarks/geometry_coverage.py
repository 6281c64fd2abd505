"""How often intervals of the explained share and of the correlation cover where there is something to explain.

Run: python benchmarks/geometry_coverage.py [--runs 300]

A world is a router W that reads the states h, and a router V that reads other states z, of the same law and unseen.
Routes are the top experts of ``h W + .8 z V``, and the prediction is those of ``h W``. So W explains a part of the
similarity of routes. The truth of a world is the same number over many sequences. There are three worlds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from moe_interp.stats.geometry.explained import explained_share
from moe_interp.stats.geometry.pairs import correlation_of_sums, pair_interval

D, EXPERTS, K, TOKENS, RHO, UNSEEN = 12, 12, 2, 4, 0.7, 0.8


@dataclass
class Drawn:
    """Similarities of the pairs of a data set: of routes, as predicted, of states; and the units of each pair."""

    routes: np.ndarray
    predicted: np.ndarray
    states: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @property
    def moments(self) -> list[np.ndarray]:
        s, c = self.routes, self.states
        return [s, c, s * s, c * c, s * c]


def states(rng: np.random.Generator, n: int) -> np.ndarray:
    """``[sequence * token, d]``: a topic a sequence, and autoregressive tokens about it."""
    topic, rows = rng.normal(size=(n, 1, D)), [rng.normal(size=(n, D))]
    for _ in range(TOKENS - 1):
        rows.append(RHO * rows[-1] + np.sqrt(1 - RHO**2) * rng.normal(size=(n, D)))
    return (topic + np.stack(rows, 1)).reshape(n * TOKENS, D)


def top(logits: np.ndarray) -> np.ndarray:
    sets = np.zeros(logits.shape)
    np.put_along_axis(sets, np.argsort(-logits, 1)[:, :K], 1.0, 1)
    return sets


def cosines(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


def drawn(rng: np.random.Generator, n: int, routers: np.ndarray, level: str) -> Drawn:
    seen, unseen = states(rng, n), states(rng, n)
    routes, predicted = top(seen @ routers[0] + UNSEEN * (unseen @ routers[1])), top(seen @ routers[0])
    if level == "token":
        unit = np.repeat(np.arange(n), TOKENS)
        similar = [routes @ routes.T / K, predicted @ predicted.T / K, cosines(seen)]
    else:
        unit = np.arange(n)
        by_sequence = [rows.reshape(n, TOKENS, -1).sum(1) for rows in (routes, predicted, seen)]
        similar = [cosines(rows) for rows in by_sequence]
    i, j = np.triu_indices(len(unit), 1)
    apart = unit[i] != unit[j]
    i, j = i[apart], j[apart]
    return Drawn(*(rows[i, j] for rows in similar), unit[i], unit[j])


def truth(rng: np.random.Generator, routers: np.ndarray, level: str) -> tuple[float, float]:
    """The share and the correlation over many sequences."""
    found = []
    for _ in range(3):
        of = drawn(rng, 1200 if level == "sequence" else 500, routers, level)
        s, g = of.routes - of.routes.mean(), of.predicted - of.predicted.mean()
        found.append(((s * g).mean() / (s * s).mean(), np.corrcoef(of.routes, of.states)[0, 1]))
    share, correlation = np.mean(found, 0)
    return float(share), float(correlation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    runs = -(-parser.parse_args().runs // 3)
    rng = np.random.default_rng(3)
    print("| level | sequences | share | half width | correlation | half width |\n|---|---|---|---|---|---|")
    for level in ("token", "sequence"):
        for n in (6, 10, 20, 60):
            held, width = np.zeros((2, 3 * runs, 2))
            for world in range(3):
                of_world = np.random.default_rng(world)
                routers = of_world.normal(size=(2, D, EXPERTS))
                true = truth(of_world, routers, level)
                for run in range(world * runs, (world + 1) * runs):
                    of = drawn(rng, n, routers, level)
                    units = of.first, of.second
                    intervals = (
                        explained_share(of.routes, of.predicted, *units, n_units=n),
                        pair_interval(of.moments, *units, correlation_of_sums, n_units=n, bounds=(-1, 1)),
                    )
                    for which, (interval, value) in enumerate(zip(intervals, true)):
                        held[run, which] = interval.low <= value <= interval.high
                        width[run, which] = (interval.high - interval.low) / 2
            (share, correlation), (wide, wider) = held.mean(0), np.nanmean(width, 0)
            print(f"| {level} | {n} | {share:.3f} | {wide:.3f} | {correlation:.3f} | {wider:.3f} |", flush=True)


if __name__ == "__main__":
    main()
