"""``moe-interp``: the entry point. Nothing heavy is imported here or in the modules that declare the commands."""

from __future__ import annotations

import os

from moe_interp.cli.startup import leave_at_once_when_interrupted
from moe_interp.engine import let_threads_sleep


def app() -> None:
    """Runs the command line that the process was started with, and ends the process."""
    leave_at_once_when_interrupted()
    let_threads_sleep(os.environ)  # read by OpenMP when torch is loaded
    from moe_interp.cli.application import run  # takes a moment, in which Ctrl-C is already heard

    run()
