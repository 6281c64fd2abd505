"""The command line: what is printed, exit codes, and errors as one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from moe_interp.arch.families import FAMILIES
from moe_interp.cli import console
from moe_interp.cli.application import cli, run
from moe_interp.cli.load import load_bridge
from moe_interp.errors import ConfigError
from moe_interp.hooks.layer import OpenLayer
from moe_interp.hooks.names import HOOK_NAMES
from moe_interp.hooks.support_table import support_markdown
from tests import tiny

runner = CliRunner(env={"COLUMNS": "100", "HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE with a tokenizer, saved as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("olmoe")
    tiny.build_hf("olmoe").save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def run_app(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the entry point, errors and all."""
    monkeypatch.setattr(sys, "argv", ["moe-interp", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stopped:
        run()
    return int(stopped.value.code or 0)


def test_support_lists_every_family_and_hook_within_the_width() -> None:
    result = runner.invoke(cli, ["support"])
    assert result.exit_code == 0
    first_words = {line.split(" ")[0] for line in result.output.splitlines()}
    assert {family.name for family in FAMILIES} | set(HOOK_NAMES) <= first_words
    assert max(map(len, result.output.splitlines())) <= 100


def test_support_as_page_as_rows_and_of_one_family() -> None:
    assert runner.invoke(cli, ["support", "--markdown"]).output == support_markdown()
    rows = runner.invoke(cli, ["support", "--csv"]).output.splitlines()
    assert len(rows) == 1 + len(FAMILIES) * len(HOOK_NAMES)
    assert "already weighted" in runner.invoke(cli, ["support", "llama4"]).output
    wrong = runner.invoke(cli, ["support", "llama5"])
    assert "family llama5. Expected: one of mixtral" in str(wrong.exception)
    assert "Did you mean llama4?" in str(wrong.exception)


def test_models_lists_demo_folders_and_hub_names() -> None:
    result = runner.invoke(cli, ["models"])
    assert result.exit_code == 0
    assert "--model demo" in result.output
    assert {family.name for family in FAMILIES} <= {line.split(" ")[0] for line in result.output.splitlines()}
    assert "allenai/OLMoE-1B-7B-0924" in runner.invoke(cli, ["models", "--all", "--family", "olmoe"]).output.split()


def test_verify_passes_on_a_folder_and_prints_the_checks(olmoe: Path) -> None:
    result = runner.invoke(cli, ["verify", "--model", str(olmoe), "--text", "w3 w4 w5 w6", "--layer", "-1"])
    assert result.exit_code == 0, result.output
    assert "all passed" in result.output
    assert "an edit changes the logits" in result.output
    full = runner.invoke(cli, ["verify", "--model", str(olmoe), "--tokens", "5,6,7,8", "--dtype", "bfloat16", "--full"])
    assert full.exit_code == 0, full.output
    assert "FAILED" not in full.output


def test_the_demo_model_passes_offline() -> None:
    result = runner.invoke(cli, ["verify", "--model", "demo", "--layer", "-1"])
    assert result.exit_code == 0, result.output
    assert "all passed" in result.output


def test_a_failed_check_gives_exit_code_one(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenLayer, "fire", lambda self, name, value, owned=False: value)
    result = runner.invoke(cli, ["verify", "--model", str(olmoe), "--layer", "0"])
    assert result.exit_code == 1
    assert "FAILED" in result.output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "./not/there"], ["./not/there", "not a folder that exists", "Correct the path"]),
        (["--model", "nobody/no-such-model"], ["HF_HUB_OFFLINE is set", "give a local folder"]),
        (["--model", "{olmoe}", "--dtype", "int3"], ["--dtype int3", "float32, bfloat16"]),
        (["--model", "{olmoe}", "--device", "cuda:77"], ["--device cuda:77", "Try --device cpu"]),
        (["--model", "{olmoe}", "--tokens", "5,x"], ["--tokens '5,x'", "integers separated by commas"]),
        (["--model", "{olmoe}", "--tokens", "5", "--text", "w3"], ["both --text and --tokens"]),
        (["--model", "{olmoe}", "--tokens", "5,999999"], ["token id 999999. Expected: ids from 0 to 100"]),
        (
            ["--model", "{olmoe}", "--tokens", ",".join(["5"] * 9999)],
            ["9999 tokens. Expected: at most the model's context of 64"],
        ),
        (["--model", "demo", "--text", ""], ["a text without a token"]),
        (["--model", "{olmoe}", "--layer", "9"], ["layer 9, which does not exist", "[0, 1, 2]"]),
        (["--model", "{dense}"], ["a model without MoE layers", "See `moe-interp support`"]),
        (["--model", "{empty}"], ["without a config.json"]),
    ],
)
def test_errors_are_one_message_and_exit_code_one(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    olmoe: Path,
    arguments: list[str],
    parts: list[str],
) -> None:
    dense = tmp_path / "dense"
    if "{dense}" in arguments:
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=101, n_positions=16)
        transformers.GPT2LMHeadModel(config).save_pretrained(dense)
        tiny.tiny_tokenizer().save_pretrained(dense)
    places = {"{olmoe}": olmoe, "{dense}": dense, "{empty}": tmp_path}
    assert run_app(monkeypatch, "verify", *(places.get(part, part) for part in arguments)) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert all(part in shown for part in parts), shown
    assert "Traceback" not in shown


def test_the_installed_command_runs_in_a_process_of_its_own(olmoe: Path) -> None:
    command = Path(sys.executable).with_name("moe-interp")
    if not command.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run(
        [command, "verify", "--model", olmoe, "--layer", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "all passed" in done.stdout
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("moe-interp 0.")


def test_an_error_breaks_between_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for width in range(30, 90, 7):
        monkeypatch.setattr(console.err, "_width", width)
        assert run_app(monkeypatch, "verify", "--model", "demo", "--dtype", "int3") == 1
        lines = capsys.readouterr().err.splitlines()
        expected = "one of float32, bfloat16, float16, float64, auto. Choose a number format."
        message = f"ConfigError: --dtype int3. Expected: {expected}"
        assert " ".join(line.rstrip() for line in lines) == message
        assert max(map(len, lines)) <= width


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_a_folder_without_a_tokenizer_takes_ids(tmp_path: Path, family: str) -> None:
    tiny.build_hf(family).save_pretrained(tmp_path / "model")
    bridge = load_bridge(str(tmp_path / "model"), "cpu")
    assert bridge.tokenizer is None
    for name, line in (("ids", [5, 6, 7, 8]), ("text", "w3 w4")):
        (file := tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
        given = ["counterfactual", "-m", str(tmp_path / "model"), "--sequences", str(file), "-o", str(tmp_path / name)]
        done = runner.invoke(cli, [*given, "-R", "2", "--layers", "-1"])
        if name == "ids":
            assert done.exit_code == 0, done.output
        else:
            assert "text, but the model has no tokenizer" in str(done.exception)


def test_a_folder_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = runner.invoke(cli, ["verify", "--model", str(tmp_path)])
    assert "could not be loaded: " in str(done.exception)
    assert "Load it with transformers alone" in str(done.exception)
    assert "HF_HUB_OFFLINE" not in str(done.exception)


def test_weights_that_were_cut_short_are_refused(tmp_path: Path) -> None:
    tiny.build_hf("olmoe").save_pretrained(tmp_path)
    (file := tmp_path / "model.safetensors").write_bytes(file.read_bytes()[:500])
    done = runner.invoke(cli, ["verify", "--model", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    assert "could not be loaded: Error while deserializing header" in str(done.exception)


def test_bridges_are_loaded_in_eval_mode_and_in_the_dtype_asked_for(olmoe: Path) -> None:
    bridge = load_bridge(str(olmoe), "cpu", "bfloat16")
    assert not bridge.training
    assert next(bridge.original_model.parameters()).dtype == torch.bfloat16
