"""Statistics on plain arrays: numpy and scipy only, vectorised over leading axes, importable without torch."""

from moe_interp.stats.correlation import (
    MeanCorrelation,
    PermutationResult,
    SpearmanResult,
    fisher_z_interval,
    fisher_z_mean,
    mean_rho_permutation,
    spearman,
)
from moe_interp.stats.intervals import Interval, bootstrap_interval, median_interval, pseudomedian_interval
from moe_interp.stats.multiple import adjust_p, items_needed, rejected, tests_needed_at_floor
from moe_interp.stats.power import plan_wilcoxon, wilcoxon_power
from moe_interp.stats.streams import derive_rng
from moe_interp.stats.wilcoxon import WilcoxonResult, smallest_attainable_p, wilcoxon_signed_rank

__all__ = [
    "Interval",
    "MeanCorrelation",
    "PermutationResult",
    "SpearmanResult",
    "WilcoxonResult",
    "adjust_p",
    "bootstrap_interval",
    "derive_rng",
    "fisher_z_interval",
    "fisher_z_mean",
    "items_needed",
    "mean_rho_permutation",
    "median_interval",
    "plan_wilcoxon",
    "pseudomedian_interval",
    "rejected",
    "smallest_attainable_p",
    "spearman",
    "tests_needed_at_floor",
    "wilcoxon_power",
    "wilcoxon_signed_rank",
]
