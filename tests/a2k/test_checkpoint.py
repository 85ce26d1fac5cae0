import json
import os
import stat
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, files, tiny_model

from a2k.checkpoint import (
    VGG_CHANNELS,
    WEIGHTS_DIR,
    WeightsError,
    find_weights,
    load_encoder,
    load_model,
    save_encoder,
    save_model,
    write_atomically,
)


def refused(path, *parts, load=load_model):
    """The message of a file that must be refused: one line that names the file."""
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (path, *parts):
        assert str(part) in message
    return message


def altered(tiny_file, path, metadata=None, **tensors):
    """A copy of the weights with other tensors (None: left out) or other metadata."""
    contents = load_file(tiny_file) | tensors
    metadata = {"config": json.dumps(asdict(TINY))} if metadata is None else metadata
    save_file({name: x for name, x in contents.items() if x is not None}, path, metadata)
    return path


# --- networks


@pytest.mark.parametrize("dtype", (None, torch.float16))
def test_round_trip(tmp_path, dtype):
    config = replace(TINY, encoder="vgg16", block_sizes=(4, 2, 2), num_heads=4, residual="content")
    model = tiny_model(config).train()
    save_model(model, tmp_path / "w.safetensors", dtype)
    loaded = load_model(tmp_path / "w.safetensors", backend="reference")
    assert loaded.config == config
    assert not loaded.training
    assert loaded.a2k3.backend == "reference"
    assert not any(p.requires_grad for p in loaded.encoder.parameters())
    assert {x.dtype for x in loaded.state_dict().values()} == {torch.float32}
    assert {x.dtype for x in load_file(tmp_path / "w.safetensors").values()} == {dtype or torch.float32}
    for name, x in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], x.to(dtype or x.dtype).float(), rtol=0, atol=0)


def test_channels_last_weights_are_kept(tmp_path):
    model = tiny_model()
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    save_model(model.to(memory_format=torch.channels_last), tmp_path / "w.safetensors")
    for name, x in load_model(tmp_path / "w.safetensors").state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0)


def test_missing_file(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist")
    refused(tmp_path, "does not exist")


@pytest.mark.parametrize("length", (0, 7, 100, 3000, -1))
def test_truncated_file(tiny_file, tmp_path, length):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(tiny_file.read_bytes()[:length])
    refused(path, "not a whole safetensors file", "get it again")


def test_other_file(tmp_path):
    path = tmp_path / "text.safetensors"
    path.write_text("not weights at all, but a text of some length")
    refused(path, "not a whole safetensors file")


def test_no_config(tiny_file, tmp_path):
    refused(altered(tiny_file, tmp_path / "w.safetensors", metadata={}), "not an A2K checkpoint")


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[1, 2]",
        "null",
        json.dumps({"depth": 3}),
        json.dumps({"channels": 4}),
        json.dumps({"channels": "abcde"}),
        json.dumps({"channels": [4.5, 4, 8, 8, 8]}),
        json.dumps({"encoder": ["lite"]}),
        json.dumps({"num_heads": None}),
        json.dumps({"num_heads": "2"}),
        json.dumps({"block_sizes": [8, 8]}),
    ],
)
def test_strange_config(tiny_file, tmp_path, config):
    path = altered(tiny_file, tmp_path / "w.safetensors", metadata={"config": config})
    refused(path, "config this version does not know")


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_weights_that_are_not_finite(tiny_file, tmp_path, value):
    broken = torch.full((16,), value)
    refused(altered(tiny_file, tmp_path / "w.safetensors", **{"a2k3.q.bias": broken}), "NaN or infinity", "a2k3.q.bias")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a2k3.q.bias": None}, "lacks 'a2k3.q.bias'"),
        ({"a2k3.q.bias": None, "a2k3.k.bias": None}, "lacks 'a2k3.k.bias' and 1 more tensors"),
        ({"extra": torch.zeros(1)}, "has no place for 'extra'"),
        ({"a2k3.q.bias": torch.zeros(9)}, "has another shape of 'a2k3.q.bias'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_another_architecture(tiny_file, tmp_path, tensors, message):
    refused(altered(tiny_file, tmp_path / "w.safetensors", **tensors), "does not fit a StyA2K", message)


# --- VGG encoders


def test_encoder_round_trip(vgg16, vgg16_file):
    loaded, kind = load_encoder(vgg16_file)
    assert kind == "vgg16"
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, x in vgg16.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], x, rtol=0, atol=0)


def vgg16_tensors(vgg16_file) -> dict[str, torch.Tensor]:
    """Weights that are small on disk, in the shapes of a VGG16."""
    return {name: torch.zeros(x.shape, dtype=torch.float16) for name, x in load_file(vgg16_file).items()}


def test_encoder_with_a_mean_and_later_layers(vgg16_file, tmp_path):
    tensors = vgg16_tensors(vgg16_file)
    del tensors["input.weight"], tensors["input.bias"]
    tensors |= {"input_mean": torch.tensor([0.1, 0.2, 0.3]), "conv5_2.weight": torch.zeros(2)}
    save_file(tensors, tmp_path / "v.safetensors", {"arch": "vgg16"})
    image = torch.rand(1, 3, 4, 4)
    out = load_encoder(tmp_path / "v.safetensors")[0].input(image)
    torch.testing.assert_close(out, image - torch.tensor([0.1, 0.2, 0.3])[:, None, None])


@pytest.mark.parametrize("arch", ({}, {"arch": "lite"}, {"arch": "resnet"}))
def test_not_an_encoder(tmp_path, arch):
    save_file({"x": torch.zeros(1)}, tmp_path / "v.safetensors", arch)
    refused(tmp_path / "v.safetensors", "not a VGG encoder file", "a2k convert", load=load_encoder)


def test_checkpoint_in_place_of_an_encoder(tiny_file):
    refused(tiny_file, "not a VGG encoder file", load=load_encoder)


def test_encoder_of_another_kind(vgg16_file, tmp_path):
    save_file(vgg16_tensors(vgg16_file), tmp_path / "v.safetensors", {"arch": "vgg19"})
    refused(tmp_path / "v.safetensors", "does not fit a Encoder", "conv3_4.bias", load=load_encoder)


def test_encoder_is_small_enough_for_its_channels(vgg16):
    assert tuple(getattr(vgg16, f"conv{scale}_1").out_channels for scale in range(1, 6)) == VGG_CHANNELS


def test_equal_networks_make_equal_files(vgg16, tmp_path):
    model, files = tiny_model(), {"network": set(), "encoder": set()}
    for number in range(8):  # two entries of metadata came in either order
        save_model(model, tmp_path / f"{number}.safetensors")
        save_encoder(vgg16, "vgg16", tmp_path / f"vgg{number}.safetensors")
        files["network"].add((tmp_path / f"{number}.safetensors").read_bytes())
        files["encoder"].add((tmp_path / f"vgg{number}.safetensors").read_bytes())
    assert {name: len(contents) for name, contents in files.items()} == {"network": 1, "encoder": 1}


# --- finding


def test_find_weights(tiny_file, monkeypatch):
    assert find_weights(tiny_file) == tiny_file
    assert find_weights(str(tiny_file)) == tiny_file
    monkeypatch.setattr("a2k.checkpoint.WEIGHTS_DIR", tiny_file.parent)
    assert find_weights("tiny") == tiny_file


@pytest.mark.parametrize("name", ("nothing", "", "/", "a2k-lite.pth"))
def test_unknown_weights(name, tiny_file, monkeypatch):
    monkeypatch.setattr("a2k.checkpoint.WEIGHTS_DIR", tiny_file.parent)
    with pytest.raises(WeightsError) as caught:
        find_weights(name)
    assert str(caught.value) == f"weights {name!r} are neither a file nor a bundled model (tiny)"


def test_weights_folder_is_in_the_package():
    assert WEIGHTS_DIR.name == "weights"
    assert WEIGHTS_DIR.parent.joinpath("py.typed").is_file()


# --- writing


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_model(tiny_model(), tmp_path / "new" / "w.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "w.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize("make", (Path.mkdir, os.mkfifo))
def test_what_is_not_a_file_is_not_replaced(tmp_path, make):
    target = tmp_path / "w.safetensors"
    make(target)
    kind = stat.S_IFMT(target.stat().st_mode)
    for path in (target, f"{tmp_path}/new/"):
        with pytest.raises(OSError, match=f"^cannot write {path}: it (exists and is not a file|names a folder); "):
            save_model(tiny_model(), path)
    assert stat.S_IFMT(target.stat().st_mode) == kind
    assert os.listdir(tmp_path) == [target.name]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    save_model(tiny_model(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_model(tmp_path / "real")


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *x, name=name, real=real: calls.append(name) or real(*x))
    save_model(tiny_model(), tmp_path / "w.safetensors")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("error", (KeyboardInterrupt, ValueError("x"), OSError(28, "No space left on device")))
def test_a_failed_write_keeps_the_earlier_file(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("earlier")

    def write(path):
        with open(path, "w") as file:
            file.write("half")
        raise error

    with pytest.raises(BaseException) as caught:
        write_atomically(target, write)
    assert target.read_text() == "earlier"
    assert files(tmp_path) == ["file"]
    if isinstance(error, OSError):
        message = f"cannot write {target}: No space left on device; choose another path or make room"
        assert str(caught.value) == message


@pytest.mark.parametrize("name", ("file/w.safetensors", "file/deeper/w.safetensors", "folder"))
def test_a_place_that_cannot_be_written(tmp_path, vgg16, name):
    (tmp_path / "file").write_text("earlier")
    (tmp_path / "folder").mkdir()
    for save in (lambda path: save_model(tiny_model(), path), lambda path: save_encoder(vgg16, "vgg16", path)):
        with pytest.raises(OSError, match=f"cannot write {tmp_path / name}: ") as caught:
            save(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "earlier"
    assert files(tmp_path) == ["file"]


def test_an_error_of_safetensors_is_an_oserror(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*_):
        raise SafetensorError("I/O error: disk quota")

    monkeypatch.setattr("a2k.checkpoint.save_file", fail)
    with pytest.raises(OSError, match=r"cannot write .*: I/O error: disk quota; choose another path or make room"):
        save_model(tiny_model(), tmp_path / "w.safetensors")
    assert files(tmp_path) == []
