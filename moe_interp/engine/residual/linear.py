"""The residual stream as a sum: one pass in which everything between sublayers is linear.

A decoder's residual stream is what its sublayers (attention, experts, dense MLPs, recurrent mixers) have written into
it. Between them stand only sums, fixed factors and norms. With the norms frozen at the scale that they have in the run
(TransformerLens' convention for the final norm, here for every norm that a sublayer's output passes), what a sublayer
writes reaches the unembedding by a linear map, and one backward pass gives all these maps at once:

    out of a norm = gain * (x - mean(x) if it centres) + bias,    gain = weight / scale, a constant of the run.

Every sublayer's output is a leaf, its input is cut off, and a norm's output keeps its value while its gradient is that
of the frozen map. Nothing of a family is written down here: norms are measured (:func:`frozen_norm`), residual
multipliers, layer scalars and several residual streams are differentiated as the family's own code applies them.
TransformerLens' ``decompose_resid`` knows attention and MLP outputs alone, added as they are: no norm after a sublayer,
no multiplier, no bias, no several streams; so it cannot be used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moe_interp.arch.modules import unwrap
from moe_interp.engine.residual.sublayers import PASSED_THROUGH, decoder_layers_of, detached, is_norm
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.types import Hooks

Kind = Literal["embedding", "attention", "mixer", "mlp", "routed", "shared", "other", "bias"]


@dataclass(frozen=True, eq=False)
class Written:
    """Something that is written into the residual stream.

    Attributes:
        kind: What wrote it; "routed" is the output of a layer's whole block of experts, shared ones inside it included.
        layer: The layer's index; None for the embedding and the final norm's bias.
        name: The layer's submodule.
        value: What was written, as the family's code goes on with it: ``[batch, pos, d_model]`` (the embedding of a
            family with several residual streams: ``[batch, pos, stream, d_model]``). A leaf.
    """

    kind: Kind
    layer: int | None
    name: str
    value: Tensor


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm at the scale of one run: ``gain * (x - mean(x) if it centres) + bias``; gain ``[batch, pos, d_model]``."""

    gain: Tensor
    bias: Tensor
    centres: bool

    def linear(self, x: Tensor) -> Tensor:
        """The map without its bias."""
        return self.gain * (x - x.mean(dim=-1, keepdim=True) if self.centres else x)


@dataclass(eq=False)
class ResidualStream:
    """What one pass wrote into the residual stream, and how it reaches the unembedding.

    Attributes:
        written: Everything that was written, in order.
        before_norm: The final norm's input ``[batch, pos, d_model]``.
        final_norm: The final norm, frozen.
        head: The unembedding.
        head_in: Its input ``[batch, pos, d_model]``.
        logits: ``[batch, pos, d_vocab]``, the model's.
        layer_ends: Each layer's input and output, to tell where a sum does not close.
        experts_in: By MoE layer, what its experts read, ``[batch, pos, d_in]``.
    """

    head: nn.Module
    written: list[Written] = field(default_factory=list)
    before_norm: Tensor | None = None
    final_norm: FrozenNorm | None = None
    head_in: Tensor | None = None
    logits: Tensor | None = None
    layer_ends: dict[int, list[Tensor]] = field(default_factory=dict)
    experts_in: dict[int, Tensor] = field(default_factory=dict)

    def gradients(self, of: Tensor, to: Sequence[Tensor], cotangent: Tensor | None = None) -> list[Tensor]:
        """``d of / d to`` through the frozen stream; zeros where nothing leads there."""
        found = torch.autograd.grad(of, list(to), cotangent, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(value) if grad is None else grad for value, grad in zip(to, found)]


def record_stream(
    moe: MoEHooks, tokens: Tensor, attention_mask: Tensor | None = None, hooks: Hooks | None = None
) -> ResidualStream:
    """One pass of a decoder, with hooks, as a :class:`ResidualStream`. Its logits are the model's own, bit for bit.

    Raises:
        ConfigError: an encoder-decoder, a norm that is neither an RMS norm nor a layer norm, or a model whose final
            norm or unembedding was not seen.
    """
    layers, model = decoder_layers_of(moe), moe.bridge.original_model
    recorder = _Recorder(moe, ResidualStream(model.get_output_embeddings()))  # type: ignore[operator]
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), recorder.on(model, layers)):
            stack.enter_context(context)
        stack.enter_context(moe.bridge.hooks(fwd_hooks=hooks or []))
        # a caller's inference mode may have made them, and what it made cannot be kept for a gradient
        mask = None if attention_mask is None else attention_mask.clone()
        logits = moe.bridge(tokens.clone(), attention_mask=mask)
    stream = recorder.stream
    stream.logits = logits.detach()
    if stream.head_in is None or stream.before_norm is None or not stream.head_in.requires_grad:
        raise ConfigError(
            f"a pass of {type(model).__name__} in which no final norm led to the unembedding",
            "layers, a final norm and the unembedding, called as modules",
            "Switch off what replaces the forward of the model.",
        )
    return stream


def frozen_norm(module: nn.Module, x: Tensor, out: Tensor) -> FrozenNorm:
    """A norm's linear map at the scale that it has for ``x``, measured without knowing its class.

    Its value at 0 is its bias. A vector of alternating signs with the mean square of ``x`` (the variance, if the norm
    centres: it then maps constants to its bias) has its scale, so what the norm makes of that is the gain.

    Raises:
        ConfigError: the map does not give ``out``: neither an RMS norm nor a layer norm.
    """
    with torch.no_grad():
        x, bias = x.detach(), module.forward(torch.zeros_like(x))
        level = x.pow(2).mean(dim=-1, keepdim=True).sqrt()
        constant = module.forward(level.expand_as(x)) - bias
        centres = bool((constant.abs().amax() < 1e-3 * out.detach().abs().amax()).item())
        if centres:
            level = (x - x.mean(dim=-1, keepdim=True)).pow(2).mean(dim=-1, keepdim=True).sqrt()
        probe = level * torch.ones_like(x)
        probe[..., 1::2] *= -1
        response = module.forward(probe) - bias
        gain = torch.where(probe != 0, response / torch.where(probe != 0, probe, 1), 0)
        norm = FrozenNorm(gain, bias, centres)
        made = norm.linear(x) + bias
        off = (made - out).abs().amax()
        if not bool((off <= 100 * _eps(out.dtype) * (1 + out.abs().amax())).item()):  # NaN among it
            raise ConfigError(
                f"a norm of the class {type(unwrap(module)).__name__}, which differs by {float(off):.1e} from a frozen "
                "scale times its weight",
                "an RMS norm or a layer norm",
                "The residual stream of this model cannot be decomposed by freezing its norms.",
            )
    return norm


class _Recorder:
    """Hooks on a model's modules that make the pass linear between sublayers."""

    def __init__(self, moe: MoEHooks, stream: ResidualStream) -> None:
        self.moe, self.stream = moe, stream
        self.shape: torch.Size | None = None  # [batch, pos, d_model]
        self.depth = 0  # sublayers that are running

    @contextmanager
    def on(self, model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
        inside = {id(part) for layer in layers for part in layer.modules()}
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                self._watch_layer(stack, index, layer)
            for module in model.modules():
                if id(module) not in inside and module is not self.stream.head:
                    last = is_norm(module)
                    hook = self._after_norm(None, "final norm") if last else self._after_mixing
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            stack.callback(self.stream.head.register_forward_pre_hook(self._before_head, with_kwargs=True).remove)
            yield

    def _watch_layer(self, stack: ExitStack, index: int, layer: nn.Module) -> None:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                self.shape = torch.Size([*hidden.shape[:2], hidden.shape[-1]])
                hidden = self._leaf("embedding", None, "embedding", hidden)
            self.stream.layer_ends[index] = [hidden]
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self.stream.layer_ends[index].append(output[0] if isinstance(output, tuple) else output)

        stack.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)

        def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            assert self.shape is not None
            self.stream.experts_in[index] = x.detach().reshape(*self.shape[:2], -1)

        stack.callback(layer.register_forward_hook(end).remove)
        if index in self.moe.layers:
            spec = self.moe.spec(index)
            reader = spec.container if spec.family.routes_at_router else spec.experts
            stack.callback(reader.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
        for name, child in layer.named_children():
            native = unwrap(child)
            if isinstance(native, PASSED_THROUGH):
                continue
            if is_norm(child):
                hook = self._after_norm(index, name)
                stack.callback(child.register_forward_hook(hook, with_kwargs=True).remove)
                continue
            stack.callback(child.register_forward_pre_hook(self._before_sublayer, with_kwargs=True).remove)
            leave = self._after_sublayer(self._kind(index, name, native), index, name)
            stack.callback(child.register_forward_hook(leave).remove)

    def _kind(self, index: int, name: str, native: nn.Module) -> Kind:
        if index in self.moe.layers:
            spec = self.moe.spec(index)
            # Gemma 4's layer is the container, and the experts are a child of it
            if native is (spec.experts if spec.container is spec.hf_layer else spec.container):
                return "routed"
            if name == spec.family.shared_on_layer:
                return "shared"
        label = type(native).__name__
        kinds: dict[Kind, tuple[str, ...]] = {
            "attention": ("Attention", "Attn"),
            "mixer": ("Mamba", "Conv", "DeltaNet", "Mixer"),
            "mlp": ("MLP", "Mlp", "FeedForward"),
        }
        return next((kind for kind, parts in kinds.items() if any(part in label for part in parts)), "other")

    def _before_sublayer(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.depth += 1
        torch.set_grad_enabled(False)
        return tree_map(detached, args), tree_map(detached, kwargs)

    def _after_sublayer(self, kind: Kind, index: int, name: str) -> Callable[..., Any]:
        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            self.depth -= 1
            torch.set_grad_enabled(self.depth == 0)
            return tree_map(lambda value: self._leaf(kind, index, name, value), output)

        return leave

    def _leaf(self, kind: Kind, index: int | None, name: str, value: Any) -> Any:
        """What a sublayer hands on, as a leaf if it is as wide as the residual stream, else as a constant."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        assert self.shape is not None
        is_stream_sized = value.shape[-1] == self.shape[-1] and value.numel() == self.shape.numel()
        if not is_stream_sized and kind != "embedding":
            return value.detach()
        leaf = value.detach().requires_grad_()
        self.stream.written.append(Written(kind, index, name, leaf))
        return leaf.clone()  # families write into what they are handed

    def _after_norm(self, index: int | None, name: str) -> Callable[..., Any]:
        def freeze(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            if not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()):
                return output
            norm = frozen_norm(module, x, output)
            made = norm.linear(x)
            if bool((norm.bias != 0).any()):
                made = made + self._leaf("bias", index, f"{name} bias", norm.bias)
            if index is None:
                self.stream.before_norm, self.stream.final_norm = x, norm
            return output.detach() + (made - made.detach())

        return freeze

    def _after_mixing(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A module that joins several residual streams, with its weights held at those of the run."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or (x.ndim, output.ndim) != (4, 3):
            return output
        if not x.requires_grad:
            return output
        with torch.no_grad():
            # [batch, pos, stream]: output = sum of weight * stream, of which the streams are d_model equations
            streams, target = x.detach().double(), output.detach().double()
            weights = torch.linalg.lstsq(streams.transpose(-1, -2), target.unsqueeze(-1)).solution.to(x.dtype)
        made = (x * weights).sum(dim=2)
        return output.detach() + (made - made.detach())

    def _before_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.stream.head_in = args[0] if args else next(iter(kwargs.values()))
        # its logits are not differentiated: they would hold the vocabulary at every position
        return tree_map(detached, args), tree_map(detached, kwargs)


def _eps(dtype: torch.dtype) -> float:
    # routers and norms cast to float32 explicitly, also in a float64 model
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
