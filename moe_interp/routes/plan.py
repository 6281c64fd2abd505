"""How branches are packed: which tokens are taken together, in what rows, and how many at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_interp.engine.grid.rows import holds_scores
from moe_interp.engine.memory import free_bytes, without_compiled
from moe_interp.engine.policy import policy_of
from moe_interp.engine.recorded_pass import RecordedPass
from moe_interp.errors import DataError
from moe_interp.routes.low_rank_unembed import is_cheaper

ROW_LENGTH = 64  # branches a row: they share a copy of their sequence's keys, and each pays for the others' own
_WORKER_BYTES = 2**25
_SCORE_PARTS = 3  # an attention score, what it is made of, and its share


class Plan:
    """The packing of one layer's branches within a memory budget.

    Attributes:
        row_length: Branches a row.
        workers: Groups of rows that run side by side.
        tokens_at_once, rows_at_once, logits_at_once: How many are held together.
        scores_at_once: Attention scores held together over shared keys.
        rank: At the last layer with many routes, the directions that a token's final states span; else 0.
        spans_at_once: Tokens whose routes are unembedded by their span together.

    Args:
        base, layer, n_routes: What is scored.
        memory_budget: In bytes; by default what is free.
        workers: Groups that may run side by side.
        shares_keys: Whether the branches will read their keys without copies.
        n_averaged: How many of a token's branches are averaged at most: what they give is held until all are there.

    Raises:
        DataError: the budget does not hold a single row.
    """

    def __init__(
        self,
        base: RecordedPass,
        layer: int,
        n_routes: int,
        memory_budget: int | None,
        workers: int = 1,
        shares_keys: bool = False,
        n_averaged: int = 0,
    ) -> None:
        self.n_pos = base.tokens.shape[1]
        self.shares_keys = shares_keys
        policy = policy_of(base.moe)
        budget = free_bytes(policy) if memory_budget is None else memory_budget
        self.row_length = min(ROW_LENGTH, n_routes * self.n_pos)
        token, row, logits = _token_bytes(base, layer, n_routes), self._row_bytes(base, layer), _logits_bytes(base)
        token += n_averaged * (base.moe.spec(layer).d_model * base.logits.element_size())
        token += 0 if base.ends_in_head else n_averaged * base.logits.shape[-1] * base.logits.element_size()
        score, one_row = (
            _SCORE_PARTS * base.logits.element_size() * self.shares_keys,
            _attention(base)[0] * self.row_length * self.n_pos,
        )
        least = 4 * max(token, row + score * one_row, logits)
        if least > budget:
            raise DataError(
                f"a memory budget of {budget} bytes",
                f"at least {least} bytes for this model and sequences of {self.n_pos} tokens",
                "Raise memory_budget, or score shorter sequences.",
            )
        at_once = policy.at_once
        self.tokens_at_once = min(budget // 4 // token, max(1, at_once.tokens_bytes // token))
        weight = next(base.moe.bridge.original_model.parameters())
        budget = max(without_compiled(budget, weight), least)
        # a thread also keeps what it has freed: little ones would together exceed the budget
        self.workers = min(
            workers, budget // 2 // (row + score * one_row), budget // 4 // logits, max(budget // _WORKER_BYTES, 1)
        )
        share = budget // self.workers
        self.scores_at_once = max(one_row, min(at_once.scores, share // 8 // max(score, 1)))
        rows = (share // 2 - score * self.scores_at_once) // row
        branches = at_once.branches if self.shares_keys else at_once.branches // 3
        self.rows_at_once = max(1, min(rows, branches // self.row_length))
        self.logits_at_once = min(share // 4 // logits, max(at_once.logits_bytes // logits, 64))
        # what the routes of a token can span at the last layer: its experts' outputs, its residual, a norm's centring
        spec = base.moe.spec(layer)
        rank = min(spec.n_experts, n_routes * spec.top_k) + 3
        self.spans_at_once = self.logits_at_once // (n_routes + rank)
        is_last = layer == len(base.blocks) - 1 and base.ends_in_head and self.spans_at_once > 0
        self.rank = rank if is_last and is_cheaper(n_routes, rank, spec.d_model, base.logits.dtype) else 0

    def chunks(self, wanted: Tensor) -> Iterator[Tensor]:
        """Flat token indices, by position, as many at a time as expert outputs fit."""
        place = wanted.nonzero()
        place = place[place[:, 1].argsort(stable=True)]
        yield from (place[:, 0] * self.n_pos + place[:, 1]).split(self.tokens_at_once)

    def rows(self, token: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``[row]`` sequences and ``[row, n]`` branch numbers: one sequence a row, rows sorted by their last position.

        A row that is not full repeats its first branch.
        """
        n = self.row_length
        order = (token // self.n_pos).argsort(stable=True)
        sequence, counts = torch.unique_consecutive(token[order] // self.n_pos, return_counts=True)
        rows_each = (counts + n - 1) // n
        # shape: (branch,): its number within its sequence, then its cell in the table of rows
        within = torch.arange(len(order), device=token.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        cell = (rows_each.cumsum(0) - rows_each).repeat_interleave(counts) * n + within
        table = torch.full((int(rows_each.sum()) * n,), -1, device=token.device)
        table[cell] = order
        table = table.view(-1, n)
        table = torch.where(table < 0, table[:, :1], table)
        by_end = (token[table] % self.n_pos).amax(dim=-1).argsort(stable=True)
        owner = sequence.repeat_interleave(rows_each)
        # equal groups, as many for each worker: a last small one would use the machine badly
        rounds = -(-len(table) // (self.rows_at_once * self.workers))
        n_groups = min(rounds * self.workers, len(table))
        for group in by_end.tensor_split(n_groups):
            together = group[owner[group].argsort(stable=True)]  # rows of one sequence read the same keys
            yield owner[together], table[together]

    def _row_bytes(self, base: RecordedPass, layer: int) -> int:
        """What a row's branches hold, and their mask; without shared keys also copies of these and scores."""
        branch, size, heads = _branch_bytes(base, layer), base.logits.element_size(), _attention(base)[0]
        if self.shares_keys:
            return self.row_length * (branch + self.n_pos * size)
        cached = [(k.shape[1] + heads) * (k.shape[-1] + v.shape[-1]) for k, v in base.cache.recorded.values()]
        scores = heads * self.row_length * (2 * size + 8)
        return self.row_length * branch + (self.n_pos + self.row_length) * (scores + max(cached, default=0) * size)


class GridPlan:
    """The packing of one layer's branches as a grid.

    Attributes:
        fits: Whether a grid of one sequence fits into the memory at all.
        tokens_at_once: Whose block outputs are computed together.
        sequences_at_once: Whose block outputs and final states are held together.
        rows_at_once: Rows of a group.
        logits_at_once: Branches that are unembedded together.
        scores_at_once: Attention scores held together where no kernel serves.

    Args:
        base, layer, n_routes: What is scored.
        memory_budget: In bytes.
    """

    def __init__(self, base: RecordedPass, layer: int, n_routes: int, memory_budget: int) -> None:
        at_once, n_pos, size = policy_of(base.moe).at_once, base.tokens.shape[1], base.logits.element_size()
        width, heads = base.moe.spec(layer).d_model, _attention(base)[0]
        # block outputs, twice while they are brought into order, and final states
        kept = n_routes * 3 * width * size * n_pos
        token, logits = _token_bytes(base, layer, n_routes), _logits_bytes(base)
        row = n_pos * _grid_branch_bytes(base, layer)
        quarter, half = memory_budget // 4, memory_budget // 2
        score = _SCORE_PARTS * score_dtype(base.logits).itemsize if holds_scores(base, layer) else 0
        one_row = heads * n_pos * n_pos
        self.scores_at_once = max(one_row, min(at_once.scores, half // 4 // max(score, 1)))
        rows = (half - score * self.scores_at_once) // row
        self.sequences_at_once = min(quarter // kept, max(1, at_once.tokens_bytes // kept))
        self.tokens_at_once = min(half // token, max(1, at_once.tokens_bytes // token))
        self.logits_at_once = min(quarter // logits, max(at_once.logits_bytes // logits, 64))
        self.rows_at_once = min(rows, max(1, at_once.branches // n_pos))
        self.fits = min(rows, self.sequences_at_once, self.tokens_at_once, self.logits_at_once) > 0


# upper estimates of what is held at once ----------------------------------------------------------------------------
def _token_bytes(base: RecordedPass, layer: int, n_routes: int) -> int:
    """A token's expert outputs, and its routes' mixing weights and block outputs."""
    spec = base.moe.spec(layer)
    width = spec.d_model + n_routes
    return (spec.n_experts * (width + spec.d_expert) + 4 * n_routes * spec.d_model) * base.logits.element_size()


def _branch_bytes(base: RecordedPass, layer: int) -> int:
    """A branch's residuals, expert rows, queries, keys and values."""
    spec, size = base.moe.spec(layer), base.logits.element_size()
    heads, widest = _attention(base)
    branch = (12 * spec.d_model + 3 * spec.top_k * (spec.d_expert + spec.d_model) + 2 * heads * widest) * size
    return branch + (0 if base.ends_in_head else _logits_bytes(base))


def _grid_branch_bytes(base: RecordedPass, layer: int) -> int:
    """As :func:`_branch_bytes`, with what the merge of a grid's attention holds: products, values, logarithms."""
    heads, widest = _attention(base)
    return _branch_bytes(base, layer) + heads * (2 * widest * base.logits.element_size() + 32)


def _attention(base: RecordedPass) -> tuple[int, int]:
    """The number of query heads, and the widest key and value of one together."""
    model: Any = base.moe.bridge.original_model
    heads = int(getattr(model.config.get_text_config(), "num_attention_heads", 1))
    return heads, max((k.shape[-1] + v.shape[-1] for k, v in base.cache.recorded.values()), default=0)


def _logits_bytes(base: RecordedPass) -> int:
    """One branch's logits: on a processor at their own width and twice at that of the scores, elsewhere twice."""
    size = base.logits.element_size()
    each = size + 2 * score_dtype(base.logits).itemsize if base.logits.is_cpu else 2 * size
    return base.logits.shape[-1] * each


def score_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
