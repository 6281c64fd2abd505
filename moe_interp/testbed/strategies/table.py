"""The strategies by name. Several can be joined by ``+``, such as ``global+capacity``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.strategies.balancing import (
    GlobalBalance,
    GlobalRunningBalance,
    LossFreeBias,
    MicroBatchBalance,
    SequenceBalance,
    ZLoss,
)
from moe_interp.testbed.strategies.reference import BlockLoss, ReferenceRouter, reference_blocks
from moe_interp.testbed.strategies.rerouting import (
    CapacityDropping,
    ExpertChoice,
    HashRouting,
    RandomRouting,
    SigmoidScores,
)
from moe_interp.testbed.strategies.strategy import Batch, Hook, Loads, Records, Setting, Strategy


class Joined(Strategy):
    """Several strategies at once: hooks in order, losses added."""

    def __init__(self, setting: Setting, parts: list[Strategy]) -> None:
        super().__init__(setting)
        self.parts = parts
        self.needs_step_load = any(part.needs_step_load for part in parts)
        self.has_varying_width = any(part.has_varying_width for part in parts)

    def rebind(self, moe: MoEHooks) -> None:
        super().rebind(moe)
        for part in self.parts:
            part.rebind(moe)

    def fwd_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for part in self.parts for hook in part.fwd_hooks(batch)]

    def dropping_hooks(self, batch: Batch) -> list[Hook]:
        return [hook for part in self.parts for hook in part.dropping_hooks(batch)]

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


_AUXILIARY = (MicroBatchBalance, SequenceBalance, GlobalBalance, GlobalRunningBalance, ZLoss, BlockLoss, LossFreeBias)
_ROUTING = (SigmoidScores, ExpertChoice, HashRouting, RandomRouting, CapacityDropping, ReferenceRouter)
_CHOOSING = {cls.name for cls in (LossFreeBias, *_ROUTING)} - {CapacityDropping.name}
STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (Strategy, *_AUXILIARY, *_ROUTING)}


def check_strategy(name: str, config: TestbedConfig, domains: Sequence[str]) -> None:
    """Refuse a strategy that cannot be made, before anything is trained.

    Raises:
        ConfigError: A name that is not made of known strategies (it says which there are); two that each decide the
            route; a block per domain asked for with fewer experts than domains, or with k larger than a block.
    """
    parts = name.split("+")
    if not set(parts) <= set(STRATEGIES) or len(set(parts)) < len(parts):
        raise ConfigError(
            f"strategy {name!r}", f"one of {', '.join(STRATEGIES)}, or several joined by +", "Choose another."
        )
    # sigmoid sets weights that dropping would take from the family's softmax again
    if len(_CHOOSING & set(parts)) > 1 or {SigmoidScores.name, CapacityDropping.name} <= set(parts):
        raise ConfigError(
            f"strategy {name!r}",
            f"at most one of {', '.join(sorted(_CHOOSING))}, and sigmoid without capacity",
            "Join balance losses and capacity to one of them.",
        )
    if {ReferenceRouter.name, BlockLoss.name} & set(parts):
        reference_blocks(tuple(domains), config.model.n_experts, config.model.top_k)


def make_strategy(name: str, setting: Setting) -> Strategy:
    """The strategy of this name, or several joined by ``+``."""
    check_strategy(name, setting.config, setting.domains)
    parts = [STRATEGIES[part](setting) for part in name.split("+")]
    return parts[0] if len(parts) == 1 else Joined(setting, parts)
