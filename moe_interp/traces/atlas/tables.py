"""Tables of an atlas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp.errors import DataError


def needed(data: xr.Dataset, variable: str, measure: str) -> xr.DataArray:
    """A variable of an atlas.

    Raises:
        DataError: it is missing, with the reason.
    """
    if variable not in data:
        why = data.attrs.get("not_testable", {}).get(measure, "it was not asked for")
        raise DataError(f"an atlas without {measure} ({why})", "routes that allow it", "See not_testable.")
    return data[variable]


def layer_table(data: xr.Dataset) -> pd.DataFrame:
    """Every variable on the layers alone, in columns."""
    names = [str(name) for name, values in data.data_vars.items() if values.dims == ("layer",)]
    table = pd.DataFrame({"layer": data["layer"].values})
    for name in names:
        table[name] = data[name].values
    return table


def busiest_table(data: xr.Dataset, top: int = 1) -> pd.DataFrame:
    """The experts of the largest share of tokens (of slots without labels)."""
    by_domain = "domain_share" in data
    shares = data["domain_share"] if by_domain else data["share"].expand_dims(domain=["all"])
    order = np.argsort(-shares.values, axis=2, kind="stable")[:, :, :top]
    bounded = "domain_share_low" in data
    rows: list[dict[str, Any]] = []
    for d, domain in enumerate(shares["domain"].values.astype(str)):
        for place, layer in enumerate(data["layer"].values.tolist()):
            for rank, expert in enumerate(order[d, place].tolist(), 1):
                row = {"domain": domain, "layer": layer, "rank": rank, "expert": int(data["expert"][expert])}
                row["share"] = float(shares[d, place, expert])
                if bounded:
                    row["share_low"] = float(data["domain_share_low"][d, place, expert])
                    row["share_high"] = float(data["domain_share_high"][d, place, expert])
                rows.append(row)
    return pd.DataFrame(rows)


def specialist_table(data: xr.Dataset, alpha: float = 0.05) -> pd.DataFrame:
    """A row a domain, layer and expert, the largest differences first."""
    needed(data, "domain_difference", "domain differences")
    names = ["domain_difference", "domain_p", "domain_q", "domain_share"]
    table = data[names].to_dataframe().reset_index()
    table = table.rename(columns={name: name.removeprefix("domain_") for name in names})
    table["found"] = table["q"] <= alpha
    order = table["difference"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def pair_table(data: xr.Dataset, top: int = 5) -> pd.DataFrame:
    """The pairs of each layer that meet most above chance, by the larger excess of the two directions."""
    together = needed(data, "co_activation", "co-activation").values
    chance = data["co_activation_chance"].values
    # tokens above chance, so that an expert of three tokens is not the first to be named
    excess = np.nan_to_num((together - chance) * data["share"].values[:, :, None], nan=-np.inf)
    excess[:, np.eye(excess.shape[1], dtype=bool)] = -np.inf
    rows = []
    experts = data["expert"].values
    for place, layer in enumerate(data["layer"].values.tolist()):
        seen: set[frozenset[int]] = set()
        for code in np.argsort(-excess[place].ravel(), kind="stable"):
            i, j = divmod(int(code), excess.shape[1])
            if len(seen) == top or not np.isfinite(excess[place, i, j]):
                break
            if frozenset((i, j)) in seen:
                continue
            seen.add(frozenset((i, j)))
            share, by_chance = float(together[place, i, j]), float(chance[place, i, j])
            lift = share / by_chance if by_chance else float("nan")
            row = {"layer": layer, "expert": int(experts[i]), "other": int(experts[j]), "share": share}
            rows.append(row | {"chance": by_chance, "lift": lift, "excess": float(excess[place, i, j])})
    return pd.DataFrame(rows, columns=["layer", "expert", "other", "share", "chance", "lift", "excess"])


def path_table(data: xr.Dataset) -> pd.DataFrame:
    """A row a listed path."""
    paths = needed(data, "path", "paths").values
    layers = data["layer"].values.tolist()
    rows = []
    for place, layer in enumerate(layers):
        for rank in range(paths.shape[1]):
            if paths[place, rank, 0] < 0:
                continue
            at = {"layer": place, "rank": rank}
            rows.append(
                {
                    "layer": layer,
                    "path": " > ".join(map(str, paths[place, rank].tolist())),
                    "share": float(data["path_share"][at]),
                    "expected": float(data["path_expected"][at]),
                    "count": int(data["path_count"][at]),
                    "cluster": int(data["path_cluster"][at]),
                }
            )
    return pd.DataFrame(rows, columns=["layer", "path", "share", "expected", "count", "cluster"])
