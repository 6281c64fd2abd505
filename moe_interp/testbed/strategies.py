"""The strategies to compare. Several can be joined by ``+``, such as ``global+capacity``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.streams import layer_labels, uniform_keys
from moe_interp.testbed.strategy import Batch, Hook, Loads, Records, Setting, Strategy, by_score, routed_by
from moe_interp.types import Layer


def balance_loss(probs: Tensor, load: Tensor) -> Tensor:
    """E * sum_e f_e P_e: 1 where use is balanced, E where it has collapsed.

    Args:
        probs: ``[..., token, expert]``; P is their mean over tokens, with gradient.
        load: ``[..., expert]``, f, each row summing to 1; it gets no gradient.

    Source: Fedus et al. 2021, with f over all top-k slots.
    """
    return probs.shape[-1] * (load.detach() * probs.mean(-2)).sum(-1)


def softmax(logits: Tensor) -> Tensor:
    """Probabilities in float32."""
    return logits.float().softmax(-1)


class MicroBatchBalance(Strategy):
    """Auxiliary load-balancing loss with f and P of the micro-batch; per layer (transformers' own pools the layers)."""

    name = "micro_batch"

    def probs(self, logits: Tensor) -> Tensor:
        """What P is the mean of."""
        return softmax(logits)

    def load(self, layer: Layer, records: Records, step_load: Loads | None) -> Tensor:
        """f, whose scope is all that the three auxiliary strategies differ in."""
        return records[layer].load()

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        total = super().auxiliary_loss(records, batch, step_load)
        for layer, record in records.items():
            probs = self.probs(record.logits).flatten(0, -2)
            total = total + balance_loss(probs, self.load(layer, records, step_load))
        return self.setting.config.balance * total


class SequenceBalance(Strategy):
    """The same with f and P of each sequence, averaged over sequences: the strictest scope."""

    name = "sequence"

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        total = super().auxiliary_loss(records, batch, step_load)
        for record in records.values():
            filled = (record.indices >= 0).unsqueeze(-1)
            one_hot = torch.nn.functional.one_hot(record.indices.clamp_min(0), record.logits.shape[-1]) * filled
            counts = one_hot.sum((1, 2)).float()  # shape: (batch, pos, slot, expert) -> (batch, expert)
            load = counts / counts.sum(-1, keepdim=True).clamp_min(1)
            total = total + balance_loss(softmax(record.logits), load).mean()
        return self.setting.config.balance * total


class GlobalBalance(MicroBatchBalance):
    """The same with f of the whole optimiser step, over all processes and accumulation steps; P stays local."""

    name = "global"
    needs_step_load = True

    def load(self, layer: Layer, records: Records, step_load: Loads | None) -> Tensor:
        return records[layer].load() if step_load is None else step_load[layer]


class GlobalRunningBalance(MicroBatchBalance):
    """The same with f from a running mean over steps (``load_decay``): nearly global, without the extra pass."""

    name = "global_running"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.running: dict[Layer, Tensor] = {}

    def load(self, layer: Layer, records: Records, step_load: Loads | None) -> Tensor:
        return self._mixed(layer, records[layer].load())

    def _mixed(self, layer: Layer, load: Tensor) -> Tensor:
        decay = self.setting.config.load_decay
        return decay * self.running[layer] + (1 - decay) * load if layer in self.running else load

    def after_step(self, loads: Loads) -> None:
        self.running = {layer: self._mixed(layer, load) for layer, load in loads.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running = state["running"]


class LossFreeBias(Strategy):
    """A bias b on the scores, for the choice only: after each step b += bias_rate * sign(mean load - load).

    Source: Wang et al. 2024. Weights stay those of the unbiased scores.
    """

    name = "loss_free"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.bias = {layer: torch.zeros(setting.moe.spec(layer).n_experts) for layer in setting.layers}

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._biased(layer)]

    def _biased(self, layer: Layer) -> list[Hook]:
        rule, moe = self.setting.moe.spec(layer).rule, self.setting.moe

        def pick(logits: Tensor, indices: Tensor) -> Tensor:
            scores = rule.scores(logits)
            biased = (logits if scores is None else scores).float() + self.bias[layer].to(logits.device)
            return biased.topk(indices.shape[-1], dim=-1).indices

        return routed_by(moe, layer, pick)

    def after_step(self, loads: Loads) -> None:
        for layer, load in loads.items():
            self.bias[layer] = self.bias[layer].to(load) + self.setting.config.bias_rate * torch.sign(
                load.mean() - load
            )

    def state_dict(self) -> dict[str, Any]:
        return {"bias": self.bias}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bias = state["bias"]


class ZLoss(Strategy):
    """z_coefficient * mean(logsumexp(logits)^2), summed over layers (Zoph et al. 2022): small logits, no balance."""

    name = "z_loss"

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        total = super().auxiliary_loss(records, batch, step_load)
        for record in records.values():
            total = total + record.logits.float().logsumexp(-1).square().mean()
        return self.setting.config.z_coefficient * total


class SigmoidScores(MicroBatchBalance):
    """Sigmoid scores in the place of the softmax, with the micro-batch balance loss on the normalised scores.

    The choice is the same, since both rise with the logit; the weights and their gradients are not.
    """

    name = "sigmoid"

    def probs(self, logits: Tensor) -> Tensor:
        scores = logits.float().sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._scored(layer)]

    def _scored(self, layer: Layer) -> list[Hook]:
        moe, seen = self.setting.moe, dict[str, Tensor]()

        def read(value: Tensor, hook: Any) -> None:
            seen["logits"] = value

        def score(value: Tensor, hook: Any) -> Tensor:
            return seen["logits"].sigmoid().to(value.dtype)

        return [(moe.hook_name("router_logits", layer), read), (moe.hook_name("router_probs", layer), score)]


class ExpertChoice(Strategy):
    """Each expert takes its k T / E best tokens of the micro-batch; a token may have none, or all (Zhou et al. 2022).

    That looks at future tokens. Outside training, therefore, a token takes the experts whose score is above a
    threshold: the running mean (``load_decay``) of the lowest score an expert took in training. **Its training loss is
    no language-modelling loss and may not be ranked against others; its validation loss is causal.**
    """

    name = "expert_choice"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.threshold: dict[Layer, Tensor] = {}
        self._taken: dict[Layer, list[Tensor]] = {}

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._chosen(layer, batch.training)]

    def _chosen(self, layer: Layer, training: bool) -> list[Hook]:
        def pick(logits: Tensor, indices: Tensor) -> Tensor:
            probs = softmax(logits)
            if not training and layer in self.threshold:
                return by_score(probs, probs >= self.threshold[layer].to(probs.device))
            flat = probs.detach().flatten(0, -2)
            n_tokens = math.ceil(flat.shape[0] * indices.shape[-1] / flat.shape[1])
            top = flat.topk(min(n_tokens, flat.shape[0]), dim=0)
            if training:
                self._taken.setdefault(layer, []).append(top.values[-1])
            taken = torch.zeros_like(flat, dtype=torch.bool).scatter(0, top.indices, True)
            return by_score(probs, taken.view_as(probs))

        return routed_by(self.setting.moe, layer, pick)

    def after_step(self, loads: Loads) -> None:
        decay = self.setting.config.load_decay
        for layer, taken in self._taken.items():
            new = self.setting.reduce(torch.stack(taken).mean(0))
            old = self.threshold.get(layer, new)
            self.threshold[layer] = decay * old.to(new) + (1 - decay) * new
        self._taken = {}

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold = state["threshold"]


class HashRouting(Strategy):
    """k experts fixed by token id and layer (Roller et al. 2021); the gate learns their weights only."""

    name = "hash"

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._drawn(layer, batch)]

    def _drawn(self, layer: Layer, batch: Batch) -> list[Hook]:
        def pick(logits: Tensor, indices: Tensor) -> Tensor:
            return self.keys(layer, batch, logits.shape[-1]).topk(indices.shape[-1], dim=-1).indices

        return routed_by(self.setting.moe, layer, pick)

    def keys(self, layer: Layer, batch: Batch, n_experts: int) -> Tensor:
        """The numbers whose largest k decide, ``[batch, pos, expert]``."""
        return uniform_keys(batch.tokens, n_experts, self.setting.config.seed, *layer_labels(layer))


class RandomRouting(HashRouting):
    """k experts at random for every token, anew at every step; fixed by seed, step and the tokens so far."""

    name = "random"

    def keys(self, layer: Layer, batch: Batch, n_experts: int) -> Tensor:
        step = batch.step if batch.training else -1
        context = batch.tokens.cumsum(-1)
        position = torch.arange(context.shape[-1], device=context.device).expand_as(context)
        return uniform_keys(position, n_experts, context, self.setting.config.seed, step, *layer_labels(layer))


class CapacityDropping(Strategy):
    """In training an expert takes at most ceil(capacity_factor * k T / E) slots of a micro-batch; the rest are dropped.

    First choices come before second ones, earlier positions before later ones. The weights of what is left stay as they
    were. Combinable: ``micro_batch+capacity``. Outside training nothing is dropped.
    """

    name = "capacity"

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for layer in self.setting.layers for hook in self._capped(layer)] if batch.training else []

    def _capped(self, layer: Layer) -> list[Hook]:
        rule, kept = self.setting.moe.spec(layer).rule, dict[str, Tensor]()

        def pick(logits: Tensor, indices: Tensor) -> Tensor:
            kept["mask"] = within_capacity(indices, logits.shape[-1], self.setting.config.capacity_factor)
            kept["weights"] = rule.weights(logits, indices)
            return indices.masked_fill(~kept["mask"], -1)

        return routed_by(self.setting.moe, layer, pick, lambda weights: kept["weights"] * kept["mask"])


def within_capacity(indices: Tensor, n_experts: int, factor: float) -> Tensor:
    """Which slots are within capacity. ``[batch, pos, slot] -> [batch, pos, slot]`` bool; empty slots never are."""
    n_tokens = indices.shape[0] * indices.shape[1]
    capacity = math.ceil(factor * indices.shape[2] * n_tokens / n_experts)
    order = indices.permute(2, 1, 0).reshape(-1)  # by slot, then position, then sequence
    one_hot = torch.nn.functional.one_hot(order.clamp_min(0), n_experts) * (order >= 0).unsqueeze(-1)
    rank = (one_hot.cumsum(0) * one_hot).sum(-1)
    kept = (rank >= 1) & (rank <= capacity)
    return kept.view(indices.shape[2], indices.shape[1], indices.shape[0]).permute(2, 1, 0)


class ReferenceRouter(Strategy):
    """The upper bound: a token of domain d takes its top-k, by a learned gate, inside d's block of experts.

    Blocks are as equal as possible, domains in alphabetical order. Each block is balanced within itself by the
    auxiliary loss over its own tokens, domains weighted by their tokens.

    Raises:
        ConfigError: Fewer experts than domains, or k larger than a block.
    """

    name = "reference"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        n_experts, top_k = (getattr(setting.moe.spec(setting.layers[0]), name) for name in ("n_experts", "top_k"))
        self.allowed = reference_blocks(setting.domains, n_experts, top_k)

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        shut = ~self.allowed.to(batch.domain.device)[batch.domain]

        def inside(value: Tensor, hook: Any) -> Tensor:
            return value.masked_fill(shut, torch.finfo(value.dtype).min)

        return [(self.setting.moe.hook_name("router_logits", layer), inside) for layer in self.setting.layers]

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        total = super().auxiliary_loss(records, batch, step_load)
        for record in records.values():
            for d in batch.domain.unique().tolist():
                here, block = batch.domain == d, self.allowed[d].nonzero()[:, 0].to(batch.domain.device)
                probs = softmax(record.logits[here][:, block])
                used = record.indices[here].flatten()
                counts = torch.bincount(used[used >= 0], minlength=record.logits.shape[-1])[block].float()
                total = total + here.float().mean() * balance_loss(probs, counts / counts.sum().clamp_min(1))
        return self.setting.config.balance * total


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


class Joined(Strategy):
    """Several strategies at once: hooks in order, losses added."""

    def __init__(self, setting: Setting, parts: list[Strategy]) -> None:
        super().__init__(setting)
        self.parts = parts
        self.needs_step_load = any(part.needs_step_load for part in parts)

    def rebind(self, moe: MoEHooks) -> None:
        super().rebind(moe)
        for part in self.parts:
            part.rebind(moe)

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for part in self.parts for hook in part.fwd_hooks(batch)]

    def auxiliary_loss(self, records: Records, batch: Batch, step_load: Loads | None) -> Tensor:
        return torch.stack([part.auxiliary_loss(records, batch, step_load) for part in self.parts]).sum()

    def after_step(self, loads: Loads) -> None:
        for part in self.parts:
            part.after_step(loads)

    def state_dict(self) -> dict[str, Any]:
        return {part.name: part.state_dict() for part in self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in self.parts:
            part.load_state_dict(state[part.name])


_AUXILIARY = (MicroBatchBalance, SequenceBalance, GlobalBalance, GlobalRunningBalance, ZLoss, LossFreeBias)
_ROUTING = (SigmoidScores, ExpertChoice, HashRouting, RandomRouting, CapacityDropping, ReferenceRouter)
STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (Strategy, *_AUXILIARY, *_ROUTING)}


def check_strategy(name: str) -> None:
    """Refuse a name that is not made of known strategies.

    Raises:
        ConfigError: It says which there are.
    """
    parts = name.split("+")
    if not set(parts) <= set(STRATEGIES) or len(set(parts)) < len(parts):
        raise ConfigError(
            f"strategy {name!r}", f"one of {sorted(STRATEGIES)}, or several joined by +", "Choose another."
        )


def make_strategy(name: str, setting: Setting) -> Strategy:
    """The strategy of this name, or several joined by ``+``."""
    check_strategy(name)
    parts = [STRATEGIES[part](setting) for part in name.split("+")]
    return parts[0] if len(parts) == 1 else Joined(setting, parts)
