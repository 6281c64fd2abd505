"""What an expert writes: the tokens that it raises most, over the tokens that use it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from moe_interp.checks import check_whole
from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import out_of_memory_in_words
from moe_interp.engine.residual.linear import record_stream
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching.inputs import PatchInputs, check_patch_inputs
from moe_interp.patching.logits.contributions import factor_after_head
from moe_interp.results import Result
from moe_interp.types import Hooks, Layer

Centre = Literal["vocabulary", "experts"]
_NEEDS = ("expert_indices", "expert_weights", "expert_out")


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
@torch.inference_mode(False)
def expert_tokens(
    moe: MoEHooks,
    tokens: Any,
    layers: Layer | list[Layer] | None = None,
    k: int = 10,
    centre: Centre = "vocabulary",
    *,
    attention_mask: Tensor | None = None,
    batch_size: int = 8,
) -> ExpertTokens:
    """The ``k`` tokens that each expert writes most, by unembedding, over the tokens that use it.

        write_e = mean over real tokens t that use e of  W_U norm_t(weight_te out_te)  - its mean,

    where norm_t is the final norm frozen at the scale of token t (its weight, and the centring of a layer norm), after
    what the family puts between the experts and the residual stream (a norm, frozen likewise; multipliers). So it is
    the mean of e's direct contribution to each logit, in logits, at the positions where e runs.

    Args:
        moe: Attached hooks of a decoder, with ``expert_outputs=True``.
        tokens: ``[batch, pos]`` ids, or texts.
        layers: MoE layers; all by default.
        k: Tokens an expert.
        centre: "vocabulary": less the mean over the vocabulary, which a softmax does not see: what e writes.
            "experts": also less the mean over the layer's experts that are used: what e writes more than the others.
        attention_mask: ``[batch, pos]``, 0 at padding, which counts nowhere.
        batch_size: Sequences a pass.

    Raises:
        As :func:`moe_interp.patching.logit_attribution`; ConfigError: a number or a centre that cannot be.

    A token at the top is written towards directly; the model need not predict it, since other components may write
    against it, and an expert of an early layer may write for later layers rather than for the unembedding.

    Source: the logit lens (nostalgebraist 2020) on an expert's mean weighted output; derived: frozen token by token.
    """
    k, batch_size = check_whole(k, "k", 1), check_whole(batch_size, "batch_size", 1)
    if centre not in get_args(Centre):
        raise ConfigError(f"centre={centre!r}", f"one of {', '.join(get_args(Centre))}", "Choose one of these.")
    inputs = check_patch_inputs(moe, tokens, layers, attention_mask, _NEEDS)
    sums: dict[Layer, Tensor] = {}
    counts: dict[Layer, Tensor] = {}
    for start in range(0, len(inputs.tokens), batch_size):
        part = slice(start, start + batch_size)
        mask = None if inputs.mask is None else inputs.mask[part]
        unembed = _add_written(inputs, inputs.tokens[part], mask, inputs.is_real[part], sums, counts)
    tops, values = {}, {}
    for layer, total in sums.items():
        with torch.no_grad():
            logits = unembed(total / counts[layer].clamp(min=1).unsqueeze(-1).to(total))
        logits = logits - logits.mean(dim=-1, keepdim=True)
        used = counts[layer] > 0
        if centre == "experts":
            logits = logits - logits[used].mean(dim=0)
        best = logits.topk(min(k, logits.shape[-1]), dim=-1)
        tops[layer] = torch.where(used.unsqueeze(-1), best.indices, -1)
        values[layer] = best.values.masked_fill(~used.unsqueeze(-1), float("nan"))
    return ExpertTokens(_dataset(inputs, tops, values, counts, centre), config={"k": k, "centre": centre})


class ExpertTokens(Result, kind="expert_tokens"):
    """The tokens that experts write.

    ``data``: token[layer, expert, rank], ids, -1 for an expert that no token uses; text[layer, expert, rank], where the
    model has a tokenizer; logit[layer, expert, rank], in logits, centred; n_tokens[layer, expert].
    """

    main = "logit"

    def table(self, k: int = 5) -> pd.DataFrame:
        """One row an expert that is used: its ``k`` first tokens in one column."""
        data, name = self.data, "text" if "text" in self.data else "token"
        stacked = data.stack(cell=("layer", "expert")).transpose("cell", "rank")
        words = [" ".join(repr(str(w)) if name == "text" else str(w) for w in row[:k]) for row in stacked[name].values]
        frame = pd.DataFrame(
            {
                "layer": stacked["layer"].values,
                "expert": stacked["expert"].values,
                "n_tokens": stacked["n_tokens"].values.astype(int),
                "logit": stacked["logit"].values[:, 0],
                "tokens": words,
            }
        )
        return frame[frame["n_tokens"] > 0].reset_index(drop=True)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` experts that write their first token most."""
        return self.table().sort_values("logit", ascending=False, kind="stable").head(k).reset_index(drop=True)

    def summary(self) -> str:
        """The experts that write one token most."""
        lines = [f"What experts write, centred on the {self.data.attrs['centre']}; logits of the first token"]
        for row in self.top(5).to_dict("records"):
            lines.append(
                f"  layer {row['layer']}, expert {row['expert']} ({row['n_tokens']} tokens): {row['logit']:+.3g}  "
                f"{row['tokens']}"
            )
        return "\n".join(lines)


@torch.enable_grad()
def _add_written(
    inputs: PatchInputs,
    tokens: Tensor,
    mask: Tensor | None,
    real: Tensor,
    sums: dict[Layer, Tensor],
    counts: dict[Layer, Tensor],
) -> Any:
    """Add what the experts write at a few sequences, in the unembedding's input; gives the unembedding."""
    moe, kept = inputs.moe, dict[tuple[str, Layer], Tensor]()

    def keep(name: str, layer: Layer) -> Any:
        return lambda value, hook: kept.__setitem__((name, layer), value.detach().clone())

    hooks: Hooks = [(moe.hook_name(name, layer), keep(name, layer)) for layer in inputs.layers for name in _NEEDS]
    stream = record_stream(moe, tokens, mask, hooks)
    assert stream.before_norm is not None
    assert stream.final_norm is not None
    assert stream.head_in is not None
    assert stream.logits is not None
    blocks = {part.layer: part.value for part in stream.written if part.kind == "routed"}
    # the map from a block's output to the final norm is diagonal: its transpose on ones is its diagonal
    gains = stream.gradients(stream.before_norm, list(blocks.values()), torch.ones_like(stream.before_norm))
    with torch.no_grad():
        factor, _ = factor_after_head(stream.head(stream.head_in[:1]), stream.logits[:1], stream.head_in.dtype)
        for layer, gain in zip(blocks, gains):
            if layer not in inputs.layers:
                continue
            spec, indices = moe.spec(layer), kept["expert_indices", layer]
            written = kept["expert_out", layer]
            if not spec.weight_on_input:
                written = written * kept["expert_weights", layer].unsqueeze(-1)
            through = written * gain.reshape(*indices.shape[:2], 1, -1)
            norm = stream.final_norm
            centred = through - through.mean(dim=-1, keepdim=True) if norm.centres else through
            through = centred * norm.gain.unsqueeze(2)
            used = (indices >= 0) & real.unsqueeze(-1)
            if layer not in sums:
                sums[layer] = through.new_zeros(spec.n_experts, through.shape[-1], dtype=torch.float64)
                counts[layer] = torch.zeros(spec.n_experts, dtype=torch.long, device=indices.device)
            sums[layer].index_add_(0, indices[used], through[used].double())
            counts[layer].index_add_(0, indices[used], torch.ones_like(indices[used]))
    head, like = stream.head, stream.head_in

    def unembed(states: Tensor) -> Tensor:
        rows = states.to(like.dtype).unsqueeze(0)
        return (head(rows) - head(torch.zeros_like(rows[:, :1])))[0].double() * factor

    return unembed


def _dataset(
    inputs: PatchInputs,
    tops: dict[Layer, Tensor],
    values: dict[Layer, Tensor],
    counts: dict[Layer, Tensor],
    centre: str,
) -> xr.Dataset:
    n_experts, n_ranks = max(len(v) for v in counts.values()), max(v.shape[-1] for v in tops.values())
    token = np.full((len(tops), n_experts, n_ranks), -1)
    logit = np.full(token.shape, np.nan)
    n_tokens = np.zeros(token.shape[:2], dtype=np.int64)
    for row, layer in enumerate(tops):
        n = len(counts[layer])
        token[row, :n], logit[row, :n] = tops[layer].cpu().numpy(), values[layer].cpu().numpy()
        n_tokens[row, :n] = counts[layer].cpu().numpy()
    axes = ("layer", "expert", "rank")
    data = xr.Dataset(
        {"logit": (axes, logit), "token": (axes, token), "n_tokens": (axes[:2], n_tokens)},
        coords={"layer": list(tops), "expert": np.arange(n_experts), "rank": np.arange(n_ranks)},
    )
    tokenizer: Any = inputs.moe.bridge.tokenizer
    if tokenizer is not None:
        texts = {each: tokenizer.decode([each]) if each >= 0 else "" for each in np.unique(token).tolist()}
        data["text"] = (axes, np.vectorize(texts.__getitem__, otypes=[object])(token))
    data.attrs["centre"] = centre
    return data
