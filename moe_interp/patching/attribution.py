"""Attribution patching: one forward and one backward pass estimate the effect of every expert at every position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe_interp.checks import check_seed, check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import eval_mode
from moe_interp.engine.memory import Memory, out_of_memory_in_words
from moe_interp.engine.pass_inputs import check_memory, check_tokens
from moe_interp.errors import ConfigError, DataError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching.attribution_result import AttributionResult, Cells
from moe_interp.patching.inputs import PatchInputs, check_patch_inputs
from moe_interp.patching.metric import Metric, Metrics
from moe_interp.patching.passes import Cell, CorruptedRun
from moe_interp.patching.patches import ContributionsPatch, ExpertOutputsPatch, SlotsPatch
from moe_interp.patching.result import EXAMPLE, METRIC, effect_dataset
from moe_interp.progress import Report, reporting
from moe_interp.types import Layer

READS = ("expert_out", "expert_indices", "expert_weights")
Estimate = Literal["gradient", "integrated"]
Activations = dict[tuple[str, Layer], Tensor]


def attribution(
    moe: MoEHooks,
    clean_tokens: Any,
    corrupted_tokens: Any,
    metric: Metric | Mapping[str, Metric],
    method: Estimate = "gradient",
    layers: Layer | Sequence[Layer] | None = None,
    *,
    quantity: Literal["contribution", "output"] = "contribution",
    steps: int = 8,
    audit: int = 32,
    attention_mask: Tensor | None = None,
    memory_budget: int | None = None,
    seed: int = 0,
    progress: bool | Report | None = None,
    **options: Any,
) -> AttributionResult:
    """Estimate the effect of patching each expert at each position, to first order: layer x expert x pos.

    With c(l, e, t) the weighted output of expert e at token t, zero where a run does not use it, and g(l, t) the
    gradient of the metric with respect to the layer's routed output on the corrupted run,

        estimate(l, e, t) = g(l, t) . (c_clean(l, e, t) - c_corrupted(l, e, t)),

    in the metric's unit; positive where taking the clean run's contribution raises the metric. What it estimates is the
    cell of ``expert_out(quantity="contribution")`` at that position alone. Summed over the experts of a token it is the
    estimate for its whole routed output. The gradient passes through later routers' weights, not through their choices:
    effects of an expert that is chosen or not further up are missing, and so is curvature. A zero says that neither run
    uses the expert there, or that the gradient vanishes; a saturated metric has small gradients whatever the effects.

    ``method="integrated"``: g is the mean of the gradients at ``steps`` midpoints of the straight path from the
    corrupted to the clean routed output *of that layer*, all else as the corrupted run has it. The estimates of a layer
    then add up to the exact effect of patching its whole routed output, but for the error of the midpoint rule and for
    jumps where a later router changes its choice on the way, at the cost of ``steps`` forward and backward passes a
    layer. (EAP-IG instead moves the embeddings: on an interpolated input a router chooses experts that neither prompt
    uses.)

    Args:
        moe: Attached hooks.
        clean_tokens, corrupted_tokens: ``[batch, pos]`` ids (or texts) of the same shape, padded alike.
        metric: Differentiable, from logits ``[batch, pos, vocab]`` to a number, or to one an example ``[batch]``: then
            estimates are kept by example. Or several of one form, by name.
        method: "gradient" or "integrated".
        layers: MoE layers; all by default.
        quantity: "contribution", as above. "output": only the outputs, where both runs use the expert:
            g . w_corrupted (E_clean - E_corrupted), the cell of ``expert_out(quantity="output")``.
        steps: Of "integrated".
        audit: How many cells are patched exactly, to say how well the estimates agree: see
            :meth:`AttributionResult.agreement`. 0 leaves that out.
        attention_mask: ``[batch, pos]`` of both, 0 at padding, which is never patched.
        memory_budget: Bytes for the exact passes; by default what is free.
        seed: Of the audited cells.
        progress: As :func:`moe_interp.progress.reporting` takes it.
        options: Further keyword arguments of the forward pass.

    Raises:
        DataError: prompts of different length, or tokens that the model cannot read.
        HookError: a layer that is not there, or attached with ``expert_outputs=False``.
        ConfigError: a metric of another form or without a gradient, or options out of range.

    Source: Nanda (2023), attribution patching; Sundararajan et al. (2017) for the path; at experts derived.
    TransformerLens' ``attribution_patch`` cannot serve: its nodes are embeddings, heads and whole MLPs, and its
    ``cache_activation_and_gradient`` takes no attention mask and gives the gradient of one scalar, not of each example.
    """
    if method not in ("gradient", "integrated") or quantity not in ("contribution", "output"):
        given = f"method={method!r}, quantity={quantity!r}"
        raise ConfigError(given, "gradient or integrated, of the contribution or the output", "Choose one of these.")
    steps, audit, seed = check_whole(steps, "steps", 1), check_whole(audit, "audit", 0), check_seed(seed)
    if audit == 1:
        raise ConfigError("audit=1", "0, or at least 2 cells, which can be ranked", "Choose another audit.")
    patch = ContributionsPatch if quantity == "contribution" else ExpertOutputsPatch
    inputs = check_patch_inputs(moe, corrupted_tokens, layers, attention_mask, ("routed_out", *READS), options)
    clean, clean_mask = check_tokens(moe, clean_tokens)
    if clean.shape != inputs.tokens.shape:
        raise DataError(
            f"clean tokens of shape {tuple(clean.shape)} and corrupted ones of shape {tuple(inputs.tokens.shape)}",
            "prompts of the same length for each example, padded alike",
            "Choose prompts of equal length.",
        )
    is_text = not hasattr(clean_tokens, "shape") and any(isinstance(each, str) for each in clean_tokens)
    real = torch.ones_like(inputs.is_real) if clean_mask is None else clean_mask.bool()
    if is_text and bool((unlike := (real != inputs.is_real).any(dim=1)).any()):
        row = int(unlike.nonzero()[0])
        raise DataError(
            f"a clean prompt of {int(real[row].sum())} tokens and a corrupted one of {int(inputs.lengths[row])} in "
            f"example {row}",
            "prompts of the same length for each example",
            "Choose prompts of equal length.",
        )
    metrics, memory = Metrics(metric, len(inputs.tokens)), check_memory(moe, memory_budget)
    run = _Attribution(inputs, metrics, patch, memory)
    with (
        out_of_memory_in_words(),
        threads_asleep(),
        eval_mode(moe.bridge),
        reporting("attribution", progress) as report,
    ):
        result = run.result(clean, method, steps, report)
    result.manifest.config.update({"quantity": quantity, "layers": [str(layer) for layer in inputs.layers]})
    if audit:
        result.agreement(audit, seed)
    return result


class _Attribution:
    """One run: the passes, and the exact effects of single cells."""

    def __init__(self, inputs: PatchInputs, metrics: Metrics, patch: type[SlotsPatch], memory: Memory) -> None:
        self.inputs, self.metrics, self.patch, self.memory = inputs, metrics, patch, memory
        self.patches: dict[Layer, SlotsPatch] = {}

    def result(self, clean: Tensor, method: Estimate, steps: int, report: Report) -> AttributionResult:
        inputs = self.inputs
        with torch.no_grad():
            logits, cache = self._activations(clean)
            clean_value = self.metrics.first(logits, "the clean run")
        gradients = _Gradients(inputs, self.metrics)
        total = 1 if method == "gradient" else 1 + steps * len(inputs.layers)
        found, baseline, corrupted = gradients.at({}, reads=READS)
        report(1, total)
        named = {inputs.moe.hook_name(name, layer): value for (name, layer), value in cache.items()}
        self.patches = {layer: self.patch(inputs, layer, named, corrupted) for layer in inputs.layers}
        if method == "integrated":
            for number, layer in enumerate(inputs.layers):
                whole, sums = self.patches[layer].difference.sum(dim=2), torch.zeros_like(found[layer])
                for step in range(steps):
                    moved = {layer: whole * ((step + 0.5) / steps)}
                    sums += gradients.at(moved, layers=(layer,))[0][layer]
                    report(2 + number * steps + step, total)
                found[layer] = sums / steps
        return self._result(found, baseline, clean_value, method, steps)

    def exact(self, cells: Cells) -> np.ndarray:
        """The exact effects ``[metric, cell, example]`` of some cells, by place on the axes."""
        inputs = self.inputs
        columns = inputs.columns(range(int(inputs.lengths.max())))
        order = torch.arange(inputs.tokens.shape[1], device=columns.device)

        def where(patch: SlotsPatch, expert: int, pos: int) -> Tensor:
            return (patch.experts == expert) & (order == columns[:, pos, None]).unsqueeze(-1)

        with (
            out_of_memory_in_words(),
            threads_asleep(),
            eval_mode(inputs.moe.bridge),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            corrupted = CorruptedRun(inputs, (), "auto", self.memory)
            baseline = self.metrics(corrupted.logits.clone())
            effects = baseline.new_zeros(len(cells), *baseline.shape)
            for number, layer in enumerate(inputs.layers):
                patch = self.patches[layer]
                todo = [
                    Cell.of((index,), partial(where, patch, expert, pos), patch.differs)
                    for index, (at, expert, pos) in enumerate(cells)
                    if at == number
                ]
                todo = [cell for cell in todo if bool(cell.changes.any())]
                with closing(corrupted.values(patch, todo, self.metrics)) as values:
                    for cell, value in values:
                        effects[cell.place[0]] = value - baseline
        return effects.movedim(1, 0).double().cpu().numpy()

    def _activations(self, tokens: Tensor) -> tuple[Tensor, Activations]:
        found: Activations = {}
        logits = self.inputs.forward(tokens, hooks=_keepers(self.inputs, READS, found))
        return logits, found

    def _result(
        self, gradients: dict[Layer, Tensor], baseline: Tensor, clean: Tensor, method: str, steps: int
    ) -> AttributionResult:
        inputs = self.inputs
        n_experts = max(inputs.moe.spec(layer).n_experts for layer in inputs.layers)
        columns = inputs.columns(range(int(inputs.lengths.max())))
        estimates, used = [], []
        for layer in inputs.layers:
            patch = self.patches[layer]
            # shape: (batch, pos, 1, d_model) * (batch, pos, slot, d_model) -> (metric, batch, pos, slot)
            by_slot = torch.stack([(g.unsqueeze(2) * patch.difference).sum(dim=-1) for g in gradients[layer]])
            by_slot = by_slot.masked_fill(patch.experts < 0, 0.0)
            experts = patch.experts.clamp(min=0)
            whole = by_slot.new_zeros(*by_slot.shape[:3], n_experts)
            whole.scatter_add_(3, experts.expand(len(by_slot), -1, -1, -1), by_slot)
            is_used = torch.zeros(whole.shape[1:], dtype=torch.int64, device=whole.device)
            is_used.scatter_add_(2, experts, (patch.experts >= 0).long())
            estimates.append(_at_positions(whole, columns))
            used.append(_at_positions(is_used.clamp(max=1).unsqueeze(0), columns)[0])
        # shape: (layer, metric, expert, pos, batch) -> (metric, layer, expert, pos, batch)
        effect = torch.stack(estimates).movedim(1, 0)
        effect = effect.masked_fill((columns.T < 0), float("nan"))
        if not self.metrics.is_per_example:
            # a sum over examples: a plain number is of the whole batch
            effect = effect.nansum(dim=-1, keepdim=True).masked_fill((columns.T < 0).all(dim=-1, keepdim=True), np.nan)
        axes = {"layer": list(inputs.layers), "expert": range(n_experts), "pos": range(columns.shape[1])}
        data = effect_dataset(
            self.metrics, axes, effect.cpu().numpy(), len(inputs.tokens),
            baseline=((METRIC, EXAMPLE), baseline.double().cpu().numpy()),
            clean=((METRIC, EXAMPLE), clean.double().cpu().numpy()),
            is_used=((*axes, EXAMPLE), torch.stack(used).cpu().numpy()),
        )  # fmt: skip
        data.attrs = {
            "method": method if method == "gradient" else f"integrated over {steps} steps",
            "metrics": list(self.metrics.names),
            "n_examples": len(inputs.tokens),
            "agreement": None,
        }
        result = AttributionResult(data, config={"method": method, "steps": steps})
        result.exact = self.exact
        return result


class _Gradients:
    """Gradients of the metrics at every layer's routed output."""

    def __init__(self, inputs: PatchInputs, metrics: Metrics) -> None:
        self.inputs, self.metrics = inputs, metrics

    @torch.inference_mode(False)
    def at(
        self, moved: Mapping[Layer, Tensor], layers: Sequence[Layer] | None = None, reads: Sequence[str] = ()
    ) -> tuple[dict[Layer, Tensor], Tensor, Activations]:
        """One forward and backward pass of the corrupted batch.

        Args:
            moved: By layer, what is added to its routed output, ``[batch, pos, d_model]``.
            layers: Where the gradient is wanted; everywhere by default.
            reads: Hooks whose activations are kept.

        Returns:
            By layer, ``[metric, batch, pos, d_model]``; the metrics; the activations.
        """
        inputs, wanted = self.inputs, self.inputs.layers if layers is None else tuple(layers)
        leaves: dict[Layer, Tensor] = {}
        found: Activations = {}

        def watch(layer: Layer) -> Callable[..., Tensor]:
            def add(value: Tensor, hook: Any) -> Tensor:
                leaves[layer] = torch.zeros_like(value, requires_grad=True)
                here = value + leaves[layer]
                return here + moved[layer].to(value.dtype) if layer in moved else here

            return add

        hooks = [
            *_keepers(inputs, reads, found),
            *((inputs.moe.hook_name("routed_out", layer), watch(layer)) for layer in wanted),
        ]
        with torch.enable_grad(), _frozen(inputs.moe.bridge.original_model):
            values = self.metrics(inputs.forward(hooks=hooks))
            if not values.requires_grad:
                raise ConfigError(
                    "a metric without a gradient",
                    "a differentiable function of the logits",
                    "Leave out detach(), argmax and numpy, or patch exactly with expert_out.",
                )
            rows = []
            for number, value in enumerate(values):
                # the examples of a batch do not reach each other: the sum's gradient is each one's own
                grads = torch.autograd.grad(
                    value.sum(), [leaves[layer] for layer in wanted], retain_graph=number + 1 < len(values),
                    allow_unused=True,
                )  # fmt: skip
                pairs = zip(wanted, grads)
                rows.append([torch.zeros_like(leaves[layer]) if g is None else g for layer, g in pairs])
        by_layer = {layer: torch.stack([row[i] for row in rows]) for i, layer in enumerate(wanted)}
        return by_layer, values.detach(), found


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Inside the ``with``, no parameter takes a gradient, so that none is computed."""
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in taking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


def _keepers(inputs: PatchInputs, names: Sequence[str], found: Activations) -> list[Any]:
    def keep(key: tuple[str, Layer]) -> Any:
        return lambda value, hook: found.__setitem__(key, value.detach().clone())

    return [(inputs.moe.hook_name(name, layer), keep((name, layer))) for layer in inputs.layers for name in names]


def _at_positions(values: Tensor, columns: Tensor) -> Tensor:
    """``[metric, batch, column, expert]`` to ``[metric, expert, pos, batch]``, by the column of each position."""
    place = columns.clamp(min=0)[None, :, :, None].expand(len(values), -1, -1, values.shape[-1])
    return values.gather(2, place).permute(0, 3, 2, 1)
