"""Direct logit attribution: it sums to the model's logit difference, and each term is what a hand-made loop gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moe_interp as mi
from moe_interp.engine.residual.linear import frozen_norm, record_stream
from moe_interp.errors import ConfigError, DataError, HookError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.patching import expert_tokens, logit_attribution
from moe_interp.types import Layer
from tests import tiny
from tests.integration.routes.helpers import DECODERS, attached, precision

AT = [(0, 8), (1, 5), (2, 4)]  # example and column
ANSWER, WRONG = [5, 6, 7], [[9, 40], [41, 8], [3, 4]]


def left_padded() -> tuple[Tensor, Tensor]:
    tokens, mask = tiny.random_tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :3] = 0
    return tokens, mask


@torch.no_grad()
def native_difference(name: str, dtype: torch.dtype, tokens: Tensor, mask: Tensor, column: list[int]) -> Tensor:
    """Of the untouched transformers model."""
    hf = tiny.build_hf(name, dtype=dtype)
    if dtype == torch.float64:
        tiny.set_experts_implementation(hf, "eager")
    logits = tiny.native_logits(hf, name, tokens, attention_mask=mask)
    rows = torch.stack([logits[row, at] for row, at in enumerate(column)]).double()
    return torch.stack([row[a] - row[w].mean() for row, a, w in zip(rows, ANSWER, WRONG)])


@pytest.mark.parametrize("name", DECODERS)
def test_it_sums_to_the_models_logit_difference_in_every_decoder_family(name: str) -> None:
    moe, (tokens, mask) = attached(name, torch.float64), left_padded()
    with precision(torch.float64):
        result = logit_attribution(moe, tokens, ANSWER, WRONG, positions=[-1, 2, 4], attention_mask=mask)
        with torch.no_grad():
            logits = moe.bridge(tokens, attention_mask=mask)  # nothing is hooked: bit for bit the model
    native = torch.stack([logits[row, at, ANSWER[row]] - logits[row, at, WRONG[row]].mean() for row, at in AT])
    total = torch.as_tensor(result.data["effect"].sum("component").values)
    assert not result.is_capped
    assert float((total - native).abs().max()) < 1e-10
    assert float(native.abs().min()) > 1e-3
    assert result.data["position"].values.tolist() == [8, 2, 4]
    # something of every layer's routed experts is there, and where it is used alone
    used = result.data["weight"].notnull() & (result.data["weight"] != 0)
    experts = result.data["kind"] == "expert"
    assert bool((result.data["effect"].where(used) != 0).where(used).sum() > 0)
    assert bool((result.data["effect"].where(experts & ~used, 0) == 0).all())


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3", "phimoe", "gemma4", "deepseek_v4"])
def test_in_float32_it_sums_to_rounding(name: str) -> None:
    tokens, mask = left_padded()
    result = logit_attribution(attached(name), tokens, ANSWER, WRONG, attention_mask=mask, controls=False)
    native = native_difference(name, torch.float32, tokens, mask, [8, 8, 8])
    assert np.abs(result.data["effect"].sum("component").values - native.numpy()).max() < 1e-4
    assert float(abs(result.remainder()).max()) < 1e-4
    assert "percentile" not in result.data


def rms(x: Tensor, eps: float) -> Tensor:
    return (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


def by_hand(name: str, moe: MoEHooks, tokens: Tensor) -> dict[tuple[Any, int], Tensor]:
    """Each expert's term at the last token, from the weights of the transformers model, slot by slot."""
    hf: Any = tiny.build_hf(name, dtype=torch.float64)
    tiny.set_experts_implementation(hf, "eager")
    final: dict[str, Tensor] = {}
    blocks: dict[Any, Any] = {}
    norm = hf.model.norm
    handles = [norm.register_forward_pre_hook(lambda m, args: final.__setitem__("x", args[0][:, -1]))]
    for index, layer in enumerate(hf.model.layers):
        after: Any = getattr(layer, "post_feedforward_layernorm", None)
        if name == "flex_olmo":
            handles.append(
                after.register_forward_pre_hook(lambda m, a, i=index: blocks.__setitem__(i, (m, a[0][:, -1])))
            )
    tiny.native_logits(hf, name, tokens)
    _, cache = moe.bridge.run_with_cache(
        tokens, names_filter=moe.filter("expert_indices", "expert_weights", "expert_out")
    )
    unembed = hf.lm_head.weight
    direction = torch.stack([unembed[a] - unembed[w].mean(dim=0) for a, w in zip(ANSWER, WRONG)]).detach()
    x = final["x"]
    if name == "phimoe":
        scale = ((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    else:
        scale = rms(x, norm.variance_epsilon)
    found: dict[tuple[Any, int], Tensor] = {}
    for layer in moe.layers:
        for row in range(len(tokens)):
            for slot, expert in enumerate(cache[moe.hook_name("expert_indices", layer)][row, -1].tolist()):
                write = cache[moe.hook_name("expert_out", layer)][row, -1, slot]
                write = write * cache[moe.hook_name("expert_weights", layer)][row, -1, slot]
                if name == "flex_olmo":
                    after, read = blocks[layer]
                    write = write * after.weight / rms(read[row], after.variance_epsilon)
                if name == "granite_moe":
                    write = write * hf.config.residual_multiplier / hf.config.logits_scaling
                if name == "phimoe":
                    write = write - write.mean()
                term = (write * norm.weight / scale[row]) @ direction[row]
                found.setdefault((layer, expert), torch.zeros(len(tokens), dtype=torch.float64))[row] += term.detach()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["olmoe", "flex_olmo", "granite_moe", "phimoe"])
def test_each_experts_term_is_what_a_loop_by_hand_gives(name: str) -> None:
    """Behind a plain RMS norm, a norm after the block, a residual multiplier and a logit scale, a layer norm."""
    moe, tokens = attached(name, torch.float64), tiny.random_tokens(3, 7)
    with precision(torch.float64), torch.no_grad():
        expected = by_hand(name, moe, tokens)
        result = logit_attribution(moe, tokens, ANSWER, WRONG)
    data = result.data.sel(component=result.data["kind"].values == "expert")
    assert len(expected) > 6
    for component in data["component"].values:
        one = data.sel(component=component)
        theirs = expected.get((int(one["layer"]), int(one["expert"])), torch.zeros(3, dtype=torch.float64))
        assert np.abs(one["effect"].values - theirs.numpy()).max() < 1e-10, component


@pytest.mark.parametrize("name", ["olmoe", "llama4", "gemma4_text"])
def test_the_control_is_what_other_experts_give_in_the_same_slot(name: str) -> None:
    """At the last layer, an expert put into the slot by hand writes what the control says it would have written."""
    moe, tokens = attached(name, torch.float64), tiny.random_tokens(1, 6)
    layer, spec = moe.layers[-1], moe.spec(moe.layers[-1])
    names = {key: moe.hook_name(key, layer) for key in ("expert_indices", "expert_weights", "expert_out")}
    with precision(torch.float64), torch.no_grad():
        result = logit_attribution(moe, tokens, 5, 9)
        _, cache = moe.bridge.run_with_cache(tokens, names_filter=list(names.values()))
        route, weights = cache[names["expert_indices"]], cache[names["expert_weights"]]
        used = route[0, -1].tolist()
        rest = torch.tensor([expert for expert in range(spec.n_experts) if expert not in used])
        others = route.repeat(len(rest), 1, 1)
        others[:, -1, 0] = rest
        kept: dict[str, Tensor] = {}
        hooks: list[Any] = [
            (names["expert_indices"], lambda value, hook: others),
            (names["expert_weights"], lambda value, hook: weights.repeat(len(rest), 1, 1)),
            (names["expert_out"], lambda value, hook: kept.__setitem__("out", value.clone())),
        ]
        moe.bridge.run_with_hooks(tokens.repeat(len(rest), 1), fwd_hooks=hooks)
        written = kept["out"][:, -1, 0] * (1.0 if spec.weight_on_input else weights[0, -1, 0])
        terms = written @ _direction(moe, tokens, layer)
    one = result.data.sel(component=f"{layer} expert {used[0]}", example=0)
    assert abs(float(one["others_mean"]) - float(terms.mean())) < 1e-10
    assert abs(float(one["others_sd"]) - float(terms.std())) < 1e-10
    assert float(one["percentile"]) == pytest.approx(float((terms < float(one["effect"])).double().mean()))


def _direction(moe: MoEHooks, tokens: Tensor, layer: Layer) -> Tensor:
    """``[d_model]``: d(logit difference) / d(routed output) at the last token, with frozen norms."""
    stream = record_stream(moe, tokens)
    block = next(part.value for part in stream.written if part.kind == "routed" and part.layer == layer)
    assert stream.head_in is not None
    with torch.enable_grad():
        logits = stream.head(stream.head_in[:, -1:])[0, 0]
        gradient = stream.gradients(logits[5] - logits[9], [block])[0]
    return gradient.reshape(*tokens.shape, -1)[0, -1]


@contextmanager
def capped(moe: MoEHooks, cap: float) -> Iterator[None]:
    model: Any = moe.bridge.original_model
    config = model.config.get_text_config()
    config.final_logit_softcapping, before = cap, config.final_logit_softcapping
    try:
        yield
    finally:
        config.final_logit_softcapping = before


def test_behind_a_soft_cap_it_sums_to_the_difference_before_it() -> None:
    moe, tokens = attached("gemma4_text", torch.float64), tiny.random_tokens(2, 6)
    with precision(torch.float64), torch.no_grad():
        plain = logit_attribution(moe, tokens, 5, 9)
        with capped(moe, 2.0):
            result = logit_attribution(moe, tokens, 5, 9)
            logits = moe.bridge(tokens)[:, -1]
    assert result.is_capped
    assert "soft-cap" in result.summary()
    assert np.allclose(result.data["effect"], plain.data["effect"], atol=1e-12)
    assert np.allclose(result.data["logit_difference"], (logits[:, 5] - logits[:, 9]).numpy(), atol=1e-12)
    assert float(abs(result.data["logit_difference"] - result.data["before_cap"]).max()) > 0.1


@contextmanager
def planted(moe: MoEHooks, tokens: Tensor, layer: int, expert: int, token: int) -> Iterator[None]:
    """An expert that writes one token's direction in the unembedding, whatever it reads."""
    model: Any = moe.bridge.original_model
    down, head = moe.spec(layer).experts.down_proj, model.lm_head.weight
    before = down[expert].detach().clone()
    names = {key: moe.hook_name(key, layer) for key in ("expert_indices", "expert_post")}
    try:
        with torch.no_grad():
            _, cache = moe.bridge.run_with_cache(tokens, names_filter=list(names.values()))
            neurons = cache[names["expert_post"]][cache[names["expert_indices"]] == expert]
            # as good as the same for every token: towards the mean of what its neurons are
            along = neurons.mean(dim=0)
            down[expert] = torch.outer(head[token], along) * 60 / (head[token].norm() ** 2 * along.norm() ** 2)
        yield
    finally:
        with torch.no_grad():
            down[expert] = before


def test_an_expert_that_writes_one_token_is_found() -> None:
    moe, tokens = attached("olmoe"), tiny.random_tokens(1, 10)
    with torch.no_grad():
        _, cache = moe.bridge.run_with_cache(tokens, names_filter=moe.filter("expert_indices"))
    layer, token = 1, 17
    expert = int(cache["expert_indices", layer][0, -1, 0])
    with planted(moe, tokens, layer, expert, token):
        result = logit_attribution(moe, tokens, token, 9)
        writes = expert_tokens(moe, tokens, k=3)
    assert result.top(1)["component"].tolist() == [f"{layer} expert {expert}"]
    first = result.experts().iloc[0]
    assert (first["layer"], first["expert"]) == (layer, expert)
    assert first["contribution"] > 0
    assert first["percentile"] == 1.0
    assert int(writes.data["token"].sel(layer=layer, expert=expert, rank=0)) == token
    assert writes.top(1)[["layer", "expert"]].values.tolist() == [[layer, expert]]


def test_what_an_expert_writes_is_its_mean_contribution_to_each_logit() -> None:
    """Against attributions of single logits, token by token, behind norms, multipliers and several streams."""
    for name in ("phimoe", "flex_olmo", "granite_moe", "deepseek_v4"):
        moe, tokens = attached(name, torch.float64), tiny.random_tokens(2, 4)
        mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
        layer = moe.layers[-1]
        with precision(torch.float64):
            plain = expert_tokens(moe, tokens, layer, k=101, attention_mask=mask, batch_size=1)
            apart = expert_tokens(moe, tokens, layer, k=101, centre="experts", attention_mask=mask)
            vocabulary, rows, at = [5, 9, 40], [0, 0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2]
            sums = np.zeros((moe.spec(layer).n_experts, 3))
            for column, token in enumerate(vocabulary):
                one = logit_attribution(
                    moe, tokens[rows], token, positions=at, attention_mask=mask[rows], controls=False
                ).data
                one = one.sel(component=(one["kind"].values == "expert") & (one["layer"].values == layer))
                sums[:, column] += one["effect"].sum("example").values
                n = one["weight"].notnull().sum("example").values
        assert plain.data["n_tokens"].values[0].tolist() == n.tolist()
        means = sums / np.maximum(n, 1)[:, None]
        for expert in np.flatnonzero(n):
            table = dict(
                zip(*(plain.data[key].sel(layer=layer, expert=expert).values.tolist() for key in ("token", "logit")))
            )
            values = np.array([table[token] for token in vocabulary])
            # centred on the vocabulary: differences between tokens are those of the attributions
            assert np.allclose(values - values[0], means[expert] - means[expert, 0], atol=1e-10), name
        assert np.nanmax(np.abs(apart.data["logit"] - plain.data["logit"])) > 1e-3


def test_norms_are_recognised_by_what_they_do() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().mean(dim=-1, keepdim=True)

    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer_norm = nn.LayerNorm(8).double()
    with torch.no_grad():
        layer_norm.weight.copy_(torch.linspace(0.5, 2, 8))
        layer_norm.bias.copy_(torch.linspace(-1, 1, 8))
    norm = frozen_norm(layer_norm, x, layer_norm(x))
    assert norm.centres
    assert torch.allclose(norm.bias[0, 0], layer_norm.bias)
    assert torch.allclose(norm.linear(x) + norm.bias, layer_norm(x), atol=1e-12)
    rms_norm = nn.RMSNorm(8).double()
    assert not frozen_norm(rms_norm, x, rms_norm(x)).centres
    with pytest.raises(ConfigError, match=r"class Doubled, which differs by .* an RMS norm or a layer norm"):
        frozen_norm(Doubled(), x, Doubled()(x))


def test_a_layer_that_does_something_else_is_refused_by_number() -> None:
    moe, tokens = attached("olmoe"), tiny.random_tokens(1, 5)
    model: Any = moe.bridge.original_model
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda m, args, out: out + out.square())
    try:
        with pytest.raises(ConfigError, match="layer 1, which changes the logit difference"):
            logit_attribution(moe, tokens, 5, 9)
    finally:
        handle.remove()


def test_what_cannot_be_is_refused_before_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, tokens = attached("olmoe"), tiny.random_tokens(2, 5)
    monkeypatch.setattr(type(moe.bridge), "forward", lambda *a, **k: pytest.fail("a pass was run"))
    mistakes: list[tuple[dict[str, Any], Any, str]] = [
        ({"positions": [0]}, ConfigError, "one whole number, or one for each of the 2 examples"),
        ({"positions": 5}, DataError, "position 5 of example 0, which has 5 real tokens"),
        ({"positions": -6}, DataError, "position -6"),
        ({"answer_tokens": [1, 2, 3]}, ConfigError, "answer_tokens of shape"),
        ({"answer_tokens": [[1, 2], [3, 4]]}, ConfigError, "2 answer_tokens an example"),
        ({"answer_tokens": 101}, DataError, "answer_tokens with id 101"),
        ({"wrong_tokens": 0.5}, ConfigError, "wrong_tokens of shape"),
    ]
    for kwargs, error, text in mistakes:
        with pytest.raises(error, match=text):
            logit_attribution(moe, tokens, **{"answer_tokens": 5, "wrong_tokens": 9, **kwargs})
    with pytest.raises(ConfigError, match="centre='mean'"):
        expert_tokens(moe, tokens, centre="mean")  # type: ignore[arg-type]
    monkeypatch.undo()
    bare = mi.attach(tiny.build_bridge(tiny.build_hf("mixtral"), "mixtral"), expert_outputs=False)
    with pytest.raises(HookError, match="expert_outputs=False"):
        logit_attribution(bare, tokens, 5, 9)
    switch = mi.attach(tiny.build_bridge(tiny.build_hf("switch_transformers"), "switch_transformers"))
    with pytest.raises(ConfigError, match="an encoder-decoder"):
        logit_attribution(switch, tokens, 5, 9)


def test_it_leaves_the_model_as_it_was_in_any_mode() -> None:
    """In inference mode, of a training model, with some layers attached: the same numbers, and nothing left behind."""
    tokens = tiny.random_tokens(2, 5)
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"), layers=[1])
    plain = logit_attribution(moe, tokens, 5, 9)
    assert float(abs(plain.remainder()).max()) < 1e-5
    assert set(plain.data["kind"].values) == {"embedding", "attention", "other", "expert"}
    moe.bridge.train()
    with torch.inference_mode():
        again = logit_attribution(moe, tokens.clone(), 5, 9)
    assert np.array_equal(plain.data["effect"], again.data["effect"])
    assert moe.bridge.training
    model: Any = moe.bridge.original_model
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.model.layers)


def test_results_are_kept_shown_and_read_back(tmp_path: Path) -> None:
    moe, tokens = attached("deepseek_v2"), tiny.random_tokens(3, 6)
    result = logit_attribution(moe, tokens, 5, [9, 10, 11])
    kinds = result.by_kind()
    assert kinds["mean"].sum() == pytest.approx(float(result.data["logit_difference"].mean()), abs=1e-4)
    assert {"embedding", "attention", "mlp", "expert", "shared"} <= set(kinds["kind"])
    again = mi.load_result(result.save(tmp_path / "attribution.nc"))
    assert again.summary() == result.summary()
    assert len(again.to_dataframe()) == result.data["effect"].size
    writes = expert_tokens(moe, tokens)
    loaded: Any = mi.load_result(writes.save(tmp_path))
    assert loaded.table().equals(writes.table())
