"""The result of an atlas: labelled variables, tables, findings in words."""

from __future__ import annotations

import pandas as pd
import xarray as xr

from moe_interp.checks import check_whole
from moe_interp.errors import ResultError
from moe_interp.results import Result
from moe_interp.stats.checks import check_probability
from moe_interp.traces.atlas import tables
from moe_interp.traces.atlas.findings import findings


class AtlasResult(Result, kind="atlas"):
    """The measures of recorded routing.

    ``data``, as far as the routes allow: share[layer, expert] of slots, entropy[layer] in nats with bounds,
    effective_experts, max_violation, dead_experts, dropped_tokens, dropped_slots[layer]; domain_share[domain, layer,
    expert] of a domain's tokens with bounds, domain_top1_share, domain_difference with domain_p and domain_q,
    domain_information[layer] with its null; vocabulary_input, _next, _predicted[layer] with _chance;
    co_activation[layer, expert, other] with _chance, rank_adjacent; transition_probability[layer, expert, next_expert],
    transition_information[layer]; path[layer, rank, step] with path_share, path_expected, path_cluster, ...;
    committee_rank[domain, layer, expert], mean_rank, committee_presence, committee_member, committee_share; token_score
    and gate_score; norm and saliency; margin, smallest_weight; saturation; usage_correlation[compared_domain, layer];
    risk_difference[layer, expert] of a corpus of two domains; sequence_share[sequence, layer, expert]. Each is defined
    where it is measured, in :mod:`moe_interp.traces`. ``data.attrs["not_testable"]``: measure -> why it is missing.
    """

    main = "share"

    @staticmethod
    def check(data: xr.Dataset) -> None:
        if "share" not in data or set(data["share"].dims) != {"layer", "expert"}:
            raise ResultError("a dataset without share[layer, expert]", "that variable", "Pass what mi.atlas makes.")

    @property
    def not_testable(self) -> dict[str, str]:
        """Measures that are missing, and why."""
        return dict(self.data.attrs.get("not_testable", {}))

    def by_layer(self) -> pd.DataFrame:
        """A row a layer: every measure that has one number for it."""
        return self.cached(tables.layer_table)

    def busiest(self, top: int = 1) -> pd.DataFrame:
        """The experts that serve most of a domain's tokens, a row a domain, layer and rank, with bounds.

        Args:
            top: Experts a layer.

        Raises:
            ConfigError: ``top`` below 1.
        """
        return self.cached(tables.busiest_table, check_whole(top, "top", 1))

    def specialists(self, alpha: float = 0.05) -> pd.DataFrame:
        """Domain, layer and expert by size of the difference to the other domains; ``found`` where q <=
        ``alpha``.

        Raises:
            DataError: not testable, with the reason.
        """
        check_probability(alpha, "alpha")
        return self.cached(tables.specialist_table, alpha)

    def pairs(self, top: int = 5) -> pd.DataFrame:
        """Pairs of experts of a layer that serve the same tokens most above chance.

        ``lift`` = share / chance; ``excess``, by which they are ranked, = (share - chance) times the share of slots of
        ``expert``.
        """
        return self.cached(tables.pair_table, check_whole(top, "top", 1))

    def paths(self) -> pd.DataFrame:
        """The most common paths of each window of layers, with their share, that under independence, and cluster."""
        return self.cached(tables.path_table)

    def headlines(self) -> list[str]:
        """What it is, then the findings, a line each; last what could not be tested."""
        return findings(self)

    def summary(self) -> str:
        """In words: the findings, and what could not be tested."""
        return "\n  ".join(self.headlines())
