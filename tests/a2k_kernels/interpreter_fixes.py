"""What Triton's interpreter (3.6 to 3.9) does wrong, or slowly, replaced for the time of the tests."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def install(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(interpreter, "_convert_float", rounding(interpreter._convert_float))
    patch.setattr(interpreter, "_patch_lang", only_once(interpreter._patch_lang))
    patch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))


def rounding(convert_float):
    """float32 to bfloat16 to nearest even, as GPUs and PyTorch do; the interpreter cuts off."""

    def convert(x, source, target, rounding_mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert_float(x, source, target, rounding_mode)
        return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()

    return convert


def only_once(patch_lang):
    """Give triton.language its interpreted functions once; the interpreter does so in every call of a function."""
    unrestored = SimpleNamespace(restore=lambda: None)
    patched = set()

    @cache
    def modules(fn) -> tuple[str, ...]:
        return tuple(x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core)

    def patch(fn):
        if modules(fn) not in patched:
            patched.add(modules(fn))
            patch_lang(fn)
            tl.tensor.__index__ = lambda tensor: tensor.handle.data.item()  # Triton 3.6 needs NumPy before 2.4 for it
        return unrestored

    return patch
