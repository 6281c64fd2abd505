"""What the process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def reuse_freed_memory() -> None:
    """Let glibc keep freed temporaries for the next layer, up to half a GiB, instead of handing them back.

    Otherwise every layer's temporaries may be new pages, which the system clears at their first touch. Holds for the
    process; nothing happens where the C library is another one.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, size in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**29)):
            libc.mallopt(option, size)
