"""Independent random streams from one seed and labels; no global state."""

from __future__ import annotations

import hashlib

import numpy as np

from moe_interp.checks import check_whole


def derive_rng(seed: int, *labels: str | int) -> np.random.Generator:
    """A generator that depends on ``seed`` and ``labels`` alone, whatever was drawn elsewhere before.

    Two different label tuples give independent streams (``numpy.random.SeedSequence`` keyed by a hash of the labels).

    Raises:
        ConfigError: a seed that is no whole number.
    """
    seed = check_whole(seed, "seed")
    digest = hashlib.sha256(repr(labels).encode()).digest()
    key = np.frombuffer(digest, dtype=np.uint32).tolist()
    return np.random.default_rng(np.random.SeedSequence([abs(seed), int(seed < 0), *key]))
