import pytest
import torch
from PIL import Image
from tiny import noise

from a2k.images import to_tensor
from a2k.losses import content_loss, global_style_loss
from a2k.validation import Validation


def images(count: int, first_seed: int) -> list[Image.Image]:
    return [Image.fromarray(noise(48, 48, seed=first_seed + number)) for number in range(count)]


@pytest.mark.parametrize("batch_size", (1, 2, 8))
def test_means_over_the_pairs(tiny_vgg, batch_size):
    """Of a network that averages photo and painting; the third photo meets the first painting again."""
    photos, paintings = images(3, 0), images(2, 10)
    validation = Validation(photos, paintings, tiny_vgg, 48, batch_size, torch.device("cpu"))
    measured = validation.measure(lambda content, style: (content + style) / 2)
    expected = {"validation_style": 0.0, "validation_content": 0.0}
    with torch.no_grad():
        for photo, painting in zip(photos, [*paintings, paintings[0]], strict=True):
            content, style = to_tensor(photo), to_tensor(painting)
            features = tiny_vgg((content + style) / 2)
            expected["validation_style"] += global_style_loss(features, tiny_vgg(style)).item() / 3
            expected["validation_content"] += content_loss(features, tiny_vgg(content)).item() / 3
    assert measured == pytest.approx(expected, rel=1e-5)
