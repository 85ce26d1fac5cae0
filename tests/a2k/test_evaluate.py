import json
import re
import sys
import tracemalloc
import warnings
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import wasserstein_distance
from skimage.metrics import structural_similarity
from tiny import files, picture, pictures, refusal, tiny_model

from a2k import StyleTransfer
from a2k.checkpoint import save_model
from a2k.cli import main
from a2k.evaluate import choose_pairs, color_quantiles, evaluate, gram_matrices, load_square, ssim, vgg_distance
from a2k.images import ImageError, to_pil, to_tensor
from a2k.losses import content_loss, global_style_loss

MEASURES = (
    "style_loss",
    "style_loss_shuffled",
    "gram_loss",
    "color_distance",
    "content_loss",
    "vgg_distance",
    "ssim",
)


@pytest.fixture
def folders(tmp_path):
    return pictures(tmp_path / "content", 3, width=50), pictures(tmp_path / "style", 3, height=40)


@pytest.fixture
def quick(tiny_vgg, monkeypatch):
    """Scores by a tiny network."""
    monkeypatch.setattr("a2k.evaluate.load_encoder", lambda path: (tiny_vgg, "vgg16"))


def stub(function):
    """A StyleTransfer that computes a function of the photo and the painting."""
    return SimpleNamespace(stylize=lambda *images: to_pil(function(*map(to_tensor, images))), dtype=torch.float16)


def score(folders, function, **options):
    """Scores of a function in place of a network, at 32 px."""
    report, _ = evaluate(*folders, "vgg", {"stub": stub(function)}, size=32, **options)
    return report.scores[1]


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


def test_pairs_of_published_scores():
    """Drawn as they were then, up to a million."""
    drawn = np.sort(np.random.default_rng(0).permutation(10**6)[:200]).tolist()
    assert [c * 1000 + s for c, s, _ in choose_pairs(1000, 1000, 200)] == drawn


def test_pairs_of_many_pictures_need_little_memory():
    tracemalloc.start()
    chosen = choose_pairs(4000, 3000, 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
    assert chosen == choose_pairs(4000, 3000, 200) == sorted(chosen)
    assert len({pair[:2] for pair in chosen}) == 200
    assert all(0 <= s < 3000 and s != other for _, s, other in chosen)
    assert max(c for c, _, _ in chosen) in range(3500, 4000)


def test_no_more_pairs_than_there_are():
    assert [pair[:2] for pair in choose_pairs(2, 2, 200)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_square(tmp_path):
    square = load_square(picture(tmp_path / "wide.png", 90, 40), 32)
    assert square.shape == (1, 3, 32, 32)
    whole = load_square(picture(tmp_path / "square.png", 32, 32), 32)
    assert torch.equal(whole, load_square(tmp_path / "square.png", 32))
    assert load_square(picture(tmp_path / "line.png", 100, 1), 32).shape == (1, 3, 32, 32)


# --- pictures that cannot be read


@pytest.mark.parametrize("broken", ("content", "style"))
def test_pairs_that_cannot_be_read_are_left_out(folders, tmp_path, broken, quick):
    """Of all rows, and rows of the sheet. The first pair is one of them."""
    path = tmp_path / broken / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.warns(UserWarning, match=f"skipped: cannot read {path}: "):
        report, sheet = evaluate(*folders, "vgg", {"stub": stub(lambda photo, painting: painting)}, size=32)
    assert 0 < report.pairs < 9
    assert [scores.name for scores in report.scores] == ["photo unchanged", "stub"]
    assert report.scores[1].style_loss == pytest.approx(0, abs=1e-6)
    assert sheet.height > 256


def test_the_program_tells_of_them_in_a_line_each(capsys, monkeypatch, folders, command, quick):
    path = folders[0] / "1.png"
    path.write_bytes(b"")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "argv", ["a2k", *map(str, command)])
    assert main() == 0
    output = capsys.readouterr()
    assert output.err.startswith(f"a2k: warning: skipped: cannot read {path}: ") and output.err.count("\n") == 1
    assert output.out.startswith("6 pairs at 32 px")


def test_no_pair_can_be_read(folders, tmp_path, quick):
    for path in (tmp_path / "content").iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ImageError, match="none of 9 pairs could be scored"):
        evaluate(*folders, "vgg", {}, size=32)


# --- measures


def images(count: int, size: int = 40) -> list[torch.Tensor]:
    seed = int(np.random.default_rng().integers(2**32))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(gaussian_filter(rng.random((3, size, size + 7)), (0, 2, 2))[None]) for _ in range(count)]


def test_ssim_is_the_published_one():
    first, second = images(2)
    pixels = [x[0].permute(1, 2, 0).numpy() for x in (first, 0.6 * first + 0.4 * second)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = structural_similarity(*pixels, channel_axis=-1, **options)
    assert ssim(first, 0.6 * first + 0.4 * second) == pytest.approx(expected, abs=1e-9)
    assert 0.05 < expected < 0.95


def test_color_distance_is_the_sliced_wasserstein_one():
    first, second = images(2)
    colors = [x[0].flatten(1).numpy() for x in (first, 0.5 * second + 0.1)]
    directions = np.random.default_rng(0).normal(size=(32, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    expected = np.mean([wasserstein_distance(*(d @ x for x in colors)) for d in directions])
    quantiles = [color_quantiles(x.float()) for x in (first, 0.5 * second + 0.1)]
    assert np.abs(quantiles[0] - quantiles[1]).mean() == pytest.approx(expected, rel=0.01)


def test_colors_have_no_place(tiny_vgg):
    image = images(1)[0].float()
    shuffled = image.flatten(2)[:, :, torch.randperm(image[0, 0].numel())].view_as(image)
    np.testing.assert_array_equal(color_quantiles(image), color_quantiles(shuffled))


def test_gram_matrices_by_hand():
    features = [torch.randn(1, channels, 3, 5) for channels in (2, 4, 6, 8, 8)]
    grams = gram_matrices(features)
    assert [gram.shape for gram in grams] == [(1, c, c) for c in (2, 4, 6, 8)]
    for gram, x in zip(grams, features, strict=False):
        expected = sum(torch.outer(x[0, :, i, j], x[0, :, i, j]) for i in range(3) for j in range(5)) / 15
        torch.testing.assert_close(gram[0], expected)


def test_vgg_distance_by_hand():
    first, second = ([torch.rand(1, 4, n, n + 1) for n in (8, 4, 3, 2, 1)] for _ in range(2))
    expected = sum((2 - 2 * F.cosine_similarity(x, y)).mean() for x, y in zip(first, second, strict=True))
    assert vgg_distance(first, second) == pytest.approx(float(expected), rel=1e-5)
    assert vgg_distance(first, [3 * x for x in first]) == pytest.approx(0, abs=1e-9)


# --- scores


def test_the_photo_unchanged(folders, vgg16_file):
    report, _ = evaluate(*folders, vgg16_file, {"stub": stub(lambda content, style: content)}, size=32)
    assert (report.perceptual, report.pairs, report.size) == (f"vgg16 ({vgg16_file.name})", 9, 32)
    unchanged, scores = (asdict(scores) for scores in report.scores)
    assert (unchanged.pop("name"), scores.pop("name")) == ("photo unchanged", "stub")
    assert unchanged.pop("seconds_per_picture") is None
    assert scores.pop("seconds_per_picture") > 0
    assert (unchanged.pop("dtype"), scores.pop("dtype")) == (None, "float16")
    assert scores == unchanged
    assert scores["style_loss"] > 0
    assert scores["content_loss"] == pytest.approx(0, abs=1e-6)
    assert scores["vgg_distance"] == pytest.approx(0, abs=1e-6)
    assert scores["ssim"] == pytest.approx(1)


@pytest.mark.usefixtures("quick")
def test_the_painting_itself(folders):
    scores = score(folders, lambda content, style: style)
    for name in ("style_loss", "gram_loss", "color_distance"):
        assert getattr(scores, name) == pytest.approx(0, abs=1e-6)
    assert scores.style_loss_shuffled > 1e-3
    assert scores.content_loss > 0.01
    assert scores.vgg_distance > 0.01
    assert scores.ssim < 0.9


@pytest.mark.usefixtures("quick")
def test_scores_are_means_of_the_measures(folders, tiny_vgg):
    scores = score(folders, lambda c, s: 2 * c - 0.5, pairs=4)
    sums = torch.zeros(7, dtype=torch.float64)
    for c, s, other in choose_pairs(3, 3, 4):
        content, style, shuffled = (
            load_square(folder / f"{i}.png", 32)
            for folder, i in zip((*folders, folders[1]), (c, s, other), strict=True)
        )
        output = to_tensor(to_pil(2 * content - 0.5))
        features = [tiny_vgg(x) for x in (output, content, style, shuffled)]
        colors = [color_quantiles(x) for x in (output, style)]
        grams = zip(*(gram_matrices(features[i]) for i in (0, 2)), strict=True)
        measures = {
            "style_loss": global_style_loss(features[0], features[2]),
            "style_loss_shuffled": global_style_loss(features[0], features[3]),
            "gram_loss": sum(F.mse_loss(x, y) for x, y in grams),
            "color_distance": np.abs(colors[0] - colors[1]).mean(),
            "content_loss": content_loss(features[0], features[1]),
            "vgg_distance": vgg_distance(features[0], features[1]),
            "ssim": ssim(output, content),
        }
        sums += torch.tensor([float(measures[name]) for name in MEASURES], dtype=torch.float64)
    actual = [getattr(scores, name) for name in MEASURES]
    assert actual == pytest.approx((sums / 4).tolist(), rel=1e-4)


@pytest.mark.usefixtures("quick")
def test_every_call_scores_the_same(folders, tiny_file, monkeypatch):
    transfer = StyleTransfer(tiny_file, device="cpu")

    def scores():
        report, _ = evaluate(*folders, "vgg", {"tiny": transfer}, size=32, pairs=5)
        return [{**asdict(scores), "seconds_per_picture": None} for scores in report.scores]

    first = scores()
    monkeypatch.setattr("a2k.evaluate.KEPT_PAINTINGS", 1)
    assert scores() == first


@pytest.mark.usefixtures("quick")
def test_features_are_computed_once(folders, tiny_vgg):
    """Of every result, of the photo of successive pairs and of every painting."""
    calls = []
    tiny_vgg.register_forward_hook(lambda *_: calls.append(1))
    score(folders, lambda c, s: 0.5 * c)
    assert len(calls) == 9 + 3 + 3


@pytest.mark.usefixtures("quick")
def test_holdout(folders):
    for folder in folders:
        (folder / "0.png").write_bytes(b"broken")
    identity = {"stub": stub(lambda content, style: content)}
    assert evaluate(*folders, "vgg", identity, size=32, holdout=2)[0].pairs == 4
    with pytest.warns(UserWarning, match=r"skipped: cannot read .*0\.png"):
        evaluate(*folders, "vgg", identity, size=32)


# --- folders of results


@pytest.mark.usefixtures("quick")
def test_results_of_stylize_score_as_the_network(folders, tiny_file, tmp_path):
    """Where photos and paintings are squares of the size that is scored."""
    squares = [pictures(tmp_path / f"squares_{folder.name}", 3, width=32, height=32) for folder in folders]
    options = ("--content", squares[0], "--style", squares[1], "-o", tmp_path / "out", "--weights", tiny_file)
    assert main(["stylize", *map(str, options), "--device", "cpu"]) == 0
    network = {"tiny": StyleTransfer(tiny_file, device="cpu")}
    report, _ = evaluate(*squares, "vgg", network, results=[tmp_path / "out"], size=32)
    _, expected, scores = report.scores
    assert scores.name == str(tmp_path / "out")
    assert scores.seconds_per_picture is None
    for name in MEASURES:
        assert getattr(scores, name) == pytest.approx(getattr(expected, name), rel=1e-5)


@pytest.mark.usefixtures("quick")
def test_results_of_any_extension_and_size(folders, tmp_path):
    for photo in range(3):
        for painting, suffix in enumerate((".jpg", ".png", ".webp")):
            picture(tmp_path / f"out/{photo}_stylized_{painting}{suffix}", width=70, seed=photo)
    report, _ = evaluate(*folders, "vgg", {}, results=[tmp_path / "out"], size=32)
    assert [scores.name for scores in report.scores] == ["photo unchanged", str(tmp_path / "out")]


@pytest.mark.usefixtures("quick")
def test_a_result_is_missing(folders, tmp_path):
    for name in ("0_stylized_0", "0_stylized_1", "other"):
        picture(tmp_path / f"out/{name}.png")
    with pytest.raises(ImageError, match=r"out lacks 7 of 9 results, the first 0_stylized_2\.png; name them as"):
        evaluate(*folders, "vgg", {}, results=[tmp_path / "out"], size=32)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("twin", ("out/1_stylized_2", "content/1", "style/2"))
def test_two_files_that_one_name_stands_for(folders, tmp_path, twin):
    for photo, painting in np.ndindex(3, 3):
        picture(tmp_path / f"out/{photo}_stylized_{painting}.png")
    picture(tmp_path / "out/other.png")
    picture(tmp_path / "out/other.jpg")
    evaluate(*folders, "vgg", {}, results=[tmp_path / "out"], size=32)
    picture(tmp_path / f"{twin}.jpg")
    message = f"{tmp_path / twin}.jpg and {tmp_path / twin}.png differ only in their extension; move one"
    with pytest.raises(ImageError, match=re.escape(message)):
        evaluate(*folders, "vgg", {}, results=[tmp_path / "out"], size=32)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ("stub", "photo unchanged"))
def test_results_named_like_another_row(folders, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for photo, painting in np.ndindex(3, 3):
        picture(tmp_path / name / f"{photo}_stylized_{painting}.png")
    networks = {"stub": stub(lambda content, style: content)}
    with pytest.raises(ValueError, match=f"two rows would be called {name!r}; give it once"):
        evaluate(*folders, "vgg", networks, results=[name], size=32)
    report, _ = evaluate(*folders, "vgg", networks, results=[f"./{name}"], size=32)
    assert [scores.name for scores in report.scores] == ["photo unchanged", "stub", f"./{name}"]
    assert report.scores[2].seconds_per_picture is None


# --- the sheet


@pytest.mark.usefixtures("quick")
def test_sheet(folders):
    networks = {"light": stub(lambda c, s: torch.ones_like(c)), "dark": stub(lambda c, s: torch.zeros_like(c))}
    _, sheet = evaluate(*folders, "vgg", networks, size=32)
    assert sheet.size == (4 * 262 + 6, 8 * 262 + 6 + 16)
    for row in range(8):
        colors = [sheet.getpixel((134 + column * 262, 150 + row * 262)) for column in range(4)]
        assert colors[2:] == [(255, 255, 255), (0, 0, 0)]
    headings = np.asarray(sheet.crop((0, 0, sheet.width, 22)).convert("L"))
    assert all((headings[:, 6 + i * 262 : 262 + i * 262] < 128).any() for i in range(4))


@pytest.mark.usefixtures("quick")
def test_sheet_of_few_pairs_and_long_names(folders):
    name = "a/very/long/path" * 20
    _, sheet = evaluate(*folders, "vgg", {name: stub(lambda c, s: c)}, size=32, pairs=2)
    assert sheet.size == (3 * 262 + 6, 2 * 262 + 6 + 16)
    assert (np.asarray(sheet)[:16, 3 * 262 :] == 255).all()


# --- the command


def test_table(capsys, command, tiny_file):
    assert main([str(x) for x in (*command, "--pairs", 4)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 pairs at 32 px, scored by vgg16 (vgg16.safetensors)"
    names = [name.replace("_", " ") for name in MEASURES]
    assert re.split("  +", lines[1].strip()) == [*names, "s / picture", "dtype"]
    assert re.fullmatch(r"photo unchanged( +\d+\.\d{4}){7} +- +-", lines[2])
    assert re.fullmatch(rf"{tiny_file}( +-?\d+\.\d{{4}}){{8}} +float32", lines[3])
    assert len({len(line) for line in lines[1:]}) == 1


def test_json_and_sheet(capsys, command, tiny_file, tmp_path):
    more = ("--json", "--pairs", 2, "--dtype", "bfloat16", "--sheet", tmp_path / "sheet.png")
    assert main([str(x) for x in (*command, *more)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pairs"], report["size"]) == (2, 32)
    assert [scores["name"] for scores in report["scores"]] == ["photo unchanged", str(tiny_file)]
    assert [scores["dtype"] for scores in report["scores"]] == [None, "bfloat16"]
    assert all(set(scores) == {*MEASURES, "name", "seconds_per_picture", "dtype"} for scores in report["scores"])
    assert Image.open(tmp_path / "sheet.png").size == (3 * 262 + 6, 2 * 262 + 6 + 16)


def test_several_networks(capsys, command, tiny_file, tmp_path):
    save_model(tiny_model(seed=1), tmp_path / "other.safetensors")
    options = ("--weights", tmp_path / "other.safetensors", "--json", "--pairs", 2)
    assert main([str(x) for x in (*command, *options)]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [x["name"] for x in scores[1:]] == [str(tiny_file), str(tmp_path / "other.safetensors")]
    assert scores[1]["style_loss"] != scores[2]["style_loss"]


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
        (("--results", "none"), "none does not exist"),
        (("--weights", "a", "a"), "two rows would be called 'a'; give it once"),
        (("--weights", "a", "--results", "a"), "two rows would be called 'a'; give it once"),
    ],
    ids=str,
)
def test_what_cannot_be(capsys, command, options, message):
    assert message in refusal(capsys, *command, *options)


def test_sheet_of_an_unknown_format(capsys, command, tmp_path):
    message = refusal(capsys, *command, "--weights", "no such weights", "--sheet", tmp_path / "sheet.foo")
    assert "sheet.foo: format '.foo' is not known; use .png" in message


def test_repeated_results_add_up(capsys, command):
    assert "two rows would be called 'a'" in refusal(capsys, *command, "--results", "a", "--results", "b", "a")


def test_the_network_where_none_is_named(capsys, command):
    command = [x for x in command if x != "--weights" and not str(x).endswith("tiny.safetensors")]
    assert "two rows would be called 'a2k-lite'" in refusal(capsys, *command, "--results", "a2k-lite")
    assert "a2k-lite does not exist" in refusal(capsys, *command, "--weights", "--results", "a2k-lite")


def test_network_in_place_of_the_vgg(capsys, command, tiny_file):
    assert "is not a VGG encoder file" in refusal(capsys, *command, "--perceptual", tiny_file)


def test_one_style_cannot_be_shuffled(capsys, command, tmp_path):
    pictures(tmp_path / "single", 1)
    message = refusal(capsys, *command, "--style-dir", tmp_path / "single")
    assert "has one picture; shuffling styles needs at least two" in message
    assert files(tmp_path / "single") == ["0.png"]
