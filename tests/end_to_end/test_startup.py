"""Before a command's work: mistakes are answered without torch, and Ctrl-C is one line."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import reduce
from pathlib import Path

import pytest
import xarray as xr
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.arch.families import FAMILIES
from moe_interp.cli import inputs, options
from moe_interp.cli.application import cli
from moe_interp.cli.commands import models, testbed
from moe_interp.cli.options import nearest
from moe_interp.cli.startup import INTERRUPTED
from moe_interp.experiments.isolation.variants import Mode
from moe_interp.routes import Method
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.registry import GENERATED
from moe_interp.testbed.model import ModelConfig
from moe_interp.testbed.presets import PRESETS
from moe_interp.testbed.strategies.table import STRATEGIES
from moe_interp.testbed.training.train import PRECISIONS

# the entry point in a Python that has none of the heavy libraries
WITHOUT = """
import sys
HEAVY = {"torch", "transformers", "transformer_lens", "scipy", "pandas", "xarray", "matplotlib", "numpy", "accelerate"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"the command line imported {name}")
sys.meta_path.insert(0, Absent())
from moe_interp.cli.main import app
app()
"""
RUN = ["--model", "demo", "--out", "{out}"]
ISOLATE, ROUTES = ["isolate", *RUN], ["counterfactual", *RUN]
VERIFY, TESTBED = ["verify", "-m", "demo"], ["testbed", "-o", "{out}"]
ANSWERS: list[tuple[list[str], int, str]] = [
    ([], 0, "Usage: moe-interp"),
    (["--version"], 0, "moe-interp 0."),
    (["--help"], 0, "counterfactual"),
    *(([f"{name}", "--help"], 0, f"Example: moe-interp {name}") for name in
      ("demo", "show", "capture", "isolate", "counterfactual", "geometry", "pass-at-k", "testbed", "atlas", "support",
       "verify", "models")),
    (["isolte"], 2, "No such command 'isolte'; there are demo, show, capture, isolate, counterfactual, geometry, "
                    "pass-at-k, tune-router, testbed, atlas, support, verify, models. Did you mean isolate? "
                    "See moe-interp --help."),
    (["isolate", "--modl", "demo"], 2, "No such option: --modl. Did you mean --model? See moe-interp isolate --help."),
    (["atlas", "none.npz"], 1, "'none.npz', which does not exist"),
    (["atlas", "x" * 5000], 1, "which does not exist"),
    (["atlas", "{tmp}", "--path-length", "0"], 1, "--path-length 0"),
    (["isolate"], 2, "Missing option '--model'"),
    (["isolate", "-m"], 2, "requires an argument"),
    ([*ISOLATE, "--seed", "many"], 2, "--seed"),
    ([*ISOLATE, "--mode", "forc"], 1, "--mode forc. Expected: one of force, ablate. Did you mean force?"),
    ([*ISOLATE, "--layers", "a"], 1, "--layers a. Expected: layers such as 0,3,-1"),
    ([*ISOLATE, "--layer", "0,,1"], 1, "--layers 0,,1"),
    ([*ISOLATE, "--experts", "0;1"], 1, "--experts 0;1. Expected: ids such as 0,1,2+5"),
    ([*ISOLATE, "--domains", ","], 1, "--domains ','"),
    ([*ISOLATE, "--first", "0"], 1, "--first 0. Expected: a whole number of at least 1"),
    ([*ISOLATE, "--per-domain", "-3"], 1, "--first -3"),
    ([*ISOLATE, "--random-draws", "0"], 1, "--random-draws 0"),
    ([*ISOLATE, "--memory", "nan"], 1, "--memory nan. Expected: a positive number of GiB"),
    ([*ISOLATE, "--memory", "1e300"], 1, "--memory 1e+300. Expected: a positive number of GiB, below 2**33"),
    ([*ISOLATE, "--device", "meta"], 1, "--device meta. Expected: a device such as cpu"),
    (["isolate", "-m", "demo", "-o", "x" * 300], 1, "a name that is not too long"),
    (["isolate", "-m", "demo", "-o", ""], 1, "--out ''. Expected: a folder to write to"),
    (["demo", "--out="], 1, "--out ''. Expected: a folder to write to"),
    ([*ISOLATE, "--memory-budget", "-1"], 1, "--memory -1.0"),
    ([*ISOLATE, "--seed", str(2**63)], 1, f"--seed {2**63}. Expected: a whole number of 64 bits"),
    ([*ISOLATE, "--dtype", "bfloat"], 1, "Did you mean bfloat16?"),
    ([*ISOLATE, "--device", "cudda"], 1, "Did you mean cuda?"),
    ([*ISOLATE, "--device", "cuda:x"], 1, "--device cuda:x"),
    ([*ISOLATE, "--items", "none.jsonl"], 1, "--items none.jsonl, which is not a file"),
    ([*ISOLATE, "--sequences", "{tmp}"], 1, "which is not a file"),
    ([*ISOLATE, "--items", "x" * 5000], 1, "which is not a file"),
    ([*ISOLATE, "--answer-field", "trajectory"], 1, "--answer-field trajectory with the bundled data"),
    (["isolate", "-m", "./nowhere", "-o", "{out}"], 1, "./nowhere, which is not a folder that exists"),
    (["isolate", "-m", "", "-o", "{out}"], 1, "--model ''"),
    (["isolate", "-m", "{tmp}", "-o", "{out}"], 1, "without a config.json"),
    (["isolate", "-m", "org/name", "-o", "{out}"], 1, "no items. Expected: --items FILE.jsonl"),
    (["isolate", "-m", "demo", "-o", "{file}"], 1, "is a file. Expected: a folder to write to"),
    (["isolate", "-m", "demo", "-o", "{file}/deeper/still"], 1, "is a file. Expected: a folder to write to"),
    ([*ROUTES, "--routes", "0"], 1, "--routes 0. Expected: at least one route a token"),
    ([*ROUTES, "-R", str(10**30)], 1, f"--routes {10**30}"),
    ([*ROUTES, "--sampler", "gumble"], 1, "Did you mean gumbel?"),
    ([*ROUTES, "--sampler", "all", "--pool", "4"], 1, "--sampler all with --tau or --pool"),
    ([*ROUTES, "--tau", "inf"], 1, "--tau inf"),
    ([*ROUTES, "--pool", "0"], 1, "--pool 0"),
    ([*ROUTES, "--method", "naiv"], 1, "Did you mean naive?"),
    ([*ROUTES, "--items", "none.jsonl"], 1, "--sequences none.jsonl"),
    (["demo", "--first", "0", "-o", "{out}"], 1, "--first 0"),
    (["demo", "--memory", "0"], 1, "--memory 0.0"),
    ([*VERIFY, "--layer", "last"], 1, "--layers last"),
    ([*VERIFY, "--tokens", "5,x"], 1, "--tokens '5,x'"),
    ([*VERIFY, "--tokens", "5", "--text", "a"], 1, "both --text and --tokens"),
    ([*TESTBED, "--preset", "smok"], 1, "Did you mean smoke?"),
    ([*TESTBED, "--strategies", "none,globl"], 1, "Did you mean global?"),
    ([*TESTBED, "--seeds", "0,0"], 1, "--seeds with 0 more than once"),
    ([*TESTBED, "--seeds", "0.5"], 1, "--seeds 0.5. Expected: integers of at least 0 such as 0,1,2"),
    ([*TESTBED, "--seeds", "0,-1"], 1, "--seeds 0,-1. Expected: integers of at least 0 such as 0,1,2"),
    ([*TESTBED, "--set", "lrr=3"], 1, "Did you mean lr?"),
    ([*TESTBED, "--set", "lr=fast"], 1, "--set lr='fast'. Expected: a number"),
    ([*TESTBED, "--set", "model.top_k=1.5"], 1, "--set model.top_k='1.5'. Expected: a whole number"),
    ([*TESTBED, "--domains", "fact"], 1, "Did you mean facts?"),
    ([*TESTBED, "--domains", "mine=none.txt"], 1, "--domains mine=none.txt, which does not exist"),
    ([*TESTBED, "--mixed-precision", "fp16"], 1, "Did you mean bf16?"),
    ([*TESTBED, "--steps", "-1"], 1, "--steps -1"),
    (["support", "olmo"], 1, "Did you mean olmoe?"),
    (["models", "--family", "mixtrall"], 1, "Did you mean mixtral?"),
]  # fmt: skip


MANY = WITHOUT.replace(
    "app()\n",
    """
import contextlib, io, json
answers = []
for arguments in json.load(sys.stdin):
    sys.argv = ["moe-interp", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app()
        except SystemExit as ended:
            code = ended.code
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
""",
)


def run(code: str, arguments: list[str], given: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "20000", "TERM": "dumb"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, input=given)


def test_answers_need_nothing_heavy(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("mine")
    places = {"{out}": str(tmp_path / "out"), "{tmp}": str(tmp_path), "{file}": str(file)}
    given = [
        [reduce(lambda text, name: text.replace(name, places[name]), places, one) for one in a] for a, _, _ in ANSWERS
    ]
    done = run(MANY, [], json.dumps(given))
    assert done.returncode == 0, done.stderr
    for (arguments, code, text), (ended, out, err) in zip(ANSWERS, json.loads(done.stdout), strict=True):
        assert text in " ".join((err if code else out).split()), (arguments, out, err)
        assert (ended, len(err.splitlines())) == (code, 1 if code else 0), arguments
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--version"], [*ISOLATE, "--mode", "forc"]])
def test_an_answer_comes_at_once(arguments: list[str]) -> None:
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(WITHOUT, arguments).returncode < 2
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # about 0.35 in an environment that is in memory; more from a disk, or beside other programs, but not each time
    assert any(cpu_seconds() < 2 for _ in range(5))


def test_completion_is_offered_and_installed_without_anything_heavy(tmp_path: Path) -> None:
    words = {"_MOE_INTERP_COMPLETE": "complete_bash", "COMP_WORDS": "moe-interp models --family ol", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=os.environ | words, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["olmoe"], done.stderr
    home = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run(
        [sys.executable, "-c", WITHOUT, "--show-completion", "bash"],
        env=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "_MOE_INTERP_COMPLETE=complete_bash" in shown.stdout, shown.stderr


@pytest.mark.parametrize("module", ["typer", "torch", "transformers"])
def test_ctrl_c_during_start_up_is_one_line(module: str, tmp_path: Path) -> None:
    """Interrupted while a library is being imported, which would else turn it into an error of its own."""
    code = f"""
import builtins, os, signal, sys
honest = builtins.__import__
def interrupted(name, *args, **options):
    if name.split(".")[0] == {module!r}:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException as error:
            raise ImportError("broken") from error
    return honest(name, *args, **options)
from moe_interp.cli.main import app
builtins.__import__ = interrupted
app()
"""
    done = run(code, [part.replace("{out}", str(tmp_path)) for part in ISOLATE])
    assert done.stderr == "Interrupted.\n"
    assert done.stdout == ""
    assert done.returncode == 128 + signal.SIGINT


SMALL = ["isolate", "-m", "demo", "--first", "6", "--experts", "0,1", "--random-draws", "1", "-o"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> mi.IsolationResult:
    out = tmp_path_factory.mktemp("whole")
    assert CliRunner().invoke(cli, [*SMALL, str(out)]).exit_code == 0
    return mi.load_result(out)  # type: ignore[return-value]


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_in_its_middle_goes_on_to_the_same_result(
    ended_by: signal.Signals, tmp_path: Path, uninterrupted: mi.IsolationResult
) -> None:
    """From outside, as by Ctrl-C and ``kill -9``; then the same command, which finishes."""
    command = [sys.executable, "-m", "moe_interp.cli", *SMALL, str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=-1, stderr=-1, text=True)
    while not list(tmp_path.glob("cells/[0-9]*.npz")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(ended_by)
    _, said = process.communicate()
    if process.returncode == 0:
        pytest.skip("it had finished before it was ended")
    # a log: no bars, no codes of a terminal, no code of Python
    assert "Loading" not in said
    assert not set(said) & {"\r", "\x1b"}, said
    assert "Traceback" not in said
    if ended_by == signal.SIGINT:
        assert process.returncode == INTERRUPTED
        assert "Interrupted. The same command goes on from the finished cells" in " ".join(said.split())
        assert said.count("Interrupted") == 1
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "isolation.nc").exists()
    assert CliRunner().invoke(cli, [*SMALL, str(tmp_path)]).exit_code == 0
    xr.testing.assert_equal(mi.load_result(tmp_path).data, uninterrupted.data)
    assert not list(tmp_path.rglob("*.part"))


def test_output_may_end_before_the_command_does() -> None:
    """``moe-interp models --all | head -1``: no traceback."""
    code = "from moe_interp.cli.main import app; app()"
    command = f"{sys.executable} -c '{code}' support --csv | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("family,")
    assert done.stderr == ""


def test_what_options_may_be_is_what_the_library_takes() -> None:
    assert [family.name for family in FAMILIES] == list(options.FAMILIES)
    assert Mode.__args__ == options.MODES
    assert Method.__args__ == options.METHODS
    assert set(options.SAMPLERS) == set(inputs.SAMPLERS)
    assert set(options.STRATEGIES) == set(STRATEGIES)
    assert set(options.PRESETS) == set(PRESETS)
    assert options.PRECISIONS == PRECISIONS
    assert set(options.DOMAINS) == {*GENERATED, "code"}
    fields = {name: field.annotation for name, field in TestbedConfig.model_fields.items()}
    fields |= {f"model.{name}": field.annotation for name, field in ModelConfig.model_fields.items()}
    for name in ("model", "strategy", "seed"):
        del fields[name]
    assert set(testbed.WHOLE) == {name for name, kind in fields.items() if kind in (int, int | None)}
    assert set(testbed.OR_NONE) == {name for name, kind in fields.items() if kind == (int | None)}
    assert set(testbed.NUMBERS) == {name for name, kind in fields.items() if kind is float}
    assert set(testbed.OTHERS) == fields.keys() - {*testbed.WHOLE, *testbed.NUMBERS}


def test_only_checkpoints_with_trained_experts_are_listed() -> None:
    names = {family.name: models.hub_names(family.name, family.architectures) for family in FAMILIES}
    assert all(names[name] for name in names if name != "jamba"), names
    listed = [name for group in names.values() for name in group]
    wrong = (
        "tiny-random",
        "internal-testing",
        "gemma-4-31B",
        "gemma-4-E2B",
        "Nano-4B",
        "MobileLLM",
        "4.0-350m",
        "4.0-h-1b",
    )
    assert not [name for name in listed if any(part in name for part in wrong)]
    for name in ("google/gemma-4-26B-A4B", "ibm-granite/granite-4.0-h-tiny-base", "allenai/OLMoE-1B-7B-0924"):
        assert name in listed
    assert names["mixtral"][0].startswith("mistralai/")


def test_the_nearest_name_is_offered_whatever_its_case() -> None:
    assert nearest("OLMOE", options.FAMILIES) == "Did you mean olmoe?"
    assert nearest("zebra", options.FAMILIES) == ""
