"""Where the system lacks what Linux has; the rest is in test_inference.py."""

import os
from pathlib import Path

import torch

from a2k.storage import free_memory, map_file


def test_files_without_posix_fallocate(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    x = map_file(1000, torch.float32).fill_(2)
    assert x.sum() == 2000


def test_free_memory_without_sysconf(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert free_memory(torch.device("cpu")) == 4 << 30
