"""The result of counterfactual routing: every score, and every statistic as a table that derives from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import xarray as xr

from moe_interp.experiments.counterfactual_data import check_counterfactual
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

    def __repr__(self) -> str:
        return super().summary()

    def _table(self, compute: Callable[..., pd.DataFrame], *args: Any) -> pd.DataFrame:
        """``compute(data, *args)``, kept; a copy, so that nobody changes what the next caller gets."""
        key = (compute.__qualname__, *args)
        if key not in self._tables:
            self._tables[key] = compute(self.data, *args)
        return self._tables[key].copy()
