"""Exact scores of counterfactual routes, by the way that serves them: a grid, or compact rows of branches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_interp.engine.branches import BranchRunner, say_not_compiled
from moe_interp.engine.grid.rows import GridRows, RowsOfSequence
from moe_interp.engine.grid.trial import can_run_grid
from moe_interp.engine.memory import Memory
from moe_interp.engine.policy import policy_of
from moe_interp.engine.recorded_pass import RecordedPass
from moe_interp.routes.branch_scores import LayerRoutes, ScoreRequest, UpperRoutes, block_outputs, branch_scores
from moe_interp.routes.plan import GridPlan, score_dtype
from moe_interp.routes.predictions import averaged_without_waiting, fused_averages, fused_log_probs, log_probs
from moe_interp.types import Hooks


def exact_scores(
    base: RecordedPass,
    routes: Mapping[int, LayerRoutes],
    wanted: Tensor,
    targets: Tensor,
    memory: Memory,
    averaged: Tensor | None = None,
    compile: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score routes by branches: as a grid where the policy takes one and the model can run it, else in compact rows.

    Args:
        base, routes, wanted, averaged: See :meth:`ScoreRequest.of`.
        targets, memory: See :func:`branch_scores`, also for what is returned.
        compile: Whether a grid's layers are compiled.
    """
    request = ScoreRequest.of(base, routes, wanted, averaged)
    plan = _grid_plan(base, request, memory, compile)
    if isinstance(plan, str):
        if compile:
            say_not_compiled(base.moe, plan)
        return branch_scores(base, request, targets, memory)
    n_at_once = plan.rows_at_once * wanted.shape[1]
    runner = BranchRunner(base, request.first, n_at_once, shares_keys=True, compile=compile)
    with torch.inference_mode(False), torch.no_grad(), runner as run:
        scorer = _GridScorer(base, request, plan, run, targets, memory)
        sequences = request.sequences.nonzero().flatten().tolist()
        memory.in_parts(lambda part: scorer.score(sequences[part]), len(sequences), "sequences of a grid")
    memory.say()
    if run.compiled is not None:
        run.compiled.say()
    return scorer.logp[:, :, 1:], scorer.logp[:, :, 0], scorer.entropy


def _grid_plan(base: RecordedPass, request: ScoreRequest, memory: Memory, compile: bool) -> GridPlan | str:
    """How a grid is packed; in words, why compact rows serve instead."""
    policy = policy_of(base.moe)
    if not policy.takes_grid(1.0, compiled=compile):
        return f"on {policy.device.type} they run in compact rows, which are not compiled"
    share = float(request.present.sum() / (request.sequences.sum() * request.present[0].numel()))
    if not policy.takes_grid(share, compiled=compile):
        return f"{share:.0%} of a grid's places are scored, so they run in compact rows, which are not compiled"
    if request.n_averaged and not base.ends_in_head:
        return "the model does more after its unembedding, so that predictions are averaged in compact rows"
    if not can_run_grid(base):
        return "this model's branches run in compact rows, as its attention is no function over keys that a grid serves"
    plan = GridPlan(base, request.first, request.present.shape[2], memory.bytes)
    return plan if plan.fits else "a grid does not fit into the memory budget, and compact rows are not compiled"


class _GridScorer:
    """Runs grids and fills in their scores, ``logp`` ``[batch, pos, route, target]``, and ``entropy`` ``[batch, pos]``
    of the mean prediction of those that are averaged."""

    def __init__(
        self,
        base: RecordedPass,
        request: ScoreRequest,
        plan: GridPlan,
        run: BranchRunner,
        targets: Tensor,
        memory: Memory,
    ) -> None:
        self.base, self.request, self.plan, self.run, self.memory = base, request, plan, run, memory
        self.targets, self.upper = targets, UpperRoutes(base, request.above)
        shape = (*request.present.shape, targets.shape[-1])
        self.logp = base.logits.new_full(shape, float("nan"), dtype=score_dtype(base.logits))
        self.entropy = self.logp.new_full(shape[:2], float("nan"))
        self.n_pos, self.n_routes = shape[1], shape[2]
        # what is scored is looked up once: the loops below wait for nothing
        places = request.present.any(dim=-1)
        self.places = {s: places[s].nonzero().flatten() for s in range(len(places))}

    def score(self, sequences: list[int]) -> None:
        """Score all that is asked of some sequences."""
        for start in range(0, len(sequences), self.plan.sequences_at_once):
            some = sequences[start : start + self.plan.sequences_at_once]
            block_out = self._block_out(some)
            found = self.memory.in_parts(
                lambda part, some=some, block_out=block_out: self._rows(some, block_out, part),  # type: ignore[misc]
                len(block_out),
                "rows of a grid",
            )
            if self.base.ends_in_head:
                states = found[0] if len(found) == 1 else torch.cat(found)
                for number, sequence in enumerate(some):
                    self._unembed(sequence, states[number * self.n_routes : (number + 1) * self.n_routes])

    def _block_out(self, sequences: list[int]) -> Tensor:
        """``[row, pos, d_model]``, the rows of a sequence together."""
        flat = torch.cat([torch.arange(s * self.n_pos, (s + 1) * self.n_pos) for s in sequences])
        tokens = flat.to(self.base.tokens.device)
        first = self.request.first
        parts = [
            block_outputs(self.base, first, self.request.routes[first], part)
            for part in tokens.split(self.plan.tokens_at_once)
        ]
        found = torch.cat(parts).view(len(sequences), self.n_pos, self.n_routes, -1)
        return found.transpose(1, 2).reshape(-1, self.n_pos, found.shape[-1])

    def _rows(self, sequences: list[int], block_out: Tensor, part: slice) -> Tensor:
        """Run some rows, a group at a time: ``[row, pos, width]`` final states; scored where logits come at once."""
        states = block_out.new_empty(0)
        for rows in self._groups(part):
            parts = list(self._parts(sequences, rows))
            grid = GridRows(self.base, parts, block_out[rows], self.plan.scores_at_once)
            found = self.run.through(grid, self._upper_hooks(sequences, rows))
            if not self.base.ends_in_head:
                self._score_logits(sequences, rows, found)
                continue
            if not len(states):
                states = found.new_empty(part.stop - part.start, *found.shape[1:])
            states[rows.start - part.start : rows.stop - part.start] = found
        return states

    def _groups(self, part: slice) -> Iterator[slice]:
        """Whole sequences, or equal parts of one: compiled code is for a shape."""
        n, most = self.n_routes, self.plan.rows_at_once
        needed = -(-n // most)
        n_groups = next((g for g in range(needed, 2 * needed + 1) if n % g == 0), needed)
        step = most // n * n if most >= n else -(-n // n_groups)
        start = part.start
        while start < part.stop:
            end = part.stop if most >= n else (start // n + 1) * n
            yield slice(start, min(start + step, end, part.stop))
            start = min(start + step, end, part.stop)

    def _parts(self, sequences: list[int], rows: slice) -> Iterator[RowsOfSequence]:
        for number, sequence in enumerate(sequences):
            first, stop = number * self.n_routes, (number + 1) * self.n_routes
            if (n := min(stop, rows.stop) - max(first, rows.start)) > 0:
                yield RowsOfSequence(sequence, n)

    def _owners(self, sequences: list[int], rows: slice) -> tuple[Tensor, Tensor]:
        """``[row]`` sequences and routes of some rows."""
        numbers = torch.arange(rows.start, rows.stop)
        owner = torch.tensor(sequences)[numbers // self.n_routes]
        device = self.base.tokens.device
        return owner.to(device), (numbers % self.n_routes).to(device)

    def _upper_hooks(self, sequences: list[int], rows: slice) -> Hooks:
        if not self.request.above:
            return []
        sequence, route = self._owners(sequences, rows)
        # where there is no such route, the standard one
        chosen = torch.where(self.request.present[sequence, :, route], route.unsqueeze(1), 0)
        token = sequence.unsqueeze(1) * self.n_pos + torch.arange(self.n_pos, device=sequence.device)
        return self.upper.hooks(token, chosen)

    def _unembed(self, sequence: int, states: Tensor) -> None:
        """Score the routes of a sequence's tokens from their final states ``[route, pos, width]``."""
        tokens_at_once = max(1, self.plan.logits_at_once // self.n_routes)
        for places in self.places[sequence].split(tokens_at_once):
            # shape: (route, token, width) -> (token, route, vocab)
            some = states[:, places].transpose(0, 1)
            logits = self.run.logits(some.flatten(0, 1)).view(*some.shape[:2], -1)
            targets = self.targets[sequence, places]
            if self.request.n_averaged:
                given = logits, targets, self.request.averaged[sequence, places]
                scores, entropy = self._compiled(fused_averages, *given) or averaged_without_waiting(*given)
                self.entropy[sequence, places] = entropy
            else:
                ids = targets.unsqueeze(1).expand(-1, self.n_routes, -1)
                found = self._compiled(fused_log_probs, logits, ids)
                scores = log_probs(logits, ids) if found is None else found
            is_there = self.request.present[sequence, places].unsqueeze(-1)
            self.logp[sequence, places] = scores.masked_fill(~is_there, float("nan"))

    def _compiled(self, function: Any, *args: Tensor) -> Any:
        """What a function gives, compiled; None without compiling, and where that fails."""
        return None if self.run.compiled is None else self.run.compiled.run(function, *args)

    def _score_logits(self, sequences: list[int], rows: slice, logits: Tensor) -> None:
        """Score rows from their logits ``[row, pos, vocab]``."""
        sequence, route = self._owners(sequences, rows)
        scores = log_probs(logits, self.targets[sequence])
        is_there = self.request.present[sequence, :, route].unsqueeze(-1)
        self.logp[sequence, :, route] = scores.masked_fill(~is_there, float("nan"))
