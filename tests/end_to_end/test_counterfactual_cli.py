"""Counterfactual routes from the command line: the demo's sequences, files, an interruption, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli import inputs, outputs
from moe_interp.cli.application import cli
from moe_interp.engine.cuda.compiled import NotCompiledWarning
from moe_interp.errors import MoEInterpError
from moe_interp.experiments.counterfactual import experiment
from moe_interp.experiments.inputs.sequence_texts import FIELDS
from moe_interp.plots import FIGURES
from moe_interp.testbed.demo import load_demo_assets

runner = CliRunner(env={"COLUMNS": "80", "HF_HUB_OFFLINE": "1"})
TEXTS = ["37+28=65\nAnswer: 65", "All fims are pims.", "x = 1\ny = 2", "Lysa Wren likes fish."]


def sequences_file(folder: Path, lines: list[object] | None = None) -> Path:
    path = folder / "texts.jsonl"
    made = [{"id": f"t{i}", "text": text} for i, text in enumerate(TEXTS)] if lines is None else lines
    path.write_text("".join(json.dumps(line) + "\n" for line in made), encoding="utf-8")
    return path


def arguments(sequences: Path | str, out: Path, *more: str) -> list[str]:
    return ["counterfactual", "--model", "demo", "--sequences", str(sequences), "--out", str(out), *more]


def test_the_demos_own_trajectories_are_the_default(tmp_path: Path) -> None:
    given = ["counterfactual", "--model", "demo", "--first", "2", "-R", "4", "--out", str(tmp_path)]
    done = runner.invoke(cli, given)
    assert done.exit_code == 0, done.output
    result = mi.load_result(tmp_path / "counterfactual.nc")
    assert isinstance(result, mi.CounterfactualResult)
    assert result.data.sizes["route"] == 4
    names = list(dict.fromkeys(result.data["sequence"].values.tolist()))
    assert names == [f"{domain}-000{i}" for domain in ("arithmetic", "code", "facts", "puzzles") for i in (0, 1)]
    # the whole worked solution is scored, from its first token on
    solution = load_demo_assets().items["arithmetic"][0].fields["solution"]
    scored = result.data["target_text"].values[result.data["sequence"].values == "arithmetic-0000"]
    assert "".join(scored) == solution
    words = " ".join(done.output.split())
    assert "The published pattern" in words
    n_tokens = result.data.sizes["token"]
    assert f"8 sequences, {n_tokens} tokens to score, 4 MoE layers, 4 routes a token" in words
    assert "Not read" not in words
    assert "finished before" not in words
    assert "layer 3" in words
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "Regret in nats" in page
    assert str(tmp_path) not in page
    for name in FIGURES["counterfactual"]:
        assert (tmp_path / "figures" / f"{name}.svg").stat().st_size > 1000


def test_an_interrupted_run_goes_on_and_another_plan_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(sequences_file(tmp_path), tmp_path / "out", "-R", "3", "--layers", "0,-1")
    honest = experiment.counterfactual_routes

    def interrupted(*args: object, **options: object) -> object:
        def stop(done: int, total: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        return honest(*args, **{**options, "progress": stop})  # type: ignore[arg-type]

    monkeypatch.setattr(experiment, "counterfactual_routes", interrupted)
    stopped = runner.invoke(cli, given)
    assert stopped.exit_code != 0
    assert "The same command goes on" in stopped.output
    store = tmp_path / "out" / outputs.ROUTE_CELLS
    kept = {file.name: file.stat().st_mtime_ns for file in store.glob("*.npz")}
    assert kept
    monkeypatch.setattr(experiment, "counterfactual_routes", honest)
    done = runner.invoke(cli, given)
    assert done.exit_code == 0, done.output
    after = {file.name: file.stat().st_mtime_ns for file in store.glob("*.npz")}
    assert kept.items() < after.items()  # nothing was computed again
    words = " ".join(done.output.split())
    assert "1 of 2 cells were finished before, in" in words
    whole = mi.load_result(tmp_path / "out" / "counterfactual.nc")
    runner.invoke(cli, arguments(tmp_path / "texts.jsonl", tmp_path / "once", "-R", "3", "--layers", "0,-1"))
    np.testing.assert_array_equal(whole.data["logp"], mi.load_result(tmp_path / "once").data["logp"])
    other = runner.invoke(cli, [*given, "--seed", "1"])
    assert "holds cells of another run (--seed 0 there, 1 here" in str(other.exception)
    assert "--no-resume" in str(other.exception)
    (store / "notes.txt").write_text("mine")
    (store / "folder").mkdir()
    assert runner.invoke(cli, [*given, "--seed", "1", "--no-resume"]).exit_code == 0
    assert (store / "notes.txt").read_text() == "mine"


def test_fields_that_are_not_read_are_named_and_spaces_between_layers_pass(tmp_path: Path) -> None:
    lines: list[object] = [
        {"prompt": "37+28=", "trajectory": "7+8=15", "answer": "65"},
        {"text": "x = 1", "scorefrom": 2, "trajectory": None},
    ]
    out = tmp_path / "[red]out[/]"
    done = runner.invoke(cli, arguments(sequences_file(tmp_path, lines), out, "-R", "1", "--layers", "0, 1"))
    assert done.exit_code == 0, done.output
    words = " ".join(done.stderr.split())
    n_tokens = mi.load_result(out).data.sizes["token"]
    assert f"2 sequences, {n_tokens} tokens to score, 2 MoE layers, 1 route a token" in words
    assert (
        "Not read: trajectory (of 2 sequences), scorefrom (of 1 sequence). The fields that are read: id, text" in words
    )
    assert f"Open {out / 'index.html'} in a browser." in done.stdout
    assert f"The result is {out / 'counterfactual.nc'}." in done.stdout
    assert (out / "counterfactual.nc").is_file()
    again = runner.invoke(cli, [*arguments(tmp_path / "texts.jsonl", out, "-R", "2"), "--layers", "0, 1"])
    assert "[red]out[/]" in str(again.exception)


def test_the_help_says_what_of_a_line_is_read() -> None:
    words = " ".join(runner.invoke(cli, ["counterfactual", "--help"]).output.split())
    assert all(field in words for field in FIELDS)
    assert "to score a worked solution, name its field as --answer-field. Other fields are not read" in words


def test_a_file_in_the_place_of_a_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (out := tmp_path / "out").write_text("mine")
    for command_line in (
        arguments(sequences_file(tmp_path), out),
        ["isolate", "--model", "demo", "--out", str(out)],
        ["demo", "--out", str(out)],
    ):
        done = runner.invoke(cli, command_line)
        assert f"'{out}' is a file. Expected: a folder to write to" in str(done.exception)
    assert out.read_text() == "mine"
    (place := tmp_path / "run").mkdir()
    (place / outputs.ROUTE_CELLS).write_text("mine")
    for more in ((), ("--no-resume",)):
        done = runner.invoke(cli, arguments(sequences_file(tmp_path), place, "-R", "1", "--layers", "0", *more))
        assert f"'{place / outputs.ROUTE_CELLS}' is a file. Expected: a folder " in str(done.exception)


@pytest.mark.parametrize(
    ("lines", "options", "parts"),
    [
        ([], [], ["without a sequence", "JSON lines"]),
        ([{"id": "long", "tokens": [5] * 600}], [], ["sequence 'long'", "the model's context of 512"]),
        ([{"id": "long", "text": "one two " * 400}], [], ["sequence 'long'", "the model's context of 512"]),
        ([{"id": "a", "text": "x = 1"}, {"id": "a", "text": "y = 2"}], [], ["sequence id 'a' more than once"]),
        ([{"id": "one", "tokens": [5]}], [], ["sequence 'one' (texts.jsonl, line 1): no token to score among 1"]),
        ([{"id": "odd", "tekst": "x"}], [], ["texts.jsonl, line 1 (sequence 'odd') with the fields"]),
        (None, ["-R", "0"], ["--routes 0", "at least one route"]),
        (None, ["--layers", "7"], ["layer 7"]),
        (None, ["--sampler", "best"], ["--sampler best", "gumbel, uniform"]),
        (None, ["--sampler", "uniform", "--tau", "2"], ["--sampler uniform with --tau", "gumbel only"]),
        (None, ["--tau", "0"], ["--tau 0.0", "a positive number"]),
        (None, ["--method", "fast"], ["--method fast"]),
        (None, ["--memory", "0.000001"], ["memory budget"]),
        (None, ["--memory", "nan"], ["--memory nan", "a positive number of GiB"]),
        (None, ["--memory", "-1"], ["--memory -1", "a positive number of GiB"]),
    ],
)
def test_what_cannot_be_scored_is_refused(
    tmp_path: Path, lines: list[object] | None, options: list[str], parts: list[str]
) -> None:
    done = runner.invoke(cli, arguments(sequences_file(tmp_path, lines), tmp_path / "out", *options))
    assert done.exit_code != 0
    assert isinstance(done.exception, MoEInterpError), done.output
    assert all(part in str(done.exception) for part in parts), str(done.exception)
    assert not (tmp_path / "out" / "counterfactual.nc").exists()


@pytest.mark.parametrize("first", ["0", "-1"])
def test_fewer_than_one_sequence_is_refused(tmp_path: Path, first: str) -> None:
    done = runner.invoke(cli, arguments("demo", tmp_path, "--first", first))
    assert f"--first {first}. Expected: a whole number of at least 1" in str(done.exception)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing = runner.invoke(cli, arguments(tmp_path / "none.jsonl", tmp_path))
    assert "none.jsonl" in str(missing.exception)
    broken = sequences_file(tmp_path)
    broken.write_text(broken.read_text(encoding="utf-8") + '{"id": \n', encoding="utf-8")
    assert "texts.jsonl, line 5" in str(runner.invoke(cli, arguments(broken, tmp_path)).exception)
    model = ["counterfactual", "--model", str(load_demo_assets().model_path), "--out", str(tmp_path)]
    assert "--sequences FILE.jsonl" in str(runner.invoke(cli, model).exception)


def test_lines_may_be_texts_or_ids_alone(tmp_path: Path) -> None:
    path = sequences_file(tmp_path, ["x = 1\ny = 2", [5, 6, 7, 8]])
    assert [one.id for one in inputs.read_sequence_files([str(path)])] == ["texts-1", "texts-2"]
    assert len(inputs.read_sequence_files([str(path), "demo"], first=1)) == 5


def test_a_line_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\x85four\x0b", "five"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (path := tmp_path / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [one.start for one in inputs.read_sequence_files([str(path)])] == texts


def test_a_single_short_sequence_without_controls_says_what_it_cannot_show(tmp_path: Path) -> None:
    path = sequences_file(tmp_path, ["x = 1"])
    done = runner.invoke(cli, arguments(path, tmp_path / "out", "--no-controls", "-R", "200", "--sampler", "all"))
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "no interval" in words
    assert "no controls" in words
    result = mi.load_result(tmp_path / "out" / "counterfactual.nc")
    assert int(result.data["logp"].notnull().sum("route").max()) == 119  # C(16, 2) - 1
    assert bool(result.data["exhausted"].all())
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3


def test_a_named_field_is_scored(tmp_path: Path) -> None:
    lines: list[object] = [{"id": "a", "question": "37+28=", "steps": "7+8=15\n30+20=50", "answer": "65"}]
    path, out = sequences_file(tmp_path, lines), tmp_path / "out"
    named = ["--prompt-field", "question", "--answer-field", "steps", "-R", "1", "--layers", "0"]
    with pytest.warns(NotCompiledWarning, match="on cpu they run in compact rows, which are not compiled"):
        done = runner.invoke(cli, arguments(path, out, *named, "--compile", "--device", "cpu"))
    assert done.exit_code == 0, done.output
    assert "Not read: answer (of 1 sequence)" in " ".join(done.stderr.split())
    data = mi.load_result(out / "counterfactual.nc").data
    assert "".join(data["target_text"].values.tolist()) == "7+8=15\n30+20=50"
    wrong = runner.invoke(cli, arguments(path, out, "--answer-field", "solution"))
    said = "texts.jsonl, line 1 (sequence 'a'): no solution among its fields id, question, steps, answer"
    assert said in str(wrong.exception)
