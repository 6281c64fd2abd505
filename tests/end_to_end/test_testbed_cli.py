"""The testbed from the command line: the table and its files, a killed run, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli.application import cli, run
from moe_interp.cli.load import load_hooks
from moe_interp.errors import ConfigError, DataError, MoEInterpError, ResultError
from moe_interp.testbed.training.compilation import NotCompiledWarning

runner = CliRunner(env={"COLUMNS": "80", "HF_HUB_OFFLINE": "1"})
SIZES = {"model.d_model": 32, "model.n_layers": 2, "model.d_expert": 16, "data_scale": 0.002, "length": 32}
SIZES |= {"validation_sequences": 3, "micro_batch": 4, "vocab_size": 300}
TINY = ["testbed", "--domains", "facts,puzzles", *(part for k, v in SIZES.items() for part in ("--set", f"{k}={v}"))]


# killed within its seventh step: three are lost, since the state of every fourth is kept
KILLED = """
import itertools, os, signal
from moe_interp.cli.main import app
from moe_interp.testbed.training.trainer import Trainer
train_step, steps = Trainer.train_step, itertools.count(1)
def step_or_end(self):
    if next(steps) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self)
Trainer.train_step = step_or_end
app()
"""


def invoke(out: Path, *arguments: str):
    return runner.invoke(cli, [*TINY, "--out", str(out), *arguments])


def test_the_grid_is_trained_compared_and_read_back(tmp_path: Path) -> None:
    grid = ["--steps", "4", "--strategies", "none, reference", "--seeds", "0,1"]
    done = invoke(tmp_path, *grid)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines[:-2])) <= 80
    assert lines[0] == "2 strategies, seeds 0, 1, 512 tokens a run: mean±sd over seeds"
    assert any(line.split()[:2] == ["reference", "1.000±0.000"] for line in lines)
    table = pd.read_csv(tmp_path / "table.csv", index_col="strategy")
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert table.loc["none", "loss"] == pytest.approx(runs[runs["strategy"] == "none"]["loss"].mean())
    assert table.loc["none", "loss_sd"] == pytest.approx(runs[runs["strategy"] == "none"]["loss"].std())
    result = mi.load_result(tmp_path / "testbed.nc")
    assert isinstance(result, mi.testbed.ComparisonResult)
    assert result.data.step.values.tolist() == [2, 4]  # the preset's intervals, shortened with its length
    assert (result.data["specialization"].sel(strategy="reference") == 1).all()
    assert result.gains("reference", "none")["ratio"].notna().all()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"strategies.svg", "shared_direction.svg"}
    # a checkpoint like any other
    assert load_hooks(str(tmp_path / "none-seed0" / "model"), "cpu").layers == (0, 1)

    saved = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/state.pt")}
    read = invoke(tmp_path, *grid)
    assert read.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/state.pt")} == saved


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    options = ["--strategies", "loss_free", "--seeds", "0", "--set", "steps=40", "--set", "checkpoint_every=4"]
    assert invoke(tmp_path / "whole", *options).exit_code == 0
    command = [sys.executable, "-c", KILLED, *TINY, "--out", str(tmp_path / "killed"), *options]
    killed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "killed" / "loss_free-seed0" / "state.pt").exists()
    assert invoke(tmp_path / "killed", *options).exit_code == 0
    folders = [tmp_path / name / "loss_free-seed0" for name in ("whole", "killed")]
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    logs = [pd.read_json(folder / "metrics.jsonl", lines=True) for folder in folders]
    pd.testing.assert_frame_equal(*(log.drop(columns="tokens_per_s") for log in logs))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--preset", "huge"], ConfigError, "--preset huge"),
        (["--strategies", "none,magic"], ConfigError, "strategy 'magic'"),
        (["--strategies", "none,reference", "--set", "model.n_experts=1", "--set", "model.top_k=1"], ConfigError,
         "1 experts for 2 domains"),
        (["--strategies", "none,reference", "--set", "model.top_k=5"], ConfigError, "with top_k=5"),
        (["--seeds", "one"], ConfigError, "--seeds one"),
        (["--steps", "0"], ConfigError, "--steps 0"),
        (["--set", "speed=3"], ConfigError, "--set speed=3"),
        (["--set", "lr=fast"], ConfigError, "--set lr='fast'"),
        (["--set", "length=4096"], ConfigError, "length=4096"),
        (["--set", "domains_per_step=0"], ConfigError, "domains_per_step=0 of 4 sequences"),
        (["--set", "domains_per_step=some"], ConfigError, "a whole number"),
        (["--set", "shared_direction=often"], ConfigError, "shared_direction='often'"),
        (["--mixed-precision", "fp8"], ConfigError, "--mixed-precision fp8"),
        (["--device", "gpu"], ConfigError, "--device gpu"),
        (["--device", "cuda:9"], ConfigError, "a device that this machine has"),
        (["--domains", "facts,cooking"], ConfigError, "domain 'cooking'"),
        (["--domains", "facts,facts"], ConfigError, "--domains with facts more than once. Expected: each once"),
        (["--domains", "facts,mine=empty.jsonl"], DataError, "holds no documents"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_is_trained(
    tmp_path: Path, arguments: list[str], error: type[MoEInterpError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    done = invoke(tmp_path / "out", *arguments)
    assert isinstance(done.exception, error), done.output
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_run_where_compilation_fails_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.warns(NotCompiledWarning, match="'inductor' failed, RuntimeError: no C"):
        done = invoke(tmp_path, "--steps", "2", "--strategies", "none", "--seeds", "0", "--compile", "--device", "cpu")
    assert done.exit_code == 0, done.output


def test_domains_that_share_a_document_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(200)))
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(199, 400)))
    done = invoke(tmp_path / "out", "--domains", f"a={tmp_path / 'a.jsonl'},b={tmp_path / 'b.jsonl'}")
    assert isinstance(done.exception, DataError)
    assert "'a' and 'b' share the document 'document 199'" in str(done.exception)


def test_a_folder_of_another_configuration_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--steps", "2", "--seeds", "0", "--strategies", "none"]
    assert invoke(tmp_path, *grid).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for changed in (["--set", "lr=0.01"], ["--no-resume"]):
        done = invoke(tmp_path, *grid, *changed)
        assert isinstance(done.exception, ResultError)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # as the user sees it
    arguments = ["moe-interp", *TINY, "--out", str(tmp_path), *grid, "--set", "lr=0.01"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith("ResultError: ")
    assert "lr 0.003 there, 0.01 here" in shown
