"""The result of counterfactual routing: every score, and every statistic as a table that derives from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import xarray as xr

from moe_interp.experiments import controls
from moe_interp.experiments import counterfactual_tables as tables
from moe_interp.experiments.confidence import By
from moe_interp.experiments.counterfactual_data import check_counterfactual
from moe_interp.experiments.counterfactual_summary import summary_text
from moe_interp.results import Manifest, Result


class CounterfactualResult(Result, kind="counterfactual"):
    """What each token's next-token log-probability would be under other routes of equal compute, layer by layer.

    ``data`` holds ``logp[token, layer, route]`` in nats (NaN where a token has no more routes), the experts ``route``,
    ``router_logp``, the same for the standard route (``logp_standard[token]``, ``standard_route``), the noise floor
    ``logp_null[token, layer]`` (the standard route through the same machinery), and the controls. It is not to be
    changed in place: tables are computed once and kept.

    Raises:
        DataError: the dataset is not one of a counterfactual run, or is incomplete.
    """

    main = "logp"

    def __init__(
        self,
        data: xr.Dataset,
        *,
        config: Mapping[str, Any] | None = None,
        seeds: Mapping[str, int] | int | None = None,
        data_checksum: str | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        check_counterfactual(data)
        super().__init__(data, config=config, seeds=seeds, data_checksum=data_checksum, manifest=manifest)
        self._tables: dict[tuple[Any, ...], pd.DataFrame] = {}

    def by_confidence(
        self,
        by: By = "resampled",
        thresholds: tuple[float, float] = (0.5, 0.9),
        layer: int | None = None,
        n_distinct: int | None = None,
    ) -> pd.DataFrame:
        """Gap, regret, positive rate, inclusion and alignment by class of confidence, with intervals:
        :func:`moe_interp.experiments.counterfactual_tables.by_confidence`."""
        return self._table(tables.by_confidence, by, tuple(thresholds), layer, n_distinct)

    def by_layer(self, n_distinct: int | None = None) -> pd.DataFrame:
        """The same by layer: :func:`moe_interp.experiments.counterfactual_tables.by_layer`."""
        return self._table(tables.by_layer, n_distinct)

    def by_token_type(self, n_distinct: int | None = None) -> pd.DataFrame:
        """The same by kind of predicted token: :func:`moe_interp.experiments.counterfactual_tables.by_token_type`."""
        return self._table(tables.by_token_type, n_distinct)

    def by_position(self, n_distinct: int | None = None) -> pd.DataFrame:
        """The same by position: :func:`moe_interp.experiments.counterfactual_tables.by_position`."""
        return self._table(tables.by_position, n_distinct)

    def controls(
        self,
        by: By | None = None,
        thresholds: tuple[float, float] = (0.5, 0.9),
        n_distinct: int | None = None,
    ) -> pd.DataFrame:
        """Gap and regret beside their controls, and the excess: :func:`moe_interp.experiments.controls.controls`."""
        return self._table(controls.controls, by, tuple(thresholds), n_distinct)

    def regret_curve(self) -> pd.DataFrame:
        """Regret against the number of routes: :func:`moe_interp.experiments.controls.regret_curve`."""
        return self._table(controls.regret_curve)

    def token_table(self) -> pd.DataFrame:
        """One row a token and layer: :func:`moe_interp.experiments.counterfactual_tables.token_table`."""
        return self._table(tables.token_table)

    def summary(self) -> str:
        """The run in plain words: what was scored, whether the published pattern is there, and the noise floor."""
        return summary_text(self)

    def __repr__(self) -> str:
        return super().summary()

    def _table(self, compute: Callable[..., pd.DataFrame], *args: Any) -> pd.DataFrame:
        """``compute(data, *args)``, kept; a copy, so that nobody changes what the next caller gets."""
        key = (compute.__qualname__, *args)
        if key not in self._tables:
            self._tables[key] = compute(self.data, *args)
        return self._tables[key].copy()
