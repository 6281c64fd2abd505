"""Numbers of the Phi-mini-MoE study, to be set beside one's own. A comparison, not a reproduction."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "Young (2026), Learned Routers Don't Learn: Phi-mini-MoE, 32 layers (14 of them isolated), 16 experts"


@dataclass(frozen=True)
class Published:
    """One of the study's two runs.

    Attributes:
        n_items: Items per domain.
        n_significant, n_tests: Tests with q <= .05, of 14 layers x 16 experts x 4 domains. (The text says 7 layers; 14
            is what its tables and the number 896 agree on.)
        rho: Fisher-z mean of Spearman's rho over layers, by domain.
        mean_rho: Over domains.
    """

    n_items: int
    n_significant: int
    n_tests: int
    rho: dict[str, float]
    mean_rho: float


SMALL = Published(10, 207, 896, {"math": 0.043, "science": -0.027, "general": -0.146, "reasoning": 0.063}, -0.017)
LARGE = Published(50, 482, 896, {"math": 0.098, "science": -0.005, "general": 0.051, "reasoning": 0.132}, 0.069)
# expert 2, the most used one: share of the slots by domain
DOMINANT_SHARE = {"math": 0.0803, "science": 0.0718, "general": 0.0734, "reasoning": 0.0724}
UNIFORM_SHARE = 0.0625
# mean over domains of the best expert's delta, nats per token; chosen and measured on the same 10 items
LAYER_IMPACT = {30: 0.779, 3: 0.750, 5: 0.715, 4: 0.647, 31: 0.441, 13: 0.066, 8: -0.009}
