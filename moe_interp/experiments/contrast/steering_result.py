"""The result of steering experts: every prompt's and sequence's values, natural, steered and with random experts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp.errors import DataError
from moe_interp.results import Result
from moe_interp.stats import mean_interval, paired_permutation, verdict

MEASURES = ("metric", "logits_metric", "loss")
_TIE = 1e-12
_PAST = {"suppress": "suppressed", "promote": "promoted"}


def check_steering(data: xr.Dataset) -> None:
    """Refuse a dataset that is not one of a steering run.

    Raises:
        DataError: no measure, or variants missing.
    """
    variants = [str(name) for name in data["variant"].values] if "variant" in data.coords else []
    if variants[:2] != ["natural", "steered"] or len(variants) < 3 or not any(name in data for name in MEASURES):
        raise DataError(
            f"variants {variants[:4]} and variables {list(map(str, data))}",
            f"natural, steered and random ones, and one of {', '.join(MEASURES)}",
            "Pass what steering_effect makes.",
        )


def effect_table(data: xr.Dataset, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """A row a measure, and a domain of the sequences; see :meth:`SteeringResult.effects`."""
    rows = []
    for name in [measure for measure in MEASURES if measure in data]:
        values = np.asarray(data[name].transpose("variant", ...).values, dtype=np.float64)
        labels = data["domain"].values.astype(str) if name == "loss" else np.array(["all"] * values.shape[1])
        parts = {"all": np.ones(values.shape[1], dtype=bool)}
        parts |= {str(label): labels == label for label in np.unique(labels) if label != "all"}
        rows += [
            {"measure": name, "domain": part, **_effect(values[:, rows_], level, seed)} for part, rows_ in parts.items()
        ]
    table = pd.DataFrame(rows)
    table.attrs = {"level": level}
    return table


def _effect(values: np.ndarray, level: float, seed: int) -> dict[str, object]:
    """Of ``values`` ``[variant, unit]``: natural, steered, then the random draws."""
    natural, steered, drawn = values[0], values[1], values[2:]
    found: dict[str, object] = {"n": len(natural), "natural": natural.mean(), "steered": steered.mean()}
    for column, difference in (("effect", steered - natural), ("excess", steered - drawn.mean(0))):
        interval = mean_interval(difference, level=level)
        p = float(paired_permutation(difference, seed=seed).p_value)
        low, high = float(interval.low), float(interval.high)
        found |= {column: float(difference.mean()), f"{column}_low": low, f"{column}_high": high, f"{column}_p": p}
        found[f"{column}_verdict"] = verdict(
            low, high, n=len(difference), words=("higher", "lower"), p=p, alpha=1 - level, units="prompts"
        )
    random = (drawn - natural).mean(1)
    found |= {"random": float(random.mean()), "random_low": float(random.min()), "random_high": float(random.max())}
    size = abs(float(found["effect"]))  # type: ignore[arg-type]
    found["draws_p"] = float((1 + (np.abs(random) >= size - _TIE).sum()) / (1 + len(random)))
    return found


class SteeringResult(Result, kind="steering"):
    """What suppressing or promoting experts does to each prompt and sequence.

    ``data``: metric[variant, prompt] and logits_metric[variant, prompt], in the user's units; loss[variant, sequence]
    in nats a scored token; slot_share[variant], the mean share of their layers' slots that the variant's experts have
    in the natural run; ``domain(sequence)``. Variants: natural, steered, and a draw of as many random experts each.
    """

    check = staticmethod(check_steering)

    def effects(self, level: float = 0.95) -> pd.DataFrame:
        """A row a measure; for the loss one a domain too.

        ``effect`` is steered - natural, ``excess`` steered - the mean of the random draws; both paired by prompt (or
        sequence), with an interval over these, p of sign flips and a verdict. ``random`` is the mean effect of the
        draws, from ``random_low`` to ``random_high``. ``draws_p`` is the share of draws, the steered one among them,
        whose effect is at least as large: the draws are what varies there, so 8 of them reach .11 at best.

        A loss that is higher was hurt. An effect beside that of random experts is what the choice of experts adds; but
        they are as many, not as busy (``slot_share``), and to suppress a busy expert changes more tokens.
        """
        return self.cached(effect_table, level)

    def headlines(self) -> list[str]:
        """What was steered, and what it changed, a line each."""
        table, attrs = self.effects(), self.data.attrs
        n = sum(len(ids) for ids in attrs.get("experts", {}).values())
        share = self.data["slot_share"].values
        lines = [
            f"{n} experts in {len(attrs.get('experts', {}))} layers of {attrs.get('model', 'the model')}: "
            f"{_PAST.get(str(attrs.get('how')), 'steered')} together, beside "
            f"{self.data.sizes['variant'] - 2} draws of as many random experts (share of slots: {share[1]:.2f}; random "
            f"{np.mean(share[2:]):.2f}):"
        ]
        for row in table.to_dict("records"):
            lines.append(
                f"{row['measure']}, {row['domain']} (n = {row['n']}): {row['natural']:.3f} -> {row['steered']:.3f}, "
                f"effect {row['effect']:+.3f} [{row['effect_low']:+.3f}, {row['effect_high']:+.3f}]; random "
                f"{row['random']:+.3f}; beside random {row['excess']:+.3f} [{row['excess_low']:+.3f}, "
                f"{row['excess_high']:+.3f}], {row['excess_verdict']}"
            )
        return lines

    def summary(self) -> str:
        """In words: what was steered, and what it changed."""
        return "\n  ".join(self.headlines())
