"""The terms of a logit difference: what everything that writes into the residual stream adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.grouped_products import RowGroups
from moe_interp.arch.spec import MoESpec
from moe_interp.engine.residual.linear import ResidualStream, Written, record_stream
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.types import Hooks

_READ = ("expert_indices", "expert_weights", "expert_out", "shared_out")
Readout = Callable[[Tensor], Tensor]
"""A linear function of logits, ``[example, d_vocab] -> [example]``."""


@dataclass(eq=False)
class Contributions:
    """The terms of a logit difference, in float64.

    Attributes:
        metric: ``[example]``, what the terms sum to.
        logit_difference: ``[example]``, the model's; another number only where the model caps its logits after.
        is_capped: Whether it does.
        parts: By ``(kind, layer, name)``, ``[example]``: everything but the routed experts.
        experts: By layer, ``[example, slot]``.
        indices, weights: By layer, the route of these slots.
        others: By layer, ``[example, slot, expert]``: what each expert would have added with that slot's weight.
    """

    metric: Tensor
    logit_difference: Tensor
    is_capped: bool
    parts: dict[tuple[str, int | None, str], Tensor] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)
    indices: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    others: dict[int, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """``[example]``, the sum of all terms."""
        routed = [value.sum(dim=-1) for value in self.experts.values()]
        return torch.stack([*self.parts.values(), *routed]).sum(dim=0)


@torch.enable_grad()
def contributions(
    moe: MoEHooks,
    tokens: Tensor,
    attention_mask: Tensor | None,
    columns: Tensor,
    readout: Readout,
    with_others: bool,
) -> Contributions:
    """Every term of ``readout(logits)`` at one column ``[example]`` of each example; see :func:`logit_attribution`."""
    reader = _Reader(moe, columns)
    stream = record_stream(moe, tokens, attention_mask, reader.hooks)
    assert stream.logits is not None
    assert stream.head_in is not None
    model = reader.rows(stream.logits).double()
    before_scale = stream.head(reader.rows(stream.head_in).unsqueeze(1))[:, 0].double()
    factor, is_capped = factor_after_head(before_scale.detach(), model, stream.head_in.dtype)
    metric = readout(before_scale * factor)
    with torch.no_grad():
        constant = readout(stream.head(torch.zeros_like(stream.head_in[:, :1]))[:, 0].double() * factor)
    found = Contributions(metric.detach(), readout(model), is_capped)
    ends = [end for pair in stream.layer_ends.values() for end in pair]
    gradients = stream.gradients(metric.sum(), [part.value for part in stream.written] + ends)
    for part, gradient in zip(stream.written, gradients):
        value = reader.summed(gradient, part.value)
        if part.kind == "routed":
            assert part.layer is not None
            _split_block(found, reader, moe.spec(part.layer), part, gradient, stream if with_others else None)
        elif bool((gradient != 0).any()):
            key = (part.kind, part.layer, part.name)
            found.parts[key] = found.parts.get(key, torch.zeros_like(value)) + value
    if bool((constant != 0).any()):
        found.parts["bias", None, "unembedding bias"] = constant
    _check_closed(found, stream, gradients[len(stream.written) :], reader)
    return found


class _Reader:
    """Keeps what the experts did at one column of each example."""

    def __init__(self, moe: MoEHooks, columns: Tensor) -> None:
        self.moe, self.columns = moe, columns
        self.kept: dict[tuple[str, Any], Tensor] = {}

    @property
    def hooks(self) -> Hooks:
        names = [(name, layer) for layer in self.moe.layers for name in _READ if name in self.moe.hooks(layer)]
        return [(self.moe.hook_name(name, layer), self._keep(name, layer)) for name, layer in names]

    def _keep(self, name: str, layer: Any) -> Callable[..., None]:
        def keep(value: Tensor, hook: Any) -> None:
            self.kept[name, layer] = self.rows(value.detach()).clone()

        return keep

    def rows(self, value: Tensor) -> Tensor:
        """``[batch, pos, ...] -> [example, ...]``."""
        return value[torch.arange(len(value), device=value.device), self.columns.to(value.device)]

    def summed(self, gradient: Tensor, value: Tensor) -> Tensor:
        """``[example]``, gradient times value at the column, summed over all other axes, in float64."""
        return (self._tokens(gradient) * self._tokens(value)).flatten(1).sum(dim=-1)

    def token(self, value: Tensor) -> Tensor:
        """``[example, d_model]`` at the column, in float64."""
        return self._tokens(value)

    def _tokens(self, value: Tensor) -> Tensor:
        n = len(self.columns)
        # shape: (batch * pos, d_model) as some families hand on -> (batch, pos, d_model)
        batched = value.reshape(n, -1, value.shape[-1]) if value.ndim == 2 else value
        return self.rows(batched.detach()).double()


def _split_block(
    found: Contributions, reader: _Reader, spec: MoESpec, part: Written, gradient: Tensor, stream: ResidualStream | None
) -> None:
    """The terms of a layer's block of experts: its slots, its shared experts, its bias, and the control."""
    layer, direction = spec.layer, reader.token(gradient)
    assert isinstance(layer, int)
    kept = {name: reader.kept[name, layer] for name in _READ if (name, layer) in reader.kept}
    weights = kept["expert_weights"].double()
    outputs = kept["expert_out"].double() @ direction.unsqueeze(-1)
    found.indices[layer], found.weights[layer] = kept["expert_indices"], weights
    found.experts[layer] = outputs[..., 0] if spec.weight_on_input else outputs[..., 0] * weights
    if "shared_out" in kept and spec.family.shared_on_layer is None:
        found.parts["shared", layer, "shared"] = (kept["shared_out"].double() * direction).sum(dim=-1)
    bias = spec.project_bias if spec.family.latent is not None else spec.output_bias
    if bias is not None:
        found.parts["bias", layer, "experts bias"] = direction @ bias.detach().double()
    if stream is not None:
        read = reader.rows(stream.experts_in[layer])
        found.others[layer] = _what_others_would_add(spec, read, weights, direction)


def _what_others_would_add(spec: MoESpec, read: Tensor, weights: Tensor, direction: Tensor) -> Tensor:
    """``[example, slot, expert]``: every expert on the token that the slot's expert read, with that slot's weight."""
    if not spec.weight_on_input:
        added = (every_expert(spec, read).double() @ direction.unsqueeze(-1)).squeeze(-1)
        return weights.unsqueeze(-1) * added.unsqueeze(1)
    slots = [every_expert(spec, read * weight.unsqueeze(-1).to(read)) for weight in weights.unbind(dim=-1)]
    return torch.stack([(out.double() @ direction.unsqueeze(-1)).squeeze(-1) for out in slots], dim=1)


@torch.no_grad()
def every_expert(spec: MoESpec, read: Tensor) -> Tensor:
    """The output of every expert on every row, before a weight: ``[row, d_in] -> [row, expert, d_model]``."""
    n_experts, n_rows = spec.n_experts, len(read)
    groups = RowGroups.of_sorted(torch.arange(n_experts, device=read.device).repeat_interleave(n_rows), n_experts)
    # shape: (expert * row, d_model) -> (row, expert, d_model)
    return spec.outputs_of_rows(read.repeat(n_experts, 1), groups).view(n_experts, n_rows, -1).transpose(0, 1)


def factor_after_head(unembedded: Tensor, logits: Tensor, dtype: torch.dtype) -> tuple[float, bool]:
    """What the model multiplies its unembedding's output by, and whether it does more than that (a soft-cap)."""
    place = unembedded.abs().flatten().argmax()
    factor = float(logits.flatten()[place] / unembedded.flatten()[place])
    off = (unembedded * factor - logits).abs().amax()
    if bool((off <= 100 * torch.finfo(dtype).eps * logits.abs().amax()).item()):
        return factor, False
    return 1.0, True


def _check_closed(found: Contributions, stream: ResidualStream, ends: list[Tensor], reader: _Reader) -> None:
    """Refuse a model that adds something to its residual stream which no sublayer, bias or norm accounts for."""
    off = (found.total - found.metric).abs()
    terms = torch.stack(
        [value.abs() for value in found.parts.values()] + [v.abs().sum(-1) for v in found.experts.values()]
    )
    assert stream.head_in is not None
    # norms cast to float32 explicitly, also in a float64 model
    eps = max(torch.finfo(stream.head_in.dtype).eps, torch.finfo(torch.float32).eps)
    if bool((off <= 1000 * eps * (1 + terms.sum(dim=0))).all()):
        return
    worst = int((off / (1 + terms.sum(dim=0))).argmax())
    # where each layer begins, and where the last one ends: what is between two of them counts for the former
    begins = [pair[0] for pair in stream.layer_ends.values()] + [list(stream.layer_ends.values())[-1][1]]
    at = [float(reader.summed(gradient, value)[worst]) for gradient, value in zip([*ends[::2], ends[-1]], begins)]
    unexplained = {}
    for number, layer in enumerate(stream.layer_ends):
        written = sum(float(v[worst]) for (_, where, _), v in found.parts.items() if where == layer)
        written += float(found.experts[layer][worst].sum()) if layer in found.experts else 0.0
        unexplained[layer] = abs(at[number + 1] - at[number] - written)
    layer = max(unexplained, key=lambda key: unexplained[key])
    raise ConfigError(
        f"layer {layer}, which changes the logit difference by {unexplained[layer]:.1e} more than its sublayers write",
        "layers that add what their sublayers write, behind norms and constant factors",
        "This model's residual stream is not a sum of its sublayers' outputs; patch its experts instead.",
    )
