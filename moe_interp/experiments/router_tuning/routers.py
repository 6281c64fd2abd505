"""Where a layer's router keeps the weights that are tuned, and its logits as a function of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.arch.rules import HashTable, RoutingRule
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks

Weights = Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class TunedRouter:
    """A router's linear map, of which the weight ``[expert, d_in]`` is tuned; a bias stays.

    Attributes:
        layer: The layer.
        name: The weight's name in the transformers model, such as ``model.layers.3.mlp.gate.weight``.
        owner: The module that holds the weight, and whose input it multiplies.
        parameter: The weight.
        rule: The layer's routing rule.
    """

    layer: int
    name: str
    owner: nn.Module
    parameter: nn.Parameter
    rule: RoutingRule

    @classmethod
    def of(cls, moe: MoEHooks, layer: int) -> TunedRouter:
        """The router of a layer.

        Raises:
            ConfigError: a layer that chooses experts by token id, or a router without one plain matrix of its own.
        """
        spec = moe.spec(layer)
        rule, n_experts = spec.rule, spec.n_experts
        if isinstance(rule, HashTable):
            raise ConfigError(
                f"layer {layer} of {spec.family.name}, a hash layer, which chooses experts by token id",
                "a layer whose router's logits choose the experts",
                "Choose another layer: no router weight moves a choice here.",
            )
        found = [
            (owner, parameter)
            for owner in spec.router.modules()
            for parameter in owner._parameters.values()
            if parameter is not None and parameter.ndim == 2 and parameter.shape[0] == n_experts
        ]
        if len(found) != 1 or not found[0][1].is_floating_point() or found[0][1].is_meta:
            raise ConfigError(
                f"the router of layer {layer}, of the class {type(spec.router).__name__}, with {len(found)} plain "
                f"matrices of {n_experts} rows in memory",
                "one weight [expert, d_model] that can be read and written",
                "Load the model unquantised and not offloaded, and merge adapters into its weights.",
            )
        owner, parameter = found[0]
        return cls(layer, name_of(moe, parameter), owner, parameter, rule)

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.owner, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) and bias.shape == self.parameter.shape[:1] else None

    def start(self) -> Tensor:
        """A copy of the weight as it is trained: float32, or float64 in a model of float64."""
        weight = self.parameter.detach()
        return weight.clone() if weight.dtype == torch.float64 else weight.float().clone()

    def logits(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """``x W^T + b``: ``[token, d_in]`` to ``[token, expert]``, in the number format of the weight."""
        bias = self.bias
        return nn.functional.linear(inputs.to(weight), weight, None if bias is None else bias.to(weight))


@contextmanager
def router_inputs(routers: Sequence[TunedRouter]) -> Iterator[dict[int, Tensor]]:
    """Collects by layer what the routers' linear maps read in the pass inside the ``with``, ``[batch * pos, d_in]``."""
    kept: dict[int, Tensor] = {}

    def keeper(layer: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else next(iter(kwargs.values()))
            kept[layer] = hidden.detach().reshape(-1, hidden.shape[-1])

        return keep

    with ExitStack() as stack:
        for router in routers:
            hook = router.owner.register_forward_pre_hook(keeper(router.layer), with_kwargs=True)
            stack.callback(hook.remove)
        yield kept


def check_logits(router: TunedRouter, inputs: Tensor, recorded: Tensor) -> None:
    """Refuse a router whose logits are not the product of its weight with what it reads.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    found = router.logits(inputs, router.start())
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-4}.get(inputs.dtype, 0.05)  # some routers cast to float32
    tolerance = 1e-4 if recorded.dtype == torch.float32 and inputs.dtype == torch.float64 else tolerance
    recorded = recorded.reshape(found.shape).to(found)
    if float((found - recorded).abs().max()) > tolerance * (1 + float(recorded.abs().max())):
        raise ConfigError(
            f"the router of layer {router.layer}, whose logits are not its weight times its input",
            "a linear router",
            "Choose another layer, or merge adapters into its weights.",
        )


@contextmanager
def frozen(moe: MoEHooks, routers: Sequence[TunedRouter]) -> Iterator[None]:
    """Inside the ``with``, no parameter but the routers' weights takes a gradient; afterwards all as before.

    The routers' weights are their own again too, also after an error.
    """
    parameters = list(moe.bridge.original_model.parameters())
    required = [parameter.requires_grad for parameter in parameters]
    before = [router.parameter.detach().clone() for router in routers]
    tuned = {id(router.parameter) for router in routers}
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in tuned)
        yield
    finally:
        put(routers, dict(zip((router.layer for router in routers), before)))
        for parameter, requires in zip(parameters, required):
            parameter.requires_grad_(requires)


@torch.no_grad()
def put(routers: Sequence[TunedRouter], weights: Weights) -> None:
    """Write weights into the model, in its number format."""
    for router in routers:
        router.parameter.copy_(weights[router.layer])


def name_of(moe: MoEHooks, parameter: Tensor) -> str:
    """A parameter's name in transformers' own model."""
    return next(name for name, one in named_tensors(moe) if one is parameter)


def named_tensors(moe: MoEHooks) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the model by transformers' own names."""
    model: nn.Module = moe.bridge.original_model
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name.replace("_original_component.", "").replace("original_component.", ""), tensor
