"""Power of the signed-rank test, by seeded simulation with the very test that will be run."""

from __future__ import annotations

import numpy as np

from moe_interp.stats.checks import check_at_least, check_choice, check_probability
from moe_interp.stats.random_generators import derive_rng
from moe_interp.stats.significance.multiple import tests_needed_at_floor
from moe_interp.stats.significance.wilcoxon import smallest_attainable_p, wilcoxon_signed_rank

# every law has variance 1; t with 5 degrees of freedom has variance 5/3
_LAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "t5": lambda rng, shape: rng.standard_t(5, shape) * np.sqrt(3 / 5),
    "laplace": lambda rng, shape: rng.laplace(size=shape) / np.sqrt(2),
}


def wilcoxon_power(
    effect: float, n: int, alpha: float = 0.05, *, law: str = "normal", n_simulations: int = 4000, seed: int = 0
) -> float:
    """P(two-sided signed-rank p <= ``alpha``) for ``n`` differences with mean ``effect`` in units of their sd.

    Monte Carlo with standard error sqrt(power (1 - power) / n_simulations). For a family of tests pass the threshold
    that the correction leaves: alpha * k / m when k of m tests are expected to be rejected under BH.

    Args:
        effect: Mean difference / standard deviation of the differences; its sign is irrelevant.
        law: ``"normal"`` | ``"t5"`` | ``"laplace"``, symmetric laws of variance 1.

    Source: derived (simulation). Real differences are neither of these laws; treat the number as a plan.
    """
    check_at_least(n, 1, "n")
    check_at_least(n_simulations, 1, "n_simulations")
    check_probability(alpha, "alpha")
    check_choice(law, tuple(_LAWS), "law")
    if smallest_attainable_p(n) > alpha:  # no data can reject
        return 0.0
    rng = derive_rng(seed, "wilcoxon_power", law, n)
    draws = _LAWS[law](rng, (n_simulations, n)) + effect
    return float((wilcoxon_signed_rank(draws).p_value <= alpha).mean())


def plan_wilcoxon(n: int, m: int, alpha: float = 0.05, *, method: str = "bh") -> str:
    """One plain sentence on whether ``m`` tests of ``n`` items can reject anything, to be shown before a run."""
    needed = tests_needed_at_floor(n, m, alpha, method=method)
    floor = f"With {n} items the smallest attainable p is {smallest_attainable_p(n):.3g}"
    if needed > m:
        return f"{floor}: none of the {m} tests can be rejected at {alpha} under {method.upper()}."
    if needed == 1:
        return f"{floor}: a single test of {m} can be rejected at {alpha} under {method.upper()}."
    return f"{floor}: at least {needed} of the {m} tests must reach it together to be rejected at {alpha}."
