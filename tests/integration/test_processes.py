"""Several processes: training and router tuning give the numbers of one, however the work is dealt out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

import moe_interp as mi
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import attach
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.model import ModelConfig
from moe_interp.testbed.training.trainer import Trainer
from tests import tiny

CONFIG = TestbedConfig(
    model=ModelConfig(n_layers=2, d_model=32, n_heads=2, n_experts=4, top_k=2, d_expert=16, max_length=64),
    vocab_size=280,
    domains=("letters", "numbers"),
    length=16,
    micro_batch=4,
    micro_batches=4,
    domains_per_micro_batch=1,
    steps=3,
    warmup_steps=1,
    strategy="global",
    balance=0.5,
)
DOMAINS = (
    Domain("letters", tuple(f"abc {'xy' * i} {i % 3 * 'z'}." for i in range(40)), ("cab xy",)),
    Domain("numbers", tuple(f"{i} + 7 = {i + 7}" for i in range(40)), ("4 - 1",)),
)


def take_steps(accelerator: Accelerator) -> list[dict[str, float]]:
    """Loss and auxiliary loss of three steps, on as many processes as there are."""
    trainer = Trainer(CONFIG, DOMAINS, accelerator)
    made = [trainer.train_step() for _ in range(CONFIG.steps)]
    return [{"loss": m["loss"], "auxiliary": m["auxiliary"], "load": m["loads"][0].tolist()} for m in made]


def tune_routers(folder: Path) -> dict[str, list[float]]:
    """Losses, held-out cross-entropies and weights of runs from a cache, through the model, and resumed."""
    found: dict[str, list[float]] = {}
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer()))
    tokens = tiny.random_tokens(8, 9, seed=1).tolist()
    given = [{"id": f"s{i}", "tokens": row} for i, row in enumerate(tokens)]
    shared: dict[str, Any] = {
        "held_out": given[5:],
        "n_routes": 4,
        "lr": 0.02,
        "batch_size": 9,
        "max_steps": 4,
        "progress": False,
    }
    shared["sampler"] = mi.GumbelTopK(1.0)
    runs = {
        "cached": lambda: mi.tune_router(moe, given[:5], **shared),
        "passes": lambda: mi.tune_router(moe, given[:5], 0, "cross_entropy", **shared),
        "stopped": lambda: mi.tune_router(moe, given[:5], out=folder, stop_at=2, **shared),
        "resumed": lambda: mi.tune_router(moe, given[:5], out=folder, resume=True, **shared),
    }
    for name, run in runs.items():
        data = run().data
        for part in ("loss", "better", "ce", "delta", "load"):
            found[f"{name} {part}"] = data[part].values.ravel().tolist()
    return found


def other_sequences(rank: int) -> str:
    """What is said where the processes are not of one run."""
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer()))
    rows = tiny.random_tokens(3, 9, seed=rank).tolist()
    try:
        mi.tune_router(moe, [{"id": f"s{i}", "tokens": row} for i, row in enumerate(rows)], progress=False)
    except ConfigError as error:
        return str(error)
    return ""


def test_training_and_tuning_are_the_same_on_one_process_and_on_two(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    shared = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # two processes over gloo, which find each other on a free port
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path)]
    started = subprocess.Popen([sys.executable, *launch], env=shared | {"PYTHONPATH": root}, cwd=root)
    one = take_steps(Accelerator(cpu=True))
    tuned = tune_routers(tmp_path / "one")
    assert started.wait(timeout=240) == 0
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert two[0] == two[1]
    for alone, shared_out in zip(one, two[0]["steps"]):
        assert shared_out["auxiliary"] == pytest.approx(alone["auxiliary"], abs=1e-6)
        assert shared_out["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert shared_out["load"] == pytest.approx(alone["load"], abs=1e-6)
    for name, values in two[0]["tuned"].items():
        np.testing.assert_allclose(values, tuned[name], atol=2e-5, err_msg=name)
        if name.startswith("resumed"):
            assert values == two[0]["tuned"][name.replace("resumed", "cached")]
    assert max(map(abs, tuned["cached delta"])) > 1e-2
    assert two[0]["refusal"].startswith("2 processes with other sequences")


def test_micro_batches_that_do_not_divide_are_refused() -> None:
    class ThreeProcesses:
        num_processes = 3

    with pytest.raises(ConfigError, match="micro_batches=4 on 3 processes"):
        Trainer(CONFIG, DOMAINS, ThreeProcesses())  # type: ignore[arg-type]


if __name__ == "__main__":
    processes = Accelerator(cpu=True)
    out, rank = Path(sys.argv[1]), os.environ["RANK"]
    made = {"steps": take_steps(processes), "tuned": tune_routers(out / "two"), "refusal": other_sequences(int(rank))}
    (out / f"{rank}.json").write_text(json.dumps(made))
    processes.wait_for_everyone()
    processes.end_training()  # a communication thread that outlives Python's end can abort the process
