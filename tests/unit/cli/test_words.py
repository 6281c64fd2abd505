"""Messages of the library name options of the command line, not arguments of Python."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moe_interp as mi
from moe_interp.cli.words import in_options
from moe_interp.testbed.compare import compare
from moe_interp.testbed.training.train import train

PACKAGE = Path(mi.__file__).parent
# what the commands run on
PARTS = ("experiments", "routes", "engine", "verification", "hooks", "arch", "testbed", "results")
FILES = ("tokenization", "jsonlines", "checks")
CALLED: tuple[Callable[..., Any], ...] = (
    *(mi.isolate_experts, mi.counterfactual_routes, mi.score_domain_router, mi.load_items, mi.load_sequences),
    *(mi.score_routes, mi.MoEHooks.verify, compare, train),
)
# functions that no command calls, or whose arguments the commands set themselves
NOT_REACHED = {
    *("check_way", "check_thresholds", "by_token_type", "check_size", "best_experts", "check_isolation"),
    *("delta_array", "routing_array", "check_counterfactual", "_asked", "_check_counts", "check_attached"),
    *("_check_bridge", "patch_index", "block_sizes", "halves_by_sequence", "load_demo_assets", "_no_scores", "route"),
    *("save", "load", "result_class", "result_file", "read_result_file", "domain_effect_table", "check_budget", "draw"),
    # families of experts and contrasts are asked for in Python, and the tokens of a prompt that are shown
    *("check_one_shape", "_chosen", "steer", "_places", "_unpadded_row"),
    "states_of_trace",  # of a trace; the command measures a model
}

NOT_SAID = {"a sampler, such as GumbelTopK()", "baselines=3, mode=3"}


def texts(node: ast.AST | None, known: dict[str, list[ast.expr]]) -> list[str]:
    """What an expression of a message may be, with 3 in the place of values."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(p.value if isinstance(p, ast.Constant) else "3" for p in parts)]  # type: ignore[misc]
        case ast.IfExp(body=one, orelse=other):
            return texts(one, known) + texts(other, known)
        case ast.BinOp(left=left, right=right):
            return [a + b for a in texts(left, known) or [""] for b in texts(right, known) or [""]]
        case ast.Name(id=name):
            return [text for value in known.get(name, []) for text in texts(value, {})]
    return []


def assigned(function: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for name, value in pairs:
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, []).append(value)
    return found


def messages() -> Iterator[tuple[str, str]]:
    """``(function, text)`` of every part of every error."""
    files = [file for part in PARTS for file in (PACKAGE / part).rglob("*.py")]
    for file in [*files, *(PACKAGE / f"{name}.py" for name in FILES)]:
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            known = assigned(function)
            for node in ast.walk(function):
                made = isinstance(node, ast.Call) and re.fullmatch("[A-Z]\\w*Error", getattr(node.func, "id", ""))
                if made and len(node.args) == 3:  # type: ignore[attr-defined]
                    for part in node.args:  # type: ignore[attr-defined]
                        yield from ((function.name, text) for text in texts(part, known))


def test_no_error_that_a_command_can_meet_names_an_argument_of_python() -> None:
    arguments = {name for function in CALLED for name in inspect.signature(function).parameters}
    underscored = "|".join(sorted(name for name in arguments if "_" in name))
    given = "|".join(sorted(arguments - {"name", "items", "text"}))
    python = re.compile(rf"(?<![\w-])(?:(?:{underscored})\b|(?:{given})=|\w+\(\)|moe_interp\.\w)")
    found = list(messages())
    assert len(found) > 300
    assert {name for name, _ in found} >= NOT_REACHED, "names that no longer exist"
    assert any(python.search(text) for name, text in found if name not in NOT_REACHED)
    met = {text for name, text in found if name not in NOT_REACHED}
    assert met >= NOT_SAID
    wrong = [said for text in met - NOT_SAID if python.search(said := in_options(text))]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Raise memory_budget, or leave the longest items out.", "Raise --memory, or leave the longest items out."),
        ("n_routes=0 and 4 layers", "--routes 0 and 4 layers"),
        ("pool=2 of a model", "--pool 2 of a model"),
        ("method='naive', or 'auto'", "--method naive, or 'auto'"),
        ("one with controls=True for the classes", "one with --controls for the classes"),
        ("layers=[0, 0]. Correct layers.", "--layers [0, 0]. Correct --layers."),
        (
            "expert 1 twice in the route of position 0 at experts. Expected: each once. Remove the duplicate; scale "
            "the expert's weight if it should count twice. The model was left as it was.",
            "expert 1 twice in --experts. Expected: each once. Remove the duplicate.",
        ),
        ("(prompt_field, answer_field, ...)", "(--prompt-field, --answer-field)"),
        ("4 experts for 2 domains with top_k=5", "4 experts for 2 domains with --set model.top_k=5"),
        ("mixed_precision 'bf16' on cpu", "--mixed-precision 'bf16' on cpu"),
        # what is the user's stays as it is
        ("'runs/n_routes=5/x.jsonl', line 2", "'runs/n_routes=5/x.jsonl', line 2"),
        ("item 'seed=3'", "item 'seed=3'"),
        ("GumbelTopK(tau=1.0)", "GumbelTopK(tau=1.0)"),
        ("runs/memory_budget.jsonl, line 2", "runs/memory_budget.jsonl, line 2"),
    ],
)  # fmt: skip
def test_arguments_become_options_and_texts_of_users_do_not(text: str, said: str) -> None:
    assert in_options(text) == said
