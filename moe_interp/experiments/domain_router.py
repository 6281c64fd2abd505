"""Does it matter? The router replaced, without training, by the best experts of each domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from moe_interp.arch.offload import device_of
from moe_interp.checks import check_seed, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import Memory, out_of_memory_in_words, tokens_per_pass
from moe_interp.engine.rerun import PrefixRunner
from moe_interp.errors import DataError
from moe_interp.experiments.best_experts import best_experts, split_items
from moe_interp.experiments.identity.naming import model_name
from moe_interp.experiments.inputs.batches import batches_of_like_length
from moe_interp.experiments.inputs.items import (
    Item,
    ItemBatch,
    check_items,
    predictions_per_token,
    tokenize_items,
)
from moe_interp.experiments.inputs.repeats import distinct_items
from moe_interp.experiments.isolation.data import pooled_name
from moe_interp.experiments.isolation.result import IsolationResult
from moe_interp.experiments.isolation.scoring import by_item
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.interventions import set_routes
from moe_interp.interventions.positions import Positions
from moe_interp.progress import Report, reporting
from moe_interp.results import Result, checksum
from moe_interp.stats import derive_rng, mean_interval, paired_permutation, verdict
from moe_interp.types import Hooks

Routes = dict[int, list[int]]


def domain_router(
    moe: MoEHooks,
    isolation_result: IsolationResult,
    domain: str,
    k: int | None = None,
    items: Sequence[str] | None = None,
    mass: str | None = None,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Route every token, at every isolated layer, to the ``k`` experts that served a domain best alone.

    The experts run with the family's own weights for that set.

    Args:
        moe: Attached hooks.
        isolation_result: Of single experts on this model.
        domain: One of its domains.
        k: Experts per token; the family's own number by default.
        items: Ids of the items to choose by; keep others to measure on.
        mass: The mass whose deltas decide; the run's first by default.
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

    Raises:
        DataError, ConfigError: as :func:`moe_interp.experiments.best_experts.best_experts`.

    Source: derived.
    """
    k = moe.spec(moe.layers[0]).top_k if k is None else check_whole(k, "k", 1)
    chosen = best_experts(isolation_result, domain, k, items, mass)
    return [
        hook
        for layer, experts in chosen.items()
        for hook in set_routes(moe, layer, experts, positions=positions, attention_mask=attention_mask)
    ]


class DomainRouterResult(Result, kind="domain_router"):
    """Scores of held-out items under each router.

    ``data``: score[router, item] and score_first[router, item], nats per answer token; ``domain(item)``. The router
    "domain" was chosen on the half of the items that an item is not in; "random" is the mean over draws of ``k``
    random experts a layer.
    """

    main = "score"

    def compare(self, against: str = "natural", level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Paired differences to one router, by domain and over all: mean with an interval over items, p, and a verdict.

        Positive where the router is better than ``against``. p is of a sign-flip permutation test; a verdict needs both
        it and the interval (:func:`moe_interp.stats.verdict`). The row over all is named "all" unless a domain is:
        ``.attrs["pooled"]``.
        """
        score, rows = self.data["score"], []
        labels = self.data["domain"].values.astype(str)
        names = sorted(set(labels.tolist()))
        pooled = pooled_name(names, "all")
        for router in [r for r in score["router"].values if r != against]:
            difference = (score.sel(router=router) - score.sel(router=against)).values
            for name in [*names, pooled]:
                values = difference if name == pooled else difference[labels == name]
                found = mean_interval(values, level=level)
                low, high, p = float(found.low), float(found.high), float(paired_permutation(values, seed=seed).p_value)
                rows.append(
                    {
                        "router": str(router),
                        "against": against,
                        "domain": name,
                        "n": len(values),
                        "mean": float(values.mean()),
                        "ci_low": low,
                        "ci_high": high,
                        "p": p,
                        "verdict": verdict(low, high, n=len(values), words=("better", "worse"), p=p, alpha=1 - level),
                    }
                )
        table = pd.DataFrame(rows)
        table.attrs = {"pooled": pooled, "level": level}
        return table

    def headlines(self) -> list[str]:
        """What was done, and what each other router changes on held-out items, a line each."""
        table = self.compare()
        n = self.data.sizes["item"]
        lines = [
            f"The router of {self.data.attrs.get('model', 'the model')} replaced by each domain's "
            f"{self.data.attrs['k']} best experts a layer, chosen on half of the items and measured on the other "
            f"(nats per answer token, against natural routing; 95% intervals over {n} item{'s' * (n != 1)}):"
        ]
        for row in table[table["domain"] == table.attrs["pooled"]].to_dict("records"):
            low, high = float(row["ci_low"]), float(row["ci_high"])
            interval = "no interval" if np.isnan(low) else f"{low:+.3f}, {high:+.3f}"
            lines.append(f"{row['router']}: {float(row['mean']):+.3f} [{interval}], {row['verdict']}")
        return lines

    def summary(self) -> str:
        """In words: what replacing the router changes on held-out items."""
        return "\n  ".join(self.headlines())


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def score_domain_router(
    moe: MoEHooks,
    items: Sequence[Any],
    isolation_result: IsolationResult,
    k: int | None = None,
    random_draws: int = 4,
    reference: Callable[[str], Hooks] | None = None,
    mass: str | None = None,
    memory_budget: int | None = None,
    seed: int = 0,
    progress: bool | Report | None = None,
) -> DomainRouterResult:
    """Score the domain router on items it was not chosen by, beside natural and random routing.

    The items are cut in two halves, each domain apart; the experts chosen on one half are measured on the other, both
    ways round.

    Args:
        moe: Attached hooks.
        items: The items of the isolation run; of the same tokens, they count once.
        isolation_result: Its result.
        k: Experts per token; the family's own number by default.
        random_draws: Draws of ``k`` random experts a layer, the same for all tokens.
        reference: domain -> hooks of a router known to be right, where there is one.
        mass, memory_budget, progress: As in ``isolate_experts``.
        seed: Seed of the halves and the draws.

    Raises:
        DataError: a domain with a single item, or items that the result does not know.
        ConfigError: ``k`` or ``random_draws`` out of range.

    Source: derived. What it does not show: what a trained router could reach.
    """
    check_attached(moe)
    random_draws, seed = check_whole(random_draws, "random_draws", 1), check_seed(seed)
    k = moe.spec(moe.layers[0]).top_k if k is None else check_whole(k, "k", 1)
    tokenized, merged = distinct_items(tokenize_items(moe.bridge, check_items(items)))
    checked = [item.item for item in tokenized]
    aliases = {
        other: name for name, others in isolation_result.data.attrs.get("merged", {}).items() for other in others
    }
    known = set(isolation_result.data["item"].values.astype(str))
    if unknown := [item.place for item in checked if aliases.get(item.id, item.id) not in known]:
        raise DataError(f"{unknown[0]}", f"one of the result's {len(known)} items", "Pass the items of that run.")
    of_run = [replace(item, id=aliases.get(item.id, item.id)) for item in checked]
    routers = _routers(moe, of_run, isolation_result, k, random_draws, mass, seed)
    scores = {name: np.zeros((2, len(checked))) for name in [*routers, *(["reference"] if reference else [])]}
    width, predictions = max(len(item) for item in tokenized), predictions_per_token(tokenized)
    tokens = tokens_per_pass(moe, width, memory_budget, predictions_per_token=predictions, slots=k)
    batches = batches_of_like_length(tokenized, tokens)
    runner, device, memory = PrefixRunner(moe), device_of(moe.bridge.original_model), Memory(moe, memory_budget)

    def score(index: list[int]) -> None:
        batch = ItemBatch.build(index, tokenized, device)
        for name, variants in routers.items():
            found = [runner.base(batch.tokens, batch.predictions, [], variant(index))[0] for variant in variants]
            scores[name][:, index] = np.mean([by_item(f, batch.predictions, len(index)) for f in found], axis=0)
        if reference is not None:
            scores["reference"][:, index] = _by_domain(runner, batch, [checked[i].domain for i in index], reference)

    with reporting("scoring routers", progress) as report, torch.no_grad():
        for number, index in enumerate(batches):
            report(number, len(batches))
            memory.in_parts(lambda part, index=index: score(index[part]), len(index), "items")  # type: ignore[misc]
            memory.say()
        report(len(batches), len(batches))
    stacked = np.stack(list(scores.values()), axis=1)
    data = xr.Dataset(
        {"score": (("router", "item"), stacked[0]), "score_first": (("router", "item"), stacked[1])},
        coords={
            "router": list(scores),
            "item": [item.id for item in checked],
            "domain": ("item", [item.domain for item in checked]),
        },
        attrs={"model": model_name(moe), "k": k, "random_draws": random_draws} | ({"merged": merged} if merged else {}),
    )
    config = {"k": k, "random_draws": random_draws, "mass": mass}
    return DomainRouterResult(
        data, config=config, seeds=seed, data_checksum=checksum([item.content for item in checked])
    )


def _routers(
    moe: MoEHooks, items: list[Item], result: IsolationResult, k: int, random_draws: int, mass: str | None, seed: int
) -> dict[str, list[Callable[[list[int]], Hooks]]]:
    """By name, the variants whose scores are averaged: from the indices of a batch's items to hooks."""
    halves = split_items(result, seed)
    # the experts for an item of half h are chosen on the other half
    chosen = {
        (domain, half): best_experts(result, domain, k, halves[1 - half], mass)
        for domain in sorted({item.domain for item in items})
        for half in (0, 1)
    }
    first = set(halves[0])
    routes = [chosen[item.domain, 0 if item.id in first else 1] for item in items]
    layers = [int(layer) for layer in result.data["layer"].values]
    draws = [_random_routes(moe, layers, k, seed, draw) for draw in range(random_draws)]
    return {
        "natural": [lambda index: []],
        "domain": [lambda index: _row_routes(moe, [routes[i] for i in index])],
        "random": [lambda index, drawn=drawn: _row_routes(moe, [drawn] * len(index)) for drawn in draws],  # type: ignore[misc]
    }


def _row_routes(moe: MoEHooks, rows: list[Routes]) -> Hooks:
    """Row r of the batch takes its own experts, at every layer."""
    hooks: Hooks = []
    for layer in rows[0]:
        # shape: (row, slot) -> (row, 1, slot), the same at every position
        indices = torch.tensor([row[layer] for row in rows]).unsqueeze(1)
        hooks += set_routes(moe, layer, indices)
    return hooks


def _random_routes(moe: MoEHooks, layers: list[int], k: int, seed: int, draw: int) -> Routes:
    rng = derive_rng(seed, "random router", draw)
    return {layer: rng.choice(moe.spec(layer).n_experts, size=k, replace=False).tolist() for layer in layers}


def _by_domain(runner: PrefixRunner, batch: ItemBatch, domains: list[str], hooks: Callable[[str], Hooks]) -> Any:
    """Each row under its own domain's hooks: one pass a domain, of which its own rows are kept."""
    found: Tensor | None = None
    for domain in sorted(set(domains)):
        mine = torch.tensor([d == domain for d in domains], device=batch.predictions.row.device)[batch.predictions.row]
        scores, _ = runner.base(batch.tokens, batch.predictions, [], hooks(domain))
        found = scores if found is None else torch.where(mine, scores, found)
    assert found is not None
    return by_item(found, batch.predictions, len(domains))
