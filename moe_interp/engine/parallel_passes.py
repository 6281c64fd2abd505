"""Several passes of one model at once on a processor: a thread of Python each, with its part of the computing threads.

One pass leaves the other cores idle while Python and small operations run; passes side by side do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

import torch

from moe_interp.arch.modules import has_foreign_hooks
from moe_interp.engine.policy import policy_of
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.thread_ownership import acting_thread, work_for

Item = TypeVar("Item")


def n_workers(moe: MoEHooks) -> int:
    """How many passes of a model may run at once; 1 where they would disturb each other.

    Each would read what another has just left in the model: somebody's hooks (TransformerLens' forks of the attention's
    input keep a running pass there) and weights that accelerate moves in and out. And what torch sets for one thread
    only (autocast, modes that see every operation) would not reach the others.
    """
    most = policy_of(moe).most_workers
    if most == 1:
        return 1
    model: Any = moe.bridge.original_model
    forks = ("use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
    alone = (
        torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or any(getattr(moe.bridge.cfg, fork, False) for fork in forks)
        or any(hasattr(module, "_hf_hook") or has_foreign_hooks(module) for module in model.modules())
        or any(point.has_hooks() for point in moe.bridge.hook_dict.values())
    )
    return 1 if alone else most


def side_by_side(work: Callable[[Item], None], items: Iterable[Item], workers: int) -> None:
    """Calls ``work`` with every item, so many at a time, without gradients; an error or an interruption ends them all.

    Args:
        work: What it writes must be its own.
        items: Dealt out in their order.
        workers: At most so many calls at once.
    """
    todo = list(items)
    workers = min(workers, len(todo))
    if workers <= 1:
        with torch.no_grad():
            for item in todo:
                work(item)
        return
    threads, caller = torch.get_num_threads(), acting_thread()
    met = Barrier(workers + 1)

    def begin() -> None:
        work_for(caller)
        torch.get_num_threads()  # a thread takes the default at its first question: later would undo the next line
        torch.set_num_threads(max(threads // workers, 1))
        with suppress(BrokenBarrierError):
            met.wait()

    def call(item: Item) -> None:
        with torch.no_grad():
            work(item)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="moe_interp", initializer=begin)
    try:
        calls = [pool.submit(call, item) for item in todo]
        try:
            met.wait()
        finally:
            torch.set_num_threads(threads)  # also the default of threads to come, which the workers have just changed
        for one in calls:
            one.result()
    finally:
        met.abort()  # an interruption before all have met
        pool.shutdown(cancel_futures=True)
