"""The result of counterfactual routing: every score, and every statistic as a table that derives from them."""

from __future__ import annotations

import pandas as pd

from moe_interp.experiments.counterfactual import controls
from moe_interp.experiments.counterfactual import tables as tables
from moe_interp.experiments.counterfactual.confidence import By, check_thresholds, check_way
from moe_interp.experiments.counterfactual.data import check_counterfactual
from moe_interp.experiments.counterfactual.prediction_calibration import prediction_calibration
from moe_interp.experiments.counterfactual.summary import summary_text
from moe_interp.experiments.headlines import route_headlines
from moe_interp.results import Result


class CounterfactualResult(Result, kind="counterfactual"):
    """What each token's next-token log-probability would be under other routes of equal compute, layer by layer.

    ``data`` holds ``logp[token, layer, route]`` in nats (NaN where a token has no more routes), the experts ``route``,
    ``router_logp``, the same for the standard route (``logp_standard[token]``, ``standard_route``), the noise floor
    ``logp_null[token, layer]`` (the standard route through the same machinery), ``heating[token, layer]`` (what the
    sampler's temperature was multiplied by for the last of a token's routes), and the controls. Routes are in the order
    they were drawn in. It is not to be changed in place: tables are computed once and kept.

    Raises:
        DataError: the dataset is not one of a counterfactual run, or is incomplete.
    """

    main = "logp"
    version = 3

    check = staticmethod(check_counterfactual)

    def by_confidence(
        self,
        by: By = "resampled",
        thresholds: tuple[float, float] = (0.5, 0.9),
        layer: int | None = None,
        n_distinct: int | None = None,
    ) -> pd.DataFrame:
        """Gap, regret, positive rate, inclusion and alignment by class of confidence, with intervals:
        :func:`moe_interp.experiments.counterfactual.tables.by_confidence`."""
        chosen = check_way(self.data, by), check_thresholds(thresholds), tables.check_layer(self.data, layer)
        return self.cached(tables.by_confidence, *chosen, tables.check_size(self.data, n_distinct))

    def by_layer(self, n_distinct: int | None = None) -> pd.DataFrame:
        """The same by layer: :func:`moe_interp.experiments.counterfactual.tables.by_layer`."""
        return self.cached(tables.by_layer, tables.check_size(self.data, n_distinct))

    def by_token_type(self, n_distinct: int | None = None) -> pd.DataFrame:
        """The same by kind of predicted token: :func:`moe_interp.experiments.counterfactual.tables.by_token_type`."""
        return self.cached(tables.by_token_type, tables.check_size(self.data, n_distinct))

    def by_position(self, n_distinct: int | None = None) -> pd.DataFrame:
        """The same by position: :func:`moe_interp.experiments.counterfactual.tables.by_position`."""
        return self.cached(tables.by_position, tables.check_size(self.data, n_distinct))

    def controls(
        self,
        by: By | None = None,
        thresholds: tuple[float, float] = (0.5, 0.9),
        n_distinct: int | None = None,
    ) -> pd.DataFrame:
        """Gap and regret beside their controls, and the excess: :func:`.controls.controls`."""
        chosen = None if by is None else check_way(self.data, by), check_thresholds(thresholds)
        return self.cached(controls.controls, *chosen, tables.check_size(self.data, n_distinct))

    def regret_curve(self) -> pd.DataFrame:
        """Regret against the number of routes: :func:`moe_interp.experiments.counterfactual.controls.regret_curve`."""
        return self.cached(controls.regret_curve)

    def prediction_calibration(self) -> pd.DataFrame:
        """How far the model's prediction is from calibrated, which the control "own_prediction" supposes:
        :func:`moe_interp.experiments.counterfactual.prediction_calibration.prediction_calibration`."""
        return self.cached(prediction_calibration)

    def token_table(self) -> pd.DataFrame:
        """One row a token and layer: :func:`moe_interp.experiments.counterfactual.tables.token_table`."""
        return self.cached(tables.token_table)

    def headlines(self) -> list[str]:
        """What was done and three findings, a sentence each:
        :func:`moe_interp.experiments.headlines.route_headlines`."""
        return route_headlines(self)

    def summary(self) -> str:
        """The run in plain words: what was scored, whether the published pattern is there, and the noise floor."""
        return summary_text(self)

    def __repr__(self) -> str:
        return super().summary()
