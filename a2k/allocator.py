"""What a process asks of the C library's allocator."""

import ctypes
import os
import platform
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)
LARGEST_KEPT = 32 << 20  # bytes of a map; glibc allows no more
MOST_KEPT = 256 << 20  # bytes at the end of the heap
THREAD_CACHES = "glibc.malloc.tcache_count"  # tunable: small pieces of a size that a thread keeps when they are freed


def restart_without_thread_caches() -> None:
    """Start this program anew, if it has glibc, without a cache of small pieces for every thread; once.

    A map that must be aligned is cut from a larger piece, whose ends are freed. Those that a cache holds are missing
    when the map is freed: its place is too small for the next of its size, and a training process grows by a fifth.
    Only a variable that is set when a program starts tells glibc.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and THREAD_CACHES not in tunables:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{THREAD_CACHES}=0".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Have glibc keep memory that is freed for what comes next: for training, whose steps are all alike.

    By default it returns that of large maps to the system, which must then clear every page anew in every step.
    """
    set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def keep_freed_tiles() -> None:
    """As `keep_freed_memory`, but of maps up to 32 MiB, and 256 MiB at the end of the heap: for redrawing pictures tile
    by tile, where whole maps of a large picture must not stay.
    """
    set_malloc({M_MMAP_THRESHOLD: LARGEST_KEPT, M_TRIM_THRESHOLD: MOST_KEPT})


def set_malloc(options: dict[int, int]) -> None:
    """Set options of glibc's allocator; other systems have none."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt:
        for option, value in options.items():
            mallopt(option, value)
