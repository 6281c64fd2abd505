"""Running a part of a model. All that it returns equals ``run_with_hooks``.

A new kind of device: its numbers are in ``policy.py``, which chooses how a model runs on it; what is free on it, in
``memory.py``; its attention kernels, in ``grid/kernels.py``; its own forms of other operations, in a folder such as
``cpu`` or ``cuda``.

``memory.py`` estimates how much memory a whole pass takes. Branches are estimated in ``moe_interp/routes/plan.py``.

``recorded_pass.py`` records one pass. Later passes start from it: branches (``branches.py``, ``grid``) and ends of
sequences (``sequence_ends``), as patching sweeps run them. ``rerun.py`` starts whole layers from a stored prefix, as
isolation does. ``decoding`` generates token by token.
"""

from moe_interp.engine.cpu.threads import let_threads_sleep, threads_asleep

__all__ = ["let_threads_sleep", "threads_asleep"]
