"""Capturing routing from the command line: the demo's items, files, going on, counts, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli.application import cli
from moe_interp.cli.commands.recording import capture
from moe_interp.errors import MoEInterpError
from moe_interp.experiments.capture.options import FORMATS
from moe_interp.experiments.capture.passes import RoutingPasses
from moe_interp.traces import RoutingCounts

runner = CliRunner(env={"COLUMNS": "80", "HF_HUB_OFFLINE": "1"})


def arguments(out: Path, *more: str) -> list[str]:
    return ["capture", "--model", "demo", "--out", str(out), *more]


def test_the_demos_items_are_the_default_and_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "routes"
    done = runner.invoke(cli, arguments(out, "--first", "1", "--generate", "2", "--logits"))
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "demo: 4 MoE layers, 16 experts, top-2." in words
    assert f"moe-interp atlas {out}" in done.output
    trace = mi.RoutingTrace.read(out)
    assert trace.domains == ("arithmetic", "code", "facts", "puzzles")
    assert trace.phase is not None
    assert trace.phase.tolist().count("generation") >= 4
    assert trace.router_logits is not None
    monkeypatch.setattr(RoutingPasses, "record", None)  # nothing is left to run
    again = runner.invoke(cli, arguments(out, "--first", "1", "--generate", "2", "--logits"))
    assert again.exit_code == 0, again.output
    other = runner.invoke(cli, arguments(out, "--first", "1", "--generate", "3", "--logits"))
    assert isinstance(other.exception, MoEInterpError)
    assert "--generate 2 there, 3 here" in str(other.exception)


def test_files_their_fields_and_counts(tmp_path: Path) -> None:
    lines = [
        {"question": "2+2=", "reply": " 4", "topic": "sums"},
        {"text": "3+3=6", "topic": "sums", "id": "three"},
        {"tokens": [1, 5, 6], "topic": "ids"},
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fields = ["--prompt-field", "question", "--answer-field", "reply", "--domain-field", "topic", "--items", str(path)]
    done = runner.invoke(cli, arguments(tmp_path / "routes", *fields))
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "routes").glob("part-*.parquet"))) == 1
    small = runner.invoke(cli, arguments(tmp_path / "small", *fields, "--part", "0.0001"))
    assert small.exit_code == 0, small.output
    assert len(list((tmp_path / "small").glob("part-*.parquet"))) == 3  # each a sequence
    trace = mi.RoutingTrace.read(tmp_path / "routes")
    assert trace.domains == ("ids", "sums")
    assert json.loads((tmp_path / "routes" / "part-00000.json").read_text())["sequences"] == [
        "texts-1",
        "three",
        "texts-3",
    ]
    done = runner.invoke(cli, arguments(tmp_path / "counts", *fields, "--accumulate", "--tables", "co_activation"))
    assert done.exit_code == 0, done.output
    counts = RoutingCounts.load(tmp_path / "counts" / "counts.npz")
    assert (counts.n_tokens, counts.tables) == (trace.n_tokens, ("co_activation",))
    assert "counts.npz" in done.output


def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RoutingPasses, "record", interrupted)
    done = runner.invoke(cli, arguments(tmp_path, "--first", "1"))
    assert done.exit_code == 130
    assert "goes on from the finished parts in" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--generate", "0"], "--generate 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top-p", "2"], "--top-p 2"),
        (["--format", "parquets"], "Did you mean parquet"),
        (["--stack", "encode"], "Did you mean encoder"),
        (["--tables", "paths"], "--tables paths without --accumulate"),
        (["--layers", "a"], "--layers a"),
        (["--sequences", "none.jsonl"], "--sequences none.jsonl, which is not a file"),
        (["--domain-field", "x"], "--domain-field x with the bundled data"),
    ],
)
def test_refused_before_the_model_is_loaded(tmp_path: Path, more: list[str], message: str) -> None:
    done = runner.invoke(cli, arguments(tmp_path, *more))
    assert isinstance(done.exception, MoEInterpError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_the_formats_are_those_of_the_library() -> None:
    assert capture.FORMATS == FORMATS
