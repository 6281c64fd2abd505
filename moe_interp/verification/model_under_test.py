"""Running a model under test: the same tokens, the user's own hooks set aside, and everything as before afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.arch.offload import device_of
from moe_interp.engine.eval_mode import eval_mode
from moe_interp.errors import ConfigError, DataError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.tokenization import TextReader, check_context
from moe_interp.types import Layer

Edit = Callable[[Tensor], Tensor | None]
Place = tuple[str, Layer]
Seen = dict[Place, Tensor]

ROUTER_HOOKS = ("router_in", "router_logits", "router_probs", "expert_indices", "expert_weights")

_HOOK_STATE = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "fwd_hooks",
    "bwd_hooks",
)


@dataclass(frozen=True)
class Call:
    """What a module was called with in the pass with nothing hooked, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class ModelUnderTest:
    """Forward passes of one model on one batch; made by :func:`run_under_test`.

    Attributes:
        natural: The logits with nothing hooked.
        noise: Twice the largest difference between two runs with nothing hooked; 0.0 for a deterministic model.
        router_calls: Layer -> the call of its router.
        expert_calls: Layer -> the call of its experts with hidden states, indices and weights, where there is one.
        shared_calls: Layer -> the call of its shared experts, where there are some.
        block_outputs: Layer -> what the block that holds router and experts returned; see :meth:`observed`.
        seen: Every activation but those of the experts, with nothing edited.
    """

    natural: Tensor
    noise: float
    block_outputs: dict[Layer, Tensor]
    seen: Seen

    def __init__(self, moe: MoEHooks, tokens: Tensor, layers: Sequence[Layer]) -> None:
        self.moe, self.tokens, self.layers = moe, tokens, tuple(layers)
        self.specs = {layer: moe.spec(layer) for layer in layers}
        self.router_calls: dict[Layer, Call] = {}
        self.expert_calls: dict[Layer, Call] = {}
        self.shared_calls: dict[Layer, Call] = {}

    def read(self, names: Iterable[str]) -> Seen:
        """These activations of all layers that have them, with nothing edited."""
        return self.see(read=[(n, layer) for layer in self.layers for n in names if n in self.moe.hooks(layer)])[1]

    def run(self, edits: Mapping[Place, Edit] | None = None) -> Tensor:
        """Logits ``[batch, pos, vocab]`` under edits."""
        bridge = self.moe.bridge
        hooks = [(self.moe.hook_name(*place), _as_hook(edit)) for place, edit in (edits or {}).items()]
        inputs: dict[str, Any] = {}
        if getattr(bridge.original_model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = self.tokens
        with bridge.hooks(fwd_hooks=hooks):
            return bridge(self.tokens, **inputs)

    def see(self, edits: Mapping[Place, Edit] | None = None, read: Iterable[Place] = ()) -> tuple[Tensor, Seen]:
        """Logits under edits, and the activations at ``read`` as they are after the edits."""
        seen: Seen = {}

        def reader(place: Place, edit: Edit | None) -> Edit:
            def hook(value: Tensor) -> Tensor:
                new = None if edit is None else edit(value)
                new = value if new is None else new
                seen[place] = new.detach().clone()
                return new

            return hook

        given = dict(edits or {})
        logits = self.run(given | {place: reader(place, given.get(place)) for place in read})
        return logits, seen

    def observed(self, layer: Layer) -> nn.Module:
        """The module whose output is compared: the block; where a norm follows the experts in it, the experts."""
        spec = self.specs[layer]
        return spec.experts if spec.family.normed_after else spec.container

    def block_output(self, layer: Layer, edits: Mapping[Place, Edit]) -> Tensor:
        """What the layer's block returns under edits."""
        return self.run_and_observe(layer, edits)[1]

    def run_and_observe(self, layer: Layer, edits: Mapping[Place, Edit]) -> tuple[Tensor, Tensor]:
        """Logits under edits, and what the layer's block returned."""
        found: dict[Layer, Call] = {}
        with _recorded(self.observed(layer), found, layer):
            logits = self.run(edits)
        return logits, first(found[layer].output)

    def run_with(self, module: nn.Module, output: Tensor) -> Tensor:
        """Logits with nothing hooked, where a module returns ``output`` instead of its own."""

        def replace(module: nn.Module, args: Any, own: Any) -> Any:
            return (output.view_as(own[0]), *own[1:]) if isinstance(own, tuple) else output.view_as(own)

        handle = module.register_forward_hook(replace)
        try:
            return self.run()
        finally:
            handle.remove()


def run_under_test(moe: MoEHooks, tokens: Tensor, layers: Sequence[Layer]) -> ModelUnderTest:
    """Runs the model with nothing hooked, twice, and once for each group of hooks that only read."""
    tested = ModelUnderTest(moe, tokens, layers)
    blocks: dict[Layer, Call] = {}
    with ExitStack() as stack:
        for layer, spec in tested.specs.items():
            stack.enter_context(_recorded(spec.router, tested.router_calls, layer))
            stack.enter_context(_recorded(tested.observed(layer), blocks, layer))
            if not spec.family.routes_at_router:
                stack.enter_context(_recorded(spec.experts, tested.expert_calls, layer))
            if spec.shared is not None:
                stack.enter_context(_recorded(spec.shared, tested.shared_calls, layer))
        tested.natural = tested.run()
    tested.block_outputs = {layer: first(call.output) for layer, call in blocks.items()}
    tested.noise = 2 * difference(tested.run(), tested.natural)
    # apart: in some families reading the sums changes the last digit of what later layers see
    tested.seen = tested.read(ROUTER_HOOKS) | tested.read(("routed_out", "shared_out"))
    return tested


@contextmanager
def at_rest(bridge: TransformerBridge) -> Iterator[None]:
    """No hooks, eval mode, no gradients inside; everything as it was after, also after an exception."""
    modules = {*bridge.modules(), *bridge.original_model.modules()}
    points = [module for module in modules if isinstance(module, HookPoint)]
    state = [(point, {name: vars(point)[name] for name in _HOOK_STATE}) for point in points]
    try:
        for point, held in state:
            # new containers of the same kind: handles go on pointing at the old ones
            vars(point).update({name: type(value)() for name, value in held.items()})
        with eval_mode(bridge), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for point, held in state:
            vars(point).update(held)


def as_tokens(bridge: TransformerBridge, tokens: Tensor | str | None, seed: int = 0) -> Tensor:
    """Ids ``[batch, pos]`` on the model's device; two random sequences of eight by default, special ids left out.

    A text begins with BOS once, where the model expects it.

    Raises:
        DataError: text without a tokenizer, ids that the model does not have, none, or more than its context.
        ConfigError: not 2-D, or not integers.
    """
    device = device_of(bridge.original_model)
    if isinstance(tokens, str):
        reader = TextReader(bridge)
        row = reader.start(tokens, "the text", "tokens")
        check_context(bridge, [("the text", len(row))])
        reader.warn("text")
        if not row:
            raise DataError("a text without a token", "at least one token", "Give a longer text.")
        return torch.tensor([row], device=device)
    if tokens is None:
        ids = torch.arange(int(bridge.cfg.d_vocab))
        ids = ids[~torch.isin(ids, torch.tensor(sorted(_special_ids(bridge.original_model.config)), dtype=ids.dtype))]
        draws = torch.randint(len(ids), (2, 8), generator=torch.Generator().manual_seed(seed))
        return ids[draws].to(device)
    if tokens.ndim != 2 or tokens.dtype.is_floating_point:
        raise ConfigError(
            f"tokens of shape {tuple(tokens.shape)} and type {tokens.dtype}",
            "integer ids [batch, pos]",
            "Pass bridge.to_tokens(text), or leave tokens out.",
        )
    vocabulary = int(bridge.cfg.d_vocab)
    if not tokens.numel():
        raise DataError("no tokens", "at least one", "Pass others.")
    check_context(bridge, [("each sequence" if len(tokens) > 1 else "the sequence", tokens.shape[1])])
    if bad := [i for i in tokens.flatten().tolist() if not 0 <= i < vocabulary]:
        raise DataError(f"token id {bad[0]}", f"ids from 0 to {vocabulary - 1}", "Tokenise for this model.")
    return tokens.to(device)


def difference(a: Any, b: Any) -> float:
    """The largest absolute difference, over tensors or tuples of them; inf where the shapes differ."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return float("inf")
        if torch.equal(a, b):
            return 0.0
        return float((a.double() - b.double()).abs().max())
    if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
        return max((difference(x, y) for x, y in zip(a, b)), default=0.0)
    return 0.0 if a == b else float("inf")


def _as_hook(edit: Edit) -> Callable[..., Tensor | None]:
    return lambda value, hook: edit(value)


def first(output: Any) -> Tensor:
    """A module's output, of several its first."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _recorded(module: nn.Module, into: dict[Layer, Call], layer: Layer) -> Iterator[None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        into[layer] = Call(_kept(args), {name: _kept(value) for name, value in kwargs.items()}, _kept(output))

    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _kept(value: Any) -> Any:
    """Copies of tensors, which later steps of a pass may write into."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tuple(map(_kept, value)) if type(value) is tuple else value


def _special_ids(config: Any) -> set[int]:
    """Ids that a configuration, or a part of it, gives a meaning to (padding, images, ...)."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found |= _special_ids(value)
        elif name.endswith(("token_id", "token_index")):
            found |= {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
    return found
