"""Several processes: the balance loss over the whole step is one number, however its micro-batches are dealt out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from moe_interp.errors import ConfigError
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.model import ModelConfig
from moe_interp.testbed.training.trainer import Trainer

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


def test_the_global_loss_is_the_same_on_one_process_and_on_two(tmp_path):
    root = str(Path(__file__).parents[3])
    shared = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # two processes over gloo, which find each other on a free port
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path)]
    started = subprocess.Popen([sys.executable, *launch], env=shared | {"PYTHONPATH": root}, cwd=root)
    one = take_steps(Accelerator(cpu=True))
    assert started.wait(timeout=240) == 0
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert two[0] == two[1]
    for alone, shared_out in zip(one, two[0]):
        assert shared_out["auxiliary"] == pytest.approx(alone["auxiliary"], abs=1e-6)
        assert shared_out["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert shared_out["load"] == pytest.approx(alone["load"], abs=1e-6)


def test_micro_batches_that_do_not_divide_are_refused():
    class ThreeProcesses:
        num_processes = 3

    with pytest.raises(ConfigError, match="micro_batches=4 on 3 processes"):
        Trainer(CONFIG, DOMAINS, ThreeProcesses())


if __name__ == "__main__":
    processes = Accelerator(cpu=True)
    steps = take_steps(processes)
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(steps))
    processes.wait_for_everyone()
    processes.end_training()  # a communication thread that outlives Python's end can abort the process
