"""Training without the bridge: the same numbers as through its hooks, no wait for the device, compiled or not."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_interp.errors import ConfigError, HookError, TrainingError
from moe_interp.testbed.compare import compare
from moe_interp.testbed.model import build_model, model_tensors
from moe_interp.testbed.presets import PRESETS
from moe_interp.testbed.strategies.strategy import Strategy
from moe_interp.testbed.strategies.table import STRATEGIES
from moe_interp.testbed.training.compilation import NotCompiledWarning, chosen_backend
from moe_interp.testbed.training.train import train
from moe_interp.testbed.training.trainer import Trainer
from tests.unit.testbed.tiny_runs import TINY as BASE
from tests.unit.testbed.tiny_runs import letters_and_numbers

TINY = BASE.model_copy(
    update={
        "micro_batches": 2,
        "steps": 6,
        "log_every": 3,
        "validate_every": 6,
        "checkpoint_every": 6,
        "capacity_factor": 0.8,
    }
)
DOMAINS = letters_and_numbers(12)
EVERY = [("olmoe", name) for name in (*STRATEGIES, "micro_batch+capacity", "loss_free+z_loss")]
EVERY += [(family, name) for family in ("qwen3_moe", "deepseek_v3") for name in ("micro_batch", "capacity", "sigmoid")]
EVERY += [("deepseek_v3", "loss_free"), ("deepseek_v3", "expert_choice"), ("qwen3_moe", "reference")]

COMPILED = ["micro_batch", "loss_free", "capacity", "global"]


def trainer_of(strategy: str, family: str = "olmoe", **changes: Any) -> Trainer:
    sizes = TINY.model.model_copy(update={"family": family, "n_shared_experts": int(family == "deepseek_v3")})
    config = TINY.model_copy(update={"strategy": strategy, "model": sizes, **changes})
    return Trainer(config, DOMAINS, Accelerator())


def through_bridge(trainer: Trainer) -> Trainer:
    """The same, step by step through TransformerLens: somebody looks."""
    trainer.bridge.add_hook("blocks.0.hook_resid_pre", lambda value, hook: None)
    return trainer


def in_double(trainer: Trainer) -> Trainer:
    """In float64 throughout, also where a model or a rule of routing asks for float32 by name."""
    trainer.model.double()
    trainer.network.double()
    trainer.model.config._experts_implementation = "eager"  # torch has no grouped product of float64
    own = trainer.forward

    def forward(*args: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return own(*args, **options)

    trainer.forward = forward  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize(("family", "strategy"), EVERY)
def test_a_step_equals_one_through_the_bridges_hooks(family: str, strategy: str) -> None:
    lean, hooked = trainer_of(strategy, family), through_bridge(trainer_of(strategy, family))
    made = lean.train_step(), hooked.train_step()
    for name in ("loss", "auxiliary", "dropped_slots"):
        assert made[0][name] == pytest.approx(made[1][name], rel=1e-6, abs=1e-9), name
    for layer, load in made[0]["loads"].items():
        assert torch.equal(load, made[1]["loads"][layer])
    tokens, domain = lean.micro_batch(0)
    for training in (True, False):
        passes = [trainer.forward(tokens, domain, training) for trainer in (lean, hooked)]
        # AdamW's first step is the gradient's sign, which rounding decides where a gradient is almost zero
        torch.testing.assert_close(passes[0][0], passes[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "strategy"), EVERY)
def test_a_pass_and_its_gradients_equal_those_through_the_bridges_hooks(family: str, strategy: str) -> None:
    lean, hooked = trainer_of(strategy, family), through_bridge(trainer_of(strategy, family))
    tokens, domain = lean.micro_batch(0)
    found = [trainer.forward(tokens, domain) for trainer in (lean, hooked)]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for layer, record in found[0][1].items():
        other = found[1][1][layer]
        assert torch.equal(record.chosen, other.chosen)
        assert torch.equal(record.indices, other.indices)
        torch.testing.assert_close(record.logits, other.logits, rtol=1e-5, atol=1e-5)
    for logits, records in found:
        (logits.square().mean() + sum(r.logits.square().mean() for r in records.values())).backward()
    for one, two in zip(lean.model.parameters(), hooked.model.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["none", "micro_batch", "global", "loss_free", "reference", "capacity", "sigmoid"])
def test_runs_in_float64_stay_together(strategy: str) -> None:
    lean, hooked = in_double(trainer_of(strategy)), through_bridge(in_double(trainer_of(strategy)))
    for _ in range(TINY.steps):
        made = lean.train_step(), hooked.train_step()
        assert made[0]["loss"] == pytest.approx(made[1]["loss"], rel=1e-12)
        assert made[0]["auxiliary"] == pytest.approx(made[1]["auxiliary"], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3"])
def test_logits_are_those_of_transformers_own_model(family: str) -> None:
    trainer = trainer_of("none", family)
    own = build_model(trainer.config.model, len(trainer.tokenizer), trainer.config.seed)
    tokens, domain = trainer.micro_batch(0)
    with torch.no_grad():
        logits, records = trainer.forward(tokens, domain)
        torch.testing.assert_close(logits, own(tokens).logits, rtol=1e-6, atol=1e-6)
        last, _ = trainer.forward(tokens, domain, logits_to_keep=2)
    torch.testing.assert_close(last, logits[:, -2:], rtol=1e-6, atol=1e-6)
    assert records[1].logits.shape == (*tokens.shape, 4)


class HostWaits(TorchDispatchMode):
    """Counts the operations that would wait for a device: values read, and shapes that depend on values."""

    NAMES = frozenset(
        f"aten::{name}"
        for name in (
            *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount"),
            *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor"),
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._python = _PythonWaits(self.found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = name.startswith("aten::index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for indices in args[1:2]
            if isinstance(indices, (list, tuple))
            for i in indices
        )
        if name in self.NAMES or masks:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> HostWaits:
        self._python.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._python.__exit__(*args)


class _PythonWaits(TorchFunctionMode):
    """What leaves no trace on a CPU: values that become Python's or numpy's."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu", "__array__"):
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_what_would_wait() -> None:
    x = torch.tensor([1.0, 2.0])
    for wait in (
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: bool((x > 1).any()),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x.cpu(),
        lambda: x[x > 1],
        lambda: x.long().bincount(),
        lambda: x.unique(),
        lambda: torch.equal(x, x + 1),
        lambda: x.nonzero(),
    ):
        with HostWaits() as waits:
            wait()
        assert waits.found


@pytest.mark.parametrize(("family", "strategy"), [*EVERY, ("olmoe", "global+capacity")])
def test_a_step_of_training_does_not_wait_for_the_device(family: str, strategy: str) -> None:
    trainer = trainer_of(strategy, family, optimizer="muon" if family == "olmoe" else "adamw")
    trainer.train_step()
    with HostWaits() as waits:
        made = trainer.train_step()
    if strategy == "expert_choice":
        # how wide the widest token's route is: its tensor must be as wide; a GPU runs no experts one by one
        assert waits.found["aten::_local_scalar_dense"] >= TINY.micro_batches * TINY.model.n_layers
    else:
        assert not waits.found
    with HostWaits() as waits:
        assert made["loss"] > 0
    assert waits.found == {"tolist": 2}  # of all steps that nobody has looked at, and of this one


def test_training_draws_no_random_numbers() -> None:
    trainers = trainer_of("micro_batch"), through_bridge(trainer_of("micro_batch"))
    before = torch.get_rng_state()
    for trainer in trainers:
        trainer.train_step()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_begun_through_hooks_goes_on_without_them(tmp_path) -> None:
    whole, begun, resumed = (trainer_of("micro_batch", optimizer="muon") for _ in range(3))
    through_bridge(begun)
    for _ in range(3):
        begun.train_step()
    begun.save_state(tmp_path / "state.pt")
    resumed.load_state(tmp_path / "state.pt")
    assert resumed.step == 3
    losses = [whole.train_step() for _ in range(6)][-1]["loss"], [resumed.train_step() for _ in range(3)][-1]["loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert set(torch.load(tmp_path / "state.pt", weights_only=True)) == {
        "fingerprint", "step", "model", "optimizers", "strategy", "history"
    }  # fmt: skip


class Scaling(Strategy):
    """Hooks on experts, which are no router's."""

    name = "scaling"

    def fwd_hooks(self, batch):
        return [(self.setting.moe.hook_name("routed_out", 0), lambda value, hook: value * 1.5)]


class InPlace(Strategy):
    name = "in_place"

    def fwd_hooks(self, batch):
        return [(self.setting.moe.hook_name("router_logits", 0), lambda value, hook: value.mul_(2) and None)]


def test_hooks_that_are_not_on_routers_run_through_the_bridge(monkeypatch) -> None:
    monkeypatch.setitem(STRATEGIES, "scaling", Scaling)
    plain, scaled = trainer_of("none"), trainer_of("scaling")
    tokens, domain = plain.micro_batch(0)
    assert not torch.equal(plain.forward(tokens, domain)[0], scaled.forward(tokens, domain)[0])
    assert scaled.train_step()["loss"] > 0


def test_a_hook_that_writes_into_its_activation_is_refused() -> None:
    trainer = trainer_of("none")

    def write(value, hook):
        value.detach().mul_(2)

    trainer.strategy.fwd_hooks = lambda batch: [(trainer.moe.hook_name("router_logits", 0), write)]
    with pytest.raises(HookError, match=r"hook at blocks\.0\.hook_router_logits that writes into its activation"):
        trainer.train_step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_after_one_that_is_not_finite_touches_the_weights(optimizer: str) -> None:
    trainer = trainer_of("micro_batch", optimizer=optimizer, lr=1e-2)
    trainer.train_step()
    handle = next(trainer.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    before = {name: tensor.clone() for name, tensor in model_tensors(trainer.model).items()}
    trainer.train_step()
    handle.remove()
    made = trainer.train_step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_tensors(trainer.model).items())
    for state in trainer.optimizers[-1].state.values():
        assert all(torch.isfinite(value).all() for value in state.values())
    with pytest.raises(TrainingError, match=r"the gradient's norm is nan at step 1, learning rate 0\.01"):
        _ = made["loss"]


# aot_eager traces as eager does, and the backward pass besides
@pytest.mark.parametrize("backend, strategy", [("eager", "micro_batch"), *(("aot_eager", s) for s in COMPILED)])
def test_compiled_layers_give_the_same_numbers(backend: str, strategy: str) -> None:
    torch._dynamo.reset()
    config = TINY.model_copy(update={"strategy": strategy})
    plain = Trainer(config, DOMAINS, Accelerator())
    compiled = Trainer(config, DOMAINS, Accelerator(), compile=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotCompiledWarning)
        made = [(one.train_step(), two.train_step()) for one, two in [(plain, compiled)] * 3]
    assert compiled.network.is_compiled
    for one, two in made:
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["auxiliary"] == pytest.approx(one["auxiliary"], rel=1e-6)
        for layer, load in one["loads"].items():
            assert torch.equal(load, two["loads"][layer])
    assert plain.evaluate().losses == pytest.approx(compiled.evaluate().losses, rel=1e-6)
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled.train_step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles  # no step compiles anew


def test_where_compilation_fails_a_run_says_so_once_and_goes_on(monkeypatch) -> None:
    torch._dynamo.reset()

    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand more")

    torch._dynamo.register_backend(broken, name="broken_for_a_test")
    with pytest.warns(NotCompiledWarning) as warned:
        run = train(TINY, domains=DOMAINS, progress=False, compile="broken_for_a_test")
    assert len(warned) == 1
    said = str(warned[0].message)
    assert "torch.compile with 'broken_for_a_test' failed" in said
    assert "The run goes on without torch.compile" in said
    assert "no compiler here" in said
    assert "and more" not in said
    plain = train(TINY, domains=DOMAINS, progress=False)
    assert [record["loss"] for record in run.history] == [record["loss"] for record in plain.history]


def test_routes_that_change_their_width_are_not_compiled() -> None:
    config = TINY.model_copy(update={"strategy": "expert_choice"})
    with pytest.warns(NotCompiledWarning, match="routes of expert_choice are wider at one step"):
        trainer = Trainer(config, DOMAINS, Accelerator(), compile="eager")
    assert trainer.train_step()["loss"] > 0
    assert not trainer.network.is_compiled


def test_a_run_is_compiled_where_it_pays_or_is_asked_for() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chosen_backend(None, PRESETS["paper"], cuda) == "inductor"
    assert chosen_backend(None, PRESETS["smoke"], cuda) is None
    assert chosen_backend(None, PRESETS["paper"], cpu) is None
    assert chosen_backend(True, PRESETS["smoke"], cpu) == "inductor"
    assert chosen_backend(False, PRESETS["paper"], cuda) is None
    assert chosen_backend("eager", PRESETS["smoke"], cpu) == "eager"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "magic"}, r"compile='magic'. Expected: True, False or one of .*inductor"),
        ({"compile": 3}, "compile=3"),
        ({"device": "cuda:7"}, r"device 'cuda:7' \(.*\). Expected: a device that this machine has"),
        ({"device": "gpu"}, r"device 'gpu'"),
    ],
)
def test_a_device_or_backend_that_is_not_there_is_refused_before_anything_is_made(options, message, tmp_path) -> None:
    for begin in (
        lambda: train(TINY, domains=DOMAINS, out=tmp_path / "run", **options),
        lambda: compare(TINY, ["none"], [0], domains=DOMAINS, out=tmp_path / "runs", **options),
    ):
        with pytest.raises(ConfigError, match=message):
            begin()
    assert not list(tmp_path.iterdir())


def test_sizes_that_no_grouped_product_takes_train_all_the_same() -> None:
    trainer = trainer_of("capacity", model=TINY.model.model_copy(update={"d_expert": 10}))
    assert trainer.network.model.config._experts_implementation in ("grouped_mm", "eager")
    losses = [trainer.train_step()["loss"] for _ in range(2)]
    assert losses[1] < losses[0]
    assert trainer.network.model.config._experts_implementation == "eager"


def test_a_process_with_an_accelerator_of_another_precision_trains_in_each_runs_own() -> None:
    short = TINY.model_copy(update={"steps": 2})
    expected = [train(short, domains=DOMAINS, progress=False, mixed_precision=p) for p in ("no", "bf16")]
    AcceleratorState._reset_state()
    try:
        theirs = Accelerator(mixed_precision="bf16")
        found = [train(short, domains=DOMAINS, progress=False, mixed_precision=p) for p in ("no", "bf16")]
        assert theirs.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state()
    losses = [[run.history[-1]["loss"] for run in runs] for runs in (expected, found)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_runs_of_another_version_are_refused_by_name(tmp_path) -> None:
    short = TINY.model_copy(update={"steps": 2})
    train(short, domains=DOMAINS, out=tmp_path, progress=False, stop_at=1, mixed_precision="bf16")
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["version"] == 2  # experts in bfloat16 as all else
    (tmp_path / "run.json").write_text(json.dumps(described | {"version": 1}))
    with pytest.raises(Exception, match="version 1 there, 2 here"):
        train(short, domains=DOMAINS, out=tmp_path, progress=False, resume=True, mixed_precision="bf16")
