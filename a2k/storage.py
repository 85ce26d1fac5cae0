"""Where feature maps live that are too big for one place."""

import os
import tempfile
import weakref
from math import prod
from pathlib import Path

import torch
from torch import Tensor

MARGIN = 1 << 30  # bytes left free for tiles and bands
GUESSED_MEMORY = 4 << 30  # bytes free on a host that does not tell (Windows)
# Linux's control groups, by version: where they are, and the files and the key of a group's limit, of what it uses and
# of what it can drop of that.
GROUPS = {
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
}


class Storage:
    """Makes feature maps: on the device, else in the host's memory, else in temporary files mapped into memory.

    Args:
        device: of the computation.
        limit: bytes that maps may take in memory; None: what is free on the device, and in the host's memory.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        places = [device] if device.type == "cpu" else [device, torch.device("cpu")]
        self.room = {place: free_memory(place) - MARGIN if limit is None else limit for place in places}

    def new_map(self, batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """An uninitialised channels_last map (batch, channels, *size). Raises MemoryError where there is no room."""
        shape = (batch, *size, channels)
        elements = prod(shape)
        for place, room in self.room.items():
            if elements * dtype.itemsize <= room:
                x = torch.empty(elements, dtype=dtype, device=place)
                self._take(place, x)
                break
        else:
            x = map_file(elements, dtype)
        return x.view(shape).permute(0, 3, 1, 2)

    def keep(self, x: Tensor) -> bool:
        """Whether there is room for x where it is; then it counts as a map of this storage."""
        fits = x.nbytes <= self.room.get(x.device, 0)
        if fits:
            self._take(x.device, x)
        return fits

    def _take(self, place: torch.device, x: Tensor) -> None:
        """Count x's bytes until it is freed."""

        def free(place: torch.device = place, size: int = x.nbytes) -> None:
            self.room[place] += size

        self.room[place] -= x.nbytes
        weakref.finalize(x.untyped_storage(), free)


def map_file(elements: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor whose bytes are in a temporary file that goes when the tensor goes."""
    with tempfile.NamedTemporaryFile(prefix="a2k-") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, elements * dtype.itemsize)
            else:  # macOS, Windows: a full disk is not found out here
                file.truncate(elements * dtype.itemsize)
        except OSError as error:
            raise MemoryError(
                f"a feature map of {elements * dtype.itemsize / 1e9:.1f} GB fits neither in memory nor in "
                f"{tempfile.gettempdir()} ({error.strerror}); make room there, set TMPDIR to another folder, or make "
                "the picture smaller (--size)"
            ) from error
        return torch.from_file(file.name, shared=True, size=elements, dtype=dtype)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device without swapping: half the host's memory where the system tells no better."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return min([int(fields["MemAvailable"].split()[0]) * 1024, *room_in_groups()])
    if not hasattr(os, "sysconf"):
        return GUESSED_MEMORY
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def room_in_groups(system: Path = Path("/")) -> list[int]:
    """Bytes that are left of every limit on this process: of a container, or of a job on a cluster.

    system: the folder that has proc and sys.
    """
    own, room = system / "proc/self/cgroup", []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        place, *names = GROUPS[1 if controllers else 2]
        group = system / place / path.lstrip("/")
        room += [room_in_group(folder, *names) for folder in (group, *group.parents) if (folder / names[0]).exists()]
    return [left for left in room if left is not None]


def room_in_group(folder: Path, limit: str, used: str, dropped: str) -> int | None:
    """Bytes left of a group's limit; None if it has none, or cannot be read."""
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / limit).read_text()) - int((folder / used).read_text()) + int(statistics.get(dropped, 0))
    except (OSError, ValueError):  # ValueError: the limit is the word max
        return None
