"""Direct logit attribution: what each expert adds to a logit difference, and the tokens that an expert writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from moe_interp.checks import as_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.errors import ConfigError, DataError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching.inputs import PatchInputs, check_patch_inputs
from moe_interp.patching.logits.contributions import Contributions, contributions
from moe_interp.patching.result import EXAMPLE, EffectResult

Tokens = int | str | Sequence[Any] | Tensor
_NEEDS = ("expert_indices", "expert_weights", "expert_out")


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
@torch.inference_mode(False)
def logit_attribution(
    moe: MoEHooks,
    tokens: Any,
    answer_tokens: Tokens,
    wrong_tokens: Tokens | None = None,
    *,
    positions: int | Sequence[int] | Tensor = -1,
    attention_mask: Tensor | None = None,
    controls: bool = True,
) -> LogitAttribution:
    """What every expert, and everything else that writes into the residual stream, adds to a logit difference.

    With the norms frozen at the scale s of this run, the logit difference is a sum over what was written,

        logit(answer) - mean logit(wrong) = sum over components c of  d_c . write_c  (+ the unembedding's bias),

    where write_c is the embedding, a sublayer's output, or a routed expert's output times its weight as applied, all at
    the one position, and d_c = dlogits / dwrite_c through the frozen stream: (W_U[answer] - W_U[wrong]) * gain / s,
    and, before it, what the family puts between a sublayer and the sum (a norm after the sublayer, frozen likewise; a
    residual multiplier; a layer scalar; the mixing of several streams, at the run's own mixing weights). A layer norm's
    centring is part of the map. The components of kind "bias" are biases of norms after a sublayer, of the final norm,
    of the experts' block and of the unembedding. Layers of experts that are not attached are of kind "other", whole.

    Args:
        moe: Attached hooks of a decoder, with ``expert_outputs=True``.
        tokens: ``[batch, pos]`` ids, or texts.
        answer_tokens: One token id an example ``[batch]``, or one for all; texts of one token each.
        wrong_tokens: The same, or several an example ``[batch, n]``, over which the logits are averaged. Without:
            the answer's logit itself, which a shift of all logits moves and the model's prediction does not show.
        positions: Whose logits: one position for all, or one an example; absolute in the unpadded prompt, negative ones
            from its end. The last real token by default.
        attention_mask: ``[batch, pos]``, 0 at padding.
        controls: Whether the layer's other experts run on the same token, at the same weight, for comparison.

    Returns:
        Contributions in logits by component and example; positive ones favour the answer. An expert that the token does
        not use contributes 0. They sum to the model's logit difference (before a soft-cap, where the model has one:
        ``is_capped`` says so), to rounding: ``remainder()``.

    Raises:
        HookError: a layer attached without expert outputs, or whose experts cannot be read.
        ConfigError: an encoder-decoder; tokens that do not fit the batch; a model whose residual stream is not a sum of
            what its sublayers write.
        DataError: positions that an example does not have, or tokens outside of the vocabulary.

    It shows what is written *directly* towards these tokens at this position; not what an expert does through later
    layers (patch it for that), nor through the scale of the norms, which stays that of the run. An expert that reads as
    large may be one of many that write the same: compare with the layer's other experts (``percentile``).

    Source: direct logit attribution (nostalgebraist 2020; Wang et al. 2022), per expert, with the other experts of the
    layer as a control. TransformerLens' ``direct_logit_attribution`` cannot serve: it asks for compatibility mode with
    a folded final norm, refuses hybrid stacks, and knows a block of experts as one MLP output.
    """
    inputs = check_patch_inputs(moe, tokens, None, attention_mask, _NEEDS)
    columns = check_column(inputs, positions)
    right, wrong = _check_answers(inputs, answer_tokens, wrong_tokens)
    example = torch.arange(len(right), device=right.device).unsqueeze(1)

    def readout(logits: Tensor) -> Tensor:
        value = logits[example, right][:, 0]
        return value if wrong is None else value - logits[example, wrong].mean(dim=-1)

    found = contributions(moe, inputs.tokens, inputs.mask, columns, readout, controls)
    return LogitAttribution(_dataset(inputs, found, columns, right, wrong), config={"controls": controls})


class LogitAttribution(EffectResult, kind="logit_attribution"):
    """Contributions to a logit difference by component.

    ``data``: effect[component, example] in logits, 0 for experts that the token does not use; kind, layer, expert
    (component) say what a component is (layer and expert -1 where it has none); weight[component, example] of the used
    experts, NaN elsewhere; logit_difference[example], the model's; total[example], what the contributions sum to.

    Controls, NaN but for used experts: percentile[component, example], the share of the layer's experts not used by
    the token whose contribution with the same input and weight would have been smaller (ties count half), and
    others_mean, others_sd of those.
    """

    @property
    def is_capped(self) -> bool:
        """Whether the model caps its logits, so that the sum is the difference before the cap."""
        return bool(self.data.attrs["is_capped"])

    def remainder(self) -> xr.DataArray:
        """``[example]``: what the contributions are short of the logit difference (before a soft-cap)."""
        return self.data["before_cap"] - self.data["effect"].sum("component")

    def by_kind(self) -> pd.DataFrame:
        """Mean contribution over examples by layer and kind; layer -1 is the embedding and the last biases."""
        summed = (
            self.data["effect"]
            .mean(EXAMPLE)
            .to_series()
            .groupby([self.data["layer"].values, self.data["kind"].values])
            .sum()
        )
        return summed.rename_axis(["layer", "kind"]).rename("mean").reset_index()

    def experts(self) -> pd.DataFrame:
        """One row a routed expert that an example uses: over the examples that use it, contribution and controls."""
        data = self.data.sel(component=self.data["kind"].values == "expert")
        used = data["weight"].notnull()
        shown = {"contribution": data["effect"], "weight": data["weight"]}
        shown |= {name: data[name] for name in ("percentile", "others_mean", "others_sd") if name in data}
        frame = pd.DataFrame({name: values.where(used).mean(EXAMPLE).values for name, values in shown.items()})
        frame.insert(0, "n_used", used.sum(EXAMPLE).values)
        for name in ("expert", "layer"):
            frame.insert(0, name, data[name].values)
        chosen = frame[frame["n_used"] > 0]
        order = chosen["contribution"].abs().sort_values(ascending=False, kind="stable").index
        return chosen.loc[order].reset_index(drop=True)

    def summary(self) -> str:
        """The logit difference, its parts by kind, and the experts with the largest contributions."""
        data = self.data
        kinds = data["effect"].mean(EXAMPLE).groupby("kind").sum()
        lines = [
            f"Direct logit attribution over {data.sizes[EXAMPLE]} examples: mean logit difference "
            f"{float(data['logit_difference'].mean()):+.4g}"
            + (f", before the soft-cap {float(data['before_cap'].mean()):+.4g}" if self.is_capped else ""),
            "  " + ", ".join(f"{kind} {float(value):+.4g}" for kind, value in zip(kinds["kind"].values, kinds.values)),
        ]
        for row in self.experts().head(3).to_dict("records"):
            control = (
                ""
                if np.isnan(row.get("percentile", np.nan))
                else (f"; above {row['percentile']:.0%} of the layer's unused experts at its weight")
            )
            lines.append(
                f"  layer {row['layer']}, expert {row['expert']}: {row['contribution']:+.4g} "
                f"in the {row['n_used']} examples that use it{control}"
            )
        lines.append(f"norms frozen at the run's scale; largest remainder {float(abs(self.remainder()).max()):.1e}")
        return "\n".join(lines)


def check_column(inputs: PatchInputs, positions: Any) -> Tensor:
    """``[batch]``: the column of one position of each example.

    Raises:
        ConfigError: neither one whole number nor one an example.
        DataError: a position that an example does not have.
    """
    n = len(inputs.tokens)
    several = positions.tolist() if hasattr(positions, "tolist") else positions
    several = [several] * n if as_whole(several) is not None else several
    found = [as_whole(position) for position in several] if isinstance(several, list | tuple) else []
    if len(found) != n or None in found:
        raise ConfigError(
            f"positions={positions!r}", f"one whole number, or one for each of the {n} examples", "Name the positions."
        )
    asked, lengths = torch.tensor(found, device=inputs.tokens.device), inputs.lengths
    beyond = (asked >= lengths) | (asked < -lengths)
    if bool(beyond.any()):
        row = int(beyond.nonzero()[0])
        raise DataError(
            f"position {found[row]} of example {row}, which has {int(lengths[row])} real tokens",
            f"a position from {-int(lengths[row])} to {int(lengths[row]) - 1}",
            "Padding is not counted.",
        )
    order = inputs.is_real.long().cumsum(dim=1).masked_fill(~inputs.is_real, 0)
    return (order == (asked % lengths + 1).unsqueeze(1)).long().argmax(dim=1)


def _check_answers(inputs: PatchInputs, answer: Any, wrong: Any) -> tuple[Tensor, Tensor | None]:
    """``[batch, 1]`` and ``[batch, n]`` token ids."""
    right = _token_ids(inputs, answer, "answer_tokens")
    if right.shape[1] != 1:
        raise ConfigError(
            f"{right.shape[1]} answer_tokens an example", "one an example, or one for all", "Choose one of them."
        )
    return right, None if wrong is None else _token_ids(inputs, wrong, "wrong_tokens")


def _token_ids(inputs: PatchInputs, given: Any, name: str) -> Tensor:
    n, bridge = len(inputs.tokens), inputs.moe.bridge
    expected = f"one token id for all, [{n}] one an example, or [{n}, n]"

    def ids(value: Any) -> Any:
        if isinstance(value, str):
            try:
                return bridge.to_single_token(value)
            except Exception as error:  # TransformerLens asserts that the text is one token
                raise ConfigError(
                    f"{name} {value!r}, which is not one token ({str(error)[:80]})",
                    "a text of one token",
                    "Pass its id.",
                ) from error
        return [ids(each) for each in value] if isinstance(value, list | tuple) else value

    try:
        found = torch.as_tensor(ids(given), device=inputs.tokens.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} that make no tensor ({error})", expected, "Pass token ids.") from None
    found = found.expand(n) if found.ndim == 0 else found
    found = found.unsqueeze(1) if found.ndim == 1 else found
    if (
        found.ndim != 2
        or len(found) != n
        or not found.shape[1]
        or found.is_floating_point()
        or found.dtype == torch.bool
    ):
        raise ConfigError(f"{name} of shape {tuple(found.shape)} and dtype {found.dtype}", expected, "Reshape them.")
    vocabulary = int(getattr(bridge.cfg, "d_vocab", 0) or 2**31)
    if bool(((found < 0) | (found >= vocabulary)).any()):
        bad = found[(found < 0) | (found >= vocabulary)][0]
        raise DataError(f"{name} with id {int(bad)}", f"ids from 0 to {vocabulary - 1}", "Correct the id.")
    return found.long()


def _dataset(
    inputs: PatchInputs, found: Contributions, columns: Tensor, right: Tensor, wrong: Tensor | None
) -> xr.Dataset:
    labels: list[tuple[str, str, int, int]] = []
    rows: dict[str, list[np.ndarray]] = {
        name: [] for name in ("effect", "weight", "percentile", "others_mean", "others_sd")
    }
    absent = np.full(len(columns), np.nan)

    def add(label: str, kind: str, layer: int, expert: int, **values: np.ndarray) -> None:
        labels.append((label, kind, layer, expert))
        for name, column in rows.items():
            column.append(values.get(name, absent))

    for layer in sorted({-1 if at is None else at for _, at, _ in found.parts} | set(found.experts)):
        for (kind, at, name), value in found.parts.items():
            if (-1 if at is None else at) == layer:
                add(name if at is None else f"{at} {name}", kind, layer, -1, effect=value.cpu().numpy())
        if layer in found.experts:
            for expert in range(inputs.moe.spec(layer).n_experts):
                add(f"{layer} expert {expert}", "expert", layer, expert, **_of_expert(found, layer, expert))
    names, kinds, layers, experts = (list(each) for each in zip(*labels))
    variables: dict[str, Any] = {name: (("component", EXAMPLE), np.stack(column)) for name, column in rows.items()}
    if not found.others:
        variables = {name: value for name, value in variables.items() if name in ("effect", "weight")}
    position = (inputs.is_real.long().cumsum(dim=1) - 1).gather(1, columns.unsqueeze(1))[:, 0]
    variables |= {
        "kind": ("component", kinds), "layer": ("component", layers), "expert": ("component", experts),
        "logit_difference": (EXAMPLE, found.logit_difference.cpu().numpy()),
        "before_cap": (EXAMPLE, found.metric.cpu().numpy()),
        "position": (EXAMPLE, position.cpu().numpy()),
    }  # fmt: skip
    data = xr.Dataset(variables, coords={"component": names, EXAMPLE: np.arange(len(columns))})
    data = data.set_coords(["kind", "layer", "expert"])
    data.attrs = {
        "is_capped": found.is_capped,
        "answer_tokens": right[:, 0].tolist(),
        "wrong_tokens": None if wrong is None else wrong.tolist(),
    }
    return data


def _of_expert(found: Contributions, layer: int, expert: int) -> dict[str, np.ndarray]:
    """One expert's values by example; the slots of a route are different experts."""
    slot = found.indices[layer] == expert
    used = slot.any(dim=-1)
    values = {
        "effect": (found.experts[layer] * slot).sum(dim=-1),
        "weight": (found.weights[layer] * slot).sum(dim=-1).masked_fill(~used, float("nan")),
    }
    if layer in found.others:
        # [example, expert], with this expert's weight; NaN for the route's own
        place = slot.long().argmax(dim=-1)
        others = found.others[layer][torch.arange(len(place), device=place.device), place]
        experts = torch.arange(others.shape[-1], device=others.device)
        is_used = (found.indices[layer].unsqueeze(-1) == experts).any(dim=1)
        rest = others.masked_fill(is_used, float("nan"))
        n_rest = (~is_used).sum(dim=-1)
        contribution = values["effect"].unsqueeze(-1)
        below = (rest < contribution).sum(dim=-1) + 0.5 * (rest == contribution).sum(dim=-1)
        mean = rest.nanmean(dim=-1)
        sd = ((rest - mean.unsqueeze(-1)).square().nansum(dim=-1) / (n_rest - 1).clamp(min=1)).sqrt()
        known = used & (n_rest > 0)
        shown = {"percentile": below / n_rest.clamp(min=1), "others_mean": mean, "others_sd": sd}
        values |= {name: value.double().masked_fill(~known, float("nan")) for name, value in shown.items()}
    return {name: value.cpu().numpy() for name, value in values.items()}
