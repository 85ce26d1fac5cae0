"""Where the Triton kernels run: without a GPU in Triton's interpreter, chosen before Triton is imported."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New uninitialised tensors hold NaN, or nearly the largest integer: an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def corrected_interpreter() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    import interpreter_fixes  # needs Triton

    with pytest.MonkeyPatch.context() as patch:
        interpreter_fixes.install(patch)
        yield
