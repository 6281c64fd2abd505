"""Tokens at any layer, through the model: a recorded pass a step, and routes scored as branches of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_interp.arch.offload import device_of
from moe_interp.engine.memory import Memory
from moe_interp.engine.recorded_pass import RecordedPass, record_pass
from moe_interp.experiments.inputs.sequences import SequenceBatch
from moe_interp.experiments.router_tuning.routers import TunedRouter, Weights, put, router_inputs
from moe_interp.experiments.router_tuning.token_sources.last_layer import nll
from moe_interp.experiments.router_tuning.token_sources.tokens import TokenTable
from moe_interp.hooks.attach import MoEHooks
from moe_interp.routes import check_routes, score_from_base
from moe_interp.types import EMPTY


class PassTokens:
    """A :class:`.tokens.TokenSource` that runs the model on the sequences of the tokens that are asked for.

    The weights that a step is given are written into the model, so its other tokens and layers are as these weights
    make them. Use it inside :func:`.routers.frozen`, which puts the model's own back.
    """

    keeps_sequences = True

    def __init__(self, moe: MoEHooks, routers: Sequence[TunedRouter], table: TokenTable, memory: Memory) -> None:
        self.moe, self.routers, self.table, self.memory = moe, list(routers), table, memory

    def open(self, rows: Tensor, weights: Weights) -> OpenPass:
        put(self.routers, weights)
        return OpenPass(self, rows)


class OpenPass:
    """Some tokens in a recorded pass of their sequences: :class:`.tokens.OpenTokens`."""

    def __init__(self, source: PassTokens, rows: Tensor) -> None:
        self.source, table = source, source.table
        device = device_of(source.moe.bridge.original_model)
        ids, place = np.unique(table.sequence[rows.numpy()], return_inverse=True)
        self.batch = SequenceBatch.build([table.sequences[i] for i in ids.tolist()], device)
        self.at = (
            torch.from_numpy(place.astype(np.int64)).to(device),
            torch.from_numpy(table.pos[rows.numpy()]).to(device),
        )
        self.targets = table.targets(rows).to(device)
        layers = [router.layer for router in source.routers]
        with router_inputs(source.routers) as kept, torch.no_grad():
            self.base: RecordedPass = record_pass(source.moe, self.batch.tokens, layers, self.batch.mask)
        flat = self.at[0] * self.batch.tokens.shape[1] + self.at[1]
        self.inputs = {layer: kept[layer][flat] for layer in layers}

    @torch.no_grad()
    def scores(self, layer: int, routes: Tensor, logits: Tensor) -> Tensor:
        placed = routes.new_full((*self.batch.tokens.shape, *routes.shape[1:]), EMPTY)
        placed[self.at] = routes
        wanted = torch.zeros_like(self.batch.tokens, dtype=torch.bool)
        wanted[self.at] = True
        given = {layer: check_routes(self.base, layer, placed)}
        found = score_from_base(self.base, given, wanted, memory_budget=self.source.memory, names=self.batch.names)
        return -found.logp[self.at]

    @torch.no_grad()
    def own_ce(self, logits: dict[int, Tensor]) -> Tensor:
        return nll(self.base.logits[self.at], self.targets)

    def own_loss(self, weights: Weights) -> Tensor:
        parameters = [router.parameter for router in self.source.routers]
        with torch.enable_grad():
            mask = None if bool(self.batch.mask.all()) else self.batch.mask
            logits = self.source.moe.bridge(self.batch.tokens, attention_mask=mask)
            loss = nll(logits[self.at], self.targets).mean()
            found = torch.autograd.grad(loss, parameters)
        # of this value, and with this gradient by the weights that were written into the model
        value = loss.detach()
        for router, gradient in zip(self.source.routers, found):
            weight = weights[router.layer]
            value = value + ((weight - weight.detach()) * gradient.to(weight)).sum()
        return value
