"""StyA2K: redraw any photo in the manner of any painting, in one forward pass."""

from a2k.attention import A2K
from a2k.model import StyA2K, StyA2KConfig
from a2k.stylize import StyleTransfer
from a2k.version import __version__

__all__ = ["A2K", "StyA2K", "StyA2KConfig", "StyleTransfer", "__version__"]
