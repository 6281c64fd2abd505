"""What a router has learned, on tokens that it was not tuned on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_interp.experiments.router_tuning.objectives import route_log_policy
from moe_interp.experiments.router_tuning.options import TuningOptions
from moe_interp.experiments.router_tuning.routers import TunedRouter, Weights
from moe_interp.experiments.router_tuning.step import scored_routes
from moe_interp.experiments.router_tuning.token_sources.tokens import TokenSource, chunks
from moe_interp.routes import TokenKeys
from moe_interp.types import EMPTY

AT_ONCE = 256  # tokens
PER_TOKEN = ("changed", "preference", "adoption", "overlap", "entropy")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Held-out tokens under some weights.

    Attributes:
        ce: ``[token]``, in nats.
        per_token: By name of ``PER_TOKEN``, ``[token, layer]``; NaN where there is no better route to speak of.
        load: ``[layer, expert]``, each expert's share of the slots.
    """

    ce: NDArray[np.float64]
    per_token: dict[str, NDArray[np.float64]]
    load: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Start:
    """What the untuned router does at some tokens of one layer: r-, r+ (-1 where none) and its log-policy of both."""

    own: Tensor
    better: Tensor
    log_own: Tensor
    log_better: Tensor


class HeldOut:
    """Held-out tokens, with the routes of the untuned router and the better ones among its draws.

    r+ is fixed once, before tuning: the best of the sampler's draws from the untuned router, scored with the untuned
    router's weights, where it improves on r-.

    Args:
        source: The tokens.
        routers: What is tuned.
        start: The untuned weights.
        options: The run's.
        seed: Of the draws.
    """

    def __init__(
        self,
        source: TokenSource,
        routers: tuple[TunedRouter, ...],
        start: Weights,
        options: TuningOptions,
        seed: int,
    ) -> None:
        self.source, self.routers, self.options, self.seed = source, routers, options, seed
        self._start: list[dict[int, _Start]] = []
        for rows in chunks(source, AT_ONCE):
            self._start.append(self._before(rows, start))

    @torch.no_grad()
    def _before(self, rows: Tensor, start: Weights) -> dict[int, _Start]:
        opened, found = self.source.open(rows, start), {}
        sequence, pos = self.source.table.keys(rows)
        for router in self.routers:
            logits = router.logits(opened.inputs[router.layer], start[router.layer])
            device = logits.device
            keys = TokenKeys(self.seed, router.layer, sequence.to(device), pos.to(device))
            scored = scored_routes(opened, router, logits, self.options, keys)
            policy = router.rule.log_policy(logits)
            own = scored.routes[:, 0]
            found[router.layer] = _Start(
                own, scored.better, route_log_policy(policy, own), route_log_policy(policy, scored.better)
            )
        return found

    @torch.no_grad()
    def evaluate(self, weights: Weights) -> Evaluation:
        """Every measure with these weights in the routers."""
        ce: list[Tensor] = []
        found: dict[str, list[Tensor]] = {name: [] for name in PER_TOKEN}
        loads = [torch.zeros(router.rule.n_experts, dtype=torch.float64) for router in self.routers]
        for rows, start in zip(chunks(self.source, AT_ONCE), self._start):
            opened = self.source.open(rows, weights)
            logits = {r.layer: r.logits(opened.inputs[r.layer], weights[r.layer]) for r in self.routers}
            ce.append(opened.own_ce(logits).double().cpu())
            by_layer = []
            for router, load in zip(self.routers, loads):
                routes = router.rule.route(logits[router.layer])[0]
                load += torch.bincount(routes[routes >= 0].cpu(), minlength=len(load))
                by_layer.append(_measures(router.rule.log_policy(logits[router.layer]), routes, start[router.layer]))
            for name, parts in found.items():
                parts.append(torch.stack([one[name] for one in by_layer], dim=-1).double().cpu())
        order = np.concatenate([rows.numpy() for rows in chunks(self.source, AT_ONCE)]).argsort()
        load = torch.stack(loads)
        return Evaluation(
            torch.cat(ce).numpy()[order],
            {name: torch.cat(parts).numpy()[order] for name, parts in found.items()},
            (load / load.sum(dim=-1, keepdim=True)).numpy(),
        )


def _measures(policy: Tensor, routes: Tensor, start: _Start) -> dict[str, Tensor]:
    """``[token]`` each, of one layer."""
    has_better = start.better[:, 0] != EMPTY
    margin = (route_log_policy(policy, start.better) - start.log_better) - (
        route_log_policy(policy, start.own) - start.log_own
    )
    preference = (margin.sign() + 1) / 2
    overlap = _shared(routes, start.better)
    found = {
        "changed": (_shared(routes, start.own) < 1).to(policy),
        "preference": preference,
        "adoption": (overlap == 1).to(policy),
        "overlap": overlap.to(policy),
    }
    for name in ("preference", "adoption", "overlap"):
        found[name] = found[name].masked_fill(~has_better, float("nan"))
    return found | {"entropy": torch.special.entr(policy.exp()).sum(dim=-1)}


def _shared(routes: Tensor, others: Tensor) -> Tensor:
    """``[token]``: the share of a route's experts that are in another of as many."""
    is_in = (routes.unsqueeze(-1) == others.unsqueeze(-2)).any(dim=-1) & (routes != EMPTY)
    return is_in.sum(dim=-1) / (routes != EMPTY).sum(dim=-1).clamp(min=1)
