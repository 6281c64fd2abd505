"""Expert isolation: every token of one layer through given experts, and what that does to the right answer.

The method of "Learned Routers Don't Learn" (Phi-mini-MoE), without its defects: an isolated expert has its indices and
its weight set, so that nothing else runs. Masses, the uniform and the random baseline are derived.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from moe_interp.arch.offload import device_of
from moe_interp.checks import check_seed, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import Memory, out_of_memory_in_words, tokens_per_pass
from moe_interp.errors import ConfigError
from moe_interp.experiments.expert_families import (
    are_families,
    check_one_shape,
    drawn_families,
    expert_families,
    family_arrays,
    family_layers,
)
from moe_interp.experiments.identity.model import model_identity, weights_of
from moe_interp.experiments.identity.naming import model_name
from moe_interp.experiments.inputs.batches import batches_of_run
from moe_interp.experiments.inputs.items import (
    Item,
    ItemBatch,
    TokenizedItem,
    check_items,
    predictions_per_token,
    tokenize_items,
)
from moe_interp.experiments.inputs.repeats import distinct_items
from moe_interp.experiments.isolation.cells import BASELINES, Baseline, IsolationPlan, isolation_dataset, stored_plan
from moe_interp.experiments.isolation.natural_routing import RoutingStats
from moe_interp.experiments.isolation.result import IsolationResult
from moe_interp.experiments.isolation.scoring import NaiveScorer, PrefixScorer, by_item, rounding
from moe_interp.experiments.isolation.variants import ExpertSet, Mode, expert_sets, is_family
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions.force import Mass, check_mass
from moe_interp.progress import Report, reporting
from moe_interp.results import checksum
from moe_interp.results.cells import Arrays, CellStore
from moe_interp.stats import derive_rng


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def isolate_experts(
    moe: MoEHooks,
    items: Sequence[Any],
    layers: Sequence[int] | None = None,
    experts: Sequence[Any] | None = None,
    baselines: Sequence[Baseline] = BASELINES,
    mode: Mode = "force",
    mass: Sequence[Mass] = ("one", "natural"),
    random_draws: int = 8,
    memory_budget: int | None = None,
    seed: int = 0,
    method: Literal["prefix", "naive"] = "prefix",
    store: str | os.PathLike[str] | None = None,
    progress: bool | Report | None = None,
) -> IsolationResult:
    """Score every item with every expert, alone at every MoE layer in turn.

    The score of an item is the mean log-probability of its answer's tokens (nats per token), and that of the first
    one. ``delta = score(forced) - score(baseline)``: positive where the expert alone is better than the baseline.

    Args:
        moe: Attached hooks of a decoder-only model.
        items: Items, or mappings with id, domain, prompt (or messages) and answer. Items of a domain with
            the same tokens count once, with a warning that names them: ``data.attrs["merged"]``, from the id that is
            kept to those that are not.
        layers: MoE layers; all by default.
        experts: Expert ids, or tuples of ids that are forced (or ablated) together; each expert by default. Or
            families over several layers: mappings from a layer to its experts, or tuples of pairs (layer, expert),
            forced (or ablated) at all their layers together. Then ``layers`` is left out; the result has one layer,
            the first of all families, and its experts are texts such as "0.3+1.5"; their natural routing is the sum
            over a family's experts, averaged over its layers.
        baselines: "natural" routing; "uniform" (every expert, 1/E); "random" (the mean over ``random_draws`` experts,
            each for all tokens). A baseline applies at the isolated layer only; for families, at all their layers,
            and families then need as many experts at each layer ("random" ones have as many).
        mode: "force" sends all tokens through the experts; "ablate" takes the experts away from the tokens that use
            them (their outputs are dropped, the others keep their weights, so there is the mass "natural" only).
        mass: The forced experts' total weight: 1, or the token's own natural sum of weights. Uniform routing likewise.
            Several experts share it in proportion to the family's weights for the set (derived).
        random_draws: Experts drawn for the random baseline, without replacement while there are enough.
        memory_budget: Bytes a forward pass may use; by default what is free (on a processor half of it). Where it does
            not do all the same, fewer sets and items are taken at a time, with a warning.
        seed: Seed of the random baseline.
        method: "prefix" computes a layer's prefix once; "naive" runs ``run_with_hooks`` one item and set at a time.
        store: Folder for finished cells (layer x batch of items): an interrupted run goes on from there. Cells of
            another model or state of it (see ``model_identity``), of other items or
            options are refused.
        progress: See :func:`moe_interp.progress.reporting`.

    Raises:
        DataError: items that cannot be scored; the message names the item and its line.
        ConfigError, RouteError: options out of range.
        ResultError: a store of another run, or a disk that refuses to be written.

    What it does not show: how an expert works together with others; an expert alone gets tokens that it never had to
    serve alone.
    """
    check_attached(moe)
    random_draws, seed = check_whole(random_draws, "random_draws", 1), check_seed(seed)
    if method not in ("prefix", "naive"):
        raise ConfigError(f"method={method!r}", "'prefix' or 'naive'", "Choose one of these.")
    tokenized, merged = distinct_items(tokenize_items(moe.bridge, check_items(items)))
    checked = [item.item for item in tokenized]
    plan = _plan(moe, checked, layers, experts, baselines, mode, mass, random_draws, seed)
    width = max(len(item) for item in tokenized)

    def fitting(slots: int) -> int:
        return tokens_per_pass(
            moe,
            width,
            memory_budget,
            kept_layers=len(plan.layers) if method == "prefix" else 0,
            kept_tokens=len(tokenized) * width,
            predictions_per_token=predictions_per_token(tokenized),
            slots=slots,
        )

    tokens = fitting(max(len(chosen) for chosen in plan.sets))
    # a batch also runs with every expert on each of its tokens
    each = fitting(moe.spec(plan.layers[0]).n_experts) if "uniform" in plan.baselines else tokens
    batches = batches_of_run(tokenized, lambda: each, memory_budget, store)
    identity = model_identity(moe)
    plan = replace(plan, weights=weights_of(identity))
    options = {"random_draws": random_draws, "seed": int(seed), "method": method}
    cells = None if store is None else CellStore(store, stored_plan(plan, tokenized, identity, options, batches))
    memory = Memory(moe, memory_budget)
    scorer = NaiveScorer(moe, mode) if method == "naive" else PrefixScorer(moe, mode, tokens, memory)
    run = _Run(moe, plan, scorer, tokenized, memory)
    finished: dict[tuple[int, int], Arrays] = {}
    with reporting("isolating experts", progress) as report, torch.no_grad():
        report(0, len(batches) * len(plan.layers))
        for number, index in enumerate(batches):
            for layer, cell in _of_batch(run, index, number, cells):
                finished[number, layer] = cell
                report(len(finished), len(batches) * len(plan.layers))
    data = isolation_dataset(moe, plan, tokenized, batches, finished)
    data.attrs |= {
        "n_layers": len(moe.bridge.blocks),
        "random_draws": random_draws,
        "null_difference": np.nan if scorer.null_difference is None else scorer.null_difference,
        "method": method,
    }
    if merged:
        data.attrs["merged"] = merged
    return IsolationResult(data, config=asdict(plan), seeds=seed, data_checksum=plan.items)


def _plan(
    moe: MoEHooks,
    items: list[Item],
    layers: Sequence[int] | None,
    experts: Sequence[Any] | None,
    baselines: Sequence[Baseline],
    mode: Mode,
    mass: Sequence[Mass],
    random_draws: int,
    seed: int,
) -> IsolationPlan:
    """What is computed; the weights' identity is not known yet."""
    families = expert_families(moe, experts) if are_families(experts) else []
    if families and layers is not None:
        raise ConfigError(f"layers={list(layers)} beside families", "one of them", "Leave layers out.")
    labels: list[Any] = list(moe.layers) if layers is None else [moe.layer_label(layer) for layer in layers]
    labels = family_layers(families)[:1] if families else labels
    for name, given in (("layers", labels), ("baselines", baselines), ("mass", mass)):
        if not given or len(set(given)) < len(given):
            raise ConfigError(f"{name}={list(given)}", "at least one, each once", f"Correct {name}.")
    n_experts = moe.spec(labels[0]).n_experts
    if set(baselines) - set(BASELINES) or mode not in ("force", "ablate"):
        raise ConfigError(
            f"baselines={tuple(baselines)}, mode={mode!r}",
            f"baselines among {BASELINES}, mode 'force' or 'ablate'",
            "Correct the options.",
        )
    for name in mass:
        check_mass(name)
    if any(moe.spec(label).n_experts != n_experts for label in family_layers(families) or labels):
        raise ConfigError("layers with different numbers of experts", "one number", "Isolate them one after the other.")
    sets: list[Any] = families
    drawn: tuple[Any, ...] = ()
    if families:
        check_one_shape(families, baselines)
        drawn = (drawn_families(moe, families[0], seed, random_draws),)
    else:
        sets = list(expert_sets(experts, n_experts))
        drawn = tuple(_draw(seed, label, n_experts, len(sets[0]), random_draws) for label in labels)
    return IsolationPlan(
        model=model_name(moe),
        weights="",
        items=checksum([item.content for item in items]),
        mode=mode,
        layers=tuple(labels),
        sets=tuple(sets),
        drawn=drawn if "random" in baselines else tuple(() for _ in labels),
        mass=tuple(mass) if mode == "force" else ("natural",),
        baselines=tuple(baselines),
    )


def _draw(seed: int, layer: int, n_experts: int, size: int, draws: int) -> tuple[ExpertSet, ...]:
    """The random baseline's sets at a layer, of the size of the isolated ones."""
    rng = derive_rng(seed, "random baseline", layer)
    if size == 1:
        order = rng.permutation(n_experts) if draws <= n_experts else rng.integers(n_experts, size=draws)
        return tuple((int(e),) for e in order[:draws])
    return tuple(tuple(int(e) for e in rng.choice(n_experts, size, replace=False)) for _ in range(draws))


def _of_batch(run: _Run, index: list[int], number: int, cells: CellStore | None) -> Iterator[tuple[int, Arrays]]:
    """The cells of one batch of items, layer after layer; finished ones come from the store."""
    stored = {layer: None if cells is None else cells.load(number, layer) for layer in run.plan.layers}
    scored = run.cells_of(index, [layer for layer, cell in stored.items() if cell is None])
    for layer, known in stored.items():
        cell = known
        if cell is None:
            _, cell = next(scored)
            if cells is not None:
                cells.save(cell, number, layer)
        yield layer, cell


@dataclass
class _Run:
    """One run's cells, batch by batch."""

    moe: MoEHooks
    plan: IsolationPlan
    scorer: PrefixScorer | NaiveScorer
    items: list[TokenizedItem]
    memory: Memory

    def cells_of(self, index: list[int], layers: list[int]) -> Iterator[tuple[int, Arrays]]:
        """Some items' cells, layer after layer."""
        return self.memory.in_halves(index, layers, "items", self._together, _joined)

    def _together(self, index: list[int], layers: list[int]) -> Iterator[tuple[int, Arrays]]:
        if not layers:
            return
        plan, scorer = self.plan, self.scorer
        batch = ItemBatch.build(index, self.items, device_of(self.moe.bridge.original_model))
        is_of_families = is_family(plan.sets[0])
        stats = RoutingStats(self.moe, batch, plan.set_layers if is_of_families else layers)
        natural = scorer.begin(batch, layers, stats.hooks())
        for layer in layers:
            sets: list[Any] = plan.to_score(layer)
            read = family_arrays(stats, sets) if is_of_families else stats.arrays(layer)
            cell = {"natural": by_item(natural, batch.predictions, len(index)), **read}
            mass = None if is_of_families else stats.natural_mass(layer)
            scores = [scorer.sets(layer, sets, m, mass) for m in plan.mass]
            cell["sets"] = np.stack([by_item(s, batch.predictions, len(index)) for s in scores], axis=1)
            if plan.mode == "ablate":
                # of families, the arrays are by family
                columns = [(column,) for column in range(len(sets))] if is_of_families else sets
                _spare_out_of_reach(cell, columns, rounding(self.moe))
            if "uniform" in plan.baselines:
                even = [scorer.uniform(plan.set_layers if is_of_families else [layer], m) for m in plan.mass]
                cell["uniform"] = np.stack([by_item(s, batch.predictions, len(index)) for s in even], axis=1)
            self.memory.say()
            yield layer, cell


# which axis of a cell's arrays the items are on; a margin is the smallest of all
_ITEM_AXIS = {"natural": 1, "routing": 1, "share": 1, "uses": 0, "reaches": 0, "sets": 2, "uniform": 2}


def _joined(parts: list[Arrays]) -> Arrays:
    """The cell of all items, from those of some each."""
    joined: Arrays = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        joined[name] = np.asarray(np.min(values)) if name == "margin" else np.concatenate(values, axis=_ITEM_AXIS[name])
    return joined


def _spare_out_of_reach(cell: Arrays, sets: list[ExpertSet], tolerance: float) -> None:
    """Without experts that no position uses whose output can reach the answer, the score is the natural one exactly.

    Passes of different shapes round differently, and that noise would be tested and ranked. What differs by more than
    rounding was reached after all, as by a hook that mixes positions, and is kept.
    """
    natural = cell["natural"][:, None, :, None]
    moved = (np.abs(cell["sets"] - natural) > tolerance).any((0, 1))  # [item, set]
    for column, chosen in enumerate(sets):
        ids = list(chosen)
        is_used = cell["uses"][:, ids].any(-1)
        reached = cell["reaches"][:, ids].any(-1) | (moved[:, column] & is_used)
        cell["sets"][..., column] = np.where(reached, cell["sets"][..., column], natural[..., 0])
        if len(ids) == 1:
            cell["reaches"][:, ids[0]] = reached
