"""Weights that accelerate keeps elsewhere until a module is called: read outside of that call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn


@contextmanager
def materialized(*modules: nn.Module | None, recurse: bool = True, within: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Inside the ``with``, the parameters and buffers of these modules are real.

    Free where nothing is offloaded. What an enclosing call has loaded already is neither loaded again nor dropped.

    Args:
        modules: The modules to read; None is passed over.
        recurse: Whether the modules inside of them are read too.
        within: Modules that hold them, the nearest first: one of those may be what the weights are kept for.
    """
    with ExitStack() as stack:
        for module in modules:
            owners = [] if module is None else [*module.modules()] if recurse else [module]
            for owner in owners:
                for name, tensor in _own_tensors(owner):
                    if tensor.is_meta:
                        _load(stack, owner, name, within)
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where a model reads its tokens: its first weight's device, or the one that this weight is loaded to."""
    for module in model.modules():
        for _, tensor in _own_tensors(module):
            if not tensor.is_meta:
                return tensor.device
            for hook in _hooks(module):
                if hook.execution_device is not None:
                    return torch.zeros(0, device=hook.execution_device).device
    return next(model.parameters()).device


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    # as named_parameters and named_buffers give them, which take five times as long
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in own if tensor is not None]


def _load(stack: ExitStack, owner: nn.Module, name: str, within: Sequence[nn.Module]) -> None:
    """Puts a tensor's values in its place for a while; nothing happens where nobody keeps them."""
    for keeper in (owner, *within):
        hooks = [hook for hook in _hooks(keeper) if hook.offload and hook.weights_map is not None]
        prefix = next((path for path, module in keeper.named_modules() if module is owner), None) if hooks else None
        key = f"{prefix}.{name}" if prefix else name
        for hook in hooks if prefix is not None else ():
            if key in hook.weights_map:
                set_module_tensor_to_device(owner, name, hook.execution_device, value=hook.weights_map[key])
                stack.callback(set_module_tensor_to_device, owner, name, "meta")
                return


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """accelerate's hooks on a module that move weights."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # several in a row
    return [one for one in hooks if isinstance(one, AlignDevicesHook)]
