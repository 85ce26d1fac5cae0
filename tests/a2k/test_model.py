import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, tiny_model

from a2k import StyA2K, StyA2KConfig
from a2k.colors import colors_of, match_colors
from a2k.decoder import Decoder, StyledConv, StyledDecoder, noise_tile, periodic_window, style_vector
from a2k.encoder import ENCODER_DEPTHS, Encoder
from a2k.model import CONFIGS, init_kaiming, pad_content, pad_image, pad_style
from a2k.texture import add_texture, texture_of

VGG16 = replace(TINY, encoder="vgg16", residual="content")


def image(height: int, width: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=("styled", "lite", "vgg16"))
def model(request):
    with torch.inference_mode():
        yield tiny_model({"styled": TINY, "lite": replace(TINY, encoder="lite"), "vgg16": VGG16}[request.param])


# --- sizes


@pytest.mark.parametrize("content", ((1, 1), (1, 50), (50, 1), (17, 31), (32, 32), (33, 47), (64, 20)))
@pytest.mark.parametrize("style", ((1, 1), (1, 40), (33, 35), (64, 48)))
def test_output_has_the_contents_size(model, content, style):
    out = model(image(*content), image(*style, seed=1))
    assert out.shape == (1, 3, *content)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((1, 1), (32, 32)),
        ((1, 50), (32, 64)),
        ((32, 32), (32, 32)),
        ((33, 48), (48, 48)),
        ((100, 20), (112, 32)),
    ],
)
def test_content_is_padded_to_multiples_of_16(size, padded):
    x = image(*size)
    out = pad_content(x)
    assert out.shape[2:] == padded
    torch.testing.assert_close(out[:, :, : size[0], : size[1]], x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "padded"), [((1, 1), (32, 32)), ((1, 50), (32, 50)), ((33, 31), (33, 32)), ((70, 41), (70, 41))]
)
def test_style_is_padded_only_where_it_is_small(size, padded):
    assert pad_style(image(*size)).shape[2:] == padded


def test_padding_reflects_and_replicates_where_it_cannot():
    row = torch.arange(3.0).expand(1, 3, 1, 3)
    assert pad_image(row, (1, 5))[0, 0].tolist() == [[0, 1, 2, 1, 0]]
    assert pad_image(row, (1, 6))[0, 0].tolist() == [[0, 1, 2, 2, 2, 2]]
    assert pad_image(row.mT, (5, 1))[0, 0].flatten().tolist() == [0, 1, 2, 1, 0]
    assert pad_image(torch.full((1, 3, 1, 1), 7.0), (2, 3)).unique().tolist() == [7]


def test_padded_part_is_cropped(model):
    content, style = image(41, 55), image(40, 40, seed=1)
    content[..., :30] = 0.5
    whole = F.pad(content, (0, 9, 0, 7), "reflect")
    if isinstance(model.decoder, StyledDecoder):  # what is cropped does not count for the colours
        features = model.transform(model.encoder(add_texture(whole, texture_of(style))), model.encoder(style))
        expected = match_colors(model.decoder(*features)[:, :, :41, :55], colors_of(style))
    else:
        expected = model(whole, style)[:, :, :41, :55]
    torch.testing.assert_close(model(content, style), expected)


@pytest.mark.parametrize("kind", ENCODER_DEPTHS)
@pytest.mark.parametrize("size", ((17, 17), (33, 35), (32, 64), (100, 61)))
def test_feature_sizes_round_up(kind, size):
    maps = Encoder(kind, TINY.channels)(image(*size))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (c, -(-size[0] // 2**i), -(-size[1] // 2**i)) for i, c in enumerate(TINY.channels)
    ]
    assert all((x >= 0).all() for x in maps) == (kind != "styled")


def test_last_column_of_an_odd_map_is_pooled():
    encoder = Encoder("styled", TINY.channels)
    maps = encoder(image(33, 33))
    pooled = F.max_pool2d(maps[0], 2, ceil_mode=True)
    assert pooled.shape[2:] == (17, 17)
    torch.testing.assert_close(pooled[:, :, -1, -1], maps[0][:, :, -1, -1])
    torch.testing.assert_close(maps[1], encoder.conv2_1(pooled.relu()))


def test_features_are_taken_after_the_first_convolution_of_a_scale():
    encoder = Encoder("vgg19", TINY.channels)
    x = encoder.input(image(32, 32))
    first = encoder.conv1_1(x).relu()
    second = encoder.conv2_1(F.max_pool2d(encoder.conv1_2(first).relu(), 2)).relu()
    maps = encoder(image(32, 32))
    torch.testing.assert_close(maps[0], first)
    torch.testing.assert_close(maps[1], second)


def test_decoder_size():
    decoder = Decoder("vgg19", TINY.channels)
    torch.nn.init.constant_(decoder.conv1_1.bias, -9)
    out = decoder(*(torch.rand(2, 16, 12 // 2**i, 8 // 2**i) for i in range(3)))
    assert out.shape == (2, 3, 48, 32)
    assert out.max() < -1  # no ReLU at the end


def test_styled_conv_sets_statistics():
    """Whatever comes in, its channels have the mean and deviation that the style asks for, beside as much noise."""
    conv = StyledConv(6, 5)
    x, style, noise = 3 + 2 * torch.randn(2, 6, 30, 20), torch.randn(2, 256), torch.randn(30, 20)
    out = conv(x, style, torch.zeros(30, 20))
    torch.testing.assert_close(out.mean((2, 3)), conv.shift(style), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.std((2, 3)), conv.scale(style).abs(), rtol=1e-3, atol=1e-3)
    grain = conv(x, style, noise) - out
    torch.testing.assert_close(grain, conv.grain(style)[:, :, None, None] * noise, rtol=1e-4, atol=1e-5)


def test_noise_is_white_and_always_the_same():
    tile = noise_tile()
    assert abs(tile.mean()) < 0.02
    assert abs(tile.var() - 1) < 0.02
    spectrum = torch.fft.rfft2(tile).abs().square()[1:, 1:]
    low, high = spectrum[:64, :64].mean(), spectrum[64:, 64:].mean()
    assert abs(low / high - 1) < 0.1
    expected = torch.tensor([1.7640523, 0.4001572, 0.978738, 2.2408932])  # numpy's RandomState(0)
    torch.testing.assert_close(tile[0, :4], expected)


def test_periodic_window():
    tile = torch.randn(2, 1, 5, 7)
    plane = tile.tile(1, 1, 9, 9)
    torch.testing.assert_close(periodic_window(tile, 3, 31, 6, 50), plane[:, :, 3:31, 6:50], rtol=0, atol=0)


def test_styled_decoder_size():
    decoder = StyledDecoder(TINY.channels)
    torch.nn.init.constant_(decoder.conv1_1.bias, -9)
    x3, x4, x5 = (torch.rand(2, 16, 12 // 2**i, 8 // 2**i) for i in range(3))
    features = [torch.rand(2, c, 40 // 2**i, 30 // 2**i) for i, c in enumerate(TINY.channels)]
    out = decoder(x3, x4, x5, torch.rand(2, 8, 24, 16), style_vector(features))
    assert out.shape == (2, 3, 48, 32)
    assert out.max() < -1  # no ReLU at the end


def test_styled_decoder_grain_is_of_luminance():
    decoder = StyledDecoder(TINY.channels).apply(init_kaiming)
    maps = [torch.rand(1, 16, 12 // 2**i, 8 // 2**i) for i in range(3)]
    inputs = *maps, torch.rand(1, 8, 24, 16), torch.rand(1, decoder.vector_mean.numel())
    torch.nn.init.zeros_(decoder.grain.bias)
    without = decoder(*inputs)
    torch.nn.init.normal_(decoder.grain.weight)
    grain = decoder.grain(decoder.style_features(inputs[-1])).item()
    added = decoder(*inputs) - without
    torch.testing.assert_close(added[0, 0], grain * noise_tile()[:48, :32], rtol=1e-4, atol=1e-6)
    assert grain
    assert not added[:, 1:].any()


def test_style_vector():
    features = [torch.rand(2, 3, 8, 8), torch.rand(2, 2, 4, 5), torch.rand(2, 1, 1, 1)]
    vector = style_vector(features)
    assert vector.shape == (2, 2 * (2 + 1))
    torch.testing.assert_close(vector[:, :2], features[1].mean((2, 3)))
    torch.testing.assert_close(vector[:, 2:4], features[1].std((2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vector[:, 5], torch.full((2,), 1e-5**0.5))


# --- strength


def test_strength_0_has_nothing_of_the_style(model):
    content = image(40, 37)
    outputs = [model(content, image(48, 32, seed=seed), strength=0.0) for seed in (1, 2)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    features = model.encoder(pad_content(content))
    if isinstance(model.decoder, StyledDecoder):
        expected = model.decoder(*features[2:], features[1], style_vector(features))[:, :, :40, :37]
        expected = match_colors(expected, colors_of(content))
    else:
        expected = model.decoder(*features[2:])[:, :, :40, :37]
    torch.testing.assert_close(outputs[0], expected)


def test_styled_network_takes_colors_over():
    model, content, style = tiny_model(TINY), image(40, 37), image(48, 33, seed=1)
    for strength, expected in ((1.0, colors_of(style)), (0.0, colors_of(content))):
        actual = colors_of(model(content, style, strength))
        torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-2, atol=2e-3)


def test_strength_1_is_plain(model):
    content, style = image(40, 37), image(48, 32, seed=1)
    torch.testing.assert_close(model(content, style, strength=1.0), model(content, style), rtol=0, atol=0)


def test_strength_moves_the_features_part_of_the_way(model):
    content, style = model.encoder(image(32, 32)), model.encoder(image(32, 32, seed=1))
    kept, half, full = (model.transform(content, style, strength) for strength in (0.0, 0.25, 1.0))
    for a, b, c in zip(kept, half, full, strict=True):
        torch.testing.assert_close(b, a + 0.25 * (c - a))
        assert (a != c).any()


def test_style_counts(model):
    outputs = [model(image(32, 32), image(32, 32, seed=seed)) for seed in (1, 2)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.01 * outputs[0].std() > 1e-4


# --- computation


@pytest.mark.parametrize("config", (TINY, VGG16), ids=("styled", "vgg16"))
def test_backends_agree(config):
    outputs = []
    for backend in ("reference", "torch"):
        with torch.inference_mode():
            outputs.append(tiny_model(config, backend)(image(100, 37), image(45, 130, seed=1)))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4 * outputs[0].abs().max().item())


def test_memory_formats_agree(model):
    model, content, style = model.double(), image(40, 37).double(), image(48, 32, seed=1).double()
    expected = model(content, style)
    content, style = (x.to(memory_format=torch.channels_last) for x in (content, style))
    out = model.to(memory_format=torch.channels_last)(content, style)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_a_batch_is_its_pictures_one_by_one(model):
    model = model.double()
    content, style = image(33, 40, batch=3).double(), image(40, 35, seed=1, batch=3).double()
    single = torch.cat([model(content[i : i + 1], style[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(content, style), single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_near(model, dtype):
    content, style = image(40, 37), image(32, 32, seed=1)  # one block of the style in all, so that no match can flip
    expected = model(content, style)
    out = model.to(dtype)(content.to(dtype), style.to(dtype))
    assert out.dtype == dtype
    # Rounding, carried through all layers, not lost precision: so the error has to shrink with the dtype's eps. Most of
    # it comes from the ten convolutions that a styled decoder normalises: of 24 pairs of pictures one had 43 eps.
    assert F.mse_loss(out.float(), expected).sqrt() < 60 * torch.finfo(dtype).eps * expected.std()


def test_what_learns():
    for config in (TINY, VGG16):
        model = tiny_model(config).train()
        model(image(32, 32), image(32, 32, seed=1)).square().mean().backward()
        for name, parameter in model.named_parameters():
            frozen = config.encoder == "vgg16" and name.startswith("encoder.")
            assert parameter.requires_grad != frozen, name
            assert (parameter.grad is None) == frozen, name


# --- building


@pytest.mark.parametrize("kind", CONFIGS)
def test_named_configs_build(kind):
    with torch.device("meta"):
        model = StyA2K(CONFIGS[kind])
    depths = ENCODER_DEPTHS[kind]
    convolutions = {f"conv{scale}_{n}" for scale, depth in enumerate(depths, 1) for n in range(1, depth + 1)}
    assert {name for name, _ in model.encoder.named_children()} == {"input", *convolutions}
    assert {m.block_size for m in (model.a2k3, model.a2k4)} == {8}
    assert (model.a2k5.block_size, model.a2k5.num_heads) == (4, CONFIGS[kind].num_heads)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters < 3e6 if kind in ("lite", "styled") else parameters > 10e6


def test_published_config_is_the_default():
    with torch.device("meta"):
        assert StyA2K().config == StyA2KConfig() == CONFIGS["vgg19"]
    assert StyA2KConfig().channels == (64, 128, 256, 512, 512)
    assert (StyA2KConfig().block_sizes, StyA2KConfig().num_heads) == ((8, 8, 4), 8)
    assert StyA2KConfig().residual == CONFIGS["vgg16"].residual == "content"


def test_published_start_of_the_decoder():
    model = StyA2K(StyA2KConfig(encoder="vgg16", channels=(8, 8, 64, 64, 64)))
    assert 0.019 < model.decoder.merge.weight.std() < 0.021
    assert not model.decoder.merge.bias.any()


def test_config_survives_json():
    assert StyA2KConfig(**json.loads(json.dumps(asdict(TINY)))) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "resnet"}, r"encoder is 'resnet'; choose one of vgg19, vgg16, lite"),
        ({"residual": "none"}, r"residual is 'none'; choose one of content, adain"),
        ({"channels": (8, 8, 16, 16)}, "five positive numbers"),
        ({"channels": (0, 8, 16, 16, 16)}, "five positive numbers"),
        ({"channels": ()}, "five positive numbers"),
        ({"channels": (8, 8, 16, 16, 32)}, "equally wide"),
        ({"block_sizes": (8, 8)}, "three positive numbers"),
        ({"block_sizes": (8, 0, 4)}, "three positive numbers"),
        ({"num_heads": 3}, r"num_heads=3 does not divide the channels \(16, 16, 16\)"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 2.0}, "whole numbers"),
        ({"channels": "44888"}, "whole numbers"),
        ({"channels": (8.0, 8, 16, 16, 16)}, "whole numbers"),
    ],
    ids=str,
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        replace(TINY, **change)
    assert "\n" not in str(caught.value)
