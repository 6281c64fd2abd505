"""Layers of a grid under ``torch.compile``: the transformers layers themselves, on the model's own weights.

What stands around them for hooks (TransformerLens' components, this package's hook points) cannot be compiled well, and
branches do not need it. So a layer that nobody hooks is copied without it: its modules as their classes define them,
with the same parameters. The first layer that runs is compared with the layer as it is.

Compiling takes a GPU about 12 seconds for each shape of a group of branches, and halves the time of the layers.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_interp.arch.modules import has_foreign_hooks, unwrap
from moe_interp.engine.memory import is_out_of_memory
from moe_interp.engine.policy import Policy, policy_of
from moe_interp.errors import warn
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.layer import Opened

BACKEND = "inductor"
"""The backend of ``torch.compile``; tests set another."""
# compiled code that is kept: for each kind of layer and shape of a group
_KEEPS_SHAPES: dict[str, Any] = (
    {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
)


class NotCompiledWarning(UserWarning):
    """Layers were to be compiled, and run as they are."""


class _NotPlain(Exception):
    """A module whose call does more than its class defines; the message says what."""


class CompiledLayers:
    """A model's layers, compiled, and the warnings about those that cannot be: see :func:`compiled_layers`.

    Args:
        attention: The name of the attention function that the copies call.
    """

    def __init__(self, attention: str) -> None:
        self.attention = attention
        self.failure: str | None = None
        self._is_checked = False
        self._said: set[str] = set()
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def forward(self, moe: MoEHooks, index: int, block: nn.Module) -> Callable[..., Any] | None:
        """A forward for a layer of transformers; None where it cannot be compiled."""
        try:
            plain = _plain(block, self.attention)
        except _NotPlain as reason:
            self.failure = str(reason)
            return None
        native: Callable[..., Any] = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index in moe.layers and moe.hooks_active(index):
                return native(*args, **kwargs)
            kwargs["past_key_values"] = None  # it would hand a layer its own keys back
            found = self.run(_run, plain, args, kwargs)
            if found is not None and not self._is_checked:
                self._check(found, native(*args, **kwargs), policy_of(moe))
            return native(*args, **kwargs) if self.failure is not None else found

        return forward

    def _check(self, found: Tensor, expected: Tensor, policy: Policy) -> None:
        tolerance = policy.grid_tolerance(expected.dtype)
        assert tolerance is not None  # the grid was tried
        distance = (found - expected).abs().amax(dim=-1)
        worst = distance.max() if tolerance.of_all else distance.median()
        if not bool(worst <= tolerance.share * expected.abs().max()):
            self.failure = f"a compiled layer's output differs by {float(worst):.2g} from the layer's own"
        self._is_checked = True

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function gives, compiled; None where it cannot be."""
        if self.failure is not None:
            return None
        try:
            if function not in self._compiled:
                self._compiled[function] = torch.compile(function, backend=BACKEND, **_KEEPS_SHAPES)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what compilers say of themselves
                return self._compiled[function](*args)
        except Exception as error:  # compilers raise errors of any class
            if is_out_of_memory(error):
                raise
            self.failure = f"torch.compile with {BACKEND!r} failed, {_reason(error)}"
            return None

    def say(self) -> None:
        """Warn, once, of what was not compiled; to be called where the user's line can be found."""
        if self.failure is not None:
            self.say_once(self.failure)

    def say_once(self, why: str) -> None:
        """Warn that branches are not compiled, once for a reason."""
        if why not in self._said:
            self._said.add(why)
            warn(f"Branches run without torch.compile, with the same results: {why}.", NotCompiledWarning)


_made: WeakKeyDictionary[MoEHooks, CompiledLayers] = WeakKeyDictionary()


def compiled_layers(moe: MoEHooks, attention: str) -> CompiledLayers:
    """The compiled layers of an attached model, which last as long as its hooks do."""
    if moe not in _made:
        _made[moe] = CompiledLayers(attention)
    return _made[moe]


def _run(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return layer.forward(*args, **kwargs)


def _plain(module: nn.Module, attention: str) -> nn.Module:
    """A module as its class defines it, without hooks and wrappers, all the way down; parameters are shared.

    Raises:
        _NotPlain: somebody else's hooks or forward, or weights that are moved in for the call.
    """
    native: Any = unwrap(module)
    name, forward = type(native).__name__, native.__dict__.get("forward")
    if has_foreign_hooks(native):
        raise _NotPlain(f"hooks are on a module {name}")
    if "_hf_hook" in native.__dict__:
        raise _NotPlain(f"the weights of a module {name} are moved in and out")
    opened = getattr(forward, "__self__", None)
    if forward is not None and not (isinstance(opened, Opened) and opened.has_class_forward):
        raise _NotPlain(f"the forward of a module {name} was replaced")
    plain: Any = copy.copy(native)
    plain.__dict__.pop("forward", None)
    plain._forward_hooks, plain._forward_pre_hooks = OrderedDict(), OrderedDict()
    plain._modules = {name: None if part is None else _plain(part, attention) for name, part in native._modules.items()}
    if getattr(getattr(native, "config", None), "_attn_implementation", None) is not None:
        plain.config = copy.copy(native.config)
        plain.config._attn_implementation = attention
    return plain


def _reason(error: Exception) -> str:
    """The first line of an error, or two where the first only announces another error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = lines[:2] if lines and lines[0].endswith(":") else lines[:1]
    return " ".join([f"{type(error).__name__}:", *shown])[:300]
