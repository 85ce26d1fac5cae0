"""StyA2K: redraw any photo in the manner of any painting, in one forward pass."""

from importlib import import_module
from typing import TYPE_CHECKING

from a2k.version import __version__

if TYPE_CHECKING:
    from a2k.attention import A2K
    from a2k.model import StyA2K, StyA2KConfig
    from a2k.stylize import StyleTransfer

__all__ = ["A2K", "StyA2K", "StyA2KConfig", "StyleTransfer", "__version__"]

MODULES = {
    "A2K": "a2k.attention",
    "StyA2K": "a2k.model",
    "StyA2KConfig": "a2k.model",
    "StyleTransfer": "a2k.stylize",
}


def __getattr__(name: str) -> object:
    """Import a class when it is first asked for: torch takes a second, for which `a2k --help` need not wait."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
