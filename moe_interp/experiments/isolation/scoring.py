"""Scores of a batch of items with a layer's routing replaced: from a shared prefix, or one full pass each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_interp.engine.attention import can_fuse
from moe_interp.engine.memory import Memory, is_out_of_memory
from moe_interp.engine.policy import policy_of
from moe_interp.engine.recorded_pass import RecordedLayer
from moe_interp.engine.rerun import PrefixRunner, TargetPredictions
from moe_interp.experiments.expert_families import family_layers, of_layer
from moe_interp.experiments.inputs.items import ItemBatch
from moe_interp.experiments.isolation.variants import Mode, forced_rows, is_family, rows_hooks
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions import ablate_experts, force_experts, uniform_routing
from moe_interp.interventions.force import Mass
from moe_interp.stats.checks import FloatArray
from moe_interp.types import Hooks

NULL_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # nats; half precision: .1


class PrefixNotExactWarning(UserWarning):
    """A model whose layers cannot be started in the middle; it is scored by whole passes instead, which is slow."""


class PrefixScorer:
    """Every layer starts from the residual stream before it, many sets of experts at a time.

    The first batch is also resumed at every layer with nothing changed, at the first one in two stacked copies.
    ``null_difference`` is the largest distance of that to the plain pass, in nats; where it is more than rounding, or
    where the pass fails (infinite then), whole passes are run, and a warning says so.

    Args:
        moe: Attached hooks.
        mode: Whether sets of experts are forced or ablated.
        tokens: Tokens in one pass.
        memory: Of the run; where a pass does not fit, fewer sets are taken at a time.
    """

    def __init__(self, moe: MoEHooks, mode: Mode, tokens: int, memory: Memory | None = None) -> None:
        self.moe, self.mode, self.tokens = moe, mode, tokens
        self.memory = Memory(moe) if memory is None else memory
        self.prefixes: dict[int, RecordedLayer] = {}
        self.runner = PrefixRunner(moe)
        self.null_difference: float | None = None
        self.resumes = True
        self._failure = ""

    def begin(self, batch: ItemBatch, layers: Sequence[int], hooks: Hooks) -> Tensor:
        """The natural pass: ``[read]`` log-probabilities."""
        self.batch, self.prefixes = batch, {}
        natural, self.prefixes = self.runner.base(batch.tokens, batch.predictions, layers, hooks)
        if self.null_difference is None:
            self._check(natural, layers)
        return natural

    def sets(self, layer: int, sets: Sequence[Any], mass: Mass, natural_mass: Any) -> Tensor:
        """``[read, set]``: the answers' log-probabilities with each set of experts."""
        rows, per_pass = self.batch.tokens.shape[0], self._per_pass()

        def score(chunk: Sequence[Any]) -> Sequence[Tensor]:
            each = [chosen for chosen in chunk for _ in range(rows)]
            hooks = rows_hooks(self.moe, self.mode, layer, each, total_mass(each, mass, natural_mass, len(chunk)))
            return self._run(layer, len(chunk), hooks).chunk(len(chunk))

        columns: list[Tensor] = []
        for start in range(0, len(sets), per_pass):
            chunk = sets[start : start + per_pass]
            parts = self.memory.in_parts(lambda part, chunk=chunk: score(chunk[part]), len(chunk), "sets of experts")  # type: ignore[misc]
            columns += [column for part in parts for column in part]
        return torch.stack(columns, dim=-1)

    def uniform(self, layers: Sequence[int], mass: Mass) -> Tensor:
        """``[read]``: the answers' log-probabilities under uniform routing of these layers."""
        return self._run(layers[0], 1, uniform_routing(self.moe, layers, mass))

    def _per_pass(self) -> int:
        return max(1, self.tokens // self.batch.tokens.numel())

    def _run(self, layer: int, copies: int, hooks: Hooks) -> Tensor:
        batch = self.batch
        tokens, predictions = batch.tokens.repeat(copies, 1), batch.predictions.repeat(copies, batch.tokens.shape[0])
        if not self.resumes:
            return self.runner.base(tokens, predictions, [], hooks)[0]
        return self.runner.resume(layer, self.prefixes[layer], copies, tokens, predictions, hooks)

    def _check(self, natural: Tensor, layers: Sequence[int]) -> None:
        dtype = next(self.moe.bridge.original_model.parameters()).dtype
        tolerance = policy_of(self.moe).fused_tolerance
        if tolerance is not None and can_fuse(self.moe):
            self.runner.fuses_attention = True
            self.null_difference = self._distance(natural, layers)
            if self.null_difference <= tolerance:
                return
            self.runner.fuses_attention = False
        self.null_difference = self._distance(natural, layers)
        if not self.null_difference <= NULL_TOLERANCE.get(dtype, 0.1):
            self.resumes = False
            warnings.warn(
                f"Starting {type(self.moe.bridge.original_model).__name__} in the middle changes its predictions by "
                f"{self.null_difference:.1e} nats{self._failure}: every variant runs a whole forward pass instead.",
                PrefixNotExactWarning,
                stacklevel=2,
            )

    def _distance(self, natural: Tensor, layers: Sequence[int]) -> float:
        """The largest change of a prediction by resuming at each layer with nothing changed; infinite if it fails."""
        copies, self._failure = [min(2, self._per_pass()), *[1] * (len(layers) - 1)], ""

        def resumed(layer: int, part: slice) -> Tensor:
            n = part.stop - part.start
            return self._run(layer, n, []) - natural.repeat(n)

        try:
            found = [
                part
                for layer, n in zip(layers, copies)
                for part in self.memory.in_parts(partial(resumed, layer), n, "sets of experts")
            ]
        except Exception as error:  # whatever a model's layers miss that others before them have not handed on
            if is_out_of_memory(error):
                raise
            self._failure = f" ({type(error).__name__}: {error})"
            return float("inf")
        return float(torch.cat(found).abs().max())


def total_mass(rows: Sequence[Any], mass: Mass, natural: Any, copies: int) -> Any:
    """The forced experts' total weight in stacked copies of a batch: 1, or the natural one (None: of the running pass,
    which a family's earlier layers have changed)."""
    if mass == "one":
        return 1.0
    return None if is_family(rows[0]) else natural.repeat(copies, 1, 1)


def rounding(moe: MoEHooks) -> float:
    """What two passes of one input may differ by at the model's precision, in nats."""
    return NULL_TOLERANCE.get(next(moe.bridge.original_model.parameters()).dtype, 0.1)


class NaiveScorer:
    """The reference: ``run_with_hooks`` with the public interventions, one item and one set of experts at a time."""

    null_difference: float | None = 0.0

    def __init__(self, moe: MoEHooks, mode: Mode) -> None:
        self.moe, self.mode = moe, mode

    def begin(self, batch: ItemBatch, layers: Sequence[int], hooks: Hooks) -> Tensor:
        """The natural pass: ``[read]`` log-probabilities."""
        self.batch = batch
        with self.moe.bridge.hooks(fwd_hooks=list(hooks)):  # the routing of the whole, padded batch
            self.moe.bridge(batch.tokens)
        return self._each(lambda row: [])

    def sets(self, layer: int, sets: Sequence[Any], mass: Mass, natural_mass: Any) -> Tensor:
        """``[read, set]``."""
        return torch.stack([self._each(self._hooks(layer, s, mass, natural_mass)) for s in sets], dim=-1)

    def uniform(self, layers: Sequence[int], mass: Mass) -> Tensor:
        """``[read]``."""
        return self._each(lambda row: uniform_routing(self.moe, layers, mass))

    def _hooks(self, layer: int, chosen: Any, mass: Mass, natural_mass: Any) -> Any:
        if is_family(chosen):
            parts = [self._hooks(at, of_layer(chosen, at), mass, None) for at in family_layers([chosen])]
            return lambda row: [hook for part in parts for hook in part(row)]
        if self.mode == "ablate":
            return lambda row: ablate_experts(self.moe, layer, chosen)
        if len(chosen) == 1:
            return lambda row: force_experts(self.moe, layer, chosen[0], mass=mass)
        lengths = self.batch.length.tolist()

        def own_mass(row: int, length: int) -> Any:
            return None if natural_mass is None else natural_mass[row : row + 1, :length]

        return lambda row: forced_rows(self.moe, layer, [chosen], 1.0 if mass == "one" else own_mass(row, lengths[row]))

    def _each(self, hooks_of: Any) -> Tensor:
        batch, found = self.batch, []
        for row, length in enumerate(batch.length.tolist()):
            logits = self.moe.bridge.run_with_hooks(batch.tokens[row : row + 1, :length], fwd_hooks=hooks_of(row))
            logits = logits if logits.dtype == torch.float64 else logits.float()
            mine = batch.predictions.row == row
            logp = torch.log_softmax(logits[0, batch.predictions.column[mine]], dim=-1)
            found.append(logp.gather(-1, batch.predictions.target[mine].unsqueeze(-1)).squeeze(-1))
        return torch.cat(found)


def by_item(logp: Tensor, predictions: TargetPredictions, n_rows: int) -> FloatArray:
    """``[read, ...]`` log-probabilities to ``[score, row, ...]``: the mean over the answer, and its first token."""
    values = logp.double()
    sums = values.new_zeros(n_rows, *values.shape[1:]).index_add_(0, predictions.row, values)
    counts = torch.bincount(predictions.row, minlength=n_rows)
    mean = sums / counts.view(-1, *[1] * (values.ndim - 1))
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    return torch.stack([mean, values[first]]).cpu().numpy()
