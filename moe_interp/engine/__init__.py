"""Running a part of a model. All that it returns equals ``run_with_hooks``.

``policy.py`` chooses the way that serves a model on its device: a new kind of device has its numbers there, what is
free on it in ``memory.py``, and its own forms of an operation in a folder such as ``cpu`` and ``cuda``. ``memory.py``
also says how much a whole pass takes; how much branches take, ``moe_interp/routes/plan.py`` and the rows of a grid.

``recorded_pass.py`` records one pass. What starts from it: variants of a layer (``rerun.py``), branches
(``branches.py``, ``grid``), ends of sequences (``sequence_ends``).
"""

from moe_interp.engine.cpu.threads import let_threads_sleep, threads_asleep

__all__ = ["let_threads_sleep", "threads_asleep"]
