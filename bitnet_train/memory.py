"""How much memory there is, and what is asked of the C library's allocator."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h


def machine_bytes() -> int:
    """The machine's main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory(*, one_arena: bool = False) -> None:
    """Tells glibc not to give large blocks back: tensors come and go, and each return costs a page fault per 4 KB.

    Args:
        one_arena: what one thread freed serves the others, too; for a few threads that ask for large blocks.
    """
    if sys.platform == "linux" and hasattr(glibc := ctypes.CDLL(None), "mallopt"):
        # Older releases refuse more than 32 MB; without it, the second call would make things worse.
        if glibc.mallopt(_M_MMAP_THRESHOLD, 1 << 30) or glibc.mallopt(_M_MMAP_THRESHOLD, 1 << 25):
            glibc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        if one_arena:
            glibc.mallopt(_M_ARENA_MAX, 1)
