"""Samplers: counterfactual routes of equal compute for every token.

A token's draws depend on the seed, the layer, the sequence's number and the position in the unpadded sequence alone:
not on how tokens are batched or padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, repeat
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor

from moe_interp.errors import ConfigError, DataError
from moe_interp.interventions.random_keys import uniform_keys
from moe_interp.types import EMPTY

_MOST_SUBSETS = 100_000
_DRAWS_AT_ONCE = 2**23  # uniform numbers in memory at a time
_FIRST = (32, 32, 64, 128, 256, 512, 512, 448)  # draws, block by block, at the sampler's temperature
_DRAWS_AT_HIGHER = (512, 512)  # and at each higher one
_DOUBLINGS = 12  # of the temperature; after that experts are drawn uniformly


@dataclass(frozen=True, eq=False)
class SampledRoutes:
    """Distinct routes (as sets) other than the standard one, in the order they were drawn.

    The first m of them are those that a call with ``n_routes=m`` gives.

    Attributes:
        indices: ``[*token, route, slot]`` expert ids, best-ranked first; -1 throughout where there are no more routes.
        n_distinct: ``[*token]``, how many routes there are.
        is_exhausted: ``[*token]`` bool: fewer than asked for, because these are all there are.
        temperature_factor: ``[*token]``, what the temperature was multiplied by for the last of a token's routes: 1 but
            for routers so sure of their choice that other routes do not come up in 2,000 draws; infinite for experts
            drawn uniformly in the end.
        share_other: ``[*token]``, the share of the sampler's first draws that were another route than the standard one
            (which is left out above): an estimate of P(a draw differs from it) that does not depend on which routes
            the others were. None for a sampler that does not say.
    """

    indices: Tensor
    n_distinct: Tensor
    is_exhausted: Tensor
    temperature_factor: Tensor
    share_other: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TokenKeys:
    """What the tokens' random numbers are fixed by.

    Attributes:
        seed, layer: Integers.
        sequence: The sequences' numbers, ``[*token]`` or what broadcasts to it, such as ``[batch, 1]``.
        position: ``[*token]``, positions in the unpadded sequences.
    """

    seed: int
    layer: int
    sequence: Tensor
    position: Tensor

    def uniforms(self, rows: Tensor, n: int, stream: int) -> Tensor:
        """``[row, n]`` uniform numbers for some of the tokens (in flat order), from one of their streams."""
        position = self.position.reshape(-1)[rows]
        sequence = self.sequence.to(position).expand_as(self.position).reshape(-1)[rows]
        return uniform_keys(position, n, self.seed, self.layer, sequence, stream)


class RouteSampler(Protocol):
    """Exactly ``n_routes`` distinct routes other than the standard one for each token, or all there are."""

    def sample(self, choice_logits: Tensor, standard: Tensor, n_routes: int, keys: TokenKeys) -> SampledRoutes:
        """Sample routes.

        Args:
            choice_logits: ``[*token, expert]``, ``rule.choice_logits(router_logits)``: on the scale of
                log-probabilities, -inf for an expert that is shut.
            standard: ``[*token, slot]``, the routes the model takes.
            n_routes: Routes a token.
            keys: The tokens' random numbers.

        Raises:
            ConfigError: no route asked for, or a sampler that cannot serve this model.
        """
        ...


@dataclass(frozen=True)
class GumbelTopK:
    """Gumbel-top-k: the k largest of ``choice_logits / tau + Gumbel noise``.

    One drawn set has the law of k draws without replacement with probabilities ``softmax(choice_logits / tau)``
    (Plackett-Luce, summed over the set's orders); as tau -> 0 it is the standard route, except on layers that choose by
    token id. Repetitions and the standard route are then left out: what remains are the sets in the order they first
    came up, and their law is another.

    ``choice_logits`` are on the scale of log-probabilities in every family: the logits where a family takes their
    softmax, the log of its choice scores where it ranks by scores (sigmoids, or probabilities with a correction bias).
    At tau = 1 without bias and groups the experts of a route are drawn with the router's own probabilities.

    Attributes:
        tau: Temperature.
        pool: Draw among this many of the highest-ranked experts only; None for all.
    """

    tau: float = 1.0
    pool: int | None = None

    def __post_init__(self) -> None:
        is_tau = isinstance(self.tau, Real) and not isinstance(self.tau, bool) and 0 < self.tau < math.inf
        is_pool = self.pool is None or (isinstance(self.pool, Integral) and not isinstance(self.pool, bool))
        if not is_tau or not is_pool or (self.pool is not None and self.pool < 1):
            given = f"tau={self.tau!r} and pool={self.pool!r}"
            expected = "a finite tau > 0, and a pool of a whole number of experts (or None)"
            raise ConfigError(given, expected, "Correct the sampler; for uniform sets use UniformSubsets().")

    def draw(self, choice_logits: Tensor, uniforms: Tensor, top_k: int) -> Tensor:
        """Independent draws, before any is left out: ``[token, draw, slot]`` expert ids.

        Args:
            choice_logits: ``[token, expert]``.
            uniforms: ``[token, draw, expert]`` in (0, 1).
            top_k: Experts a route.
        """
        return _gumbel_top_k(self._pooled(choice_logits), uniforms, top_k, self.tau)

    def sample(self, choice_logits: Tensor, standard: Tensor, n_routes: int, keys: TokenKeys) -> SampledRoutes:
        """See :class:`RouteSampler`."""
        found = _Found(choice_logits, standard, n_routes)
        pooled = self._pooled(found.ranking)
        there_are = self._there_are(pooled, found)
        # draws and temperatures do not depend on n_routes: fewer routes are the first of more
        for stream, (n_draws, factor) in enumerate(_schedule()):
            rows = (found.count < there_are.clamp(max=n_routes)).nonzero().flatten()
            if factor > 1:
                found.add_all(rows[there_are[rows] <= n_routes], pooled)
                rows = rows[there_are[rows] > n_routes]
            if not len(rows):
                break
            for part in rows.split(max(1, _DRAWS_AT_ONCE // (n_draws * pooled.shape[-1]))):
                uniforms = keys.uniforms(part, n_draws * pooled.shape[-1], stream).view(len(part), n_draws, -1)
                drawn = _gumbel_top_k(pooled[part], uniforms, found.top_k, self.tau * factor)
                found.add(part, drawn)
                if stream == 0:
                    found.share_other[part] = found.is_other(part, drawn)
            found.temperature_factor[rows] = factor
        return found.result(there_are)

    def _pooled(self, choice_logits: Tensor) -> Tensor:
        if self.pool is None or self.pool >= choice_logits.shape[-1]:
            return choice_logits
        kept = choice_logits.topk(self.pool, dim=-1).indices
        outside = torch.ones_like(choice_logits, dtype=torch.bool).scatter(-1, kept, False)
        return choice_logits.masked_fill(outside, float("-inf"))

    def _there_are(self, pooled: Tensor, found: _Found) -> Tensor:
        """``[token]``, how many sets other than the standard one can come up (counted up to a ceiling)."""
        is_open = pooled > float("-inf")
        n_open = is_open.sum(dim=-1)
        if int(n_open.min()) < found.top_k:
            given, expected = f"{int(n_open.min())} experts to draw from", f"at least the {found.top_k} of a route"
            raise ConfigError(given, expected, "Widen the pool.")
        subsets = [min(math.comb(n, found.top_k), 2**40) for n in range(pooled.shape[-1] + 1)]
        is_among = is_open.gather(-1, found.standard.clamp(min=0)).all(dim=-1)
        return torch.tensor(subsets, device=pooled.device)[n_open] - is_among.long()


@dataclass(frozen=True)
class UniformSubsets:
    """Every set of k experts with equal probability, whatever the router says."""

    def sample(self, choice_logits: Tensor, standard: Tensor, n_routes: int, keys: TokenKeys) -> SampledRoutes:
        """See :class:`RouteSampler`."""
        _check_logits(choice_logits)
        # all perturbed alike: Gumbel noise alone ranks the experts uniformly
        drawn = GumbelTopK().sample(torch.zeros_like(choice_logits), standard, n_routes, keys)
        return replace(drawn, indices=_by_rank(drawn.indices, choice_logits))


@dataclass(frozen=True)
class OneSwap:
    """Neighbours of the standard route: one of its experts exchanged for one outside; k * (E - k) of them."""

    def sample(self, choice_logits: Tensor, standard: Tensor, n_routes: int, keys: TokenKeys) -> SampledRoutes:
        """See :class:`RouteSampler`."""
        found = _Found(choice_logits, standard, n_routes)
        n_tokens, n_experts = found.ranking.shape
        is_chosen = torch.zeros(n_tokens, n_experts, dtype=torch.bool, device=standard.device)
        is_chosen.scatter_(-1, found.standard, True)
        outside = (~is_chosen).nonzero()[:, 1].view(n_tokens, 1, -1)
        swapped = found.standard.unsqueeze(1).unsqueeze(1).repeat(1, found.top_k, outside.shape[-1], 1)
        for slot in range(found.top_k):
            swapped[:, slot, :, slot] = outside[:, 0]
        return found.pick(swapped.flatten(1, 2), keys)


@dataclass(frozen=True)
class AllSubsets:
    """All C(E, k) sets of experts, where they are few; a uniform draw of them where fewer routes are asked for."""

    def sample(self, choice_logits: Tensor, standard: Tensor, n_routes: int, keys: TokenKeys) -> SampledRoutes:
        """See :class:`RouteSampler`."""
        found = _Found(choice_logits, standard, n_routes)
        n_experts, n_subsets = choice_logits.shape[-1], math.comb(choice_logits.shape[-1], found.top_k)
        if n_subsets > _MOST_SUBSETS:
            raise ConfigError(
                f"all {n_subsets} sets of {found.top_k} of {n_experts} experts",
                f"at most {_MOST_SUBSETS}",
                "Use UniformSubsets() or GumbelTopK().",
            )
        subsets = torch.tensor(list(combinations(range(n_experts), found.top_k)), device=standard.device)
        return found.pick(subsets.expand(len(found.ranking), -1, -1), keys)


class _Found:
    """The distinct routes found so far for each token, besides its standard one."""

    def __init__(self, choice_logits: Tensor, standard: Tensor, n_routes: int) -> None:
        if n_routes < 1:
            raise ConfigError(f"{n_routes} routes a token", "at least one", "Raise the number of routes.")
        _check_logits(choice_logits)
        self.shape, self.top_k, self.n_routes = standard.shape[:-1], standard.shape[-1], n_routes
        self.ranking, self.standard = choice_logits.flatten(0, -2), standard.flatten(0, -2)
        n_tokens, n_experts = self.ranking.shape
        device = self.standard.device
        self.routes = self.standard.new_full((n_tokens, n_routes, self.top_k), EMPTY)
        self.count = torch.zeros(n_tokens, dtype=torch.int64, device=device)
        self.temperature_factor, self.share_other = (
            torch.ones(n_tokens, device=device),
            torch.zeros(n_tokens, device=device),
        )
        # a set's code is the sum of its experts' random 64-bit numbers: two sets agree with probability 2^-64
        numbers = torch.randint(-(2**62), 2**62, (n_experts,), generator=torch.Generator().manual_seed(0))
        self.numbers = numbers.to(device)
        self.standard_code = self.numbers[self.standard].sum(dim=-1, keepdim=True)

    def add(self, rows: Tensor, drawn: Tensor, is_valid: Tensor | None = None) -> None:
        """Take what is new of ``[row, draw, slot]``, in order, until a token has its number of routes."""
        codes = self.numbers[drawn].sum(dim=-1)
        known = torch.where(
            self.routes[rows, :, 0] == EMPTY, self.standard_code[rows], self.numbers[self.routes[rows]].sum(dim=-1)
        )
        is_new = _is_first(torch.cat([self.standard_code[rows], known, codes], dim=1))[:, 1 + self.n_routes :]
        is_new = is_new if is_valid is None else is_new & is_valid
        place = self.count[rows].unsqueeze(1) + is_new.cumsum(dim=1) - 1
        row, draw = (is_new & (place < self.n_routes)).nonzero().unbind(1)
        self.routes[rows[row], place[row, draw]] = drawn[row, draw]
        self.count[rows] = (self.count[rows] + is_new.sum(dim=1)).clamp(max=self.n_routes)

    def is_other(self, rows: Tensor, drawn: Tensor) -> Tensor:
        """``[row]``: the share of ``[row, draw, slot]`` that is not the standard route."""
        return (self.numbers[drawn].sum(dim=-1) != self.standard_code[rows]).float().mean(dim=1)

    def add_all(self, rows: Tensor, pooled: Tensor) -> None:
        """Take every set of experts that are open to a token, by descending sum of their logits."""
        if not len(rows):
            return
        values, by_rank = pooled[rows].sort(dim=-1, descending=True, stable=True)
        n_open = (values > float("-inf")).sum(dim=-1, keepdim=True)
        ranks = torch.tensor(list(combinations(range(int(n_open.max())), self.top_k)), device=rows.device)
        order = values[:, ranks].sum(dim=-1).argsort(dim=-1, descending=True, stable=True)
        sets = by_rank[:, ranks].gather(1, order.unsqueeze(-1).expand(-1, -1, self.top_k))
        self.add(rows, sets, (ranks.amax(dim=-1) < n_open).gather(1, order))

    def pick(self, candidates: Tensor, keys: TokenKeys) -> SampledRoutes:
        """A uniform draw of the distinct ``[token, candidate, slot]``, or all of them but the standard one."""
        there_are = (self.numbers[candidates].sum(dim=-1) != self.standard_code).sum(dim=-1)
        n = candidates.shape[1]
        self.share_other = there_are / max(n, 1)
        for rows in torch.arange(len(candidates), device=candidates.device).split(max(1, _DRAWS_AT_ONCE // max(n, 1))):
            # one more than asked for, as the standard route may be among them
            order = keys.uniforms(rows, n, 0).topk(min(self.n_routes + 1, n), dim=-1).indices
            self.add(rows, candidates[rows.unsqueeze(1), order])
        return self.result(there_are)

    def result(self, there_are: Tensor) -> SampledRoutes:
        return SampledRoutes(
            indices=_by_rank(self.routes, self.ranking).reshape(*self.shape, self.n_routes, self.top_k),
            n_distinct=self.count.reshape(self.shape),
            is_exhausted=(there_are < self.n_routes).reshape(self.shape),
            temperature_factor=self.temperature_factor.reshape(self.shape),
            share_other=self.share_other.reshape(self.shape),
        )


def _schedule() -> Iterator[tuple[int, float]]:
    """The draws of one block after another, and what the temperature is multiplied by in it."""
    yield from ((n, 1.0) for n in _FIRST)
    yield from ((n, 2.0**doubling) for doubling in range(1, _DOUBLINGS + 1) for n in _DRAWS_AT_HIGHER)
    yield from ((n, math.inf) for n in repeat(_DRAWS_AT_HIGHER[-1]))


def _gumbel_top_k(pooled: Tensor, uniforms: Tensor, top_k: int, tau: float) -> Tensor:
    """``[token, draw, slot]``: the largest of ``pooled / tau`` with Gumbel noise; experts at -inf never."""
    top = pooled.amax(dim=-1, keepdim=True)
    # below the best and bounded: a tiny tau makes no expert of the pool one that is shut
    logits = ((pooled - top).to(uniforms.dtype) / tau).clamp(min=-1e30) if tau < math.inf else torch.zeros_like(pooled)
    logits = logits.to(uniforms.dtype).masked_fill(pooled == float("-inf"), float("-inf"))
    gumbel = -torch.log(-torch.log(uniforms))
    return (logits.unsqueeze(1) + gumbel).topk(top_k, dim=-1).indices


def _check_logits(choice_logits: Tensor) -> None:
    """Refuse NaN and +inf; -inf shuts an expert."""
    bad = (choice_logits.isnan() | (choice_logits == float("inf"))).any(dim=-1).nonzero()
    if len(bad):
        place = tuple(bad[0].tolist())
        raise DataError(
            f"choice logits {choice_logits[place].tolist()} of token {place if len(place) > 1 else place[0]}",
            "finite numbers, or -inf for an expert that is shut",
            "Look for overflow in the model at this number format.",
        )


def _is_first(codes: Tensor) -> Tensor:
    """``[row, code]``: whether a code comes up for the first time in its row."""
    ordered, order = codes.sort(dim=-1, stable=True)
    is_repeat = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return ~torch.zeros_like(is_repeat).scatter(-1, order, is_repeat)


def _by_rank(routes: Tensor, ranking: Tensor) -> Tensor:
    """The slots of ``[*token, route, slot]`` by descending ``[*token, expert]``; empty slots last."""
    value = ranking.unsqueeze(-2).expand(*routes.shape[:-1], -1).gather(-1, routes.clamp(min=0))
    order = value.masked_fill(routes == EMPTY, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    return routes.gather(-1, order)
