"""Counterfactual routes of every token of some sequences: would other experts have predicted the next token better?

The question of "When Are Experts Misrouted?", scored exactly: for each token and each MoE layer, the log-probability of
the realized next token with only this token's route at this layer changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from moe_interp.arch.offload import device_of
from moe_interp.checks import as_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import Memory, out_of_memory_in_words, tokens_per_pass
from moe_interp.engine.pass_inputs import check_budget
from moe_interp.engine.recorded_pass import RecordedPass, record_pass
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.counterfactual.data import CounterfactualPlan, counterfactual_dataset, stored_plan
from moe_interp.experiments.counterfactual.result import CounterfactualResult
from moe_interp.experiments.identity.model import model_identity, value_identity, weights_of
from moe_interp.experiments.identity.naming import model_name
from moe_interp.experiments.inputs.batches import batches_of_run
from moe_interp.experiments.inputs.repeats import distinct_sequences
from moe_interp.experiments.inputs.sequences import ScoredSequence, SequenceBatch, read_sequences
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.random_keys import uniform_keys
from moe_interp.progress import Report, reporting
from moe_interp.results import checksum
from moe_interp.results.cells import Arrays, CellStore
from moe_interp.routes import (
    GumbelTopK,
    Method,
    RouteSampler,
    SampledRoutes,
    TokenKeys,
    UniformSubsets,
    check_routes,
    score_from_base,
)
from moe_interp.routes.inputs import decoder_layers
from moe_interp.routes.score import router_logp
from moe_interp.types import EMPTY

SECOND = 16  # routes of the second draw that are scored besides the main draw's: they class tokens


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def counterfactual_routes(
    moe: MoEHooks,
    sequences: Sequence[Any],
    layers: Sequence[int] | None = None,
    n_routes: int = 32,
    sampler: RouteSampler | None = None,
    seed: int = 0,
    controls: bool = True,
    method: Method = "auto",
    memory_budget: int | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool | Report | None = None,
    compile: bool = False,
) -> CounterfactualResult:
    """Score sampled routes of every token at every MoE layer, one layer at a time.

    ``logp[t, l, r] = log p(next token | its context, token t takes route r at layer l)``, in nats; everything else as
    the model does it. Routes are of equal compute: as many experts as the router takes, weighted by the family's rule
    for the set, shared experts untouched.

    Args:
        moe: Attached hooks of a causal decoder.
        sequences: Texts, lists of ids, items, or mappings with ``id`` and ``text``, ``tokens`` or
            ``messages``, and ``mask`` or ``score_from`` for the tokens whose prediction is scored, such as the
            solution of a trajectory: see :func:`moe_interp.experiments.inputs.sequences.read_sequences`.
            Sequences of the same tokens count once, with a warning.
        layers: MoE layers; all by default.
        n_routes: Distinct routes a token, besides the standard one (or all there are).
        sampler: Where routes come from: ``GumbelTopK(tau=1.0)`` by default, the router's own distribution.
        seed: A token's routes depend on it, on the layer, on the tokens of its sequence and on its position alone.
        controls: Also score a second draw of routes (up to 16 that the main one lacks), as many uniform sets of experts
            as routes, and a next token drawn from the model's own prediction. They cost about 1.5 times as much again,
            and most tables need them.
        method: See :func:`moe_interp.score_routes`.
        memory_budget: Bytes for a forward pass, and for the branches; by default what is free (on a processor half of
            it). Where it does not do all the same, fewer branches and sequences are taken at a time, with a warning.
        store: Folder for finished cells (layer x batch of sequences): an interrupted run goes on from there. Cells of
            another model or state of it (see :func:`moe_interp.experiments.identity.model.model_identity`), of other
            sequences or options are refused.
        progress: See :func:`moe_interp.progress.reporting`.
        compile: Run layers under ``torch.compile`` where branches run as a grid: see :func:`moe_interp.score_routes`.
            Worth it from about a hundred thousand routes. Stores and results do not know of it.

    Raises:
        DataError: sequences that cannot be scored (the message names their id), or a log-probability that is not finite
            (sequence, position and route).
        HookError: a layer that is dense or does not exist.
        ConfigError: no routes, a sampler's pool no wider than a route, or options that this model cannot serve.
        ResultError: a store of another run, or a disk that refuses to be written.

    Source: "When Are Experts Misrouted?" for routes and scores; the controls are derived. What it does not show: what a
    route does to tokens after the next, and what routes at several layers do together.
    """
    chosen, memory_budget = decoder_layers(moe, layers), check_budget(memory_budget)
    read, merged = distinct_sequences(read_sequences(moe.bridge, sequences))
    sampler = GumbelTopK() if sampler is None else sampler
    _check_options(n_routes, chosen, sampler, seed, method)
    _check_pool(moe, chosen, sampler)
    n_routes, seed = int(n_routes), int(seed)
    batches = batches_of_run(
        read,
        lambda: _tokens_per_batch(moe, read, chosen, memory_budget),
        memory_budget,
        store,
        names=[sequence.id for sequence in read],
    )
    identity = model_identity(moe)
    plan = CounterfactualPlan(
        model=model_name(moe),
        weights=weights_of(identity),
        sequences=checksum([[s.id, s.tokens, s.is_scored] for s in read]),
        layers=chosen,
        sampler=repr(sampler),
        n_routes=n_routes,
        n_second=max(n_routes, min(2 * n_routes, SECOND)) if controls else 0,
        n_random=n_routes if controls else 0,
        seed=seed,
        method=method,
        batches=tuple(map(tuple, batches)),
    )
    cells = None
    if store is not None:
        identity["sampler"] = value_identity(sampler, "sampler")
        cells = CellStore(store, stored_plan(plan, len(read), identity))
    run = _Run(moe, plan, sampler, read, cells, Memory(moe, memory_budget), compile)
    finished: dict[tuple[int, Any], Arrays] = {}
    with reporting("scoring routes", progress) as report, torch.no_grad():
        total = len(plan.batches) * len(plan.layers)
        report(0, total)
        for number in range(len(plan.batches)):
            for key, cell in run.cells_of(number):
                finished[number, key] = cell
                report(sum(key != TOKENS for _, key in finished), total)
    data = counterfactual_dataset(moe, plan, read, finished)
    if merged:
        data.attrs["merged"] = merged
    return CounterfactualResult(data, config=asdict(plan), seeds=seed, data_checksum=plan.sequences)


TOKENS = "tokens"  # the cell of what a batch's tokens have at all layers alike


class _Run:
    """One run's cells, batch by batch."""

    def __init__(
        self,
        moe: MoEHooks,
        plan: CounterfactualPlan,
        sampler: RouteSampler,
        sequences: list[ScoredSequence],
        cells: CellStore | None,
        memory: Memory,
        compile: bool,
    ) -> None:
        self.moe, self.plan, self.sampler, self.sequences = moe, plan, sampler, sequences
        self.cells, self.memory, self.compile = cells, memory, compile

    def cells_of(self, number: int) -> Iterator[tuple[Any, Arrays]]:
        """What the batch's tokens have in common, then its layers; finished cells come from the store."""
        keys: list[Any] = [TOKENS, *self.plan.layers]
        stored = {key: None if self.cells is None else self.cells.load(number, key) for key in keys}
        todo = [key for key in keys if stored[key] is None]
        rows = [self.sequences[i] for i in self.plan.batches[number]]
        scored = self.memory.in_halves(rows, todo, "sequences", self._together, _joined)
        for key in keys:
            cell = stored[key]
            if cell is None:
                _, cell = next(scored)
                if self.cells is not None:
                    self.cells.save(cell, number, key)
            yield key, cell

    def _together(self, rows: list[ScoredSequence], keys: list[Any]) -> Iterator[tuple[Any, Arrays]]:
        if not keys:
            return
        batch = SequenceBatch.build(rows, device_of(self.moe.bridge.original_model))
        base = record_pass(self.moe, batch.tokens, [key for key in keys if key != TOKENS], batch.mask)
        targets, in_common = self._targets(base, batch)
        for key in keys:
            yield key, in_common if key == TOKENS else self._layer(base, batch, targets, key)

    def _targets(self, base: RecordedPass, batch: SequenceBatch) -> tuple[Tensor, Arrays]:
        """``[row, pos, target]`` ids: the realized next token and one drawn from the prediction."""
        wanted = batch.wanted
        realized = batch.tokens.roll(-1, dims=1)
        own = realized.clone()
        logp = torch.empty(int(wanted.sum()), 2, dtype=torch.float64)
        entropy, top = torch.empty(len(logp), dtype=torch.float64), torch.empty_like(logp)
        row, pos = wanted.nonzero().unbind(-1)
        uniform = uniform_keys(pos, 1, self.plan.stream("own"), batch.keys[row])[:, 0]
        for part in torch.arange(len(logp)).split(1024):  # in double precision, so few at a time
            at = row[part], pos[part]
            policy = base.logits[at].double().log_softmax(dim=-1)
            cumulated = policy.exp().cumsum(dim=-1)
            drawn = torch.searchsorted(cumulated, (uniform[part] * cumulated[:, -1]).unsqueeze(-1))
            own[at] = drawn[:, 0].clamp(max=policy.shape[-1] - 1)
            entropy[part] = -torch.special.xlogy(policy.exp(), policy.exp()).sum(dim=-1).cpu()
            logp[part] = policy.gather(-1, torch.stack([realized[at], own[at]], dim=-1)).cpu()
            best = policy.max(dim=-1)
            top[part] = torch.stack([best.values, (best.indices == realized[at]).double()], dim=-1).cpu()
        _refuse_non_finite(logp[:, 0], batch, row, pos)
        arrays = {"logp_standard": logp[:, 0], "logp_own_standard": logp[:, 1], "entropy": entropy}
        arrays |= {"logp_top": top[:, 0], "is_top": top[:, 1].bool()}
        return torch.stack([realized, own], dim=-1), {name: value.numpy() for name, value in arrays.items()}

    def _layer(self, base: RecordedPass, batch: SequenceBatch, targets: Tensor, layer: int) -> Arrays:
        """One layer's routes and scores, of the batch's scored tokens in flat order."""
        plan, wanted = self.plan, batch.wanted
        main = self._sample(base, batch, layer, "main", self.sampler, plan.n_routes)
        drawn = main.indices
        if plan.n_second:
            second = self._sample(base, batch, layer, "second", self.sampler, plan.n_second)
            random = self._sample(base, batch, layer, "random", UniformSubsets(), plan.n_random).indices
            others = torch.cat([first_new(second.indices, main.indices), random], dim=1)
            again = matches(others, main.indices)
            # a route that the main draw has as well is not scored twice
            drawn = torch.cat([main.indices, others.masked_fill((again >= 0).unsqueeze(-1), EMPTY)], dim=1)
        routes = drawn.new_full((*wanted.shape, *drawn.shape[1:]), EMPTY)
        routes[wanted] = drawn
        kept = targets if plan.n_second else targets[..., :1]
        given = {layer: check_routes(base, layer, routes)}
        averaged = _averaged(wanted, drawn.shape[1], plan) if plan.n_second else None
        scores = score_from_base(
            base, given, wanted, kept, plan.method, self.memory, batch.names, averaged, self.compile
        )
        logp, policy, n = scores.logp[wanted], scores.router_logp[wanted], plan.n_routes
        standard = check_routes(base, layer, base.indices[layer].unsqueeze(2))
        cell = {
            "logp": logp[:, :n, 0],
            "router_logp": policy[:, :n],
            "route": main.indices.to(torch.int16),
            "exhausted": main.is_exhausted,
            "heating": main.temperature_factor.float(),
            "logp_null": scores.logp_null[wanted][:, 0],
            "router_logp_standard": router_logp(base, {layer: standard})[wanted][:, 0],
            "standard_route": base.indices[layer][wanted].to(torch.int16),
            "is_slow": torch.tensor(scores.method == "naive"),
        }
        if plan.n_second:
            cell |= _controls(logp, policy, again, n, plan.n_second)
            cell["logp_own_null"] = scores.logp_null[wanted][:, 1]
            assert scores.mean_entropy is not None
            cell["entropy_second"] = scores.mean_entropy[wanted]
            share = second.share_other
            cell["second_share"] = torch.ones(len(logp)) if share is None else share.float()
        return {name: value.cpu().numpy() for name, value in cell.items()}

    def _sample(
        self, base: RecordedPass, batch: SequenceBatch, layer: int, stream: str, sampler: RouteSampler, n_routes: int
    ) -> SampledRoutes:
        """Routes ``[token, route, slot]`` of the scored tokens."""
        row, pos = batch.wanted.nonzero().unbind(-1)
        keys = TokenKeys(self.plan.stream(stream), layer, batch.keys[row], pos)
        ranking = self.moe.spec(layer).rule.choice_logits(base.router_logits[layer])[batch.wanted]
        return sampler.sample(ranking, base.indices[layer][batch.wanted], n_routes, keys)


def _joined(parts: list[Arrays]) -> Arrays:
    """The cell of all sequences, from those of some each: tokens are on the first axis, where there are any."""
    joined: Arrays = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        joined[name] = np.asarray(np.any(values)) if name == "is_slow" else np.concatenate(values)
    return joined


def matches(routes: Tensor, known: Tensor) -> Tensor:
    """``[token, route]``: the number of the known route ``[token, known, slot]`` that is the same set, or -1."""
    left, right = routes.sort(dim=-1).values, known.sort(dim=-1).values
    found = torch.full(routes.shape[:2], -1, dtype=torch.int64, device=routes.device)
    for index in range(known.shape[1]):
        is_same = (left == right[:, index : index + 1]).all(dim=-1) & (right[:, index, -1:] != EMPTY)
        found[is_same] = index
    return found


def first_new(routes: Tensor, known: Tensor, n: int = SECOND) -> Tensor:
    """``[token, route, slot]`` with only the first ``n`` of those that are not known kept, and all that are."""
    is_new = matches(routes, known) < 0
    return routes.masked_fill((is_new & (is_new.cumsum(dim=1) > n)).unsqueeze(-1), EMPTY)


def _averaged(wanted: Tensor, n_drawn: int, plan: CounterfactualPlan) -> Tensor:
    """``[row, pos, route]``: the second draw's routes but its first, which a control compares with the standard one."""
    averaged = torch.zeros(*wanted.shape, n_drawn, dtype=torch.bool, device=wanted.device)
    averaged[:, :, plan.n_routes + 1 : plan.n_routes + plan.n_second] = True
    return averaged


def _controls(logp: Tensor, policy: Tensor, again: Tensor, n: int, n_second: int) -> dict[str, Tensor]:
    """Scores of the second and the uniform draw, with those of the routes that the main draw has as well."""

    def whole(scores: Tensor) -> Tensor:
        return torch.where(again >= 0, scores[:, :n].gather(1, again.clamp(min=0)), scores[:, n:])

    realized, own = whole(logp[..., 0]), whole(logp[..., 1])
    return {
        "logp_second": realized[:, :n_second],
        "router_logp_second": whole(policy)[:, :n_second],
        "second_route": again[:, :n_second].to(torch.int16),
        "logp_random": realized[:, n_second:],
        "logp_own": logp[:, :n, 1],
        "logp_own_second": own[:, :n_second],
    }


def _check_options(n_routes: int, layers: Sequence[int], sampler: RouteSampler, seed: int, method: str) -> None:
    if (as_whole(n_routes) or 0) < 1 or not layers:
        given = f"n_routes={n_routes!r} and {len(layers)} layers"
        raise ConfigError(given, "at least one route a token, and a layer", "Raise n_routes, or name a layer.")
    if isinstance(sampler, type) or not hasattr(sampler, "sample"):
        raise ConfigError(f"sampler={sampler!r}", "a sampler, such as GumbelTopK()", "Make one, with its brackets.")
    number = as_whole(seed)
    if number is None or not -(2**63) <= number < 2**63:
        raise ConfigError(f"seed={seed!r}", "a whole number of 64 bits", "Choose a smaller seed.")
    if method not in get_args(Method):
        raise ConfigError(f"method={method!r}", f"one of {get_args(Method)}", 'Use "auto".')


def _check_pool(moe: MoEHooks, layers: Sequence[int], sampler: RouteSampler) -> None:
    """Refuse a pool in which a token has no other route than its standard one."""
    top_k = max(moe.spec(layer).top_k for layer in layers)
    if isinstance(sampler, GumbelTopK) and sampler.pool is not None and sampler.pool <= top_k:
        given, expected = f"pool={sampler.pool} of a model that takes {top_k} experts a token", f"more than {top_k}"
        raise ConfigError(given, expected, "Widen the pool, or leave it out.")


def _tokens_per_batch(
    moe: MoEHooks, sequences: list[ScoredSequence], layers: Sequence[int], memory_budget: int | None
) -> int:
    """As many tokens as a forward pass may have, of which a third for logits at the widest.

    By default half of what is free is left to the branches.
    """
    budget = Memory(moe).bytes // 2 if memory_budget is None else memory_budget
    lengths = [len(sequence) for sequence in sequences]
    # a base pass keeps each layer's input, keys and values, and of a layer to score what its modules answered
    kept = {"kept_layers": len(moe.bridge.blocks) + len(layers), "kept_tokens": sum(lengths)}
    tokens = tokens_per_pass(moe, max(lengths), budget, **kept)
    vocabulary = int(getattr(moe.bridge.cfg, "d_vocab", 0) or 1)
    return max(max(lengths), min(tokens, budget // (12 * vocabulary)))


def _refuse_non_finite(logp: Tensor, batch: SequenceBatch, row: Tensor, pos: Tensor) -> None:
    bad = (~logp.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise DataError(
            f"log-probability {float(logp[bad[0]])} of sequence {batch.names[int(row[bad[0]])]!r}, position "
            f"{int(pos[bad[0]])} under the standard route",
            "finite log-probabilities",
            "Look for overflow in the model at this number format, or leave the sequence out.",
        )
