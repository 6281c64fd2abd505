"""pass@K from the command line: the demo's problems, files, going on, an interruption, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli import options
from moe_interp.cli.application import cli
from moe_interp.errors import MoEInterpError
from moe_interp.experiments.pass_at_k import sampling_run
from moe_interp.experiments.pass_at_k.checkers import CHECKERS
from moe_interp.experiments.pass_at_k.completions import read_completions

runner = CliRunner(env={"COLUMNS": "80", "HF_HUB_OFFLINE": "1"})
SHORT = ["--samples", "3", "--k", "1,3", "--max-new-tokens", "4"]


def arguments(out: Path, *more: str) -> list[str]:
    return ["pass-at-k", "--model", "demo", "--out", str(out), *SHORT, *more]


def test_the_demos_problems_are_the_default_and_a_run_goes_on(tmp_path: Path) -> None:
    done = runner.invoke(cli, arguments(tmp_path, "--first", "2"))
    assert done.exit_code == 0, done.output
    result = mi.load_result(tmp_path / "pass_at_k.nc")
    assert isinstance(result, mi.PassAtKResult)
    assert result.data["problem"].values.tolist() == ["arithmetic-0000", "arithmetic-0001"]
    assert result.ks == (1, 3)
    words = " ".join(done.output.split())
    assert "2 problems, 3 completions each" in words
    assert "pass@K of demo on 2 problems" in words
    assert "all problems 2 3" in words
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert str(tmp_path) not in page
    assert (tmp_path / "figures" / "pass_at_k.svg").exists()
    before = (tmp_path / "completions.jsonl").read_bytes()
    more = runner.invoke(
        cli, ["pass-at-k", "--model", "demo", "--out", str(tmp_path), *SHORT[2:], "-n", "4", "--first", "2"]
    )
    assert more.exit_code == 0, more.output
    assert (tmp_path / "completions.jsonl").read_bytes().startswith(before)
    assert len(read_completions(tmp_path / "completions.jsonl")) == 8
    other = runner.invoke(cli, arguments(tmp_path, "--first", "2", "--temperature", "1"))
    assert isinstance(other.exception, MoEInterpError)
    assert "--temperature 0.6 there, 1.0 here" in str(other.exception)
    anew = runner.invoke(cli, arguments(tmp_path, "--first", "1", "--temperature", "1", "--no-resume"))
    assert anew.exit_code == 0, anew.output
    assert len(read_completions(tmp_path / "completions.jsonl")) == 3


def test_files_and_their_fields(tmp_path: Path) -> None:
    lines = [{"problem": f"{i}+1=", "solution": i + 1, "topic": "ab"[i % 2]} for i in range(2)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    fields = ["--prompt-field", "problem", "--answer-field", "solution", "--domain-field", "topic"]
    done = runner.invoke(cli, arguments(tmp_path / "out", "--problems", str(path), *fields, "--stop", "\n"))
    assert done.exit_code == 0, done.output
    result = mi.load_result(tmp_path / "out")
    assert result.data["domain"].values.tolist() == ["a", "b"]
    missing = runner.invoke(cli, arguments(tmp_path / "out", "--problems", str(path)))
    assert "line 1: no prompt and no answer" in str(missing.exception)


def test_an_interruption_keeps_what_was_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, calls = sampling_run.CompletionRun._check, []

    def interrupted(self: object, text: str, problem: object) -> object:
        calls.append(text)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return native(self, text, problem)  # type: ignore[arg-type]

    monkeypatch.setattr(sampling_run.CompletionRun, "_check", interrupted)
    done = runner.invoke(cli, arguments(tmp_path, "--first", "1"))
    assert done.exit_code == 130
    assert "goes on from the completions in" in " ".join(done.output.split())
    assert len(read_completions(tmp_path / "completions.jsonl")) == 2


@pytest.mark.parametrize(
    "more, message",
    [
        (["--k", "1,4"], "--k 4 with --samples 3"),
        (["--k", "0"], "--k 0"),
        (["--k", "one"], "--k one"),
        (["--samples", "0"], "--samples 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top-p", "0"], "--top-p 0"),
        (["--checker", "maths"], "Did you mean math"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--problems", "none.jsonl"], "--problems none.jsonl, which is not a file"),
        (["--answer-field", "x"], "--answer-field x with the bundled data"),
    ],
)
def test_refused_before_the_model_is_loaded(tmp_path: Path, more: list[str], message: str) -> None:
    done = runner.invoke(cli, arguments(tmp_path, *more))
    assert isinstance(done.exception, MoEInterpError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_the_checkers_are_those_of_the_library() -> None:
    assert set(options.CHECKERS) == set(CHECKERS)
