import os
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from official import a2k_shapes, decoder_shapes, fill, transform_shapes, vgg19_shapes
from tiny import TINY, files, picture, pictures, refusal, succeed

from a2k import A2K
from a2k.checkpoint import WeightsError, load_encoder, load_model
from a2k.cli import main
from a2k.convert import IMAGENET_MEAN, IMAGENET_STD, a2k_layer, stya2k, vgg_encoder
from a2k.model import CONFIGS

# torchvision's configurations "E" and "D": convolution widths, and 0 for a pooling layer.
VGG_LAYERS = {
    "vgg19": (64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0),
    "vgg16": (64, 64, 0, 128, 128, 0, *[256] * 3, 0, *[512] * 3, 0, *[512] * 3, 0),
}


def constants(shapes, prefix=""):
    """Tensors of the given shapes, each of one value of its own, which take no room on disk."""
    return {prefix + name: torch.tensor(1e-3 * (i + 1)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


def torchvision_vgg(kind, values=constants):
    """A state dict as torchvision's files have it, classifier included, and the places of its convolutions."""
    shapes, places, place, in_channels = {}, {}, 0, 3
    scale, number = 1, 1
    for width in VGG_LAYERS[kind]:
        if width:
            shapes |= {f"features.{place}.weight": (width, in_channels, 3, 3), f"features.{place}.bias": (width,)}
            places[f"conv{scale}_{number}"] = place
            in_channels, number, place = width, number + 1, place + 2
        else:
            scale, number, place = scale + 1, 1, place + 1
    shapes |= {"classifier.0.weight": (4096, 25088), "classifier.0.bias": (4096,)}
    return values(shapes), places


def official(prefix="module."):
    return {
        "vgg": constants(vgg19_shapes(), prefix),
        "a2k": constants(a2k_shapes(256), prefix),
        "transform": constants(transform_shapes(), prefix),
        "decoder": constants(decoder_shapes(), prefix),
    }


def saved(weights, folder):
    """Write state dicts as .pth files: {name: path}."""
    folder.mkdir(exist_ok=True)
    for name, x in weights.items():
        torch.save(x, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in weights}


def refused(function, *arguments, parts=(), **options):
    with pytest.raises(WeightsError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300, message
    for part in parts:
        assert str(part) in message
    return message


@pytest.fixture(autouse=True)
def no_random_start(monkeypatch):
    """Random weights that are replaced at once would take most of the time."""
    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", lambda conv: None)
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor)


# --- A2K layers


@pytest.mark.parametrize("prefix", ("", "module."))
def test_a2k_layer_loads_strictly(prefix):
    weights = fill(a2k_shapes(8, prefix), 0, 1.0)
    module = A2K(8, num_heads=2)
    module.load_state_dict(a2k_layer(weights), strict=True)
    for name, x in module.state_dict().items():
        torch.testing.assert_close(x, weights[prefix + name], rtol=0, atol=0)


def test_scalars_of_any_shape():
    weights = fill(a2k_shapes(8), 0, 1.0) | {"sim_alpha": torch.tensor(2.0)}
    assert a2k_layer(weights)["sim_alpha"].tolist() == [2]


@pytest.mark.parametrize("name", ("q.weight", "fusion2.bias", "sim_alpha", "sim_beta"))
def test_a2k_layer_names_what_is_missing(name):
    weights = fill(a2k_shapes(8), 0, 1.0)
    del weights[name]
    refused(a2k_layer, weights, parts=(f"a2k lacks {name}", "official file"))


# --- VGG


@pytest.mark.parametrize("kind", VGG_LAYERS)
def test_torchvision_layers_find_their_places(kind):
    weights, places = torchvision_vgg(kind)
    encoder, found = vgg_encoder(weights)
    assert found == kind
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    convolutions = [name for name, _ in encoder.named_children() if name != "input"]
    assert convolutions == [name for name in places if name <= "conv5_1"]
    for name in convolutions:
        for part in ("weight", "bias"):
            expected = weights[f"features.{places[name]}.{part}"]
            torch.testing.assert_close(getattr(getattr(encoder, name), part), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", VGG_LAYERS)
def test_torchvision_first_convolution(kind):
    weights, _ = torchvision_vgg(kind)
    weights["features.0.weight"] = torch.randn(64, 3, 3, 3)
    weights["features.0.bias"] = torch.randn(64)
    image = torch.rand(1, 3, 40, 36)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    padded = F.pad((image - mean) / std, (1, 1, 1, 1), "reflect")
    expected = F.conv2d(padded, weights["features.0.weight"], weights["features.0.bias"]).relu()
    torch.testing.assert_close(vgg_encoder(weights)[0](image)[0], expected, rtol=1e-4, atol=1e-4)


def test_imagenet_statistics():
    encoder, _ = vgg_encoder(torchvision_vgg("vgg16")[0])
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    torch.testing.assert_close(encoder.input(mean[None].expand(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.input((mean + std)[None].expand(1, 3, 2, 2)), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("prefix", ("", "module."))
def test_official_layers_find_their_places(prefix):
    weights = constants(vgg19_shapes(), prefix)
    encoder, kind = vgg_encoder(weights)
    assert kind == "vgg19"
    # Each 3x3 convolution follows a padding layer and is followed by a ReLU; a pooling layer ends a scale.
    place, scale, number = 2, 1, 1
    for width in VGG_LAYERS["vgg19"][:-4]:
        if width and (scale, number) <= (5, 1):
            weight = getattr(encoder, f"conv{scale}_{number}").weight
            torch.testing.assert_close(weight, weights[f"{prefix}{place}.weight"], rtol=0, atol=0)
            number, place = number + 1, place + 3
        elif not width:
            scale, number, place = scale + 1, 1, place + 1
    torch.testing.assert_close(encoder.input.weight, weights[f"{prefix}0.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("key", ("state_dict", "model"))
def test_wrapped_state_dict(key):
    _, kind = vgg_encoder({key: torchvision_vgg("vgg16")[0], "epoch": 3})
    assert kind == "vgg16"


def test_vgg_of_another_kind():
    weights, _ = torchvision_vgg("vgg19")
    batch_norm = {name.replace("features.2.", "features.3."): x for name, x in weights.items()}
    refused(vgg_encoder, batch_norm, parts=("vgg lacks features.2.weight",))
    refused(vgg_encoder, constants(decoder_shapes()), parts=("vgg lacks 0.weight",))


def test_vgg_of_other_widths():
    weights, _ = torchvision_vgg("vgg16")
    weights["features.24.weight"] = torch.zeros(512, 512, 1, 1)
    refused(vgg_encoder, weights, parts=("vgg does not fit", "another shape of 'conv5_1.weight'"))


def test_vgg_with_nan():
    weights, _ = torchvision_vgg("vgg16")
    weights["features.24.bias"] = torch.full((512,), float("nan"))
    refused(vgg_encoder, weights, parts=("vgg holds NaN or infinity in 'conv5_1.bias'",))


# --- files


@pytest.mark.parametrize(
    "content",
    [{}, [torch.zeros(1)], torch.zeros(3), {"epoch": 3}, {"a": {"b": torch.zeros(1)}}, {0: torch.zeros(1)}, "text"],
    ids=str,
)
def test_file_that_holds_something_else(tmp_path, content):
    path = saved({"other": content}, tmp_path)["other"]
    assert re.search("state dict", refused(vgg_encoder, path, parts=("vgg",)))


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path / "none.safetensors", tmp_path):
        refused(vgg_encoder, path, parts=(path, "does not exist"))


@pytest.mark.parametrize("length", (0, 1, 100, -100))
@pytest.mark.parametrize("zipped", (True, False))
def test_truncated_file(tmp_path, length, zipped):
    path = tmp_path / "cut.pth"
    torch.save({"0.weight": torch.rand(3, 3, 1, 1)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:length])
    refused(vgg_encoder, path, parts=(path, "get"))


@pytest.mark.parametrize("zipped", (True, False))
def test_damaged_file(tmp_path, zipped):
    """Flipped bytes give a clear error or, in the numbers themselves, other numbers, but never another exception."""
    path = tmp_path / "bad.pth"
    torch.save({"0.weight": torch.rand(3, 3, 1, 1)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (3,), generator=generator).tolist():
            damaged[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(damaged)
        refused(vgg_encoder, path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))))
def test_code_in_a_file_is_not_run(tmp_path, capsys, write):
    path = tmp_path / "evil.pth"
    write({"0.weight": Payload(tmp_path / "executed")}, path)
    message = refused(vgg_encoder, path, parts=(path, "holds other things than weights"))
    assert "weights_only" not in message  # no advice to read it unsafely
    refusal(capsys, "convert", "--vgg", path, "-o", tmp_path / "out.safetensors")
    assert files(tmp_path) == ["evil.pth"]
    assert not (tmp_path / "executed").exists()


# --- the whole network


def test_whole_network_finds_its_places():
    weights = official()
    model = stya2k(**weights)
    assert not model.training
    plain = {name: {key.removeprefix("module."): x for key, x in part.items()} for name, part in weights.items()}
    for module, source in (
        (model.a2k3.k2.weight, plain["a2k"]["k2.weight"]),
        (model.a2k4.fusion1.bias, plain["transform"]["attn_adain_4_1.fusion1.bias"]),
        (model.a2k5.sim_alpha, plain["transform"]["attn_adain_5_1.sim_alpha"]),
        (model.decoder.merge.weight, plain["transform"]["merge_conv.weight"]),
        (model.decoder.conv4_1.weight, plain["decoder"]["decoder_layer_1.1.weight"]),
        (model.decoder.conv3_4.weight, plain["decoder"]["decoder_layer_2.1.weight"]),
        (model.decoder.conv1_1.bias, plain["decoder"]["decoder_layer_2.24.bias"]),
    ):
        torch.testing.assert_close(module, source, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("part", "name", "replacement", "message"),
    [
        ("a2k", "module.q.weight", None, "a2k lacks q.weight"),
        ("a2k", "module.q.weight", torch.zeros(512, 512, 1, 1), "a2k does not fit a A2K: it has another shape of 'q.w"),
        ("a2k", "module.sim_alpha", torch.zeros(2), "a2k does not fit a A2K: it has another shape of 'sim_alpha'"),
        ("transform", "module.merge_conv.bias", None, "transform lacks merge_conv.bias"),
        ("transform", "module.attn_adain_5_1.v2.bias", None, "lacks v2.bias"),
        ("decoder", "module.decoder_layer_2.24.weight", None, "decoder lacks decoder_layer_2.24.weight"),
        ("decoder", "module.decoder_layer_2.24.bias", torch.zeros(4), "another shape of 'conv1_1.bias'"),
    ],
)
def test_parts_that_do_not_fit(part, name, replacement, message):
    weights = official()
    if replacement is None:
        del weights[part][name]
    else:
        weights[part][name] = replacement
    refused(stya2k, **weights, parts=(message,))


def test_parts_in_the_wrong_place():
    weights = official()
    refused(stya2k, **{**weights, "transform": weights["decoder"]}, parts=("transform lacks attn_adain_4_1.",))
    refused(stya2k, **{**weights, "vgg": torchvision_vgg("vgg16")[0]}, parts=("vgg is a vgg16",))


# --- the command


def test_command_writes_a_network(tmp_path, capsys):
    paths = saved(official(), tmp_path / "official")
    out = tmp_path / "new" / "weights.safetensors"
    options = [x for name, path in paths.items() for x in (f"--{name}", path)]
    assert str(out) in succeed(capsys, "convert", *options, "-o", out)
    assert files(tmp_path / "new") == ["weights.safetensors"]
    model = load_model(out)
    assert model.config.encoder == "vgg19"
    vgg, decoder = (torch.load(paths[name]) for name in ("vgg", "decoder"))
    torch.testing.assert_close(model.encoder.conv5_1.bias, vgg["module.42.bias"])
    torch.testing.assert_close(model.decoder.conv1_1.bias, decoder["module.decoder_layer_2.24.bias"])


def test_command_writes_an_encoder_to_train_and_evaluate_with(tmp_path, capsys, vgg16, monkeypatch):
    monkeypatch.undo()  # this one needs a random start
    monkeypatch.setitem(CONFIGS, "styled", TINY)
    _, places = torchvision_vgg("vgg16")
    tensors = vgg16.state_dict()
    weights = {
        f"features.{place}.{part}": tensors[f"{name}.{part}"]
        for name, place in places.items()
        for part in ("weight", "bias")
        if name <= "conv5_1"
    }
    path, out = saved({"vgg16": weights}, tmp_path)["vgg16"], tmp_path / "encoder.safetensors"
    assert succeed(capsys, "convert", "--vgg", path, "-o", out) == f"{out}  vgg16 encoder\n"
    assert load_encoder(out)[1] == "vgg16"

    content, style = pictures(tmp_path / "content", 2), pictures(tmp_path / "style", 2)
    folders = ("--content-dir", content, "--style-dir", style, "--perceptual", out)
    run = tmp_path / "run"
    options = ["--crop", "32", "--batch-size", "1", "--steps", "1", "--holdout", "0", "--workers", "0"]
    assert main(["train", *map(str, folders), "-o", str(run), *options]) == 0
    weights = run / "weights.safetensors"
    assert main(["evaluate", *map(str, folders), "--weights", str(weights), "--size", "32", "--pairs", "2"]) == 0
    assert "2 pairs at 32 px, scored by vgg16 (encoder.safetensors)" in capsys.readouterr().out


def test_command_wants_one_file_or_four(tmp_path, capsys):
    message = refusal(capsys, "convert", "--vgg", "v.pth", "--a2k", "a.pth", "-o", tmp_path / "o.safetensors")
    assert "--transform and --decoder missing" in message
    assert files(tmp_path) == []


def test_command_does_not_overwrite_its_input(tmp_path, capsys, monkeypatch):
    path = saved({"vgg": torchvision_vgg("vgg16")[0]}, tmp_path)["vgg"]
    before = path.read_bytes()
    (tmp_path / "link.pth").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for out in (path, "vgg.pth", "link.pth"):
        assert "is one of the inputs" in refusal(capsys, "convert", "--vgg", path, "-o", out)
    assert path.read_bytes() == before


def test_command_leaves_nothing_partial(tmp_path, capsys):
    path = saved({"vgg": torchvision_vgg("vgg16")[0]}, tmp_path)["vgg"]
    picture(tmp_path / "photo.png")
    before = files(tmp_path)
    for vgg, out in ((path, path / "o.safetensors"), (path, "/proc/none/o.safetensors"), (tmp_path / "photo.png", "o")):
        refusal(capsys, "convert", "--vgg", vgg, "-o", out)
    assert files(tmp_path) == before
