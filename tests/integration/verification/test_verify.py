"""`moe.verify()` passes on every family, finds what is broken, and leaves the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from moe_interp.engine.branches import BranchRunner
from moe_interp.errors import AttachError, ConfigError, HookError
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.hooks.names import HOOK_NAMES
from moe_interp.hooks.transformer_lens_hooks import TRANSFORMER_LENS_HOOKS
from moe_interp.hooks.verification_table import COLUMNS, Verification
from tests import tiny

# (family of the table, hook) -> why a check has no meaning there, in tests' tiny models
EXCEPTED = {
    ("phimoe", "router_in"): "do not depend on the logits",
    ("phimoe", "router_logits"): "do not depend on the logits",
    ("jamba", "mlp.router.hook_out"): "a tuple",
    # branches are not exact: other state than keys and values, several residual streams, or an encoder-decoder
    ("deepseek_v4", "expert_indices"): "several residual streams",
    ("glm_moe_dsa", "expert_indices"): "hand on more than the residual stream",
    ("jamba", "expert_indices"): "instead of plain keys and values",
    ("lfm2_moe", "expert_indices"): "instead of plain keys and values",
    ("switch_transformers", "expert_indices"): "defined for causal decoders",
}
if Version(transformers.__version__) < Version("5.23"):  # its layers without attention had a state of their own
    EXCEPTED["nemotron_h", "expert_indices"] = "instead of plain keys and values"
BRANCHES = "branch scoring equals naive scoring"
ALL = set(HOOK_NAMES)
REAL = ALL - {"expert_indices"}


def attached(name: str, dtype: torch.dtype = torch.float32) -> MoEHooks:
    return attach(tiny.build_bridge(tiny.build_hf(name, dtype=dtype), name))


def failures(table: Verification) -> list[tuple[str, str]]:
    bad = table[~table["passed"]]
    return list(zip(bad["check"], bad["hook"]))


def test_every_check_passes_on_every_family(family: str) -> None:
    moe = attached(family)
    table = moe.verify()
    assert table.ok, failures(table)
    assert f"{len(table)} of {len(table)} checks passed" in repr(table)
    assert tuple(table.columns) == tuple(COLUMNS)
    name = moe.spec(moe.layers[0]).family.name
    excepted = table[table["note"].str.startswith("excepted")]
    assert {(name, hook) for hook in excepted["hook"]} == {key for key in EXCEPTED if key[0] == name}
    checks = ("pass-through changes nothing", "an edit changes the logits", "a hook shows the block's own value")
    for check in checks:
        rows = table[table["check"] == check]
        assert set(zip(rows["layer"], rows["hook"])) == {(at, hook) for at in moe.layers for hook in moe.hooks(at)}
    for check, hooks in (("the gradient is the plain model's", REAL), ("writing does what the table says", ALL)):
        rows = table[table["check"] == check]
        assert set(zip(rows["layer"], rows["hook"])) == {
            (at, hook) for at in moe.layers for hook in moe.hooks(at) if hook in hooks
        }
    theirs = table[table["check"] == "TransformerLens' hook agrees"]
    assert set(theirs["hook"]) == {hook.path for hook in TRANSFORMER_LENS_HOOKS[name]}


@pytest.fixture(scope="module")
def olmoe() -> tuple[MoEHooks, Verification]:
    """A plain family, attached, and its table; the tests that share it change neither."""
    moe = attached("olmoe")
    return moe, moe.verify()


def test_positions_are_checked_with_a_cache_on_every_layer(olmoe: tuple[MoEHooks, Verification]) -> None:
    moe, table = olmoe
    rows = table[table["check"] == "a position is its token, with a cache"]
    assert rows["layer"].tolist() == list(moe.layers)
    assert (rows["figure"] == 0.0).all()


def test_branches_are_checked_against_full_passes_on_every_layer_of_a_plain_family(
    olmoe: tuple[MoEHooks, Verification],
) -> None:
    moe, table = olmoe
    rows = table[table["check"] == BRANCHES]
    assert rows["layer"].tolist() == list(moe.layers)
    assert 0 <= rows["figure"].max() < 2e-5
    assert (rows["bound"] == 1e-3).all()


def test_branches_that_read_the_wrong_keys_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BranchRunner.__call__

    def wrong(self: BranchRunner, sequence: Tensor, position: Tensor, *others: Any) -> Tensor:
        return right(self, sequence, (position - 1).clamp(min=0), *others)

    monkeypatch.setattr(BranchRunner, "__call__", wrong)
    table = attached("olmoe").verify()
    failed = table[~table["passed"]]
    # at the last layer nothing attends any more, so it is right whatever the position
    assert set(failed["check"]) == {BRANCHES}
    assert {0, 1} <= set(failed["layer"])
    assert failed["figure"].min() > 1e-2


def test_branches_that_cannot_run_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Tensor:
        raise ValueError("no such cache")

    monkeypatch.setattr(BranchRunner, "__call__", broken)
    table = attached("olmoe").verify()
    failed = table[~table["passed"]]
    assert failed["check"].tolist() == ["branches equal naive"]
    assert "no such cache" in failed["note"].iloc[0]


def test_router_checks_are_exact_and_expert_checks_are_bounded_by_the_number_format(
    olmoe: tuple[MoEHooks, Verification],
) -> None:
    _, table = olmoe
    through = table[table["check"] == "pass-through changes nothing"]
    bounds = dict(zip(through["hook"], through["bound"]))
    assert {hook for hook, bound in bounds.items() if bound > 0} == {"expert_post", "expert_out"}
    assert bounds["expert_out"] == pytest.approx(128 * torch.finfo(torch.float32).eps, rel=0.01)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation_passes(implementation: str) -> None:
    moe = attached("qwen3_moe")
    tiny.set_experts_implementation(moe.bridge, implementation)
    assert moe.verify(layers=[-1]).ok


@pytest.mark.parametrize("name", ["deepseek_v4", "nemotron_h"])
def test_float64_models_that_compute_in_float32_inside_pass(name: str) -> None:
    moe = attached(name, torch.float64)
    tiny.set_experts_implementation(moe.bridge, "eager")
    table = moe.verify()
    assert table.ok, failures(table)


# beside those in float16: each layout and kind of block once
HALF = ["mixtral", "deepseek_v3", "gpt_oss", "phimoe", "switch_transformers", "jetmoe", "gemma4_text"]


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_passes(name: str) -> None:
    assert_half_precision_passes(name, torch.bfloat16)


@pytest.mark.parametrize("name", ["nemotron_h", "deepseek_v4", "llama4"])
def test_float16_passes(name: str) -> None:
    assert_half_precision_passes(name, torch.float16)


def assert_half_precision_passes(name: str, dtype: torch.dtype) -> None:
    moe = attached(name, dtype)
    table = moe.verify(layers=[-1])
    assert table.ok, failures(table)
    rows = table[table["check"] == "writing does what the table says"]
    # so that an expert scaled by 1.5 and a block scaled by 1.1 would show
    assert (rows["bound"] <= 0.04).all()


def resized(name: str, n_experts: int, top_k: int) -> Any:
    entry = tiny.CONFIGS[name]
    sizes = {"num_local_experts": n_experts, "num_experts": n_experts, "num_experts_per_tok": top_k}
    config = copy.deepcopy(entry["config"]) | {key: value for key, value in sizes.items() if key in entry["config"]}
    model = getattr(transformers, entry["model_class"])(getattr(transformers, entry["config_class"])(**config)).eval()
    tiny.redraw(model, torch.Generator().manual_seed(0), 1.0)
    return model


@pytest.mark.parametrize(("name", "n_experts"), [("mixtral", 2), ("llama4", 2), ("jetmoe", 2), ("gpt_oss", 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_hooks_have_their_axes_where_one_token_has_one_slot(name: str, n_experts: int, batch: int) -> None:
    """As each step of generation with one expert a token: ``[token, slot]`` is as long as ``[batch, pos]``."""
    moe = attach(tiny.build_bridge(resized(name, n_experts, 1), name))
    tokens, layer = tiny.random_tokens(batch, 4), moe.layers[-1]

    def shown(tokens: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for hook in moe.hooks(layer):

            def read(value: Tensor, hook: Any, name: str = hook) -> None:
                found[name] = value.clone()

            with torch.no_grad(), moe.bridge.hooks(fwd_hooks=[(moe.hook_name(hook, layer), read)]):
                moe.bridge(tokens)
        return found

    whole, one = shown(tokens), shown(tokens[:, :1])
    assert one["expert_indices"].shape == one["expert_weights"].shape == (batch, 1, 1)
    for hook, value in one.items():  # a causal model: the first token is the same
        torch.testing.assert_close(value, whole[hook][:, :1], msg=lambda text, hook=hook: f"{hook}: {text}")


@pytest.mark.parametrize(
    ("name", "n_experts", "top_k"),
    [("mixtral", 1, 1), ("mixtral", 2, 1), ("mixtral", 4, 4), ("llama4", 1, 1), ("llama4", 4, 4), ("minimax_m2", 2, 1)]
    + [("gpt_oss", 1, 1), ("gpt_oss", 4, 4), ("jetmoe", 1, 1), ("qwen2_moe", 2, 2)],
)
def test_every_expert_runs_or_there_is_one(name: str, n_experts: int, top_k: int) -> None:
    model = resized(name, n_experts, top_k)
    moe = attach(tiny.build_bridge(model, name))
    assert (moe.spec(moe.layers[0]).n_experts, moe.spec(moe.layers[0]).top_k) == (n_experts, top_k)
    table = moe.verify(layers=[-1])
    assert table.ok, failures(table)
    assert not table["figure"].isin([float("inf")]).any()


def test_a_bridge_in_compatibility_mode_passes() -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("mixtral"), "mixtral", tiny.tiny_tokenizer()))
    moe.bridge.enable_compatibility_mode(disable_warnings=True)
    assert moe.verify(layers=[-1]).ok


def test_the_model_and_the_users_hooks_are_as_before() -> None:
    moe = attached("deepseek_v3")
    bridge, tokens = moe.bridge, tiny.random_tokens()
    bridge.train()
    bridge.eval()
    bridge.blocks[1].train()
    seen: list[str] = []
    bridge.add_hook(moe.hook_name("router_logits", 1), lambda value, hook: value * 0.5)
    bridge.add_hook("blocks.0.hook_resid_pre", lambda value, hook: seen.append(hook.name), is_permanent=True)
    parameter = next(bridge.original_model.parameters())
    parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        before = bridge(tokens)
    modes = [module.training for module in bridge.modules()]
    state, names = list(bridge.hook_dict), [name for name, _ in bridge.named_modules()]
    seen.clear()
    assert moe.verify(layers=[1]).ok
    assert seen == []
    assert [module.training for module in bridge.modules()] == modes
    assert list(bridge.hook_dict) == state
    assert sorted(name for name, _ in bridge.named_modules()) == sorted(names)
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    with torch.no_grad():
        assert torch.equal(bridge(tokens), before)
    assert len(seen) == 1
    bridge.reset_hooks()
    with torch.no_grad():
        assert not torch.equal(bridge(tokens), before)


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = attached("olmoe")
    bridge, tokens = moe.bridge, tiny.random_tokens()
    with torch.no_grad():
        before = bridge(tokens)
    bridge.train()
    native = type(bridge).hooks

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not moe.is_attached:
            raise KeyboardInterrupt
        return native(self, *args, **kwargs)

    monkeypatch.setattr(type(bridge), "hooks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moe.verify(layers=[-1])
    monkeypatch.undo()
    assert moe.is_attached
    assert bridge.training
    bridge.eval()
    with torch.no_grad():
        assert torch.equal(bridge(tokens), before)
    assert moe.verify(layers=[-1]).ok


def test_suspended_is_the_unattached_model() -> None:
    bridge = tiny.build_bridge(tiny.build_hf("jetmoe"), "jetmoe")
    names = set(bridge.hook_dict)
    moe = attach(bridge)
    with moe.suspended() as same:
        assert same is bridge
        assert set(bridge.hook_dict) == names
        assert not moe.is_attached
    assert set(bridge.hook_dict) == names | set(moe.hook_names())


def test_tokens_text_and_layers() -> None:
    tokenizer = tiny.tiny_tokenizer()
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tokenizer))
    assert moe.verify("w3 w4 w5 w6 w7", layers=[-1])["layer"].unique().tolist() == [2]
    assert moe.verify(tiny.random_tokens(1, 3), layers=[0]).ok
    with pytest.raises(ConfigError, match=r"tokens of shape \(3,\).*integer ids \[batch, pos\]"):
        moe.verify(torch.tensor([3, 4, 5]))
    with pytest.raises(HookError, match="layer 7, which does not exist"):
        moe.verify(layers=[7])
    moe.detach()
    with pytest.raises(AttachError, match="have been detached"):
        moe.verify()


def test_without_expert_hooks_the_rest_is_checked() -> None:
    bridge = tiny.build_bridge(tiny.build_hf("gpt_oss"), "gpt_oss")
    table = attach(bridge, expert_outputs=False).verify()
    assert table.ok
    assert not {"expert_post", "expert_out"} & set(table["hook"])


def test_the_printed_table_sums_up_over_the_layers(olmoe: tuple[MoEHooks, Verification]) -> None:
    _, table = olmoe
    summary = table.summary()
    assert len(summary) < len(table) / 2
    # two edits of the experts a layer: more of them a token, and some slots empty
    twice = summary[summary["layers"] == "6/6"]
    assert list(zip(twice["check"], twice["hook"])) == [("writing does what the table says", "expert_indices")]
    assert set(summary["layers"]) == {"3/3", "1/1", "6/6"}
    text = repr(table)
    assert f"{len(table)} of {len(table)} checks passed" in text
    assert all(name in text for name in HOOK_NAMES if name != "shared_out")
