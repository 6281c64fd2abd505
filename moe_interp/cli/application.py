"""The application: its commands, and how errors, mistakes in usage and interruptions are shown."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from moe_interp import __version__
from moe_interp.cli import console, options
from moe_interp.cli.commands.atlas import atlas
from moe_interp.cli.commands.counterfactual import counterfactual
from moe_interp.cli.commands.demo import demo
from moe_interp.cli.commands.geometry import geometry
from moe_interp.cli.commands.isolate import isolate
from moe_interp.cli.commands.models import models
from moe_interp.cli.commands.pass_at_k import pass_at_k
from moe_interp.cli.commands.recording.capture import capture
from moe_interp.cli.commands.show import show_routing
from moe_interp.cli.commands.support import support
from moe_interp.cli.commands.testbed import compare_strategies
from moe_interp.cli.commands.tune_router import tune_router
from moe_interp.cli.commands.verify import verify_model
from moe_interp.cli.startup import INTERRUPTED
from moe_interp.errors import ConfigError, MoEInterpError

UsageError: Any = typer.BadParameter.__mro__[1]  # typer brings the class, but no name for it

# earlier spellings, and the words of other commands and of Python
ALIASES = {
    "--layer": "--layers",
    "--per-domain": "--first",
    "--memory-budget": "--memory",
    "--n-routes": "--routes",
    "--output": "--out",
    "--n-samples": "--samples",
    "--ks": "--k",
    "--is-correct": "--checker",
}
INPUTS = {
    "capture": {"--items": "--sequences"},
    "isolate": {"--sequences": "--items"},
    "counterfactual": {"--items": "--sequences"},
    "geometry": {"--items": "--sequences"},
    "pass-at-k": {"--items": "--problems"},
    "tune-router": {"--items": "--sequences"},
}


class Command(TyperCommand):
    """A command that also takes the aliases of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in parameter.opts}
        if "--out=" in args or any(pair in (("--out", ""), ("-o", "")) for pair in pairwise(args)):
            raise ConfigError("--out ''", "a folder to write to", "Name one; '.' is where you are.")
        aliases = ALIASES | INPUTS.get(self.name or "", {})

        def renamed(arg: str) -> str:
            name, equals, value = arg.partition("=")
            return aliases[name] + equals + value if name not in own and aliases.get(name) in own else arg

        return super().parse_args(ctx, [renamed(arg) for arg in args])


PROGRAM = "moe-interp"

cli = typer.Typer(
    help="Mixture-of-Experts layers as HookPoints of a TransformerLens bridge, and experiments on them.",
    epilog="First steps: moe-interp demo",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, function: Callable[..., None], short: str, example: str) -> None:
    made = cli.command(name, cls=Command, short_help=short, epilog=f"Example: {PROGRAM} {name} {example}".rstrip())
    made(function)


_add("demo", demo, "Experts and routes of the bundled model, offline.", "--first 20 --out demo")
_add("show", show_routing, "Which expert does each token of a prompt go to?", '--model demo "Gus has 3 coins."')
_add("capture", capture, "Record which experts every token uses.", "--model demo --first 20 --out routes")
_add("isolate", isolate, "Which experts are good for which domain?", "--model demo --layers -1 --out results")
_add("counterfactual", counterfactual, "Would other routes predict better?", "--model demo --first 6 --out results")
_add("geometry", geometry, "Does routing follow from the geometry of states?", "--model demo --first 6 --out results")
_add("pass-at-k", pass_at_k, "Is one of K tries right?", "--model demo --first 8 --samples 16 --k 1,4,16 --out results")
_add("tune-router", tune_router, "Can the router alone learn better routes?", "--model demo --first 6 --out tuned")
_add("testbed", compare_strategies, "Train small models and compare routers.", "--steps 40 --seeds 0 --out runs")
_add("atlas", atlas, "What does recorded routing look like?", "law=law.npz code=code.npz --out atlas")
_add("support", support, "The families, and the hooks of each.", "olmoe")
_add("verify", verify_model, "Check every hook on a model.", "--model demo --layers -1")
_add("models", models, "What --model takes.", "--family olmoe")


@cli.callback()
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        console.out.print(f"moe-interp {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _in_words(error: Any) -> str:
    """A mistake in usage in a sentence or two, with what was probably meant and where to look."""
    context = error.ctx
    given = error.message if hasattr(error, "option_name") else error.format_message()
    given = re.split(r"\.? *Did you mean", given)[0].strip().rstrip(".")
    if isinstance(error.__cause__, ValueError) and hasattr(error.__cause__, "errors"):  # pydantic's, without the value
        given += f", given {error.__cause__.errors()[0]['input']!r}"
    near = ""
    if context and (unknown := re.search(r"No such (?:command|option):? '?([^'\s]+)", given)):
        known = [name for one in context.command.get_params(context) for name in one.opts if name.startswith("--")]
        if not unknown[1].startswith("-"):
            known = list(context.command.commands)
            given += f"; there are {', '.join(known)}"
        near = options.nearest(unknown[1], known)
    return " ".join(filter(None, [f"{given}.", near, f"See {context.command_path if context else PROGRAM} --help."]))


def run() -> NoReturn:
    """Parse the arguments and run the command; every end is an exit code and at most one message, never a traceback."""
    warnings.showwarning = console.show_warning
    try:
        code = cli(prog_name=PROGRAM, standalone_mode=False) or 0
        sys.stdout.flush()
    except MoEInterpError as error:
        code = 1
        console.fail(str(error), type(error).__name__)
    except UsageError as error:
        code = error.exit_code
        console.fail(_in_words(error), "Usage")
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
        console.say("Interrupted.")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch's own class comes with torch
            raise
        code = 1
        console.fail(f"{str(error).splitlines()[0]}. Lower --memory, or take fewer and shorter inputs.", "MemoryError")
    except BrokenPipeError:  # the reader of the output, such as `head`, has enough
        code = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # such as a full disk, or a file that went away during the run
        code = 1
        console.fail(f"{error.filename or 'a file'}: {error.strerror or error}.", "OSError")
    sys.exit(code)
