"""``attach`` and ``MoEHooks``: the hook points of every MoE layer of a bridge."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pkgutil import resolve_name
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.arch.spec import MoESpec
from moe_interp.errors import AttachError, ConfigError, HookError
from moe_interp.hooks.find_layers import close_layer, describe_layer, find_layers, find_path, open_layer
from moe_interp.hooks.layer import LayerPass, OpenLayer, plain_label
from moe_interp.hooks.names import HOOK_NAMES, absence, hooks_of
from moe_interp.hooks.passes import Generation, PassContext, Passes
from moe_interp.hooks.thread_ownership import LayerHookPoint, ThreadOwnership
from moe_interp.hooks.verification_table import Verification
from moe_interp.routing_view.view import RoutingView
from moe_interp.types import Layer

_MARK = "_moe_interp_hooks"
# of floors above: found when they are asked for
_VERIFY = "moe_interp.verification.verify:verify"
_SHOW = "moe_interp.experiments.show_routing:show"


class MoEHooks:
    """The hook points of a bridge's MoE layers; a context manager that detaches on leaving.

    Attributes:
        bridge: The bridge they are on. Everything TransformerLens offers works on it as before.
        layers: Labels of the attached MoE layers; dense layers of an interleaved stack are left out.
    """

    def __init__(self, bridge: TransformerBridge, opened: dict[Layer, OpenLayer], blocks: dict[Layer, str]) -> None:
        self.bridge = bridge
        self._opened = opened
        self._blocks = blocks
        self._mounted: dict[Layer, nn.Module] = {}
        self._ownership = ThreadOwnership(bridge.original_model)
        self._ownership.points = [point for layer in opened.values() for point in layer.points.values()]
        self._paths = {label: find_path(bridge.original_model, layer.spec) for label, layer in opened.items()}
        for layer in opened.values():
            layer.before_pass = self._prepare
            for point in layer.points.values():
                vars(point)["ownership"] = self._ownership
        self._mount()

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(self._opened)

    @property
    def is_attached(self) -> bool:
        return self.bridge.__dict__.get(_MARK) is self

    def held(self) -> AbstractContextManager[None]:
        """Inside the ``with``, the model is this thread's alone; passes of others are refused.

        Raises:
            HookError: another thread is at work on it.
        """
        return self._ownership.held()

    @property
    def n_past(self) -> int:
        """Columns that the last layer's running (or last) pass found in its cache."""
        return self.pass_context(self.layers[-1]).n_past

    def pass_context(self, layer: Layer) -> PassContext:
        """Where the tokens of the layer's running (or last) pass lie in their sequences: cached columns, the prompt."""
        return self._passes.pass_context(layer)

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Inside the ``with``, the passes that this thread runs are those of one call of ``generate``.

        For loops of passes that decode by themselves: interventions then tell the prompt and what is generated apart.
        """
        with self._passes.generating(generation):
            yield

    def spec(self, layer: Layer) -> MoESpec:
        """What the layer is: family, sizes, routing rule.

        Raises:
            HookError: the layer is dense, not attached, or does not exist.
        """
        return self._open(layer).spec

    def hooks(self, layer: Layer) -> tuple[str, ...]:
        """Bare names of the layer's hooks, in the order they fire."""
        return tuple(self._open(layer).points)

    def absent(self, layer: Layer) -> dict[str, str]:
        """The hooks that the layer does not have, with the reason in words."""
        opened = self._open(layer)
        missing = [name for name in HOOK_NAMES if name not in opened.points]
        return {name: absence(name, opened.spec.family, opened.spec.unreadable) for name in missing}

    def hook_name(self, name: str, layer: Layer) -> str:
        """The full name of a hook point, ``blocks.{layer}.hook_{name}``, for ``run_with_hooks``.

        Raises:
            HookError: this layer has no such hook; the message says why.
        """
        opened = self._open(layer)
        if name not in opened.points:
            reason = absence(name, opened.spec.family, opened.spec.unreadable)
            raise HookError(
                f"hook {name!r} at layer {layer!r}: {reason}",
                f"one of {', '.join(opened.points)}",
                "Merge adapters into the weights (peft: merge_and_unload), or load the model unquantised; then attach "
                "anew."
                if reason == opened.spec.unreadable
                else "See moe_interp.support_table() for what each family can serve.",
            )
        return f"{self._blocks[plain_label(layer)]}.hook_{name}"

    def hook_names(self, layer: Layer | None = None) -> list[str]:
        """Full names of all hook points, of one layer or of all, in the order they fire."""
        layers = self.layers if layer is None else (layer,)
        return [self.hook_name(name, label) for label in layers for name in self.hooks(label)]

    def running(self, layer: Layer) -> LayerPass:
        """What the layer's running forward pass has computed so far, for functions that hooks call.

        Raises:
            HookError: no forward pass is running.
        """
        run = self._open(layer).running
        if run is None:
            raise HookError(f"no running pass at layer {layer!r}", "a call from inside a hook", "Use it in a hook.")
        return run

    def hooks_active(self, layer: Layer) -> bool:
        """Whether any hook point of the layer has a hook right now."""
        return self._open(layer).is_hooked()

    def filter(self, *names: str, layers: Iterable[Layer] | None = None) -> Callable[[str], bool]:
        """A ``names_filter`` for ``run_with_cache`` that selects these hooks only (not TransformerLens' of like name).

        Raises:
            HookError: no attached layer has such a hook.
            AttachError: the hooks were detached, so that nothing would be cached.
        """
        check_attached(self)
        wanted = set()
        for name in names or HOOK_NAMES:
            found = {self.hook_name(name, label) for label in layers or self.layers if name in self.hooks(label)}
            if names and not found:
                self.hook_name(name, next(iter(layers or self.layers)))
            wanted |= found
        return wanted.__contains__

    def cached(self, cache: Any, name: str, layer: Layer) -> Tensor:
        """The cached activation of a hook, for any layer label (``cache[name, layer]`` reaches decoder-only models)."""
        return cache[self.hook_name(name, layer)]

    def patch_index(self, axes: Sequence[str] = ("layer", "pos", "expert"), n_pos: int | None = None) -> pd.DataFrame:
        """All cells of a patching sweep, for ``patching.generic_activation_patch(index_df=...)``: MoE layers only.

        Args:
            axes: Columns, among "layer", "pos", "expert" and "slot".
            n_pos: Number of positions; by default that of the last forward pass.

        Raises:
            ConfigError: an unknown axis, or "pos" before any forward pass and without ``n_pos``.
        """
        n_pos = n_pos or max((layer.last_pos for layer in self._opened.values()), default=0)
        unknown = set(axes) - {"layer", "pos", "expert", "slot"}
        if unknown or ("pos" in axes and not n_pos):
            raise ConfigError(
                f"axes {tuple(axes)}" + ("" if unknown else " before any forward pass"),
                "axes among layer, pos, expert and slot" if unknown else "the number of positions",
                "Correct the axes." if unknown else "Pass n_pos, or run the model on the tokens first.",
            )
        rows: list[tuple[Any, ...]] = []
        for label, opened in self._opened.items():
            ranges = {"pos": n_pos, "expert": opened.spec.n_experts, "slot": opened.spec.top_k}
            columns = [[label] if axis == "layer" else range(ranges[axis]) for axis in axes]
            rows += itertools.product(*columns)
        # without the layer axis, every layer gives the same cells
        return pd.DataFrame(list(dict.fromkeys(rows)), columns=list(axes))

    def layer_label(self, label: Any) -> Layer:
        """Normalise a label: negative indices count MoE layers from the end, ``"encoder.1"`` is ``("encoder", 1)``.

        Raises:
            HookError: the layer is dense, not attached, or does not exist.
        """
        if isinstance(label, str) and label.rpartition(".")[2].lstrip("-").isdecimal():
            stack, _, index = label.rpartition(".")
            label = (stack, int(index)) if stack else int(label)
        if isinstance(label, list):
            label = tuple(label)
        label = plain_label(label)
        if type(label) is int and label < 0 and -label <= len(self.layers):
            return self.layers[label]
        self._open(label)
        return label

    def verify(self, tokens: Tensor | str | None = None, layers: Sequence[Layer] | None = None) -> Verification:
        """Check every hook by cause on this very model: see :func:`moe_interp.verification.verify.verify`."""
        verify: Callable[..., Verification] = resolve_name(_VERIFY)
        return verify(self, tokens, None if layers is None else [self.layer_label(label) for label in layers])

    def show(self, text: Any, layer: Layer | Sequence[Layer] | None = None, **options: Any) -> RoutingView:
        """The routing of a prompt at a glance, in a notebook or a terminal: a row a token, a column a layer.

        Args:
            text: A text, a list of chat messages, token ids, or a recorded ``RoutingTrace``.
            layer: One MoE layer, shown with all of its experts and weights; or several side by side; all by default.
            options: ``weights``, ``positions``, ``attention_mask``, ``decoder_input`` and ``sequence``: see
                :func:`moe_interp.show`.

        Returns:
            A view that shows itself; ``.to_dataframe()`` has every slot of every token, ``.html()`` is a page.

        Raises:
            DataError, ConfigError, HookError: as :func:`moe_interp.show`.

        What it does not show: what the experts compute, or by how little another expert was passed over.
        """
        show: Callable[..., RoutingView] = resolve_name(_SHOW)
        return show(self, text, layer, **options)

    @contextmanager
    def suspended(self) -> Iterator[TransformerBridge]:
        """The model without these hook points, as it was before attaching; they come back after, with their hooks."""
        registry = dict(self.bridge._hook_registry)
        self._unmount()
        try:
            yield self.bridge
        finally:
            self._mount()
            # in the order they were in, with any aliases
            self.bridge._hook_registry.clear()
            self.bridge._hook_registry.update(registry)

    def detach(self) -> None:
        """Give back the very model that was attached to.

        Raises:
            AttachError: already detached.
        """
        self._unmount()
        for opened in self._opened.values():
            for point in opened.points.values():
                point.remove_hooks(dir="both", including_permanent=True)

    def _mount(self) -> None:
        for layer, opened in self._opened.items():
            open_layer(opened)
            block = self._mounted[layer] = self.bridge.get_submodule(self._blocks[layer])
            for name, point in opened.points.items():
                point.train(self.bridge.training)
                point.name = f"{self._blocks[layer]}.hook_{name}"
                block.add_module(f"hook_{name}", point)
                self.bridge._hook_registry[point.name] = point
        containers = {layer: opened.spec.container for layer, opened in self._opened.items()}
        self._passes = Passes(self.bridge, containers)
        model = self.bridge.original_model
        self._watch = (
            model.register_forward_pre_hook(self._begin_pass),
            model.register_forward_hook(self._end_pass, always_call=True),
        )
        self.bridge.__dict__[_MARK] = self

    def _unmount(self) -> None:
        check_attached(self)
        for layer, opened in self._opened.items():
            close_layer(opened)
            block = self._mounted.pop(layer)  # something else may be in its place now
            for name in opened.points:
                del block._modules[f"hook_{name}"]
                self.bridge._hook_registry.pop(f"{self._blocks[layer]}.hook_{name}", None)
        self._passes.remove()
        for handle in self._watch:
            handle.remove()
        del self.bridge.__dict__[_MARK]

    @torch.compiler.disable
    def _begin_pass(self, module: nn.Module, args: Any) -> None:
        self._ownership.begin()
        for label, layer in self._opened.items():
            if layer.is_hooked() and not self._paths[label].still_holds(layer.spec.container):
                self._ownership.end()
                raise HookError(
                    f"hooks at layer {label!r}, whose experts' block was replaced after attaching",
                    "the modules that were attached to",
                    "Detach, put the modules in place, and attach anew.",
                )

    @torch.compiler.disable
    def _end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        self._ownership.end()

    def _prepare(self, layer: OpenLayer) -> None:
        """Before a hooked pass through a layer: whose hooks these are, and which modules are there now."""
        self._ownership.check()
        open_layer(layer)

    def __enter__(self) -> MoEHooks:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_attached:
            self.detach()

    def __iter__(self) -> Iterator[MoESpec]:
        return (opened.spec for opened in self._opened.values())

    def __repr__(self) -> str:
        spec = self._opened[self.layers[0]].spec
        return (
            f"MoEHooks({spec.family.name}: {len(self.layers)} MoE layers, {spec.n_experts} experts, top-{spec.top_k}"
            f"{'' if self.is_attached else ', detached'})"
        )

    def _open(self, layer: Layer) -> OpenLayer:
        label = plain_label(layer)
        try:
            if isinstance(label, (bool, float)):  # True and 1.0 equal the label 1, and are not meant
                raise KeyError(label)
            return self._opened[label]
        except (KeyError, TypeError):
            raise HookError(
                f"layer {layer!r}, which {describe_layer(self.bridge, layer)}",
                f"one of the attached MoE layers {list(self.layers)}",
                "Choose one of moe.layers.",
            ) from None


def attach(bridge: TransformerBridge, layers: Sequence[Layer] | None = None, expert_outputs: bool = True) -> MoEHooks:
    """Make the MoE layers of a bridge patchable.

    Adds the hook points ``blocks.{l}.hook_<name>`` (see ``moe_interp.support_table()``). With nothing hooked the model
    computes exactly what it did before.

    Args:
        bridge: A ``TransformerBridge`` of any MoE family in the support table.
        layers: Layers to attach to; all MoE layers by default.
        expert_outputs: Whether the layers get ``expert_post`` and ``expert_out``; without them, unfiltered caching of a
            large model stays small.

    Raises:
        AttachError: not a bridge, already attached, no MoE layers, an unknown family, or a layer that is dense or does
            not exist. The model is left as it was.
    """
    found = find_layers(_check_bridge(bridge))
    chosen = list(found) if layers is None else _choose(bridge, layers, list(found))
    opened, blocks = {}, {}
    for label in chosen:
        path, spec = found[label]
        can_read = expert_outputs and spec.unreadable is None
        names = hooks_of(spec.family, has_shared=spec.shared is not None, expert_outputs=can_read)
        opened[label], blocks[label] = OpenLayer(spec, {name: LayerHookPoint() for name in names}), path
    return MoEHooks(bridge, opened, blocks)


def attached(bridge: TransformerBridge) -> MoEHooks | None:
    """The hooks attached to a bridge, also to a deep copy of an attached one; None where there are none."""
    return bridge.__dict__.get(_MARK)


def check_attached(moe: Any) -> None:
    """Refuse what is not a bridge's attached hooks.

    Raises:
        AttachError: a bridge or something else in place of its hooks, or hooks that were detached.
    """
    if not isinstance(moe, MoEHooks):
        raise AttachError(
            f"a {type(moe).__name__} in place of its hooks" if isinstance(moe, TransformerBridge) else f"moe={moe!r}",
            "what moe_interp.attach(bridge) returns",
            "Pass that; moe_interp.attached(bridge) gives it of a bridge that is attached.",
        )
    if not moe.is_attached:
        raise AttachError(
            "a model that these hooks are no longer attached to",
            "an attached model",
            "Call moe_interp.attach(bridge) to attach anew.",
        )


def _choose(bridge: TransformerBridge, layers: Any, found: list[Layer]) -> list[Layer]:
    """The labels among those found that the user names, in the order of the model."""
    remedy = "Leave `layers` out to attach to all of them."
    if isinstance(layers, str) or not isinstance(layers, Iterable) or getattr(layers, "shape", None) == ():
        raise AttachError(f"layers={layers!r}", f"a sequence of layers among {found}", remedy)
    chosen = set()
    for label in map(plain_label, layers):
        # True and 1.0 equal the label 1, and are not meant
        same = [known for known in found if known == label and not isinstance(label, (bool, float))]
        if not same:
            raise AttachError(
                f"layer {label!r}, which {describe_layer(bridge, label)}", f"MoE layers, here {found}", remedy
            )
        chosen |= set(same)
    if not chosen:
        raise AttachError("no layers", f"at least one of {found}", remedy)
    return [label for label in found if label in chosen]


def _check_bridge(bridge: Any) -> TransformerBridge:
    if not isinstance(bridge, TransformerBridge):
        raise AttachError(
            f"a {type(bridge).__module__}.{type(bridge).__name__}",
            "a transformer_lens TransformerBridge",
            "Load the model with TransformerBridge.boot_transformers(name).",
        )
    if attached(bridge) is not None:
        raise AttachError(
            "a bridge that is already attached",
            "an unattached bridge",
            "Go on with its hooks, moe = moe_interp.attached(bridge), or take them off first, moe.detach(): also where "
            "a cell of a notebook runs again.",
        )
    return bridge
