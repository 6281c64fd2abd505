"""One opened layer: its hook points, and what of a running forward pass they need to know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from moe_interp.arch.rules import RoutingRule
from moe_interp.arch.spec import MoESpec
from moe_interp.errors import HookError, RouteError
from moe_interp.hooks.edits import EditDetector, VersionedTensor, carries_gradient, counting_copy, is_edited
from moe_interp.hooks.thread_ownership import PerThread


@dataclass
class LayerPass:
    """What one forward pass through the layer has computed so far. Dropped when the pass ends, also by an exception."""

    batch: int
    pos: int
    rule: RoutingRule | None = None
    logits: Tensor | None = None  # [batch, pos, expert], as edited
    scores: Tensor | None = None  # [batch, pos, expert], only where router_probs was edited
    indices: Tensor | None = None  # [batch, pos, slot], as edited
    weights: Tensor | None = None
    is_edited: bool = False  # whether a hook changed the route, rather than only read what it is made of
    has_empty: bool = False  # whether the route of a family that hands it to its experts has empty slots
    router_choice: VersionedTensor | None = None  # as the router returned it, before TransformerLens' own hooks
    writer: Tensor | None = None  # [batch, pos], the intervention that wrote a token's route last
    shared_in: Tensor | None = None  # set where the block calls its shared experts before the routed ones
    shared_out: Tensor | None = None
    routed_is_done: bool = False
    is_projected: bool = False  # the experts' outputs have already left their latent width
    notes: dict[Any, Any] = field(default_factory=dict)  # what functions of hooks keep for later hooks

    def fold(self, flat: Tensor) -> Tensor:
        """``[batch * pos, width] -> [batch, pos, width]``; already folded tensors pass."""
        # judged by the whole shape: of one token and one slot a sequence, [token, slot] is as long as [batch, pos]
        shape = (self.batch, self.pos, flat.shape[-1])
        return flat if flat.shape == shape else flat.reshape(shape)

    def family_weights(self, indices: Tensor) -> Tensor:
        """The family's own weights ``[batch, pos, slot]`` for any experts, from the logits (or scores) as edited."""
        assert self.rule is not None
        assert self.logits is not None
        if self.scores is not None:
            return self.rule.weights_from_scores(self.scores, indices)
        return self.rule.weights(self.logits, indices)

    def ranking(self, raised: Tensor | None = None, top_k: int | None = None) -> Tensor:
        """What the family ranks experts by, ``[batch, pos, expert]``, from the logits (or scores) as edited.

        Args:
            raised: Added before groups are chosen, in nats.
            top_k: Another number of experts a token.
        """
        assert self.rule is not None
        assert self.logits is not None
        rule = self.rule if top_k is None else replace(self.rule, top_k=top_k)
        return rule.ranking(self.logits, self.scores, raised)


class _RunningPass(PerThread):
    """The pass that a thread is running."""

    run: LayerPass | None = None


class OpenLayer:
    """A layer whose forward pass can be read and edited at its hook points.

    Attributes:
        spec: What the layer is.
        points: Its hook points, by bare name.
        last_pos: Positions of the last pass.
        opened: What is in the place of the modules' own forwards, by kind.
        before_pass: Called with the layer before a pass that hooks look at.
    """

    def __init__(self, spec: MoESpec, points: dict[str, HookPoint]) -> None:
        self.spec = spec
        self.points = points
        self.last_pos = 0
        self.opened: dict[type[Opened], Opened] = {}
        self.before_pass: Callable[[OpenLayer], None] | None = None
        self._running = _RunningPass()

    @property
    def running(self) -> LayerPass | None:
        """The pass that this thread is running; a pass inside of a hook is another one."""
        return self._running.run

    @running.setter
    def running(self, run: LayerPass | None) -> None:
        self._running.run = run

    def prepare(self) -> None:
        """A hooked pass is about to run through the layer."""
        if self.before_pass is not None:
            self.before_pass(self)

    def is_hooked(self, *names: str) -> bool:
        """Whether any of these hook points (all by default) has a hook, forward or backward."""
        points = [self.points[n] for n in names if n in self.points] if names else self.points.values()
        return any(_has_hook(point) for point in points)

    def fire(self, name: str, value: Tensor, *, owned: bool = False) -> Tensor:
        """Run one hook point: the activation as the hooks leave it.

        A hook may return a tensor, or edit in place and return None; ``hooks/edits.py`` says what counts as an edit.
        Shape and dtype are checked always, values only where something may have been written, so that hooks that only
        read make the host wait for nothing.

        Args:
            name: The bare hook name.
            value: The activation, ``[batch, pos, ...]``.
            owned: Nobody else holds this tensor, so a hook may write into it.

        Raises:
            HookError: a hook returned something else, or another shape.
            RouteError: a hook wrote values that cannot be: NaN, or a route that is none.
        """
        return self._run_hooks(name, value, owned)[0]

    def fire_and_compare(self, name: str, value: Tensor) -> tuple[Tensor, bool]:
        """As :meth:`fire`, and whether a hook edited the activation."""
        result, is_written = self._run_hooks(name, value, owned=False)
        return result, is_written and is_edited(result, value)

    def _run_hooks(self, name: str, value: Tensor, owned: bool) -> tuple[Tensor, bool]:
        """The activation after the hooks, and whether they may have written to it."""
        point = self.points.get(name)
        if point is None or not _has_hook(point):
            return value, False
        # an edit in place must reach neither the model's own buffers nor the value it is compared with
        given = value if owned and not torch.is_grad_enabled() else counting_copy(value)
        with EditDetector(given) as watch:
            result = point(given)
        self._check_form(name, result, value)
        if watch.is_unedited(result):
            has_gradient = carries_gradient(result) or carries_gradient(value)
            return (result if has_gradient else value), False
        result = result.to(value.dtype)
        if name == "expert_indices":
            check_route(result, self.spec.n_experts, f"{self.points[name].name}")
        elif name in ("router_logits", "router_probs", "expert_weights"):
            self._check_values(name, result, value)
        return result, True

    def _check_form(self, name: str, result: Any, before: Tensor) -> None:
        """Refuse what is not a tensor like the activation; the number of slots may change."""
        if not isinstance(result, Tensor):
            raise self._edit_error(name, f"a {type(result).__name__}", f"a tensor like {_like(before)}")
        if name != "expert_indices":
            if result.shape != before.shape:
                raise self._edit_error(name, f"shape {tuple(result.shape)}", f"shape {tuple(before.shape)}")
            return
        if result.ndim != 3 or result.shape[:2] != before.shape[:2] or result.shape[2] == 0:
            expected = f"[{before.shape[0]}, {before.shape[1]}, slots] with at least one slot"
            raise self._edit_error(name, f"shape {tuple(result.shape)}", expected)
        if result.dtype.is_floating_point or result.dtype == torch.bool:
            raise self._edit_error(name, f"dtype {result.dtype}", "integer expert ids")

    def _check_values(self, name: str, result: Tensor, before: Tensor) -> None:
        bad = torch.isnan(result) & ~torch.isnan(before)
        if name == "expert_weights":
            bad = ~torch.isfinite(result) & torch.isfinite(before)
        if bool(bad.any()):
            where = ", ".join(f"{axis} {i}" for axis, i in zip(("batch", "pos", "column"), bad.nonzero()[0].tolist()))
            raise RouteError(
                f"a hook wrote {result[tuple(bad.nonzero()[0])].item()} to {self.points[name].name} at {where}",
                "finite values" if name == "expert_weights" else "numbers (-inf gives an expert the score 0)",
                "Mend the hook; the model was left as it was.",
            )

    def _edit_error(self, name: str, given: str, expected: str) -> HookError:
        return HookError(
            f"a hook at {self.points[name].name} returned {given}",
            expected,
            "Return the edited tensor, or None after editing in place; the model was left as it was.",
        )


class Opened(ABC):
    """A forward in the place of a module's own.

    A bound method of a plain object, not a closure: a deep copy of the model is then open on its own. It is kept out of
    the graphs of ``torch.compile``, which would not see hooks that come later.

    Attributes:
        layer: The layer.
        module: The module.
        native_forward: Its own forward.
    """

    def __init__(self, layer: OpenLayer, module: nn.Module) -> None:
        self.layer, self.module = layer, module
        state = module.__dict__
        # accelerate keeps the forward that it wraps in an attribute: inside of it, weights are where they are used
        slot = "_old_forward" if "_hf_hook" in state and "_old_forward" in state else "forward"
        self._had_forward, self._is_open = "forward" in state, True
        self.native_forward: Any = state.get(slot, module.forward)
        state[slot] = self.forward

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs) if self._is_open else self.native_forward(*args, **kwargs)

    @property
    def has_class_forward(self) -> bool:
        """Whether the module's own forward is its class's."""
        return not self._had_forward

    @abstractmethod
    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does while it is open."""

    def close(self) -> None:
        """Give the module its own forward back; where somebody has wrapped this one, it only hands calls on."""
        self._is_open = False
        state = self.module.__dict__
        for slot in ("forward", "_old_forward"):  # accelerate may have come or gone meanwhile
            if getattr(state.get(slot), "__self__", None) is self:
                if slot == "_old_forward" or self._had_forward:
                    state[slot] = self.native_forward
                else:
                    del state[slot]


def plain_label(label: Any) -> Any:
    """A layer's label as the plain number it is: also numpy's integers, and arrays and tensors of one integer."""
    if getattr(label, "shape", None) == () and hasattr(label, "item"):
        label = label.item()
    return int(label) if isinstance(label, Integral) and not isinstance(label, bool) else label


def check_route(indices: Tensor, n_experts: int, where: str) -> None:
    """Refuse ids out of range and experts that a token uses twice."""
    out = (indices >= n_experts) | (indices < -1)
    ordered = indices.sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if not bool((out.any() | twice.any()).item()):
        return
    if bool(out.any()):
        place = out.nonzero()[0].tolist()
        raise RouteError(
            f"expert id {int(indices[tuple(place)])} at {where}{_token(place[:-1], ', ')}",
            f"ids from 0 to {n_experts - 1}, or -1 for an empty slot",
            "Correct the id; the model was left as it was.",
        )
    place = twice.nonzero()[0].tolist()
    raise RouteError(
        f"expert {int(ordered[..., 1:][tuple(place)])} twice in the route{_token(place[:-1], ' of ')} at {where}",
        "each expert at most once a token",
        "Remove the duplicate; scale the expert's weight if it should count twice. The model was left as it was.",
    )


def _token(place: list[int], before: str) -> str:
    """Whose route it is, in words: of indices ``[slot]`` nobody's own, of ``[pos, slot]`` a position's, and so on."""
    axes = ("sequence", "position", "route") if len(place) > 1 else ("position",)
    named = ", ".join(f"{axis} {i}" for axis, i in zip(axes, place))
    return before + named if named else ""


def pack_left(indices: Tensor) -> Tensor:
    """Move empty slots to the end, keeping the order of the others, and cut to the widest route."""
    empty = indices < 0
    if bool((empty[..., :-1] & ~empty[..., 1:]).any()):
        indices = indices.gather(-1, empty.to(torch.int8).sort(dim=-1, stable=True).indices)
    widest = int((~empty).sum(dim=-1).max()) if indices.numel() else 1
    return indices[..., : max(widest, 1)]


def _has_hook(point: HookPoint) -> bool:
    return bool(point._forward_hooks or point._backward_hooks or point._forward_pre_hooks or point._backward_pre_hooks)


def _like(value: Tensor) -> str:
    return f"{tuple(value.shape)} {value.dtype}"
