"""Devices, number formats and budgets that a machine or a model does not have: answered in words, in 80 columns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_interp.cli import load
from moe_interp.cli.application import run
from moe_interp.cli.load import load_bridge, load_hooks
from moe_interp.errors import ConfigError
from moe_interp.testbed.training.train import check_device
from tests import tiny

CALLS = {
    "verify": ["verify"],
    "isolate": ["isolate", "--first", "2", "--out"],
    "counterfactual": ["counterfactual", "--first", "1", "--out"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    tiny.build_hf("olmoe").save_pretrained(folder)
    return folder


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """What a command says where it fails, on one line; nothing is wider than a terminal, and no traceback is shown."""

    def fail(*arguments: object) -> str:
        command, *more = map(str, arguments)
        words = list(CALLS.get(command, [command]))
        words += [str(tmp_path / "out")] if words[-1] == "--out" else []
        monkeypatch.setattr(sys, "argv", ["moe-interp", *words, *more])
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(SystemExit) as stopped:
            run()
        assert stopped.value.code == 1
        text = capsys.readouterr().err
        assert max(map(len, text.splitlines())) <= 80
        assert "Traceback" not in text
        assert "Expected:" in text
        return " ".join(text.split())

    return fail


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", CALLS)
@pytest.mark.parametrize(
    "device, words",
    [
        ("cuda", "--device cuda (Torch not compiled with CUDA enabled). Expected: a device that this machine has. Try"),
        ("cuda:9", "--device cuda:9 ("),
        ("mps", "'MPS' backend). Expected: a device that this machine has. Try --device cpu."),
        ("tpu", "--device tpu. Expected: a device such as cpu, cuda, cuda:1 or mps. Did you mean xpu?"),
        ("cuda:x", "--device cuda:x. Expected: a device such as"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    said: Any, command: str, device: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load.TransformerBridge, "boot_transformers", lambda *args, **options: pytest.fail("loaded"))
    assert words in said(command, "--model", "demo", "--device", device)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:9", "mps", "tpu", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_in_python(device: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=rf"device.*{device}.*Expected: a device that this machine has") as refused:
        check_device(device)  # of mi.testbed.train and compare
    assert len(str(refused.value)) < 300
    with pytest.raises(ConfigError, match=rf"--device {device} \(.*Expected: a device"):
        load_bridge(str(checkpoint), device)


def test_a_number_format_that_the_device_does_not_have_is_refused(
    said: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MPS answers to float64."""
    monkeypatch.setattr(load.TransformerBridge, "boot_transformers", lambda *args, **options: pytest.fail("loaded"))

    def zeros(*shape: int, **options: Any) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. P")

    monkeypatch.setattr(load.torch, "zeros", zeros)
    words = "--dtype float64 on --device cpu (Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't"
    assert words in said("verify", "--model", checkpoint, "--dtype", "float64", "--device", "cpu")
    with pytest.raises(ConfigError, match=r"Expected: a number format that the device has. Try --dtype float32"):
        load_bridge(str(checkpoint), "cpu", "float64")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"--dtype int8. Expected: one of float32"):
        load_bridge(str(checkpoint), "cpu", "int8")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_every_number_format_runs(dtype: str, checkpoint: Path) -> None:
    """transformers' grouped product has no float64: experts then run one after the other."""
    moe = load_hooks(str(checkpoint), "cpu", dtype)
    tokens = tiny.random_tokens(2, 8)
    assert moe.bridge(tokens).dtype == getattr(torch, dtype)
    table = moe.verify(tokens, moe.layers[-1:])
    assert table.ok, table[~table["passed"]]


def test_weights_without_room_are_told_in_words(said: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def boot(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1 MiB free.")

    monkeypatch.setattr(load.TransformerBridge, "boot_transformers", boot)
    text = said("verify", "--model", checkpoint)
    assert "does not fit into memory (CUDA out of memory). Expected: room for its weights. Try --dtype bfloat16" in text


def test_budgets_too_small_are_told_in_the_words_of_the_command_line(said: Any) -> None:
    words = "a memory budget of 0.010 MiB. Expected: at least"
    for command in ("isolate", "counterfactual"):
        text = said(command, "--model", "demo", "--layers", "0", "--memory", "0.00001")
        assert words in text
        assert "Raise --memory" in text
    for given in ("0", "-1", "nan", "inf"):
        assert "--memory" in said("isolate", "--model", "demo", "--memory", given)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_quantised_checkpoint_is_refused_before_it_is_loaded(
    said: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load.TransformerBridge, "boot_transformers", lambda *args, **options: pytest.fail("loaded"))
    folder = tmp_path / "quantised"
    folder.mkdir()
    quantised = {"model_type": "olmoe", "quantization_config": {"quant_method": method, "load_in_8bit": True}}
    (folder / "config.json").write_text(json.dumps(quantised))
    for command in CALLS:
        text = said(command, "--model", folder, *([] if command == "verify" else _inputs(command, tmp_path)))
        assert f"a checkpoint quantised by {method}. Expected: weights in float32" in text
        assert "dequantise it with transformers and save it" in text


def test_a_model_over_devices_runs_every_command(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = [
        ["verify", "--tokens", "5,6,7,8", "--layers", "-1"],
        ["isolate", *_inputs("isolate", tmp_path), "--layers", "0", "--experts", "0,1", "--out", str(tmp_path / "i")],
        ["counterfactual", *_inputs("counterfactual", tmp_path), "-R", "2", "--out", str(tmp_path / "c")],
    ]
    for command, *more in calls:
        monkeypatch.setattr(
            sys, "argv", ["moe-interp", command, "--model", str(checkpoint), "--device-map", "auto", *more]
        )
        with pytest.raises(SystemExit) as stopped:
            run()
        assert not stopped.value.code, capsys.readouterr().err


def _inputs(command: str, folder: Path) -> list[str]:
    """Files of token ids."""
    rows = tiny.random_tokens(4, 9).tolist()
    if command == "isolate":
        lines = [{"id": f"i{i}", "domain": "ab"[i % 2], "prompt": r[:6], "answer": r[6:]} for i, r in enumerate(rows)]
    else:
        lines = [{"id": f"s{i}", "tokens": row} for i, row in enumerate(rows)]
    file = folder / f"{command}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return ["--items" if command == "isolate" else "--sequences", str(file)]
