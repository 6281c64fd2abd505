"""The result of a contrast: every prompt's shares, and the experts that differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError
from moe_interp.experiments.contrast import tables
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions import promote_experts, suppress_experts
from moe_interp.interventions.named import experts_by_layer
from moe_interp.interventions.positions import Positions
from moe_interp.results import Result
from moe_interp.stats import FEWEST_UNITS
from moe_interp.types import Hooks, Layer

Side = Literal["a", "b", "both"]
How = Literal["suppress", "promote"]


class ContrastResult(Result, kind="contrast"):
    """How often each prompt's tokens use each expert, for two sets of prompts.

    ``data``: selection[prompt, layer, expert], the share of the prompt's tokens that use the expert; n_tokens[prompt];
    ``group(prompt)`` is "a" or "b". Pairs stand in the same order in both groups.
    """

    main = "selection"
    check = staticmethod(tables.check_contrast)

    def experts(self, alpha: float = 0.05, method: str = "bh") -> pd.DataFrame:
        """A row a layer and expert.

        Columns: ``share_a``, ``share_b`` (mean shares of tokens), ``difference`` (their risk difference, a - b) with
        ``ci_low`` and ``ci_high`` over prompts (:func:`moe_interp.stats.stratified_interval`, for pairs
        :func:`moe_interp.stats.mean_interval`; not TransformerLens' ``bootstrap_ci``, which covers .83 to .89 of a
        nominal .95 at 6 to 20 prompts), ``p`` of a permutation of prompts between the sets (for pairs, of signs), ``q``
        adjusted over all rows, ``stability`` (see :func:`.risk_differences.stability_of`), and ``found``: "a" or "b",
        the set that uses the expert more, where q <= ``alpha``; else "".

        The permutation holds where prompts of both sets have one law under the null; BH where rows are independent or
        positively dependent. Shares of a layer's experts sum to k, so that one expert's gain is another's loss.
        """
        return self.cached(tables.expert_table, alpha, method)

    def top(self, n: int = 10, side: Side = "both") -> pd.DataFrame:
        """The rows of :meth:`experts` with the largest differences, found or not.

        Args:
            n: At most so many.
            side: Those that set "a" or "b" uses more come first; or "both", by size.

        Raises:
            ConfigError: another side, or no number.
        """
        n = check_whole(n, "n", 1)
        _check_side(side)
        table = self.experts()
        size = table["difference"] * {"a": 1, "b": -1}.get(side, 0)
        size = table["difference"].abs() if side == "both" else size
        return table.loc[size.sort_values(ascending=False, kind="stable").index].head(n).reset_index(drop=True)

    def found(
        self, side: Side = "a", alpha: float = 0.05, min_stability: float = 0.0, most: int | None = None
    ) -> dict[Layer, list[int]]:
        """By layer, the experts that one set uses more, the largest difference first; layers without any are left out.

        Args:
            side: The set that uses them more; "both" for all that differ.
            alpha: Level of the false discovery rate.
            min_stability: Leave out what is found in fewer of the resamples.
            most: At most so many in all.

        Raises:
            ConfigError: another side, or less than one.
        """
        _check_side(side)
        most = None if most is None else check_whole(most, "most", 1)
        table = self.experts(alpha)
        kept = table[(table["found"] != "") if side == "both" else (table["found"] == side)]
        kept = kept[kept["stability"] >= min_stability]
        kept = kept.loc[kept["difference"].abs().sort_values(ascending=False, kind="stable").index]
        kept = kept if most is None else kept.head(most)
        chosen: dict[Layer, list[int]] = {}
        for layer, expert in zip(kept["layer"], kept["expert"]):
            chosen.setdefault(int(layer), []).append(int(expert))
        return dict(sorted(chosen.items()))  # type: ignore[arg-type]

    def steer(
        self,
        moe: MoEHooks,
        how: How = "suppress",
        experts: Mapping[Layer, Sequence[int]] | Iterable[tuple[Layer, int]] | None = None,
        positions: Positions = "all",
        attention_mask: Any = None,
    ) -> Hooks:
        """Hooks that suppress or promote the found experts at all their layers together, prompt and generated tokens.

        Args:
            moe: Attached hooks.
            how: "suppress" or "promote". Of a layer with more of them than the family can use (or leave out), those
                with the largest difference are taken.
            experts: By layer, or pairs (layer, expert); those of ``found()`` by default.
            positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

        Raises:
            ConfigError: nothing was found, or another way.
        """
        chosen = self.found() if experts is None else named_experts(moe, experts, "steer") if experts else {}
        if not chosen:
            raise ConfigError(
                "no experts to steer", "experts that differ between the sets", "Name them: experts={...}."
            )
        return steering_hooks(moe, chosen, how, positions, attention_mask)

    def headlines(self) -> list[str]:
        """What was done, and what differs, a line each."""
        table = self.experts()
        attrs, data = table.attrs, self.data.attrs
        units = f"{attrs['n_a']} pairs" if data.get("paired") else f"{attrs['n_a']} and {attrs['n_b']} prompts"
        lines = [
            f"Selection of {attrs['n_tests']} experts (layer x expert) of {data.get('model', 'the model')} on "
            f"{data.get('phase', 'prompt')} tokens, {units}:"
        ]
        counts = table["found"].value_counts()
        lines.append(
            f"{counts.get('a', 0)} are used more by a and {counts.get('b', 0)} more by b (permutation over prompts, "
            f"q <= {attrs['alpha']:g})."
        )
        if min(attrs["n_a"], attrs["n_b"]) < FEWEST_UNITS or attrs["smallest_p"] > attrs["alpha"]:
            needed = max(1, math.ceil(attrs["smallest_p"] * attrs["n_tests"] / attrs["alpha"]))
            lines.append(
                f"So few prompts reach p = {attrs['smallest_p']:.2g} at best; with {attrs['n_tests']} tests, at least "
                f"{needed} must sit there together for any "
                "to be found: nothing found says nothing."
            )
        for row in (
            table[table["found"] != ""].sort_values("difference", key=abs, ascending=False).head(5).to_dict("records")
        ):
            lines.append(
                f"layer {row['layer']} expert {row['expert']}: {row['difference']:+.3f} "
                f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}] of tokens, in {row['stability']:.0%} of resamples"
            )
        return lines

    def summary(self) -> str:
        """In words: what was compared, and which experts differ."""
        return "\n  ".join(self.headlines())


def _check_side(side: Any) -> None:
    if side not in ("a", "b", "both"):
        raise ConfigError(f"side={side!r}", '"a", "b" or "both"', "Correct the side.")


def named_experts(moe: MoEHooks, experts: Any, where: str) -> dict[Layer, list[int]]:
    """Experts by layer, of a mapping from layers to experts or of pairs (layer, expert).

    Raises:
        ConfigError: neither, or none.
        HookError, RouteError: layers or experts that are not there.
    """
    if not isinstance(experts, Mapping):
        by_layer: dict[Any, list[int]] = {}
        try:
            for layer, expert in experts:
                by_layer.setdefault(moe.layer_label(layer), []).append(expert)
        except (TypeError, ValueError):
            given, expected = f"experts={str(experts)[:60]}", "a contrast, {layer: [expert]} or pairs (layer, expert)"
            raise ConfigError(given, expected, "Correct the experts.") from None
        experts = by_layer
    return {layer: ids.tolist() for layer, ids in experts_by_layer(moe, None, experts, where).items()}


def steering_hooks(
    moe: MoEHooks, experts: dict[Layer, list[int]], how: How, positions: Positions = "all", attention_mask: Any = None
) -> Hooks:
    """Suppress or promote experts, the first of each layer as far as its family can.

    Raises:
        ConfigError: another way.
    """
    if how not in ("suppress", "promote"):
        raise ConfigError(f"how={how!r}", '"suppress" or "promote"', "Correct it.")
    change, taken = (suppress_experts if how == "suppress" else promote_experts), steerable(moe, experts, how)
    return change(moe, list(taken), taken, positions=positions, attention_mask=attention_mask)


def steerable(moe: MoEHooks, experts: dict[Layer, list[int]], how: How) -> dict[Layer, list[int]]:
    """Of each layer the first experts that can be promoted, or suppressed, at once."""
    taken = {}
    for layer, ids in experts.items():
        spec = moe.spec(layer)
        most = spec.top_k if how == "promote" else spec.n_experts - spec.top_k
        taken[layer] = list(ids)[:most]
    return taken
