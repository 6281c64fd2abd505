"""``show``: the routing of one prompt, as a view that shows itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_interp.arch.offload import device_of
from moe_interp.checks import as_whole, check_whole
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.inputs.token_texts import token_texts
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.hooks.passes import decoder_start_token
from moe_interp.routing_view.panel import Panel
from moe_interp.routing_view.view import RoutingView
from moe_interp.slots import EMPTY
from moe_interp.tokenization import TextReader, check_context, check_messages
from moe_interp.traces import RoutingTrace
from moe_interp.types import Layer

_AT_ONCE = 2**24  # logits that are turned into probabilities at a time


@in_eval_mode
@torch.no_grad()
def show(
    moe: MoEHooks,
    given: Any,
    layer: Layer | Sequence[Layer] | None = None,
    *,
    weights: bool | None = None,
    positions: int | slice | Sequence[int] | None = None,
    attention_mask: Any = None,
    decoder_input: Any = None,
    sequence: int = 0,
) -> RoutingView:
    """The routing of one prompt at a glance: a row a token, a column an MoE layer, a cell its expert of largest weight.

    The model runs once, in eval mode. Hooks that are on it stay on, so that inside ``with moe.bridge.hooks(...)`` the
    routing under an intervention is shown. Indices and weights are those of ``expert_indices`` and ``expert_weights``.

    Args:
        moe: The attached model.
        given: A text (BOS is put in front where the model expects it), a conversation as a list of messages (the
            assistant's turn is opened after it), ids as a list or a tensor ``[pos]`` or ``[1, pos]``, or a
            ``RoutingTrace``, of which one sequence is shown and nothing is run.
        layer: One MoE layer, shown slot by slot, the largest weight first; or several, side by side. All by default.
        weights: Show weights in the cells; by default for one layer.
        positions: The tokens to show, by their place in the unpadded prompt; negative ones count from its end. Of a
            decoder shown below its encoder, those that it has. All by default; of a long prompt the first.
        attention_mask: ``[pos]`` or ``[1, pos]`` for ids: padding (0) is left out before the model runs.
        decoder_input: What the decoder of an encoder-decoder reads: a text or ids; by default its start token alone.
        sequence: Which sequence of a trace.

    Returns:
        A view that shows itself in a notebook and a terminal; ``.to_dataframe()`` has every slot of every token.

    Raises:
        DataError: more than one row, ids that are none, no tokenizer or chat template for a text or messages, more
            tokens than the model's context, or a trace of another model or without this sequence.
        ConfigError: positions that the prompt does not have, or an attention_mask for a text or messages.
        HookError: a layer that is not attached.

    What it does not show: what the experts compute, or by how little another expert was passed over. One prompt is no
    evidence about an expert.
    """
    check_attached(moe)
    labels, one = _labels(moe, layer)
    if isinstance(given, RoutingTrace):
        panels = [_recorded(moe, given, check_whole(sequence, "sequence", 0), labels)]
    else:
        panels = _run(moe, _ids(moe, given, attention_mask), labels, decoder_input)
    name = str(getattr(moe.bridge.cfg, "model_name", None) or "model")
    shown = None if positions is None else _shown(positions, [len(panel.tokens) for panel in panels])
    return RoutingView(name, panels, one, one is not None if weights is None else bool(weights), shown)


def _labels(moe: MoEHooks, layer: Any) -> tuple[list[Layer], Layer | None]:
    """The layers to show, in the model's order, and the one that is shown slot by slot, if any."""
    if layer is None:
        return list(moe.layers), None
    is_pair = isinstance(layer, tuple) and len(layer) == 2 and isinstance(layer[0], str)
    if is_pair or isinstance(layer, str) or as_whole(layer) is not None or not hasattr(layer, "__iter__"):
        label = moe.layer_label(layer)
        return [label], label
    chosen = {moe.layer_label(each) for each in layer}
    if not chosen:
        raise ConfigError("no layers", f"at least one of {list(moe.layers)}", "Leave layer out for all of them.")
    return [label for label in moe.layers if label in chosen], None


def _ids(moe: MoEHooks, given: Any, attention_mask: Any) -> tuple[int, ...]:
    """The prompt's ids, without padding."""
    reader = TextReader(moe.bridge)
    is_text = isinstance(given, str)
    is_chat = isinstance(given, list | tuple) and bool(given) and isinstance(given[0], Mapping)
    if attention_mask is not None and (is_text or is_chat):
        what = "a text" if is_text else "messages"
        raise ConfigError(f"a mask of padding beside {what}", "a mask of token ids", "Leave it out, or give ids.")
    if is_chat:
        ids = reader.messages(check_messages(given, "the prompt"), "the prompt", is_prompt=True)
    else:
        own = given if is_text else _unpadded_row(given, attention_mask)
        ids = reader.start(own, "the prompt", "text" if is_text else "tokens")
    reader.warn("sequence")
    if not ids:
        raise DataError("a prompt without tokens", "at least one token", "Give a text.")
    check_context(moe.bridge, [("the prompt", len(ids))])
    return ids


def _unpadded_row(given: Any, attention_mask: Any) -> Any:
    """One row of ids, without those that the mask leaves out."""
    row = _only_row(given, "tokens")
    if attention_mask is None:
        return row
    mask = np.asarray(_only_row(attention_mask, "attention_mask"))
    if mask.shape != np.shape(row) or not mask.any():
        raise DataError(
            f"an attention_mask of shape {mask.shape} with {int(mask.sum())} ones",
            f"one of shape {np.shape(row)} that leaves a token",
            "Give the mask of these tokens.",
        )
    return np.asarray(row)[mask.astype(bool)]


def _only_row(given: Any, name: str) -> Any:
    """A row of a batch of one; anything else as it is."""
    values = given.cpu().numpy() if isinstance(given, Tensor) else given
    shape = np.shape(values) if isinstance(values, np.ndarray) or _is_nested(values) else ()
    if len(shape) != 2:
        return values
    if shape[0] != 1:
        raise DataError(f"{name} of shape {tuple(shape)}", "one prompt, [pos] or [1, pos]", "Show one row at a time.")
    return values[0]


def _is_nested(values: Any) -> bool:
    return isinstance(values, list | tuple) and bool(values) and all(isinstance(each, list | tuple) for each in values)


def _run(moe: MoEHooks, ids: tuple[int, ...], labels: Sequence[Layer], decoder_input: Any) -> list[Panel]:
    """One forward pass, and what it routed; one panel a stack."""
    bridge = moe.bridge
    device = device_of(bridge)
    config: Any = bridge.original_model.config
    tokens = {"": ids}
    options: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False):
        start = (decoder_start_token(bridge.original_model),)
        reader = TextReader(bridge)
        given = (
            start if decoder_input is None else reader.rest(_unpadded_row(decoder_input, None), "the decoder", "input")
        )
        tokens = {"encoder": ids, "decoder": given}
        options["decoder_input"] = torch.tensor([given], device=device)
    elif decoder_input is not None:
        raise ConfigError("decoder_input for a model of one stack", "an encoder-decoder", "Leave it out.")
    seen: dict[tuple[str, Layer], NDArray[Any]] = {}

    def reader_of(name: str, label: Layer) -> Any:
        def read(value: Tensor, hook: Any) -> None:
            seen[name, label] = (value.float() if value.is_floating_point() else value)[0].cpu().numpy()

        return read

    places = [(name, label) for label in labels for name in ("expert_indices", "expert_weights")]
    with bridge.hooks(fwd_hooks=[(moe.hook_name(*place), reader_of(*place)) for place in places]):
        logits = bridge(torch.tensor([ids], device=device), **options)
    panels = []
    for stack, own in tokens.items():
        here = [label for label in labels if (label[0] if isinstance(label, tuple) else "") == stack]
        if here:
            panels.append(_panel(moe, here, own, seen, None if stack == "encoder" else logits[0]))
    return panels


def _panel(
    moe: MoEHooks,
    labels: Sequence[Layer],
    ids: tuple[int, ...],
    seen: Mapping[Any, NDArray[Any]],
    logits: Tensor | None,
) -> Panel:
    width = max(seen["expert_indices", label].shape[-1] for label in labels)

    def stacked(name: str, fill: float) -> NDArray[Any]:
        arrays = [seen[name, label] for label in labels]
        padded = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays]
        return np.stack(padded, axis=1)

    predicted_ids, predicted_p = (None, None) if logits is None else _predictions(logits)
    texts = token_texts(moe.bridge.tokenizer, {*ids, *([] if predicted_ids is None else predicted_ids.tolist())})
    return Panel(
        layers=tuple(labels),
        n_experts=tuple(moe.spec(label).n_experts for label in labels),
        tokens=[texts[i] for i in ids],
        token_ids=np.asarray(ids, dtype=np.int64),
        positions=np.arange(len(ids)),
        indices=stacked("expert_indices", EMPTY).astype(np.int32),
        weights=stacked("expert_weights", 0.0).astype(np.float32),
        predicted=None if predicted_ids is None else [texts[i] for i in predicted_ids.tolist()],
        predicted_ids=predicted_ids,
        predicted_p=predicted_p,
    )


def _predictions(logits: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The most probable next token at each position of ``[pos, vocab]``, and its probability."""
    ids, log_p = [], []
    for part in logits.split(max(1, _AT_ONCE // logits.shape[-1])):
        top = part.float().max(dim=-1)
        ids.append(top.indices.cpu())
        log_p.append((top.values - part.float().logsumexp(dim=-1)).cpu())
    return torch.cat(ids).numpy(), torch.cat(log_p).exp().numpy()


def _recorded(moe: MoEHooks, trace: RoutingTrace, sequence: int, labels: Sequence[Layer]) -> Panel:
    """One sequence of a trace of this model."""
    lacking = [layer for layer in trace.layers if layer not in moe.layers]
    own = {moe.spec(label).n_experts for label in moe.layers}
    if lacking or own != {trace.n_experts}:
        raise DataError(
            f"a trace of layers {list(trace.layers)} with {trace.n_experts} experts",
            f"layers among {list(moe.layers)} with {' or '.join(map(str, sorted(own)))} experts",
            "Show it with the model that it was recorded from.",
        )
    kept = [place for place, layer in enumerate(trace.layers) if layer in labels]
    here = trace.sequence == sequence
    if not here.any() or not kept:
        raise DataError(
            f"sequence {sequence} and layers {list(labels)} of a trace of {len(trace.sequence_lengths)} sequences",
            f"a sequence below {len(trace.sequence_lengths)}, and layers among {list(trace.layers)}",
            "Choose one that it has.",
        )
    ids = None if trace.token_ids is None else trace.token_ids[here]
    next_ids = None if trace.predicted_ids is None else trace.predicted_ids[here]
    known = [values.tolist() for values in (ids, next_ids) if values is not None]
    texts = token_texts(moe.bridge.tokenizer, {i for row in known for i in row})
    return Panel(
        layers=tuple(trace.layers[place] for place in kept),
        n_experts=(trace.n_experts,) * len(kept),
        tokens=["?"] * int(here.sum()) if ids is None else [texts[i] for i in ids.tolist()],
        token_ids=ids,
        positions=np.arange(int(here.sum())),
        indices=trace.expert_indices[here][:, kept],
        weights=None if trace.expert_weights is None else trace.expert_weights[here][:, kept],
        predicted=None if next_ids is None else [texts[i] for i in next_ids.tolist()],
        predicted_ids=next_ids,
    )


def _shown(positions: Any, lengths: Sequence[int]) -> list[NDArray[np.int64]]:
    """By panel, indices of the tokens asked for: the first panel must have all of them."""
    first, *further = lengths
    found = [_places(positions, first)]
    for n in further:
        if isinstance(positions, slice):
            found.append(np.arange(n)[positions])
        else:
            given = [positions] if as_whole(positions) is not None else positions
            found.append(np.array([int(place) % n for place in given if -n <= place < n], dtype=np.int64))
    return found


def _places(positions: Any, n: int) -> NDArray[np.int64]:
    """Indices of the tokens asked for, in their order."""
    if isinstance(positions, slice):
        chosen = list(range(n))[positions]
    else:
        given = [positions] if as_whole(positions) is not None else list(positions)
        chosen = [check_whole(place, "positions", -n, n - 1) % n for place in given]
    if not chosen:
        raise ConfigError(f"positions={positions!r}", f"at least one of the {n} tokens", "Leave it out for all.")
    return np.asarray(chosen, dtype=np.int64)
