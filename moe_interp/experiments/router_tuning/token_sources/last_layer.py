"""Tokens at the last layer, from a cache: no forward pass of the model in a step.

Nothing but the residual sum, the final norm and the unembedding lies above the last layer's experts, so with the
residual stream h without the routed experts, the experts' outputs u_e and a route's weights w_e

    logits(r) = U norm(h + sum over e in r of w_e u_e)

is what the model gives. h and what router and experts read are kept of one plain pass; u_e comes from the experts'
modules, once a token where all of them fit into memory, else again for every batch.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.arch.modules import unwrap
from moe_interp.engine.memory import Memory
from moe_interp.engine.recorded_pass import RecordedPass
from moe_interp.experiments.router_tuning.routers import TunedRouter, Weights
from moe_interp.experiments.router_tuning.token_sources.tokens import TokenTable
from moe_interp.hooks.attach import MoEHooks
from moe_interp.routes import OneSwap, TokenKeys, check_routes, score_from_base
from moe_interp.routes.branch_scores import expert_outputs
from moe_interp.types import EMPTY

CHECKED = 8  # tokens of which other routes are scored both ways
LOGITS_BYTES = 2**28  # that are held together
Outputs = Callable[[Tensor, Tensor], Tensor]
"""Rows ``[row]`` and needed experts ``[row, expert]`` to outputs ``[row, expert, d_model]``."""


class FileOrMemory:
    """Makes tensors in memory while they fit into a budget, and on the disk beyond.

    Args:
        budget: Bytes.
        folder: Where files are put; a temporary folder by default.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.left, self.parent = budget, folder
        self._folder: str | None = None
        self._n = 0

    @property
    def is_on_disk(self) -> bool:
        return self._folder is not None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape; on the disk it is read and written by pages."""
        n = torch.Size(shape).numel()
        if n * dtype.itemsize <= self.left:
            self.left -= n * dtype.itemsize
            return torch.empty(shape, dtype=dtype)
        if self._folder is None:
            if self.parent is not None:
                self.parent.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.mkdtemp(prefix="router_inputs_", dir=self.parent)
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._n += 1
        name = str(Path(self._folder) / f"{self._n}.bin")
        return torch.from_file(name, shared=True, size=n, dtype=dtype).view(shape)


@dataclass(frozen=True, eq=False)
class Tail:
    """From the residual stream after the last layer to logits."""

    norm: nn.Module
    head: nn.Module

    @classmethod
    def of(cls, moe: MoEHooks) -> Tail:
        model: Any = moe.bridge.original_model
        return cls(unwrap(moe.bridge.ln_final), model.get_output_embeddings())

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class ExpertOutputs:
    """A layer's expert outputs ``[token, expert, d_model]``: kept once made where all fit, else made for each batch.

    Args:
        moe, layer: The layer.
        experts_in: ``[token, d_in]``.
        budget: Bytes that may be kept.
        device: Where they are computed: that of the layer.
    """

    def __init__(self, moe: MoEHooks, layer: int, experts_in: Tensor, budget: int, device: torch.device) -> None:
        self.spec, self.experts_in = moe.spec(layer), experts_in
        shape = (len(experts_in), self.spec.n_experts, self.spec.d_model)
        fits = torch.Size(shape).numel() * experts_in.dtype.itemsize <= budget
        self.kept = experts_in.new_empty(shape) if fits else None
        self.is_made = torch.zeros(len(experts_in), dtype=torch.bool)
        self.device = device

    @torch.no_grad()
    def __call__(self, rows: Tensor, needed: Tensor) -> Tensor:
        if self.kept is None:
            return self._make(rows, needed)
        new = rows[~self.is_made[rows]].unique()
        if len(new):
            every = torch.ones(len(new), self.spec.n_experts, dtype=torch.bool, device=self.device)
            self.kept[new] = self._make(new, every).to(self.kept.device)
            self.is_made[new] = True
        return self.kept[rows].to(self.device)

    def _make(self, rows: Tensor, needed: Tensor) -> Tensor:
        return expert_outputs(self.spec, self.experts_in[rows].to(self.device), needed).transpose(0, 1)


class LastLayerTokens:
    """A :class:`.tokens.TokenSource` over a cache.

    Args:
        table: The tokens.
        router: The last layer's router.
        inputs: ``[token, d_in]``, what the router reads.
        rest: ``[token, d_model]``, the residual stream after the layer without the routed experts.
        outputs: The experts' outputs.
        tail: From the residual stream to logits.
        device: Where they are computed.
    """

    keeps_sequences = False

    def __init__(
        self,
        table: TokenTable,
        router: TunedRouter,
        inputs: Tensor,
        rest: Tensor,
        outputs: Outputs,
        tail: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.table, self.router, self.inputs, self.rest = table, router, inputs, rest
        self.outputs, self.tail, self.device = outputs, tail, device
        self.storage: FileOrMemory | None = None

    @cached_property
    def vocabulary(self) -> int:
        with torch.no_grad():
            return int(self.tail(self.rest[:1].to(self.device)).shape[-1])

    def open(self, rows: Tensor, weights: Weights) -> OpenLastLayer:
        return OpenLastLayer(self, rows)


class OpenLastLayer:
    """Some tokens of the cache: :class:`.tokens.OpenTokens`."""

    def __init__(self, source: LastLayerTokens, rows: Tensor) -> None:
        self.source, self.rows, self.router = source, rows, source.router
        self.inputs = {self.router.layer: source.inputs[rows].to(source.device)}
        self.rest = source.rest[rows].to(source.device)
        self.targets = source.table.targets(rows).to(source.device)

    @torch.no_grad()
    def scores(self, layer: int, routes: Tensor, logits: Tensor) -> Tensor:
        wide = logits.unsqueeze(1).expand(-1, routes.shape[1], -1)
        weights = self.router.rule.weights(wide, routes, are_valid=True)
        ce = self._ce(routes, weights)
        return ce.masked_fill((routes == EMPTY).all(dim=-1), float("nan"))

    def own_ce(self, logits: dict[int, Tensor]) -> Tensor:
        return self._own_ce(logits[self.router.layer])

    def own_loss(self, weights: Weights) -> Tensor:
        layer = self.router.layer
        return self._own_ce(self.router.logits(self.inputs[layer], weights[layer])).mean()

    def _own_ce(self, logits: Tensor) -> Tensor:
        indices, weights = self.router.rule.route(logits)
        return self._ce(indices.unsqueeze(1), weights.unsqueeze(1)).squeeze(1)

    def _ce(self, routes: Tensor, weights: Tensor) -> Tensor:
        outputs = self.source.outputs(self.rows, _needed(routes, self.router.rule.n_experts))
        hidden = self.rest.unsqueeze(1) + mixed(outputs, routes, weights).to(self.rest)
        n = max(1, LOGITS_BYTES // (8 * self.source.vocabulary))
        targets = self.targets.unsqueeze(1).expand(routes.shape[:2]).reshape(-1)
        parts = [nll(self.source.tail(some), ids) for some, ids in zip(hidden.flatten(0, 1).split(n), targets.split(n))]
        return torch.cat(parts).view(routes.shape[:2])


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log softmax(logits)[target]``, ``[row, vocab]`` to ``[row]``, at float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def mixed(outputs: Tensor, routes: Tensor, weights: Tensor) -> Tensor:
    """``sum_e w_e u_e``: ``[token, expert, d]`` and routes ``[token, route, slot]`` to ``[token, route, d]``."""
    mixing = weights.new_zeros(*routes.shape[:2], outputs.shape[1]).scatter_add(2, routes.clamp(min=0), weights)
    return torch.bmm(mixing.to(outputs), outputs)


def _needed(routes: Tensor, n_experts: int) -> Tensor:
    """``[token, expert]`` bool: the experts of any of a token's routes."""
    needed = torch.zeros(len(routes), n_experts + 1, dtype=torch.bool, device=routes.device)
    return needed.scatter_(1, routes.flatten(1) % (n_experts + 1), True)[:, :-1]


def refusal(moe: MoEHooks, base: RecordedPass, layer: int) -> str | None:
    """Why steps at a layer cannot run from a cache, in words; None where nothing speaks against it so far."""
    if layer != len(base.blocks) - 1:
        return f"layer {layer} is not the last of the {len(base.blocks)}"
    if moe.spec(layer).weight_on_input:
        return "an expert's weight scales its input in this family"
    if any(point.has_hooks() for point in moe.bridge.hook_dict.values()):
        return "hooks are on the bridge, which a step without a forward pass would not call"
    if not isinstance(getattr(moe.bridge, "ln_final", None), nn.Module):
        return "the bridge has no final norm of that name"
    return base.refusal(layer)


@torch.no_grad()
def cached_parts(base: RecordedPass, router: TunedRouter, hidden_out: Tensor) -> Tensor:
    """``[batch, pos, d_model]``: the residual stream after the layer without the routed experts."""
    layer, spec = router.layer, base.moe.spec(router.layer)
    routes, weights = (part[layer].flatten(0, 1).unsqueeze(1) for part in (base.indices, base.weights))
    x = base.experts_in[layer].flatten(0, 1)
    outputs = expert_outputs(spec, x, _needed(routes, spec.n_experts)).transpose(0, 1)
    routed = mixed(outputs, routes, weights).squeeze(1).view(hidden_out.shape)
    return hidden_out - routed.to(hidden_out)


def differs(base: RecordedPass, source: LastLayerTokens, wanted: Tensor, memory: Memory) -> str | None:
    """Whether the cache scores other routes as branches of the model do, tried on the first tokens; why not, in words.

    Args:
        base: The pass that the source's first rows come from.
        source: The cache.
        wanted: ``[batch, pos]`` bool, these tokens.
    """
    router, layer = source.router, source.router.layer
    sequence, pos = wanted.nonzero()[:CHECKED].unbind(-1)
    logits = base.router_logits[layer][sequence, pos]
    keys = TokenKeys(0, layer, sequence, pos)
    standard = base.indices[layer][sequence, pos]
    drawn = OneSwap().sample(router.rule.choice_logits(logits), standard, 2, keys).indices
    routes = torch.cat([standard.unsqueeze(1), drawn], dim=1)
    placed = routes.new_full((*wanted.shape, *routes.shape[1:]), EMPTY)
    placed[sequence, pos] = routes
    given = {layer: check_routes(base, layer, placed)}
    chosen = torch.zeros_like(wanted)
    chosen[sequence, pos] = True
    exact = -score_from_base(base, given, chosen, method="branch", memory_budget=memory).logp[sequence, pos]
    found = source.open(torch.arange(len(pos)), {}).scores(layer, routes, logits)
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-3}.get(base.logits.dtype, 0.25)
    distance = float((found - exact.to(found)).abs().nan_to_num(0.0).max())
    if distance > tolerance:
        return f"from a cache, routes score up to {distance:.2g} nats otherwise: more than a sum lies above the experts"
    return None
