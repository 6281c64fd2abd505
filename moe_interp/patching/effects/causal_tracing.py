"""Causal tracing of experts: which experts' outputs bring back what noise in the subject's embeddings destroys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor
from transformer_lens.utilities.statistics import derive_generator

from moe_interp.checks import as_whole, check_seed, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.engine.residual.sublayers import decoder_layers_of
from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching.cells import position_mask
from moe_interp.patching.effects.path_patching import Activations, keeping, repeated, written_by
from moe_interp.patching.inputs import PatchInputs, check_layers, check_patch_inputs, check_positions
from moe_interp.patching.metric import Metric, Metrics
from moe_interp.patching.result import EXAMPLE, METRIC, EffectResult, effect_dataset
from moe_interp.progress import Report, reporting
from moe_interp.stats import mean_interval
from moe_interp.types import Hooks, Layer

_NEEDS = ("expert_indices", "expert_weights", "expert_out", "routed_out")
Member = tuple[Any, int | None]
"""A layer and one of its experts, or a layer and None: all that its experts route."""


def trace_experts(
    moe: MoEHooks,
    tokens: Any,
    subject_positions: Any,
    metric: Metric | Mapping[str, Metric],
    noise: float = 3.0,
    *,
    draws: int = 10,
    layers: Layer | Sequence[Layer] | None = None,
    experts: Sequence[tuple[Any, int]] | None = None,
    coalitions: Mapping[str, Sequence[tuple[Any, int]]] | None = None,
    window: int | None = None,
    positions: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool | Report | None = None,
    **options: Any,
) -> ExpertTrace:
    """Which experts carry a fact: the subject is noised, and one expert's clean output is put back.

    Three kinds of run: clean; noised, in which Gaussian noise of ``noise`` times the standard deviation of the
    embeddings (over the prompts' real tokens and all dimensions) is added to the subject's embeddings; and restored,
    the noised run in which something is as in the clean run:

    - one expert e of a layer: at each token at which the clean run uses e, what e adds to the residual stream (its
      output times its weight) is what it adds in the clean run. What the noised run's own e would add there is left
      out; where that run chose other experts, e's clean output is added beside theirs. The noised run's other experts
      and their weights stay as they are, and nothing changes at tokens where only the noised run uses e;
    - a coalition: several experts, of one or several layers, together;
    - a layer: its whole routed output, so that the noised run's experts add nothing of their own;
    - a window: the routed outputs of so many consecutive layers.

    effect = metric(restored) - metric(noised), for each draw and example; positive where the metric is raised.

    Args:
        moe: Attached hooks of a decoder, with ``expert_outputs=True``.
        tokens: ``[batch, pos]`` ids, or texts.
        subject_positions: The subject's tokens: positions for all examples, a list of them for each, or a bool mask
            ``[batch, pos]``. Absolute in the unpadded prompt; negative ones count from its end.
        metric: From logits ``[batch, pos, vocab]`` to a number, or to one an example ``[batch]``; or several by name.
        noise: In standard deviations of the embeddings.
        draws: Of the noise.
        layers: MoE layers to restore at; all by default.
        experts: Pairs (layer, expert); by default all that the clean run uses, each alone.
        coalitions: By name, pairs (layer, expert) that are restored together.
        window: Layers in a window; none by default.
        positions: Tokens at which outputs are restored; all by default.
        attention_mask: ``[batch, pos]``, 0 at padding.
        seed: Of the noise, which depends on it, the example's number and the draw's alone.
        batch_size: Sequences a pass; several draws share one.
        progress: As :func:`moe_interp.progress.reporting` takes it.
        options: Further keyword arguments of the forward pass.

    Raises:
        HookError: a layer that is not there, or was attached without expert outputs.
        RouteError: an expert that is not there.
        ConfigError: an encoder-decoder; a subject, positions, a window or numbers that cannot be; a metric of another
            form (after one pass).
        DataError: tokens that the model cannot read.

    An expert whose output restores the metric is *sufficient* here, given everything that the noise left; it need not
    be necessary (ablate it for that), nor the place where the fact is stored. Effects of experts do not add up to their
    layer's. The noise is off the distribution that the model was trained on: effects depend on ``noise``; try several.

    Source: causal tracing (Meng et al. 2022), with experts in the place of layers; derived in what is put back.
    """
    decoder_layers_of(moe)
    n_draws, seed = check_whole(draws, "draws", 1), check_seed(seed)
    check_whole(batch_size, "batch_size", 1)
    if not isinstance(noise, int | float) or isinstance(noise, bool) or not 0 < noise < math.inf:
        raise ConfigError(f"noise={noise!r}", "a positive number of standard deviations", "Pass such as 3.0.")
    inputs = check_patch_inputs(moe, tokens, layers, attention_mask, _NEEDS, options)
    subject = _check_subject(inputs, subject_positions)
    where = position_mask(inputs, check_positions(inputs, positions))
    metrics = Metrics(metric, len(inputs.tokens))
    named = _named_cells(inputs, experts, coalitions, window)
    with torch.no_grad(), eval_mode(moe.bridge), threads_asleep(), out_of_memory_in_words():
        trace = _Trace(inputs, subject, where, metrics, float(noise), n_draws, seed, batch_size)
        return trace.run(named, experts is None, progress)


class ExpertTrace(EffectResult, kind="trace"):
    """What restoring experts brings back.

    ``data``: effect[metric?, cell, example?], the mean over draws of metric(restored) - metric(noised), NaN where the
    clean run of an example does not use the experts; by_draw[metric?, cell, draw, example?]; clean[metric?, example?];
    noised[metric?, draw, example?]; n_restored[cell, example], tokens; kind (cell) "expert", "coalition", "layer" or
    "window", layer and expert of it (-1 where it has none).
    """

    def table(
        self, metric: str | None = None, level: float = 0.95, seed: int = 0, over: str = "example"
    ) -> pd.DataFrame:
        """As :meth:`EffectResult.table`.

        Args:
            metric, level, seed: As there.
            over: What the interval is over: "example", whose effects are means over draws; or "draw", for the prompts
                at hand, whose effects are then averaged: it says nothing of other prompts.
        """
        if over == "example":
            return super().table(metric, level, seed)
        if over != "draw":
            raise ConfigError(f"over={over!r}", "example or draw", "Choose one of these.")
        values = self.of_metric(metric)["by_draw"]
        values = values.mean(EXAMPLE) if EXAMPLE in values.dims else values
        rows = values.transpose("cell", "draw").values
        frame = pd.DataFrame({"cell": values["cell"].values, "n": rows.shape[1], "mean": rows.mean(axis=1)})
        known = ~np.isnan(rows).any(axis=1)
        frame["ci_low"] = frame["ci_high"] = np.nan
        if rows.shape[1] > 1 and known.any():
            interval = mean_interval(rows[known], level=level)
            frame.loc[known, "ci_low"], frame.loc[known, "ci_high"] = interval.low, interval.high
        return frame

    def recovered(self, metric: str | None = None) -> xr.DataArray:
        """By cell, mean effect over mean gap between the clean and the noised run: 1 where all is brought back.

        Over the examples that have the cell.
        """
        data = self.of_metric(metric)
        gap = (data["clean"] - data["noised"].mean("draw")).where(data["effect"].notnull())
        gap = gap.mean(EXAMPLE) if EXAMPLE in gap.dims else gap
        return self.mean(metric) / gap

    def summary(self) -> str:
        """The clean and noised metric, and the experts that bring back most."""
        data = self.of_metric()
        attrs = self.data.attrs
        lines = [
            f"Causal tracing of experts: noise {attrs['noise']:g} standard deviations, {attrs['draws']} draws, "
            f"{attrs['n_examples']} examples",
            f"{attrs['metrics'][0]}: clean {float(data['clean'].mean()):.4g}, noised "
            f"{float(data['noised'].mean()):.4g}",
        ]
        table = self.table().merge(self.data["kind"].to_series().rename("kind"), left_on="cell", right_index=True)
        table["share"] = self.recovered().to_series().loc[table["cell"]].to_numpy()
        for kind in ("layer", "window", "coalition", "expert"):
            of_kind = table[table["kind"] == kind].dropna(subset=["mean"])
            order = of_kind["share"].sort_values(ascending=False, kind="stable").index[:3]
            for row in of_kind.loc[order].to_dict("records"):
                some = f" in the {row['n']} that use it" if row["n"] < attrs["n_examples"] else ""
                lines.append(f"  {kind}: {row['cell']} {row['mean']:+.4g} ({row['share']:.0%} of the gap{some})")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Cell:
    """What one kind of restored run puts back."""

    name: str
    kind: str
    members: tuple[Member, ...]


@dataclass(eq=False)
class _Trace:
    """One run: the clean pass, the noised passes, and the restored passes of each cell."""

    inputs: PatchInputs
    subject: Tensor
    where: Tensor
    metrics: Metrics
    noise: float
    draws: int
    seed: int
    batch_size: int

    def run(self, named: list[_Cell], uses_all: bool, progress: bool | Report | None) -> ExpertTrace:
        clean: Activations = {}
        embedded: list[Tensor] = []
        reads = keeping(self.inputs.moe, _NEEDS, self.inputs.moe.layers, clean)
        reads = [*reads, ("embed.hook_out", lambda value, hook: embedded.append(value.detach().clone()))]
        baseline = self.metrics.first(self.inputs.forward(hooks=reads), "the clean run")
        cells = (self._used(clean) if uses_all else []) + named
        noises = self._noises(embedded[0])
        size = max(1, self.batch_size // len(self.inputs.tokens))
        noised, restored = [], []
        with reporting("tracing experts", progress) as report:
            done, total = 0, (len(cells) + 1) * self.draws
            for start in range(0, self.draws, size):
                part = noises[start : start + size]
                noised.append(self._values(part, []))
                of_part = []
                for cell in cells:
                    of_part.append(self._values(part, self._restoring(cell, clean, len(part))))
                    report(done := done + len(part), total)
                restored.append(torch.stack(of_part) if of_part else torch.empty(0))
            report(total, total)
        self.metrics.warn_of_nan()
        # shape: (draw, metric, example); (cell, draw, metric, example)
        return self._result(cells, baseline, torch.cat(noised), torch.cat(restored, dim=1), clean)

    def _used(self, clean: Activations) -> list[_Cell]:
        """Each expert that the clean run uses where outputs are restored."""
        found = []
        for layer in self.inputs.layers:
            here = clean["expert_indices", layer][self.where]
            found += [
                _Cell(f"{layer} expert {expert}", "expert", ((layer, expert),))
                for expert in here[here >= 0].unique().tolist()
            ]
        return found

    def _noises(self, embedded: Tensor) -> Tensor:
        """``[draw, batch, pos, d_model]``, 0 but at the subject."""
        deviation = float(embedded[self.inputs.is_real].double().std())
        noises = embedded.new_zeros(self.draws, *embedded.shape)
        for draw in range(self.draws):
            for example in range(len(embedded)):
                at = self.subject[example]
                generator = derive_generator(self.seed, "noise", example, draw)
                drawn = torch.randn(int(at.sum()), embedded.shape[-1], generator=generator, dtype=torch.float32)
                noises[draw, example, at] = (drawn * self.noise * deviation).to(noises)
        return noises

    def _values(self, noises: Tensor, hooks: Hooks) -> Tensor:
        """``[draw, metric, example]`` of passes with some draws of the noise; the metric sees one draw at a time."""
        flat = noises.flatten(0, 1)
        noising = ("embed.hook_out", lambda value, hook: value + flat)
        logits = repeated(self.inputs, len(noises)).forward(hooks=[noising, *hooks])
        parts = logits.view(len(noises), -1, *logits.shape[1:])
        return torch.stack([self.metrics.noted(self.metrics(part)) for part in parts]).cpu()

    def _restoring(self, cell: _Cell, clean: Activations, copies: int) -> Hooks:
        by_layer: dict[Any, list[int | None]] = {}
        for layer, expert in cell.members:
            by_layer.setdefault(layer, []).append(expert)
        hooks: Hooks = []
        for layer, experts in by_layer.items():
            hooks += self._restoring_at(layer, experts, clean, copies)
        return hooks

    def _restoring_at(self, layer: Any, experts: list[int | None], clean: Activations, copies: int) -> Hooks:
        moe, spec = self.inputs.moe, self.inputs.moe.spec(layer)
        if None in experts:
            whole, at = clean["routed_out", layer].repeat(copies, 1, 1), self.where.repeat(copies, 1).unsqueeze(-1)
            return [(moe.hook_name("routed_out", layer), lambda value, hook: torch.where(at, whole, value))]
        run = {name: clean[name, layer] for name in _NEEDS}
        ids = torch.tensor([expert for expert in experts if expert is not None], device=self.where.device)
        uses, added = zip(*[written_by(spec, run, int(expert)) for expert in ids])
        here = torch.stack([used & self.where for used in uses], dim=-1)  # [batch, pos, member]
        addition = (torch.stack(added, dim=-2) * here.unsqueeze(-1)).sum(dim=-2).repeat(copies, 1, 1)
        replaced = here.repeat(copies, 1, 1)

        def drop_own(value: Tensor, hook: Any) -> Tensor:
            route = moe.running(layer).indices
            assert route is not None
            own = ((route.unsqueeze(-1) == ids) & replaced.unsqueeze(2)).any(dim=-1)
            return value.masked_fill(own, 0.0)

        def add_clean(value: Tensor, hook: Any) -> Tensor:
            return value + addition.to(value.dtype)

        return [(moe.hook_name("expert_weights", layer), drop_own), (moe.hook_name("routed_out", layer), add_clean)]

    def _n_restored(self, cell: _Cell, clean: Activations) -> Tensor:
        """``[batch]``: tokens at which something is put back."""
        touched = torch.zeros_like(self.where)
        for layer, expert in cell.members:
            used = torch.ones_like(touched) if expert is None else (clean["expert_indices", layer] == expert).any(-1)
            touched |= used & self.where
        return touched.sum(dim=1)

    def _result(
        self, cells: list[_Cell], clean_value: Tensor, noised: Tensor, restored: Tensor, clean: Activations
    ) -> ExpertTrace:
        counts = torch.stack([self._n_restored(cell, clean) for cell in cells]).cpu()
        effects = (restored - noised).double()
        if self.metrics.is_per_example:
            effects = effects.masked_fill((counts == 0)[:, None, None], math.nan)
        # shape: (cell, draw, metric, example) -> (metric, cell, draw, example)
        by_draw = effects.permute(2, 0, 1, 3).numpy()
        names = [cell.name for cell in cells]
        data = effect_dataset(
            self.metrics, {"cell": names}, by_draw.mean(axis=2), len(self.inputs.tokens),
            clean=((METRIC, EXAMPLE), clean_value.cpu().double().numpy()),
            n_restored=(("cell", EXAMPLE), counts.numpy()),
        )  # fmt: skip
        has = [METRIC in data["effect"].dims, EXAMPLE in data["effect"].dims]
        for name, dims, values in (
            ("by_draw", (METRIC, "cell", "draw", EXAMPLE), by_draw),
            ("noised", (METRIC, "draw", EXAMPLE), noised.permute(1, 0, 2).double().numpy()),
        ):
            kept = tuple(dim for dim in dims if (dim != METRIC or has[0]) and (dim != EXAMPLE or has[1]))
            data[name] = (kept, values[tuple(slice(None) if dim in kept else 0 for dim in dims)])
        alone = [cell.members[0] if len(cell.members) == 1 else (-1, None) for cell in cells]
        data = data.assign_coords(
            kind=("cell", [cell.kind for cell in cells]),
            layer=("cell", [layer for layer, _ in alone]),
            expert=("cell", [-1 if expert is None else expert for _, expert in alone]),
        )
        data.attrs = {
            "metrics": list(self.metrics.names),
            "n_examples": len(self.inputs.tokens),
            "noise": self.noise,
            "draws": self.draws,
        }
        return ExpertTrace(data, config={"noise": self.noise, "draws": self.draws}, seeds=self.seed)


def _check_subject(inputs: PatchInputs, given: Any) -> Tensor:
    """``[batch, pos]`` bool: the subject's tokens.

    Raises:
        ConfigError: none for an example, or positions that it does not have.
    """
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        if given.shape != inputs.tokens.shape:
            expected = f"a mask of shape {tuple(inputs.tokens.shape)}"
            raise ConfigError(f"subject_positions of shape {tuple(given.shape)}", expected, "Mask the batch's tokens.")
        found = given.to(inputs.tokens.device) & inputs.is_real
    else:
        several = given.tolist() if hasattr(given, "tolist") else given
        is_nested = isinstance(several, Sequence) and any(isinstance(each, Iterable) for each in several)
        if not is_nested:
            found = position_mask(inputs, check_positions(inputs, several))
        else:
            if isinstance(several, str) or len(several) != len(inputs.tokens):
                expected = f"a list of positions for each of the {len(inputs.tokens)} examples"
                raise ConfigError(f"subject_positions={given!r}", expected, "Name each example's subject.")
            rows = [position_mask(inputs, check_positions(inputs, row))[at] for at, row in enumerate(several)]
            found = torch.stack(rows)
    if not bool(found.any(dim=1).all()):
        row = int((~found.any(dim=1)).nonzero()[0])
        raise ConfigError(f"example {row} without a subject", "at least one position each", "Name its subject.")
    return found


def _named_cells(inputs: PatchInputs, experts: Any, coalitions: Any, window: Any) -> list[_Cell]:
    """The cells that do not depend on the clean run."""
    cells = []
    for pair in experts or ():
        (member,) = _members(inputs, [pair], "experts")
        cells.append(_Cell(f"{member[0]} expert {member[1]}", "expert", (member,)))
    if coalitions is not None and not isinstance(coalitions, Mapping):
        raise ConfigError(f"coalitions={coalitions!r}", "pairs (layer, expert) by name", "Pass {name: [(0, 3), ...]}.")
    for name, pairs in (coalitions or {}).items():
        cells.append(_Cell(str(name), "coalition", tuple(_members(inputs, pairs, f"coalition {name!r}"))))
    cells += [_Cell(f"layer {layer}", "layer", ((layer, None),)) for layer in inputs.layers]
    if window is not None:
        size, layers = check_whole(window, "window", 2, len(inputs.layers)), inputs.layers
        for start in range(len(layers) - size + 1):
            some = layers[start : start + size]
            cells.append(_Cell(f"layers {some[0]} to {some[-1]}", "window", tuple((layer, None) for layer in some)))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice!r} twice", "each cell once", "Name each expert once, and coalitions otherwise.")
    return cells


def _members(inputs: PatchInputs, pairs: Any, what: str) -> list[Member]:
    found: list[Member] = []
    for pair in pairs:
        numbers = [as_whole(x) for x in pair] if isinstance(pair, tuple | list) and len(pair) == 2 else [None]
        if None in numbers:
            raise ConfigError(f"{what} with {pair!r}", "pairs (layer, expert)", "Pass such as [(0, 3), (1, 5)].")
        (layer,) = check_layers(inputs.moe, numbers[0], _NEEDS)
        n_experts = inputs.moe.spec(layer).n_experts
        expert = numbers[1]
        if expert is None or not 0 <= expert < n_experts:
            raise RouteError(f"expert {expert} of layer {layer}", f"ids from 0 to {n_experts - 1}", "Correct the id.")
        found.append((layer, expert))
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"{what} of {list(pairs)!r}", "at least one expert, each once", "Name its experts.")
    return found
