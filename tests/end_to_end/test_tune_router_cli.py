"""Router tuning from the command line: the demo's sequences, files, a checkpoint to go on from, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli.application import cli
from moe_interp.errors import ConfigError, MoEInterpError, ResultError
from moe_interp.plots import FIGURES

runner = CliRunner(env={"COLUMNS": "80", "HF_HUB_OFFLINE": "1"})
SHORT = ("--routes", "4", "--tau", "1", "--lr", "0.003", "--max-steps", "4")


def arguments(out: Path, *more: str) -> list[str]:
    return ["tune-router", "--model", "demo", "--first", "2", "--out", str(out), *SHORT, *more]


def test_the_demo_is_tuned_and_merged(tmp_path: Path) -> None:
    other = tmp_path / "rhymes.jsonl"
    other.write_text("".join(json.dumps({"text": f"{n}+{n}={2 * n}\nAnswer: {2 * n}"}) + "\n" for n in (11, 12, 13)))
    out, merged = tmp_path / "out", tmp_path / "merged"
    done = runner.invoke(cli, arguments(out, "--other-domain", str(other), "--merge", str(merged)))
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    for said in ("Router tuning of demo, layer 3, objective epo: 4 steps", "In rhymes, another domain", "adoption"):
        assert said in words
    result = mi.load_result(out / "router_tuning.nc")
    assert isinstance(result, mi.RouterTuningResult)
    assert {*result.data["domain"].values.tolist()} == {"held out", "rhymes"}
    assert {path.stem for path in (out / "figures").glob("*.svg")} == {*FIGURES["router_tuning"]}
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    moe, _ = mi.load_demo()
    mi.RouterDelta.load(out / "router_delta.safetensors").apply(moe)
    tokens = torch.tensor([[1, 300, 301, 302, 40, 41]])
    alone = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert float((alone(tokens).logits - moe.bridge(tokens)).abs().max()) < 1e-5
    again = runner.invoke(cli, arguments(out, "--other-domain", str(other)))
    assert again.exit_code == 0, again.output
    assert mi.load_result(out / "router_tuning.nc").data.drop_attrs().identical(result.data.drop_attrs())
    changed = runner.invoke(cli, arguments(out))
    assert isinstance(changed.exception, ResultError)
    assert "another model, other sequences or other options" in str(changed.exception)
    assert runner.invoke(cli, arguments(out, "--no-resume")).exit_code == 0


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--objective", "dpo"), "one of epo, cross_entropy, listwise, distill"),
        (("--select", "fragil"), "Did you mean fragile?"),
        (("--select", "-1"), "a number of nats"),
        (("--lr", "0"), "--lr 0"),
        (("--sampler", "gumble"), "Did you mean gumbel?"),
        (("--layers", "77"), "layer 77"),
    ],
)
def test_mistakes_are_answered_in_words(more: tuple[str, str], text: str, tmp_path: Path) -> None:
    done = runner.invoke(cli, arguments(tmp_path, *more))
    assert isinstance(done.exception, MoEInterpError)
    assert text in str(done.exception)


def test_a_folder_that_is_there_is_not_merged_into(tmp_path: Path) -> None:
    done = runner.invoke(cli, arguments(tmp_path / "out", "--merge", str(tmp_path)))
    assert isinstance(done.exception, ConfigError)
    assert "which is there already" in str(done.exception)
