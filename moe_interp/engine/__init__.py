"""Running a part of a model. All that it returns equals ``run_with_hooks``."""

from moe_interp.engine.cpu.threads import let_threads_sleep, threads_asleep

__all__ = ["let_threads_sleep", "threads_asleep"]
