"""The reference router: the route that the domains prescribe, against which specialization is measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.routing_rule import at_least_float
from moe_interp.errors import ConfigError
from moe_interp.testbed.strategies.strategy import (
    Batch,
    Hook,
    Loads,
    Records,
    Setting,
    Strategy,
    slots_taken,
    softmax,
)


class ReferenceRouter(Strategy):
    """The upper bound: a token of domain d takes its top-k, by a learned gate, inside d's block of experts.

    Blocks are as equal as possible, domains in alphabetical order. Each block is balanced within itself by the
    auxiliary loss over its own tokens, domains weighted by their tokens. The mask hides the other blocks from the
    router, so that its own choice, without the mask, is no better than chance: ``reference+block_loss`` teaches it.

    Raises:
        ConfigError: Fewer experts than domains, or k larger than a block.
    """

    name = "reference"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        n_experts, top_k = (getattr(setting.moe.spec(setting.layers[0]), name) for name in ("n_experts", "top_k"))
        self.allowed = reference_blocks(setting.domains, n_experts, top_k)

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        self.allowed = self.allowed.to(batch.domain.device)
        excluded = ~self.allowed[batch.domain]

        def inside(value: Tensor, hook: Any) -> Tensor:
            return value.masked_fill(excluded, torch.finfo(value.dtype).min)

        return [(self.setting.moe.hook_name("router_logits", layer), inside) for layer in self.setting.layers]

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        total = super().auxiliary_loss(records, batch, step_load)
        self.allowed = self.allowed.to(batch.domain.device)
        own = self.allowed[batch.domain].flatten(0, 1)  # [token, expert]
        for record in records.values():
            probs = softmax(record.logits.flatten(0, 1).masked_fill(~own, -torch.inf))
            taken = (slots_taken(record.chosen, own.shape[-1]).flatten(0, 1) * own).sum(0)
            load = taken / self._over_block(taken).clamp_min(1)
            size = self._over_block(torch.ones_like(taken))
            # sum over domains d of n_d / n * E_d * sum_{e in R_d} f_e P_e, where P_e = (sum of d's tokens' p_e) / n_d
            total = total + (size * load * probs.sum(0)).sum() / len(own)
        return self.setting.config.balance * total

    def _over_block(self, values: Tensor) -> Tensor:
        """``[expert]`` numbers summed over the block that each expert is in; no expert is in two."""
        totals = (self.allowed * values).sum(-1, keepdim=True)  # [domain, 1]
        return (self.allowed * totals).sum(0)


class BlockLoss(Strategy):
    """-c * mean over tokens of log sum_{e in R_d} p_e, summed over layers: the router is told the block.

    p is the softmax of the router's own logits, R_d the block of the token's domain, c = ``coefficient``. With
    ``reference+block_loss`` the router learns to choose by itself what the mask prescribes, so that the model routes
    as the reference does where the mask is not attached. Source: derived.

    Raises:
        ConfigError: Fewer experts than domains, or k larger than a block.
    """

    name = "block_loss"
    coefficient = 0.1  # a tiny model routes by the block after a hundred steps

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        spec = setting.moe.spec(setting.layers[0])
        self.allowed = reference_blocks(setting.domains, spec.n_experts, spec.top_k)

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        total = super().auxiliary_loss(records, batch, step_load)
        self.allowed = self.allowed.to(batch.domain.device)
        excluded = ~self.allowed[batch.domain]
        for record in records.values():
            logits = at_least_float(record.logits)
            inside = logits.masked_fill(excluded, -torch.inf).logsumexp(-1)
            total = total + (logits.logsumexp(-1) - inside).mean()
        return self.coefficient * total


def reference_blocks(domains: tuple[str, ...], n_experts: int, top_k: int) -> Tensor:
    """``[domain, expert]`` bool: each domain's block, in the order of ``domains``; the first by name get more."""
    quotient, rest = divmod(n_experts, len(domains))
    if quotient < max(1, top_k):
        raise ConfigError(
            f"{n_experts} experts for {len(domains)} domains with top_k={top_k}",
            "blocks of at least top_k experts, one block a domain",
            "Use more experts, fewer domains or a smaller top_k.",
        )
    allowed, start = torch.zeros(len(domains), n_experts, dtype=torch.bool), 0
    for number, name in enumerate(sorted(domains)):
        size = quotient + (number < rest)
        allowed[domains.index(name), start : start + size] = True
        start += size
    return allowed
