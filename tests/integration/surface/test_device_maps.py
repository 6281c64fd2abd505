"""Models that are loaded for several devices, in the checkpoint's number format, or quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_interp as mi
from moe_interp.cli import load, options
from moe_interp.cli.load import load_bridge, load_hooks
from moe_interp.errors import ConfigError
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    tiny.build_hf("olmoe").to(torch.bfloat16).save_pretrained(folder)
    return folder


def items() -> list[dict[str, Any]]:
    ids = np.random.default_rng(0).integers(3, 90, (4, 7)).tolist()
    return [{"id": f"i{i}", "domain": "ab"[i % 2], "prompt": row[:5], "answer": row[5:]} for i, row in enumerate(ids)]


def test_every_experiment_runs_on_a_model_over_processor_and_disk(checkpoint: Path, tmp_path: Path) -> None:
    whole = load_hooks(str(checkpoint), "cpu")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(len(whole.bridge.blocks))}
    spread = mi.attach(load_bridge(str(checkpoint), device_map=where, offload_folder=str(tmp_path)))
    assert any(p.is_meta for p in spread.bridge.original_model.parameters())
    tokens, layer = tiny.random_tokens(2, 8), spread.layers[-1]
    found = [mi.isolate_experts(m, items(), layers=[layer], random_draws=2, progress=False) for m in (spread, whole)]
    np.testing.assert_allclose(found[0].data["delta"], found[1].data["delta"], atol=2e-5)
    scored = [mi.counterfactual_routes(m, tokens.tolist(), n_routes=3, progress=False) for m in (spread, whole)]
    np.testing.assert_allclose(scored[0].data["logp"], scored[1].data["logp"], atol=2e-5)


def never_loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What TransformerLens was asked to load, which it then does not."""
    asked: list[dict[str, Any]] = []

    def boot(source: str, **given: Any) -> None:
        asked.append(given)
        raise ValueError("not loaded here")

    monkeypatch.setattr(load.TransformerBridge, "boot_transformers", boot)
    return asked


def test_the_number_format_is_the_checkpoints_on_a_gpu_and_float32_on_a_processor(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = never_loaded(monkeypatch)
    monkeypatch.setattr(load, "get_device", lambda: "cuda")
    monkeypatch.setattr(load, "_check_number_format", lambda dtype, device: None)  # there is no such device to try
    for device, dtype, expected in (
        ("cpu", "auto", torch.float32),
        (None, "auto", torch.bfloat16),
        (None, "float16", torch.float16),
    ):
        with pytest.raises(ConfigError):
            load_bridge(str(checkpoint), device, dtype)
        assert asked[-1]["dtype"] == expected
    with pytest.raises(ConfigError):
        load_bridge(str(checkpoint), None, "auto", "auto")
    assert asked[-1]["device_map"] == "auto"
    assert "device" not in asked[-1]


def test_a_quantised_checkpoint_is_unpacked_or_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = never_loaded(monkeypatch)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "olmoe", "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ConfigError, match=r"quantised by gptq.*Expected: weights in float32.*not quantised"):
        load_bridge(str(tmp_path))
    assert not asked
    config.write_text(json.dumps({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ConfigError, match="not loaded here"):
        load_bridge(str(tmp_path))
    assert asked[0]["hf_config_overrides"]["quantization_config"]["dequantize"]


def test_device_maps_are_checked_in_words() -> None:
    options.check_device_map(None, "cpu")
    options.check_device_map("auto", None)
    with pytest.raises(ConfigError, match=r"--device-map autp.*Did you mean auto"):
        options.check_device_map("autp", None)
    with pytest.raises(ConfigError, match="both --device cpu and --device-map auto"):
        options.check_device_map("auto", "cpu")
