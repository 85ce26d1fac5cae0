"""What is audited: the attention of the StyA2K networks and of their losses."""

from dataclasses import dataclass, replace

from a2k_kernels.blocks import count_blocks

PICTURES = (256, 512, 1024, 2048, 4096)
DTYPES = ("bfloat16", "float16", "float32")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
BLOCK_SIZES = {2: 16, 3: 8, 4: 8, 5: 4}  # at relu2 .. relu5


@dataclass(frozen=True)
class Layer:
    """The attention at one scale of a network: everything but the size of the picture."""

    network: str
    scale: int
    dim: int
    value_dim: int
    num_heads: int
    pictures: tuple[int, ...] = PICTURES
    backward: bool = True

    @property
    def name(self) -> str:
        return f"{self.network} relu{self.scale}"

    @property
    def block_size(self) -> int:
        return BLOCK_SIZES[self.scale]

    def only(self, pictures: tuple[int, ...]) -> "Layer":
        """The same layer at only those of its sizes."""
        return replace(self, pictures=tuple(x for x in self.pictures if x in pictures))

    def side(self, picture: int) -> int:
        """Side of the map of a square picture."""
        return picture >> (self.scale - 1)

    def blocks(self, picture: int) -> int:
        rows, cols = count_blocks((self.side(picture), self.side(picture)), self.block_size)
        return rows * cols


VGG = tuple(Layer("vgg", scale, dim, dim, 8) for scale, dim in ((3, 32), (4, 64), (5, 64)))
LITE = tuple(Layer("lite", scale, dim, dim, 4) for scale, dim in ((3, 24), (4, 48), (5, 48)))
STYLED = tuple(Layer("styled", scale, dim, dim, 4) for scale, dim in ((3, 16), (4, 32), (5, 32)))
LOSSES = tuple(
    Layer("loss", scale, dim, value_dim, 8, pictures=(256,), backward=False)
    for scale, dim, value_dim in ((2, 24, 16), (3, 56, 32), (4, 120, 64), (5, 184, 64))
)
LAYERS = VGG + LITE + STYLED + LOSSES
