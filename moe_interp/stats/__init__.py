"""Statistics on plain arrays: numpy and scipy only, vectorised over leading axes, importable without torch."""

from moe_interp.stats.best_of import BestOf, best_of, in_top
from moe_interp.stats.corrected import CORRECTED_COVERS, CorrectedCorrelation, Estimate, corrected_correlation
from moe_interp.stats.correlation import (
    MeanCorrelation,
    PermutationResult,
    SpearmanResult,
    fisher_z_interval,
    fisher_z_mean,
    mean_rho_permutation,
    spearman,
)
from moe_interp.stats.fixed_size_sets import pair_inclusion
from moe_interp.stats.geometry.linear_bound import LinearBound, linear_bound
from moe_interp.stats.geometry.mantel import MantelResult, mantel
from moe_interp.stats.geometry.overlap import expected_jaccard, jaccard, smallest_sets
from moe_interp.stats.geometry.pairs import pair_interval
from moe_interp.stats.geometry.shared_direction import SharedDirection, shared_direction
from moe_interp.stats.intervals.bootstrap import bootstrap_interval
from moe_interp.stats.intervals.clusters import cluster_bootstrap
from moe_interp.stats.intervals.means import Interval, median_interval, pseudomedian_interval
from moe_interp.stats.intervals.small_samples import (
    cluster_interval,
    jackknife_interval,
    mean_interval,
    ratio_interval,
    stratified_interval,
)
from moe_interp.stats.intervals.verdicts import FEWEST_UNITS, Decision, decide, verdict
from moe_interp.stats.pass_at_k import pass_at_k
from moe_interp.stats.random_generators import derive_rng
from moe_interp.stats.reliability import (
    Reliability,
    expected_spearman,
    latent_pearson,
    spearman_brown,
    split_half_reliability,
)
from moe_interp.stats.significance.domains import ITEMS_IF_WIDER, DomainEffect, domain_effect
from moe_interp.stats.significance.multiple import adjust_p, items_needed, rejected, tests_needed_at_floor
from moe_interp.stats.significance.permutation import paired_permutation, shifted_group_test, two_group_permutation
from moe_interp.stats.significance.power import plan_wilcoxon, wilcoxon_power
from moe_interp.stats.significance.risk_differences import RiskDifferences, risk_differences
from moe_interp.stats.significance.wilcoxon import WilcoxonResult, smallest_attainable_p, wilcoxon_signed_rank

__all__ = [
    "BestOf",
    "CORRECTED_COVERS",
    "CorrectedCorrelation",
    "Decision",
    "DomainEffect",
    "Estimate",
    "FEWEST_UNITS",
    "ITEMS_IF_WIDER",
    "Interval",
    "LinearBound",
    "MantelResult",
    "MeanCorrelation",
    "PermutationResult",
    "Reliability",
    "RiskDifferences",
    "SharedDirection",
    "SpearmanResult",
    "WilcoxonResult",
    "adjust_p",
    "best_of",
    "bootstrap_interval",
    "cluster_bootstrap",
    "cluster_interval",
    "corrected_correlation",
    "decide",
    "derive_rng",
    "domain_effect",
    "expected_jaccard",
    "expected_spearman",
    "fisher_z_interval",
    "fisher_z_mean",
    "in_top",
    "items_needed",
    "jaccard",
    "jackknife_interval",
    "latent_pearson",
    "linear_bound",
    "mantel",
    "mean_interval",
    "mean_rho_permutation",
    "median_interval",
    "pair_inclusion",
    "pair_interval",
    "paired_permutation",
    "pass_at_k",
    "plan_wilcoxon",
    "pseudomedian_interval",
    "ratio_interval",
    "rejected",
    "risk_differences",
    "shared_direction",
    "shifted_group_test",
    "smallest_attainable_p",
    "smallest_sets",
    "spearman",
    "spearman_brown",
    "split_half_reliability",
    "stratified_interval",
    "tests_needed_at_floor",
    "two_group_permutation",
    "verdict",
    "wilcoxon_power",
    "wilcoxon_signed_rank",
]
