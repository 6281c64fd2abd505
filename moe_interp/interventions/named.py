"""Which layers, experts and neurons an intervention is told to act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_interp.checks import as_whole
from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import check_route
from moe_interp.types import Layer

Layers = Layer | Sequence[Layer] | None
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def chosen_layers(moe: MoEHooks, layer: Layers) -> list[Layer]:
    """One layer or several, by label; all attached ones for None.

    Raises:
        HookError: a layer that is dense, not attached, or does not exist.
        ConfigError: none, or one twice.
    """
    if layer is None:
        return list(moe.layers)
    given: Any = layer
    if getattr(given, "shape", ()) or isinstance(given, list | tuple | range | set | frozenset):
        several = list(given)
        if not (len(several) == 2 and isinstance(several[0], str) and not several[0].rpartition(".")[2].isdecimal()):
            labels = [moe.layer_label(label) for label in several]
            if not labels or len(set(labels)) < len(labels):
                raise ConfigError(f"layers {several}", f"layers among {list(moe.layers)}, each once", "Correct them.")
            return labels
    return [moe.layer_label(given)]


def experts_by_layer(moe: MoEHooks, layer: Layers, experts: Any, where: str) -> dict[Layer, Tensor]:
    """Of each layer the ids ``[expert]`` named for it: the same for all, or those that a mapping gives it.

    Raises:
        HookError: a layer that is dense, not attached, or does not exist.
        ConfigError: no experts, or a mapping of other layers.
        RouteError: an id that is no integer or out of range, or an expert twice.
    """
    if not isinstance(experts, Mapping):
        return {label: checked_experts(moe, label, experts, where) for label in chosen_layers(moe, layer)}
    by_label = {moe.layer_label(key): ids for key, ids in experts.items()}
    labels = list(by_label) if layer is None else chosen_layers(moe, layer)
    if not by_label or len(by_label) < len(experts) or set(by_label) != set(labels):
        raise ConfigError(
            f"experts of layers {list(experts)} for {where} at layers {labels}",
            "experts for each of the layers, and no others",
            "Name the same layers in both, or pass layer=None.",
        )
    return {label: checked_experts(moe, label, by_label[label], where) for label in labels}


def checked_experts(moe: MoEHooks, layer: Layer, experts: int | Iterable[int] | Tensor, where: str) -> Tensor:
    """``[expert]`` ids of one or several different experts of a layer.

    Raises:
        ConfigError: no experts.
        RouteError: an id that is no integer or out of range, or an expert twice.
    """
    n_experts = moe.spec(layer).n_experts
    if isinstance(experts, Tensor):
        ids = experts.reshape(-1)
        ids = ids.long() if ids.dtype in _UNSIGNED else ids
    else:
        flat = np.asarray(list(experts) if isinstance(experts, set | frozenset) else experts, dtype=object)
        given = flat.reshape(-1).tolist()
        if strange := [e for e in given if as_whole(e) is None]:
            expected = f"integers from 0 to {n_experts - 1}"
            raise RouteError(f"experts {strange[:4]} for {where}", expected, "Name existing experts.")
        # no tensor holds what is beyond 64 bits, which is refused as any id that does not exist
        ids = torch.as_tensor([min(max(int(e), -(2**62)), 2**62) for e in given])
    if not len(ids):
        raise ConfigError(f"no experts for {where}", f"ids from 0 to {n_experts - 1}", "Name at least one expert.")
    if ids.is_floating_point() or ids.dtype == torch.bool or bool((ids < 0).any()):
        raise RouteError(
            f"experts {ids.tolist()} for {where}",
            f"integers from 0 to {n_experts - 1}",
            "Name existing experts; set_routes takes -1 for an empty slot.",
        )
    check_route(ids, n_experts, where)
    return ids.long()


def checked_neurons(moe: MoEHooks, layer: Layer, neurons: int | Iterable[int] | Tensor, where: str) -> Tensor:
    """``[neuron]`` numbers of different hidden neurons of a layer's experts.

    Raises:
        ConfigError: none, one that is no integer or out of range, or one twice.
    """
    d_expert = moe.spec(layer).d_expert
    is_set = isinstance(neurons, set | frozenset)
    given: Any = neurons.tolist() if isinstance(neurons, Tensor) else list(neurons) if is_set else neurons  # type: ignore[arg-type]
    ids = [as_whole(neuron) for neuron in np.asarray(given, dtype=object).reshape(-1).tolist()]
    numbers = [n for n in ids if n is not None and 0 <= n < d_expert]
    numbers = sorted(numbers) if is_set else numbers
    if not ids or len(set(numbers)) < len(ids):
        raise ConfigError(
            f"neurons {str(neurons)[:60]} for {where}",
            f"different integers from 0 to {d_expert - 1}",
            f"Name neurons that the experts of layer {layer!r} have.",
        )
    return torch.tensor(numbers)
