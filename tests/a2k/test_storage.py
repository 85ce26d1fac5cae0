"""Where the system lacks what Linux has; the rest is in test_inference.py."""

import os
from pathlib import Path

import pytest
import torch

from a2k import storage
from a2k.storage import Storage, free_memory, map_file, room_in_groups


def test_a_kept_map_counts_until_it_is_freed():
    made = Storage(torch.device("cpu"), limit=400)
    x = torch.zeros(100)
    assert made.keep(x)
    assert not made.keep(torch.zeros(1))
    del x
    assert made.keep(torch.zeros(100))


def test_some_of_what_is_free_stays_free(monkeypatch):
    monkeypatch.setattr(storage, "free_memory", lambda place: 5 << 30)
    assert Storage(torch.device("cpu")).room[torch.device("cpu")] == (5 << 30) - storage.MARGIN < 5 << 30


def test_files_without_posix_fallocate(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    x = map_file(1000, torch.float32).fill_(2)
    assert x.sum() == 2000


def test_free_memory_without_sysconf(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert free_memory(torch.device("cpu")) == 4 << 30


# By version of control groups: a line of /proc/self/cgroup, its folder, and the names of limit, use and what can go.
GROUPS = {
    1: ("4:cpu,memory:/job/step", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("0::/job/step", "sys/fs/cgroup", "memory.max", "memory.current", ""),
}


def make_group(folder: Path, version: int, limit: str, used: int, dropped: int) -> None:
    _, _, limit_name, used_name, prefix = GROUPS[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {dropped}\n")


@pytest.mark.parametrize("version", GROUPS)
def test_room_in_groups(tmp_path, version):
    line, place, *_ = GROUPS[version]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:name=systemd:/job\n{line}\n")
    make_group(tmp_path / place / "job", version, "1000", 700, 50)
    make_group(tmp_path / place / "job/step", version, "max" if version == 2 else str(2**63 - 4096), 600, 0)
    assert min(room_in_groups(tmp_path)) == 350


def test_room_in_a_container(tmp_path):
    """Which sees its own group as the root, and may be told the path that it has outside."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/docker/4f1c\n")
    make_group(tmp_path / "sys/fs/cgroup", 2, "1000", 700, 0)
    assert room_in_groups(tmp_path) == [300]


def test_a_group_that_tells_only_its_limit(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    make_group(tmp_path / "sys/fs/cgroup", 2, "1000", 700, 0)
    (tmp_path / "sys/fs/cgroup/memory.stat").unlink()
    assert room_in_groups(tmp_path) == []


def test_no_groups(tmp_path):
    assert room_in_groups(tmp_path) == []


def test_free_memory_within_groups(monkeypatch):
    monkeypatch.setattr(storage, "room_in_groups", lambda: [3 << 20, 2 << 20])
    assert free_memory(torch.device("cpu")) == 2 << 20
