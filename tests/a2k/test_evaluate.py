import json
import re
from types import SimpleNamespace

import pytest
import torch
from tiny import files, picture, pictures, refusal

from a2k import StyleTransfer
from a2k.cli import main
from a2k.evaluate import choose_pairs, evaluate, load_square
from a2k.images import ImageError
from a2k.losses import content_loss, global_style_loss

SCORES = {
    "weights",
    "perceptual",
    "pairs",
    "size",
    "style_loss",
    "style_loss_identity",
    "style_loss_shuffled",
    "content_loss",
    "seconds_per_picture",
}


@pytest.fixture
def folders(tmp_path):
    return pictures(tmp_path / "content", 3, width=50), pictures(tmp_path / "style", 3, height=40)


@pytest.fixture
def quick(tiny_vgg, monkeypatch):
    """Scores by a tiny network."""
    monkeypatch.setattr("a2k.evaluate.load_encoder", lambda path: (tiny_vgg, "vgg16"))


def stub(function):
    """A StyleTransfer whose network is a function."""
    return SimpleNamespace(model=function, device="cpu", dtype=torch.float32)


@pytest.fixture
def command(folders, vgg16_file, tiny_file):
    options = ("--perceptual", vgg16_file, "--weights", tiny_file, "--size", 32)
    return ["evaluate", "--content-dir", folders[0], "--style-dir", folders[1], *options]


# --- pairs


def test_pairs_are_fixed_and_distinct():
    chosen = choose_pairs(40, 40, 200)
    assert chosen == choose_pairs(40, 40, 200) == sorted(chosen)
    assert len({pair[:2] for pair in chosen}) == 200
    assert all(s != other for _, s, other in chosen)
    for drawn in zip(*chosen, strict=True):
        assert set(drawn) <= set(range(40))
        assert len(set(drawn)) > 35


def test_no_more_pairs_than_there_are():
    assert [pair[:2] for pair in choose_pairs(2, 2, 200)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_square(tmp_path):
    square = load_square(picture(tmp_path / "wide.png", 90, 40), 32)
    assert square.shape == (1, 3, 32, 32)
    whole = load_square(picture(tmp_path / "square.png", 32, 32), 32)
    assert torch.equal(whole, load_square(tmp_path / "square.png", 32))
    assert load_square(picture(tmp_path / "line.png", 100, 1), 32).shape == (1, 3, 32, 32)


# --- scores


def test_the_photo_unchanged_scores_as_the_identity(folders, vgg16_file):
    scores = evaluate(*folders, vgg16_file, stub(lambda content, style: content), name="stub", size=32)
    assert scores.style_loss == scores.style_loss_identity > 0
    assert scores.content_loss == pytest.approx(0, abs=1e-6)
    assert scores.pairs == 9
    assert scores.perceptual == f"vgg16 ({vgg16_file.name})"


@pytest.mark.usefixtures("quick")
def test_the_painting_itself_has_no_style_loss(folders):
    scores = evaluate(*folders, "vgg", stub(lambda content, style: style), name="stub", size=32)
    assert scores.style_loss == pytest.approx(0, abs=1e-6)
    assert scores.style_loss_shuffled > 1e-3
    assert scores.content_loss > 0.01


@pytest.mark.usefixtures("quick")
def test_scores_are_means_of_the_losses(folders, tiny_vgg):
    scores = evaluate(*folders, "vgg", stub(lambda c, s: 2 * c - 0.5), name="stub", size=32, pairs=4)
    sums = torch.zeros(4)
    for c, s, other in choose_pairs(3, 3, 4):
        content, style, shuffled = (
            load_square(folder / f"{i}.png", 32)
            for folder, i in zip((*folders, folders[1]), (c, s, other), strict=True)
        )
        output, content, style, shuffled = (
            tiny_vgg(x) for x in ((2 * content - 0.5).clamp(0, 1), content, style, shuffled)
        )
        sums += torch.stack(
            [
                global_style_loss(output, style),
                global_style_loss(content, style),
                global_style_loss(output, shuffled),
                content_loss(output, content),
            ]
        )
    expected = (sums / 4).tolist()
    actual = [scores.style_loss, scores.style_loss_identity, scores.style_loss_shuffled, scores.content_loss]
    assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("quick")
def test_every_call_scores_the_same(folders, tiny_file, monkeypatch):
    transfer = StyleTransfer(tiny_file, device="cpu")

    def scores():
        result = evaluate(*folders, "vgg", transfer, name="tiny", size=32, pairs=5)
        return result.style_loss, result.style_loss_shuffled, result.content_loss

    first = scores()
    monkeypatch.setattr("a2k.evaluate.KEPT_PICTURES", 1)
    assert scores() == first


@pytest.mark.usefixtures("quick")
def test_holdout(folders):
    for folder in folders:
        (folder / "0.png").write_bytes(b"broken")
    identity = stub(lambda content, style: content)
    assert evaluate(*folders, "vgg", identity, name="stub", size=32, holdout=2).pairs == 4
    with pytest.raises(ImageError, match=r"cannot read .*0\.png"):
        evaluate(*folders, "vgg", identity, name="stub", size=32)


# --- the command


def test_table(capsys, command, tiny_file):
    assert main([str(x) for x in (*command, "--pairs", 4)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tiny_file}: 4 pairs at 32 px, scored by vgg16 (vgg16.safetensors)"
    names = ("style loss", "  photo unchanged", "  shuffled styles", "content loss", "seconds per picture")
    for name, line in zip(names, lines[1:], strict=True):
        assert re.match(rf"  {name} +\d+\.\d{{4}}", line)
    style, identity = (float(re.search(r"\d+\.\d+", line)[0]) for line in lines[1:3])
    ratio = float(re.search(r"(\d+\.\d\d) of the identity's", lines[1])[1])
    assert ratio == pytest.approx(style / identity, rel=0.03)
    assert re.search(r"right style -?\d+% lower", lines[3])


def test_json(capsys, command):
    assert main([str(x) for x in (*command, "--json", "--pairs", 2, "--dtype", "bfloat16")]) == 0
    captured = capsys.readouterr()
    scores = json.loads(captured.out)
    assert set(scores) == SCORES
    assert (scores["pairs"], scores["size"]) == (2, 32)
    assert all(scores[name] > 0 for name in SCORES if "loss" in name or "seconds" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pairs", 0), "pairs=0 and size=32; they must be at least 1 and 32"),
        (("--pairs", -1), "pairs=-1"),
        (("--size", 0), "size=0"),
        (("--size", 31), "size=31"),
        (("--holdout", 3), "has 3 images, of which holdout=3 leaves none"),
        (("--holdout", -1), "holdout is -1"),
        (("--perceptual", "none.safetensors"), "none.safetensors does not exist"),
        (("--weights", "none"), "weights 'none' are neither a file nor a bundled model"),
        (("--style-dir", "none"), "none does not exist"),
        (("--device", "nonsense"), "device 'nonsense' cannot be used"),
    ],
    ids=str,
)
def test_what_cannot_be(capsys, command, options, message):
    assert message in refusal(capsys, *command, *options)


def test_network_in_place_of_the_vgg(capsys, command, tiny_file):
    assert "is not a VGG encoder file" in refusal(capsys, *command, "--perceptual", tiny_file)


def test_one_style_cannot_be_shuffled(capsys, command, tmp_path):
    pictures(tmp_path / "single", 1)
    message = refusal(capsys, *command, "--style-dir", tmp_path / "single")
    assert "has one picture; shuffling styles needs at least two" in message
    assert files(tmp_path / "single") == ["0.png"]
