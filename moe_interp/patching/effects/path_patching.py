"""Path patching: how much of an upstream expert's effect on a downstream router is direct."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_interp.arch.spec import MoESpec
from moe_interp.checks import as_whole, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.engine.residual.sublayers import FrozenSublayers, decoder_layers_of, record_sublayers
from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching.cells import position_mask
from moe_interp.patching.inputs import (
    PatchInputs,
    cached_activation,
    check_layers,
    check_patch_inputs,
    check_positions,
)
from moe_interp.patching.result import EXAMPLE, EffectResult
from moe_interp.progress import Report, reporting
from moe_interp.types import EMPTY, Hooks

Mode = Literal["zero", "mean", "clean"]
PATHS = ("direct", "total")
ONE_PATH = ("share", "changed_elsewhere")  # measures without a path axis
_NEEDS = ("expert_indices", "expert_weights", "expert_out")
_READ = ("router_logits", "expert_indices")
Activations = dict[tuple[str, Any], Tensor]
"""Activations by bare hook name and layer."""


def path_patching(
    moe: MoEHooks,
    tokens: Any,
    sources: Any = None,
    targets: Any = None,
    mode: Mode = "zero",
    clean_cache: Any = None,
    positions: Sequence[int] | None = None,
    *,
    attention_mask: Tensor | None = None,
    by_expert: bool = False,
    batch_size: int = 64,
    progress: bool | Report | None = None,
) -> PathResult:
    """How an upstream expert moves the routers of later layers: directly, and in all.

    At a layer l the output of one expert e, weighted as applied, is replaced at the tokens that use it, and the routers
    of later layers m are read at these tokens.

    - ``total``: everything after follows (attention, experts and norms in between are computed anew).
    - ``direct``: attention, experts and MLPs in between keep what they gave without the patch; the change reaches
      ``router_in`` of layer m through the residual stream alone. Norms are computed anew: of layer m before its router,
      and any that the family puts after its experts. It acts on the token itself only.

    The rest, total - direct, is what goes through sublayers in between, and through other tokens.

    Args:
        moe: Attached hooks of a decoder, with ``expert_outputs=True``.
        tokens: ``[batch, pos]`` ids, or texts.
        sources: What is patched: pairs (layer, expert), or layers for all of their experts; by default all experts of
            all layers but the last.
        targets: Layers whose routers are read; all but the first MoE layer by default.
        mode: What stands in the place of the expert's weighted output: "zero"; "mean", its mean over the batch's real
            tokens that use it; "clean", what it contributes in the clean run at that token (nothing where that does
            not use it), for which ``tokens`` are the corrupted ones.
        clean_cache: For "clean": of a run of prompts of the same length, with ``expert_indices``, ``expert_weights``
            and ``expert_out``.
        positions: Where the expert is patched: absolute in the unpadded prompts, negative ones from each example's end;
            all by default.
        attention_mask: ``[batch, pos]``, 0 at padding, which is never patched.
        by_expert: Whether the changes of each downstream expert's logit are kept too.
        batch_size: Sequences a pass; patches of one layer share passes.
        progress: As :func:`moe_interp.progress.reporting` takes it.

    Returns:
        Per example, averaged over the tokens at which the expert was patched; NaN where there is none.

    Raises:
        HookError: a layer that is not there or was attached without expert outputs, or a cache without a hook; by name.
        RouteError: an expert that is not there.
        ConfigError: an encoder-decoder, a family with several residual streams, no pair of layers to compare, a clean
            cache without mode "clean" or the reverse.
        DataError: tokens that the model cannot read, or clean prompts of another length.

    A router reads a norm of the residual stream: the direct effects of several experts do not add up to that of all of
    them. A large direct effect says that the later router reads what the expert writes, not that it uses it as such:
    the patch also moves the norm's scale.

    Source: path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023), from experts to routers. TransformerLens'
    ``get_act_patch_direct_path`` patches edges between attention heads and MLPs of models whose blocks it splits
    itself; it has no routers as receivers.
    """
    if mode not in get_args(Mode) or (mode == "clean") != (clean_cache is not None):
        given = f"mode={mode!r} {'without' if clean_cache is None else 'with'} a clean cache"
        expected = 'mode "zero" or "mean" alone, or "clean" with the cache of the clean run'
        raise ConfigError(given, expected, "Pass both or neither.")
    check_whole(batch_size, "batch_size", 1)
    decoder_layers_of(moe)
    inputs = check_patch_inputs(moe, tokens, None, attention_mask, _NEEDS)
    read = check_layers(moe, moe.layers[1:] if targets is None else targets, _READ)
    experts = _check_sources(inputs, sources, read)
    where = position_mask(inputs, check_positions(inputs, positions))
    if mode == "clean":
        inputs_at = replace(inputs, layers=tuple(experts))
        for layer in inputs_at.layers:
            for name in _NEEDS:
                cached_activation(inputs_at, clean_cache, name, layer)
    with torch.no_grad(), eval_mode(moe.bridge), threads_asleep(), out_of_memory_in_words():
        return _Paths(inputs, read, where, mode, clean_cache, batch_size, by_expert).run(experts, progress)


class PathResult(EffectResult, kind="paths"):
    """What upstream experts do to downstream routers, directly and in all.

    ``data``, for each path ("direct", "total"), source (an expert: its layer and number are source_layer and
    source_expert), layer read and example, averaged over the tokens at which the source was patched; NaN where there is
    none, or the layer is not after the source:

    - effect: the change of the mean router logit of the experts that the unpatched run chooses, less the change of the
      mean over all experts. Negative under mode "zero": the source writes towards what is chosen.
    - probability: the change of the routing probability (exp of ``rule.log_policy``) of these experts together.
    - changed: the share of these experts that are no longer chosen.
    - logit[..., expert]: the change of each expert's logit, less the mean over experts; with ``by_expert`` alone.

    share[source, layer, example]: sum of direct times total over sum of total squared, over tokens and experts' logits:
    1 if all of the effect is direct. changed_elsewhere[source, layer, example]: under "total", the share of chosen
    experts lost at the other real tokens. n_tokens[source, example]: tokens patched.
    """

    def table_of_sources(self, layer: int | None = None) -> pd.DataFrame:
        """One row a source and layer read: mean direct and total effect, the share, and routes changed."""
        data = self.data if layer is None else self.data.sel(layer=[layer])
        means = {}
        for name, short in (("effect", ""), ("changed", "_changed")):
            for path in PATHS:
                means[f"{path}{short}"] = data[name].sel(path=path).mean(EXAMPLE).to_series()
        means["share"] = data["share"].mean(EXAMPLE).to_series()
        return pd.DataFrame(means).dropna(subset=["total"]).reset_index()

    def summary(self) -> str:
        """The largest direct effects."""
        table = self.table_of_sources()
        order = table["direct"].abs().sort_values(ascending=False, kind="stable").index[:5]
        attrs = self.data.attrs
        lines = [
            f"Paths from {self.data.sizes['source']} experts (mode {attrs['mode']}) to the routers of layers "
            f"{', '.join(map(str, self.data['layer'].values))}: change of the chosen experts' logit"
        ]
        for row in table.loc[order].to_dict("records"):
            lines.append(
                f"  {row['source']} -> router of layer {row['layer']}: direct {row['direct']:+.3g}, total "
                f"{row['total']:+.3g} (share {row['share']:.2f}); chosen experts lost: {row['direct_changed']:.0%} and "
                f"{row['total_changed']:.0%}"
            )
        return "\n".join(lines)


@dataclass(eq=False)
class _Paths:
    """One run: the plain pass, then two passes for each group of sources."""

    inputs: PatchInputs
    targets: tuple[Any, ...]
    where: Tensor
    mode: Mode
    cache: Any
    batch_size: int
    by_expert: bool

    def run(self, experts: dict[Any, list[int]], progress: bool | Report | None) -> PathResult:
        moe, n = self.inputs.moe, len(self.inputs.tokens)
        plain: Activations = {}
        hooks = keeping(moe, _NEEDS, experts, plain) + keeping(moe, _READ, self.targets, plain)
        _, frozen = record_sublayers(moe, lambda: self.inputs.forward(hooks=hooks), n)
        sources = [(layer, expert) for layer, chosen in experts.items() for expert in chosen]
        found = self._empty(len(sources))
        n_tokens = np.zeros((len(sources), n), dtype=np.int64)
        size, done = max(1, self.batch_size // n), 0
        with reporting("patching paths", progress) as report:
            for layer, chosen in experts.items():
                for start in range(0, len(chosen), size):
                    group = chosen[start : start + size]
                    rows = slice(done, done + len(group))
                    patched, measures = self._group(layer, group, plain, frozen)
                    n_tokens[rows] = patched.sum(dim=-1).cpu().numpy()
                    for (name, target), value in measures.items():
                        at: Any = (rows, self.targets.index(target))
                        found[name][at if name in ONE_PATH else (slice(None), *at)] = value
                    done += len(group)
                    report(done, len(sources))
        return PathResult(self._dataset(sources, found, n_tokens), config={"mode": self.mode})

    def _empty(self, n_sources: int) -> dict[str, NDArray[np.float64]]:
        shape = (n_sources, len(self.targets), len(self.inputs.tokens))
        found = {name: np.full((2, *shape), np.nan) for name in ("effect", "probability", "changed")}
        found |= {name: np.full(shape, np.nan) for name in ONE_PATH}
        if self.by_expert:
            n_experts = max(self.inputs.moe.spec(target).n_experts for target in self.targets)
            found["logit"] = np.full((2, *shape, n_experts), np.nan)
        return found

    def _group(
        self, layer: Any, group: list[int], plain: Activations, frozen: FrozenSublayers
    ) -> tuple[Tensor, dict[tuple[str, Any], NDArray[np.float64]]]:
        """The tokens at which a few experts of a layer were patched, and measures by name and target."""
        moe, later = self.inputs.moe, [target for target in self.targets if target > layer]
        patched, delta = self._deltas(layer, group, plain)
        copies, flat = repeated(self.inputs, len(group)), delta.flatten(0, 1)
        found: dict[str, Activations] = {path: {} for path in PATHS}
        # only the routers are read, so no expert runs
        empty_routes = [
            (moe.hook_name("expert_indices", m), lambda value, hook: torch.full_like(value, EMPTY)) for m in later
        ]
        with frozen.adding(layer, flat):
            copies.forward(hooks=keeping(moe, _READ, later, found["direct"]) + empty_routes)
        add = (moe.hook_name("routed_out", layer), lambda value, hook: value + flat.to(value.dtype))
        copies.forward(hooks=[add, *keeping(moe, _READ, later, found["total"])])
        measures = {}
        for target in later:
            for name, value in self._measures(target, plain, found, patched).items():
                measures[name, target] = value.cpu().double().numpy()
        return patched, measures

    def _deltas(self, layer: Any, group: list[int], plain: Activations) -> tuple[Tensor, Tensor]:
        """``[source, batch, pos]``, the tokens patched, and what is added there, ``[source, batch, pos, d_model]``."""
        spec, run = self.inputs.moe.spec(layer), {name: plain[name, layer] for name in _NEEDS}
        clean = None
        if self.cache is not None:
            at = replace(self.inputs, layers=(layer,))
            clean = {name: cached_activation(at, self.cache, name, layer) for name in _NEEDS}
        patched, deltas = [], []
        for expert in group:
            used, old = written_by(spec, run, expert)
            new = torch.zeros_like(old)
            if self.mode == "mean" and bool((used & self.inputs.is_real).any()):
                new = old[used & self.inputs.is_real].mean(dim=0).expand_as(old)
            if clean is not None:
                clean_used, new = written_by(spec, clean, expert)
                used = used | clean_used
            here = used & self.where
            patched.append(here)
            deltas.append((new.to(old.dtype) - old) * here.unsqueeze(-1).to(old.dtype))
        return torch.stack(patched), torch.stack(deltas)

    def _measures(
        self, target: Any, plain: Activations, found: dict[str, Activations], patched: Tensor
    ) -> dict[str, Tensor]:
        """What happens to one router: ``[path, source, batch]``, or ``[source, batch]``."""
        rule, logits = self.inputs.moe.spec(target).rule, plain["router_logits", target]
        before = _membership(plain["expert_indices", target], logits.shape[-1])
        n_chosen = before.sum(dim=-1).clamp(min=1)
        shape = (*patched.shape, logits.shape[-1])
        by_path: dict[str, list[Tensor]] = {"effect": [], "probability": [], "changed": [], "logit": []}
        changes, elsewhere = [], torch.empty(0)
        for path in PATHS:
            new = found[path]["router_logits", target].view(shape)
            delta = (new - logits).double()
            delta = delta - delta.mean(dim=-1, keepdim=True)
            moved = (rule.log_policy(new).exp() - rule.log_policy(logits).exp()).double()
            now = _membership(found[path]["expert_indices", target], logits.shape[-1]).view(shape)
            lost = 1 - (before * now).sum(dim=-1) / n_chosen
            by_path["effect"].append(_mean_over(patched, (delta * before).sum(dim=-1) / n_chosen))
            by_path["probability"].append(_mean_over(patched, (moved * before).sum(dim=-1)))
            by_path["changed"].append(_mean_over(patched, lost))
            by_path["logit"].append(_mean_over(patched, delta))
            changes.append(delta * patched.unsqueeze(-1))
            elsewhere = _mean_over(self.inputs.is_real & ~patched, lost)
        direct, total = changes
        size = total.square().sum(dim=(-2, -1))
        share = ((direct * total).sum(dim=(-2, -1)) / size).masked_fill(size == 0, torch.nan)
        values = {name: torch.stack(each) for name, each in by_path.items() if name != "logit" or self.by_expert}
        return values | {"share": share, "changed_elsewhere": elsewhere}

    def _dataset(
        self, sources: list[tuple[Any, int]], found: dict[str, NDArray[np.float64]], n_tokens: NDArray[np.int64]
    ) -> xr.Dataset:
        axes = ("path", "source", "layer", EXAMPLE)
        variables: dict[str, Any] = {
            name: (axes[1:] if name in ONE_PATH else (*axes, "expert")[: value.ndim], value)
            for name, value in found.items()
        }
        variables["n_tokens"] = (("source", EXAMPLE), n_tokens)
        coords = {
            "path": list(PATHS),
            "source": [f"{layer} expert {expert}" for layer, expert in sources],
            "layer": list(self.targets),
            EXAMPLE: np.arange(n_tokens.shape[1]),
            "source_layer": ("source", [layer for layer, _ in sources]),
            "source_expert": ("source", [expert for _, expert in sources]),
        }
        return xr.Dataset(variables, coords=coords, attrs={"mode": self.mode})


def written_by(spec: MoESpec, run: Mapping[str, Tensor], expert: int) -> tuple[Tensor, Tensor]:
    """Where an expert is used ``[batch, pos]``, and what it adds there ``[batch, pos, d_model]``, 0 elsewhere.

    Args:
        spec: The layer.
        run: Its ``expert_indices``, ``expert_weights`` and ``expert_out``.
        expert: The expert.
    """
    slot = run["expert_indices"] == expert
    weights = slot.to(run["expert_out"].dtype)
    if not spec.weight_on_input:
        weights = weights * run["expert_weights"].to(run["expert_out"].dtype)
    return slot.any(dim=-1), (run["expert_out"] * weights.unsqueeze(-1)).sum(dim=2)


def keeping(moe: MoEHooks, names: Sequence[str], layers: Iterable[Any], kept: Activations) -> Hooks:
    """Hooks that keep activations by bare name and layer."""

    def keep(key: tuple[str, Any]) -> Any:
        return lambda value, hook: kept.__setitem__(key, value.detach().clone())

    return [(moe.hook_name(name, layer), keep((name, layer))) for layer in layers for name in names]


def repeated(inputs: PatchInputs, copies: int) -> PatchInputs:
    """Stacked copies of a batch."""
    n = len(inputs.tokens)

    def repeat(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim and len(value) == n
        return value.repeat(copies, *[1] * (value.ndim - 1)) if is_batch else value

    options = tree_map(repeat, inputs.options)
    return replace(inputs, tokens=repeat(inputs.tokens), mask=repeat(inputs.mask), options=options)


def _membership(indices: Tensor, n_experts: int) -> Tensor:
    """``[..., slot]`` ids to ``[..., expert]``, 1 where an expert is among them; float64."""
    experts = torch.arange(n_experts, device=indices.device)
    return (indices.unsqueeze(-1) == experts).any(dim=-2).double()


def _mean_over(tokens: Tensor, values: Tensor) -> Tensor:
    """The mean over some tokens ``[source, batch, pos]`` of values that may have further axes; NaN without a token."""
    weights = tokens.double().view(*tokens.shape, *[1] * (values.ndim - tokens.ndim))
    n = weights.sum(dim=2)
    return ((values * weights).sum(dim=2) / n.clamp(min=1)).masked_fill(n == 0, torch.nan)


def _check_sources(inputs: PatchInputs, sources: Any, targets: Sequence[Any]) -> dict[Any, list[int]]:
    """By layer, the experts to patch; of layers that have a target after them."""
    moe, last = inputs.moe, max(targets)
    found: dict[Any, list[int]] = {}
    for each in [layer for layer in moe.layers if layer < last] if sources is None else _several(sources):
        pair = list(each) if isinstance(each, tuple | list) else [each]
        numbers = [number for number in map(as_whole, pair) if number is not None]
        if len(numbers) < len(pair) or len(pair) not in (1, 2):
            raise ConfigError(f"source {each!r}", "a layer, or a pair (layer, expert)", "Pass such as [(0, 3), 1].")
        (layer,) = check_layers(moe, numbers[0], _NEEDS)
        n_experts = moe.spec(layer).n_experts
        experts = numbers[1:] or range(n_experts)
        if not all(0 <= expert < n_experts for expert in experts):
            raise RouteError(
                f"source {each!r}", f"a layer and an expert from 0 to {n_experts - 1}", "Name the experts to patch."
            )
        found[layer] = [*dict.fromkeys([*found.get(layer, []), *experts])]
    if not found or not all(layer < last for layer in found):
        raise ConfigError(
            f"sources at layers {list(found)} and routers of layers {list(targets)}",
            "for each source a router of a later layer",
            "Name earlier sources or later targets.",
        )
    return {layer: found[layer] for layer in moe.layers if layer in found}


def _several(sources: Any) -> list[Any]:
    """One layer or one pair as a list of one."""
    several = sources.tolist() if hasattr(sources, "tolist") else sources
    is_pair = isinstance(several, tuple) and len(several) == 2 and all(as_whole(x) is not None for x in several)
    return [several] if is_pair or isinstance(several, str) or not isinstance(several, Iterable) else list(several)
