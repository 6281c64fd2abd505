"""What a bias on the router's logits can do, given what the family ranks by.

In the limit of an ever larger bias, an expert's score goes to the end of its range, and no further: a correction bias
that is added to the scores, or the choice of groups, may then still decide otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable, RoutingRule, ScoreRule, SoftmaxTopK


@dataclass(frozen=True)
class Limits:
    """Biased experts for which no finite bias of its sign is certain to have its way, with the reason.

    Attributes:
        up: Those promoted that a token may leave out all the same.
        down: Those suppressed that a token may use all the same.
    """

    up: dict[int, str]
    down: dict[int, str]


def limits(rule: RoutingRule, added: Tensor) -> Limits:
    """What a bias ``added`` ``[expert]`` on the logits cannot ensure: by intervals of the choice scores (derived).

    Rules that rank by the logits, or by scores in the same order, have no limits. Hash tables rank by nothing.
    """
    if isinstance(rule, HashTable) or not isinstance(rule, ScoreRule):
        return Limits({}, {})
    if rule.bias is None and (rule.group_score is None or rule.n_groups == rule.top_groups):
        return Limits({}, {})
    up: dict[int, str] = {}
    down: dict[int, str] = {}
    for expert in added.nonzero().flatten().tolist():
        ranking = _Ranking(rule, *_choice_bounds(rule, _without_rivals(rule, added, expert)))
        if added[expert] > 0 and (reason := ranking.may_miss(expert)):
            up[expert] = reason
        if added[expert] < 0 and ranking.may_take(expert):
            down[expert] = f"it keeps {ranking.low[expert]:.3g}, which others may stay below"
    return Limits(up, down)


def _without_rivals(rule: RoutingRule, added: Tensor, expert: int) -> Tensor:
    """The bias without the others of its sign where they are more than a token can use, or leave out, in any family."""
    same = added.sign() == added[expert].sign()
    if int(same.sum()) <= (rule.top_k if added[expert] > 0 else rule.n_experts - rule.top_k):
        return added
    same[expert] = False
    return added.masked_fill(same, 0.0)


def _choice_bounds(rule: ScoreRule, added: Tensor) -> tuple[Any, Any]:
    """The lowest and highest choice scores ``[expert]``, biased experts' logits being at plus or minus infinity."""
    up, down = added > 0, added < 0
    if isinstance(rule, SoftmaxTopK):  # the scores share 1: among those promoted, if any are
        some, alone = bool(up.any()), int(up.sum()) == 1
        high = up.double() if some else (~down).double()
        low = up.double() if alone else torch.zeros_like(added)
    else:
        ends = torch.full((2, rule.n_experts), float("inf"), dtype=torch.float32)
        ends[0] *= -1
        lowest, highest = rule.scores(ends).double().cpu()
        low, high = torch.where(up, highest, lowest), torch.where(down, lowest, highest)
    bias = 0.0 if rule.bias is None else rule.bias.detach().double().cpu()
    return (low + bias).numpy(), (high + bias).numpy()


class _Ranking:
    """The choice among experts whose scores lie between ``low`` and ``high``, in groups of which few are open."""

    def __init__(self, rule: ScoreRule, low: Any, high: Any) -> None:
        self.low, self.high, self.top_k = low, high, rule.top_k
        is_grouped = rule.group_score is not None and rule.n_groups > rule.top_groups
        self.n_groups, self.n_open = (rule.n_groups, rule.top_groups) if is_grouped else (1, 1)
        self.size = rule.n_experts // self.n_groups
        self.best = 1 if rule.group_score == "max" else 2  # experts that make a group's score

    def may_miss(self, expert: int) -> str:
        """Why an expert at its lowest score may not be chosen; empty if it always is."""
        own = expert // self.size
        others = [group for group in range(self.n_groups) if group != own]
        lowest = self._score(self.low[self._members(own)])
        if sum(self._score(self.high[self._members(group)]) > lowest for group in others) >= self.n_open:
            return "its group can be shut"
        above = self.high > self.low[expert]
        above[expert] = False
        counts = sorted(int(above[self._members(group)].sum()) for group in others)
        n_above = int(above[self._members(own)].sum()) + sum(counts[len(counts) - self.n_open + 1 :])
        return f"{n_above} others can reach more than its {self.low[expert]:.3g}" if n_above >= self.top_k else ""

    def may_take(self, expert: int) -> bool:
        """Whether an expert at its highest score may be chosen: its group open, and fewer than top-k others above."""
        own = expert // self.size
        others = [group for group in range(self.n_groups) if group != own]
        for beside in combinations(others, self.n_open - 1):
            excluded = [self._score(self.low[self._members(g)]) for g in others if g not in beside]
            needed = max(excluded, default=-np.inf)
            if sum(self._fewest_above(group, expert, needed) for group in (own, *beside)) < self.top_k:
                return True
        return False

    def _fewest_above(self, group: int, expert: int, needed: float) -> float:
        """The fewest of a group's experts that rank above ``expert`` where the group's score is the needed one."""
        members = [e for e in range(group * self.size, (group + 1) * self.size) if e != expert]
        value = self.high[expert]
        above = [self.high[e] for e in members if self.low[e] >= value]
        free = sorted((self.high[e] for e in members if self.low[e] < value), reverse=True)
        own = [value] if expert // self.size == group else []
        for raised in range(min(self.best, len(free)) + 1):
            rest = [min(high, value) for high in free[raised:]]
            if self._score(np.array([*above, *free[:raised], *rest, *own])) >= needed:
                return len(above) + raised
        return np.inf

    def _members(self, group: int) -> slice:
        return slice(group * self.size, (group + 1) * self.size)

    def _score(self, values: Any) -> float:
        return float(np.sort(values)[-self.best :].sum())
