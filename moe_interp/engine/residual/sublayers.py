"""The sublayers of a decoder, and passes in which they give what they gave in another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moe_interp.arch.modules import unwrap
from moe_interp.engine.recorded_pass import RecordedLayer
from moe_interp.engine.replaced_forward import swapped_forward
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks

PASSED_THROUGH = (nn.Dropout, nn.Identity)


@dataclass(frozen=True, eq=False)
class FrozenSublayers:
    """A decoder whose sublayers give what they gave in one run.

    Only norms, sums, fixed factors and routers are computed anew: what is added to a sublayer's output reaches later
    routers through the residual stream alone.

    Attributes:
        moe: The attached hooks.
        layers: The model's layers.
        n_examples: Of the run.
        answers: What each sublayer gave, by layer and name.
        blocks: By MoE layer, the name of the sublayer that its experts are.
    """

    moe: MoEHooks
    layers: list[nn.Module]
    n_examples: int
    answers: dict[tuple[int, str], Any]
    blocks: dict[int, str]

    @contextmanager
    def adding(self, layer: int, delta: Tensor) -> Iterator[None]:
        """Inside, passes are of stacked copies of the batch, with something added to what a layer's experts give.

        Args:
            layer: An MoE layer.
            delta: ``[copy * batch, pos, d_model]``.
        """
        copies = len(delta) // self.n_examples
        with ExitStack() as stack:
            for index, name, child in sublayers(self.moe, self.layers):
                if (index, name) not in self.answers:
                    continue
                answer = RecordedLayer.stacked(self.answers[index, name], copies)
                is_block = self.blocks.get(index) == name
                if is_block and index == layer:
                    answer = _with_added(answer, delta)
                if is_block and index > layer:
                    # its router runs, and reads the stream as it is now
                    stack.callback(child.register_forward_hook(_returning(answer)).remove)
                else:
                    stack.enter_context(swapped_forward(child, _returning(answer)))
            yield


def record_sublayers(moe: MoEHooks, forward: Callable[[], Tensor], n_examples: int) -> tuple[Tensor, FrozenSublayers]:
    """The logits of a pass, and what its sublayers gave.

    Args:
        moe: Attached hooks of a decoder.
        forward: Runs the pass.
        n_examples: In its batch.

    Raises:
        ConfigError: an encoder-decoder, or layers with several residual streams, whose mixing is computed from them.
    """
    layers = decoder_layers_of(moe)
    answers: dict[tuple[int, str], Any] = {}
    blocks: dict[int, str] = {}
    with ExitStack() as stack:
        for index, name, child in sublayers(moe, layers):
            if index in moe.layers:
                spec, native = moe.spec(index), unwrap(child)
                own = spec.container is spec.hf_layer  # Gemma 4: the experts are a sublayer, and so is their router
                if own and native is spec.router:
                    continue
                if native is (spec.experts if own else spec.container):
                    blocks[index] = name
            stack.callback(child.register_forward_hook(_recording(answers, (index, name))).remove)
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(_one_stream(index), with_kwargs=True).remove)
        logits = forward()
    return logits, FrozenSublayers(moe, layers, n_examples, answers, blocks)


def sublayers(moe: MoEHooks, layers: Sequence[nn.Module]) -> Iterator[tuple[int, str, nn.Module]]:
    """``(layer, name, module)`` of everything that the layers call but their norms."""
    for index, layer in enumerate(layers):
        for name, child in layer.named_children():
            if not isinstance(unwrap(child), PASSED_THROUGH) and not is_norm(child):
                yield index, name, child


def decoder_layers_of(moe: MoEHooks) -> list[nn.Module]:
    """The transformers layers of a decoder.

    Raises:
        ConfigError: an encoder-decoder.
    """
    blocks: Any = moe.bridge._modules.get("blocks")
    if blocks is None:
        raise ConfigError(
            f"{type(moe.bridge.original_model).__name__}, an encoder-decoder",
            "a causal decoder",
            "The residual streams of encoder and decoder meet in attention alone: read them by the hooks.",
        )
    return [unwrap(block) for block in blocks]


def _recording(answers: dict[tuple[int, str], Any], key: tuple[int, str]) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        answers[key] = tree_map(detached, output)

    return keep


def _returning(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _with_added(answer: Any, delta: Tensor) -> Any:
    """A block's answer with something added to its output, which may come flat, and with router logits beside it."""
    out, *rest = answer if isinstance(answer, tuple) else (answer,)
    added = out + delta.reshape(out.shape).to(out.dtype)
    return (added, *rest) if isinstance(answer, tuple) else added


def _one_stream(index: int) -> Callable[..., None]:
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.ndim != 3:
            raise ConfigError(
                f"layer {index}, which carries several residual streams",
                "layers with one residual stream",
                "What mixes the streams is computed from them, so no path between experts is direct in this family.",
            )

    return check


def detached(value: Any) -> Any:
    """A tensor without its history; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "norm" in type(unwrap(module)).__name__.lower()
