"""What a router has learned, on tokens that it was not tuned on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from moe_interp.experiments.router_tuning.objectives import route_log_policy
from moe_interp.experiments.router_tuning.options import TuningOptions
from moe_interp.experiments.router_tuning.routers import TunedRouter, Weights
from moe_interp.experiments.router_tuning.step import scored_routes
from moe_interp.experiments.router_tuning.token_sources.tokens import TokenSource, chunks
from moe_interp.processes import accelerator, gathered
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


_Part = tuple[NDArray[np.int64], NDArray[np.float64], dict[str, NDArray[np.float64]], Tensor]


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
        processes: Those that share the run; accelerate's by default.
    """

    def __init__(
        self,
        source: TokenSource,
        routers: tuple[TunedRouter, ...],
        start: Weights,
        options: TuningOptions,
        seed: int,
        processes: Accelerator | None = None,
    ) -> None:
        self.processes = accelerator() if processes is None else processes
        self.source, self.routers, self.options, self.seed = source, routers, options, seed
        parts = list(chunks(source, AT_ONCE))[self.processes.process_index :: self.processes.num_processes]
        self._start = [(rows, self._before(rows, start)) for rows in parts]

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
        """Every measure with these weights in the routers; of several processes each takes its part of the tokens."""
        found = gathered(self.processes, [self._measured(*part, weights) for part in self._start])
        order = np.concatenate([rows for rows, _, _, _ in found]).argsort()
        load = torch.stack([loads for _, _, _, loads in found]).sum(dim=0)
        return Evaluation(
            np.concatenate([ce for _, ce, _, _ in found])[order],
            {name: np.concatenate([measures[name] for _, _, measures, _ in found])[order] for name in PER_TOKEN},
            (load / load.sum(dim=-1, keepdim=True)).numpy(),
        )

    def _measured(self, rows: Tensor, start: dict[int, _Start], weights: Weights) -> _Part:
        """Some tokens: which they are, their cross-entropies, their measures, and how often experts are taken."""
        opened = self.source.open(rows, weights)
        logits = {r.layer: r.logits(opened.inputs[r.layer], weights[r.layer]) for r in self.routers}
        by_layer, loads = [], []
        for router in self.routers:
            routes = router.rule.route(logits[router.layer])[0]
            loads.append(torch.bincount(routes[routes >= 0].cpu(), minlength=router.rule.n_experts).double())
            by_layer.append(_measures(router.rule.log_policy(logits[router.layer]), routes, start[router.layer]))
        measures = {
            name: torch.stack([one[name] for one in by_layer], dim=-1).double().cpu().numpy() for name in PER_TOKEN
        }
        return rows.numpy(), opened.own_ce(logits).double().cpu().numpy(), measures, torch.stack(loads)


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
