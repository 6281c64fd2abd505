"""``moe.show``: its cells are the cached hooks, for every family and kind of input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError, HookError, MoEInterpError
from tests.tiny import ENCODER_DECODERS, build_bridge, build_hf, random_tokens, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"


def attached(name: str, tokenizer: Any = None) -> mi.MoEHooks:
    return mi.attach(build_bridge(build_hf(name), name, tokenizer=tokenizer))


@pytest.fixture(scope="module")
def olmoe() -> mi.MoEHooks:
    return attached("olmoe", tiny_tokenizer(chat_template=TEMPLATE))


def check_equals_hooks(moe: mi.MoEHooks, tokens: torch.Tensor, view: mi.RoutingView, **options: Any) -> None:
    """Every slot of every token and layer, and the predictions, against one cached pass."""
    with torch.no_grad():
        logits, cache = moe.bridge.run_with_cache(
            tokens, names_filter=moe.filter("expert_indices", "expert_weights"), **options
        )
    by_label = {label: (panel, place) for panel in view.panels for place, label in enumerate(panel.layers)}
    assert tuple(by_label) == moe.layers
    for label, (panel, place) in by_label.items():
        indices, weights = (moe.cached(cache, name, label)[0] for name in ("expert_indices", "expert_weights"))
        width = indices.shape[-1]
        assert np.array_equal(panel.indices[:, place, :width], indices.numpy())
        assert (panel.indices[:, place, width:] == -1).all()
        assert np.array_equal(panel.weights[:, place, :width], weights.float().numpy())  # type: ignore[index]
    panel = view.panels[-1]
    assert np.array_equal(panel.predicted_ids, logits[0].argmax(-1).numpy())  # type: ignore[arg-type]
    top = logits[0].float().softmax(-1).max(-1).values
    np.testing.assert_allclose(panel.predicted_p, top.numpy(), atol=1e-6)  # type: ignore[arg-type]


# plain; dense first layers; experts chosen by token; one expert a token; two stacks; experts beside a dense MLP
@pytest.mark.parametrize(
    "family", ["mixtral", "deepseek_v3", "deepseek_v4", "llama4", "switch_transformers", "gemma4_text"]
)
def test_the_cells_are_the_cached_hooks(family: str) -> None:
    moe = attached(family)
    tokens = random_tokens(1, 6)
    options = {}
    if family in ENCODER_DECODERS:
        options["decoder_input"] = tokens.flip(-1)[:, :4]
    view = moe.show(tokens, **options)
    check_equals_hooks(moe, tokens, view, **options)
    assert view.panels[0].tokens == [f"<{i}>" for i in tokens[0].tolist()]  # no tokenizer
    assert view._repr_html_().count("<tr>") == sum(1 + len(panel.tokens) for panel in view.panels)
    numbers = {label[1] if isinstance(label, tuple) else label for label in moe.layers}
    assert {n for panel in view.panels for n in panel.numbers} == numbers
    assert f"({'/'.join(map(str, sorted(set(view.panels[0].n_experts))))} experts" in str(view)


def test_text_messages_ids_and_padded_rows_of_one_prompt_show_the_same(olmoe: mi.MoEHooks) -> None:
    ids = olmoe.bridge.to_tokens("w3 w4 w5")
    assert ids.tolist() == [[1, 3, 4, 5]]
    view = olmoe.show("w3 w4 w5")
    check_equals_hooks(olmoe, ids, view)
    assert list(view.panels[0].tokens) == ["<bos>", "w3", "w4", "w5"]
    others: list[tuple[Any, dict[str, Any]]] = [
        (ids, {}),
        (ids[0], {}),
        (ids[0].tolist(), {}),
        (ids.tolist(), {}),
        (ids.numpy(), {}),
        (torch.tensor([[0, 0, 1, 3, 4, 5]]), {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}),
        (torch.tensor([1, 3, 4, 5, 0]), {"attention_mask": [1, 1, 1, 1, 0]}),
        ([{"role": "user", "content": "w3 w4 w5"}], {}),
    ]
    for given, options in others:
        other = olmoe.show(given, **options)
        table = other.to_dataframe()
        n = len(view.to_dataframe())
        if isinstance(given, list) and isinstance(given[0], dict):
            assert list(other.panels[0].tokens) == ["<bos>", "w3", "w4", "w5", "w9"]  # the assistant's turn is opened
            table = table[table["position"] < 4]
        assert len(table) == n
        assert (table["expert"].to_numpy() == view.to_dataframe()["expert"].to_numpy()).all()


def test_layers_and_positions_are_chosen(olmoe: mi.MoEHooks) -> None:
    everything = olmoe.show("w3 w4 w5 w6")
    last = olmoe.layers[-1]
    one = olmoe.show("w3 w4 w5 w6", layer=-1)
    assert one.layer == last
    assert one.weights
    whole = everything.to_dataframe()
    assert one.to_dataframe()["expert"].tolist() == whole[whole["layer"] == last]["expert"].tolist()
    assert olmoe.show("w3 w4", layer=[last, olmoe.layers[0]]).panels[0].layers == (olmoe.layers[0], last)
    assert "2 of 5 tokens" in str(olmoe.show("w3 w4 w5 w6", positions=[1, -1]))
    assert "3 of 5 tokens" in str(olmoe.show("w3 w4 w5 w6", positions=slice(2, None)))
    assert "w5" in olmoe.show("w3 w4 w5 w6", positions=3).html()


def test_an_intervention_that_is_on_is_what_is_shown_and_nothing_stays(olmoe: mi.MoEHooks) -> None:
    layer = olmoe.layers[0]
    before = olmoe.bridge("w3 w4")
    with olmoe.bridge.hooks(fwd_hooks=mi.force_experts(olmoe, layer, [5])):
        shown = olmoe.show("w3 w4")
    assert (shown.panels[0].indices[:, 0, 0] == 5).all()
    assert not olmoe.hooks_active(layer)
    assert torch.equal(olmoe.bridge("w3 w4"), before)
    olmoe.bridge.train()
    olmoe.show("w3 w4")
    assert olmoe.bridge.training
    olmoe.bridge.eval()


def test_a_recorded_trace_shows_without_a_pass(olmoe: mi.MoEHooks, monkeypatch: pytest.MonkeyPatch) -> None:
    views = [olmoe.show("w3 w4 w5"), olmoe.show("w7 w8")]
    panels = [view.panels[0] for view in views]
    trace = mi.RoutingTrace.from_arrays(
        np.concatenate([p.indices for p in panels]),
        np.concatenate([p.weights for p in panels if p.weights is not None]),
        sequence_lengths=[4, 3],
        n_experts=panels[0].n_experts[0],
        layers=[layer for layer in panels[0].layers if isinstance(layer, int)],
        token_ids=np.concatenate([p.token_ids for p in panels if p.token_ids is not None]),
        predicted_ids=np.concatenate([p.predicted_ids for p in panels if p.predicted_ids is not None]),
    )
    monkeypatch.setattr(type(olmoe.bridge), "forward", None)
    for n, view in enumerate(views):
        same = mi.show(olmoe, trace, sequence=n)
        pd_columns = ["position", "token_id", "token", "layer", "slot", "expert", "weight", "predicted"]
        assert same.to_dataframe()[pd_columns].equals(view.to_dataframe()[pd_columns])
    with pytest.raises(DataError, match=r"sequence 2 .* of a trace of 2 sequences"):
        mi.show(olmoe, trace, sequence=2)
    other = mi.RoutingTrace.from_arrays(
        trace.expert_indices, n_experts=trace.n_experts, layers=[5, 6, 7, 8][: len(trace.layers)]
    )
    with pytest.raises(DataError, match=r"a trace of layers \[5"):
        mi.show(olmoe, other)


def test_an_encoder_decoder_shows_both_stacks() -> None:
    moe = attached("switch_transformers")
    view = moe.show([5, 6, 7])
    encoder, decoder = view.panels
    assert (encoder.name, decoder.name) == ("encoder", "decoder")
    assert len(encoder.tokens) == 3
    assert len(decoder.tokens) == 1  # its start token
    assert encoder.predicted is None
    assert moe.show([5, 6, 7], layer=("decoder", decoder.numbers[0])).panels[0].layers == decoder.layers[:1]
    assert moe.show([5, 6, 7], layer=f"encoder.{encoder.numbers[0]}").panels[0].name == "encoder"
    # of the decoder, those of the tokens that it has
    for positions, of_decoder in ((0, [0]), ([2, -1, 0], [0, 0]), ([2], []), (slice(1, None), []), (slice(2), [0])):
        chosen = moe.show([5, 6, 7], positions=positions)
        assert [places.tolist() for places in chosen.shown or ()][1] == of_decoder
        assert f"{len(of_decoder)} of 1 tokens are shown" in chosen.html() or of_decoder == [0]
        assert "decoder" in str(chosen)
    with pytest.raises(ConfigError, match="positions=3"):
        moe.show([5, 6, 7], positions=[3])


def test_the_decoder_begins_where_the_generation_config_says() -> None:
    moe = attached("switch_transformers")
    model: Any = moe.bridge.original_model
    model.generation_config.decoder_start_token_id, model.config.decoder_start_token_id = 9, 4
    shown = moe.show([5, 6, 7]).panels[1]
    captured: Any = mi.capture_routing(moe, [[5, 6, 7]], stack="decoder", progress=False)
    assert shown.token_ids is not None
    assert shown.token_ids.tolist() == captured.token_ids.tolist() == [9]
    np.testing.assert_array_equal(shown.indices, captured.expert_indices)
    model.generation_config.decoder_start_token_id = None
    assert moe.show([5, 6, 7]).panels[1].token_ids.tolist() == [4]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "options", "error", "words"),
    [
        (torch.tensor([[3, 4], [5, 6]]), {}, DataError, "tokens of shape (2, 2). Expected: one prompt"),
        ([3, 4000], {}, DataError, "token id 4000 in tokens"),
        ([], {}, DataError, "the prompt: tokens []"),
        ([{"content": "w3"}], {}, DataError, "message 0"),
        (3.5, {}, DataError, "tokens 3.5 of type float"),
        ("w3", {"layer": 77}, HookError, "layer 77"),
        ("w3", {"layer": []}, ConfigError, "no layers"),
        ("w3", {"positions": 9}, ConfigError, "positions=9"),
        ("w3 w4", {"attention_mask": [0, 1, 1]}, ConfigError, "a mask of padding beside a text"),
        (
            [{"role": "user", "content": "w3"}],
            {"attention_mask": [1]},
            ConfigError,
            "a mask of padding beside messages",
        ),
        ("w3", {"positions": []}, ConfigError, "positions=[]"),
        ("w3", {"decoder_input": [3]}, ConfigError, "decoder_input for a model of one stack"),
        (torch.tensor([3, 4]), {"attention_mask": [0, 0]}, DataError, "an attention_mask of shape (2,) with 0 ones"),
        (torch.tensor([3, 4]), {"attention_mask": [1]}, DataError, "an attention_mask of shape (1,)"),
        ("w3 " * 5000, {}, DataError, "at most the model's context"),
    ],
)
def test_what_is_no_prompt_is_refused_in_words(
    olmoe: mi.MoEHooks, given: Any, options: dict[str, Any], error: type[MoEInterpError], words: str
) -> None:
    with pytest.raises(error) as caught:
        olmoe.show(given, **options)
    assert words in str(caught.value)
    assert not any(olmoe.hooks_active(layer) for layer in olmoe.layers)


def test_text_without_a_tokenizer_and_detached_hooks_are_refused() -> None:
    moe = attached("olmoe")
    with pytest.raises(DataError, match="no tokenizer"):
        moe.show("w3")
    moe.detach()
    with pytest.raises(MoEInterpError, match="no longer attached"):
        moe.show([3])


def test_the_command_prints_the_view_and_writes_a_page(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from moe_interp.cli.application import cli

    done = CliRunner().invoke(cli, ["show", "--model", "demo", "Gus has 3\ncoins", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    moe, _ = mi.load_demo()
    view = moe.show("Gus has 3\ncoins")
    lines = str(view).splitlines()
    assert lines[-1] in done.stdout
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == view.html()
    assert (tmp_path / "routing.csv").read_text(encoding="utf-8").count("\n") >= len(view.to_dataframe())
    one = CliRunner().invoke(cli, ["show", "--model", "demo", "--tokens", "5,6", "--layers", "-1"])
    assert "through layer 3 (16 experts, 2 a token)" in one.stdout
