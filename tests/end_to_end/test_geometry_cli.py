"""The geometry of routing from the command line: the demo's items, going on, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli.application import cli
from moe_interp.errors import MoEInterpError

runner = CliRunner(env={"COLUMNS": "80", "HF_HUB_OFFLINE": "1"})
SHORT = ["--pairs", "60", "--permutations", "9", "--random-routers", "2", "--max-tokens", "60"]


def arguments(out: Path, *more: str) -> list[str]:
    return ["geometry", "--model", "demo", "--out", str(out), *SHORT, *more]


def test_the_demos_items_are_the_default_and_finished_batches_are_kept(tmp_path: Path) -> None:
    done = runner.invoke(cli, arguments(tmp_path, "--first", "2", "--layers", "0,-1", "--generate", "4"))
    assert done.exit_code == 0, done.output
    result = mi.load_result(tmp_path / "geometry.nc")
    assert isinstance(result, mi.GeometryResult)
    assert result.data["layer"].values.tolist() == [0, 3]
    assert sorted(set(result.data["domain"].values.tolist())) == ["arithmetic", "code", "facts", "puzzles"]
    assert len(result.phases()) == 2
    words = " ".join(done.output.split())
    assert "8 sequences, 2 MoE layers" in words
    assert "Similar states route alike:" in words
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6
    assert str(tmp_path) not in page
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 6
    other = runner.invoke(cli, arguments(tmp_path, "--first", "2", "--layers", "0,-1", "--seed", "1"))
    assert isinstance(other.exception, MoEInterpError)
    assert "--seed 0 there, 1 here" in str(other.exception)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--matching", "usag"], "Did you mean usage"),
        (["--p", "0"], "--p 0"),
        (["--generate", "0"], "--generate 0"),
        (["--random-routers", "1"], "--random-routers 1"),
        (["--other", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_mistakes_are_answered_before_the_model_is_loaded(tmp_path: Path, more: list[str], message: str) -> None:
    done = runner.invoke(cli, arguments(tmp_path, *more))
    assert isinstance(done.exception, MoEInterpError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())
