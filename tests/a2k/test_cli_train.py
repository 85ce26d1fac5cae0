import json

import pytest
from tiny import refusal

import a2k.train
from a2k.cli import main
from a2k.train_options import RECIPES, TrainOptions

YAML = """
config: vgg16
content_dir: photos
style_dir: paintings
perceptual: vgg.safetensors
output: run
scale: [1, 3]
batch-size: 4
lr: 1e-3
checkpoint_activations: true
seed: null
"""


@pytest.fixture
def given(monkeypatch) -> list[TrainOptions]:
    """Options of the runs that the command line would have begun."""
    runs = []
    monkeypatch.setattr(a2k.train, "main", runs.append)
    return runs


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return str(path)


def test_config_file(given, config):
    assert main(["train", "-c", config]) == 0
    (options,) = given
    assert (options.config, options.content_dir, options.output) == ("vgg16", "photos", "run")
    assert (options.scale, options.batch_size, options.seed, options.recipe.lr) == ((1, 3), 4, 0, 1e-3)
    assert options.checkpoint_activations
    assert options.recipe.schedule == RECIPES["vgg16"].schedule


def test_flags_override_the_config_file(given, config):
    flags = ("--batch-size", "2", "--no-checkpoint-activations", "--config", "lite", "--scale", "1", "2", "-o", "other")
    assert main(["train", *flags, "-c", config]) == 0
    (options,) = given
    assert (options.batch_size, options.config, options.scale, options.output) == (2, "lite", (1, 2), "other")
    assert not options.checkpoint_activations
    assert (options.recipe.lr, options.recipe.identity_weight) == (1e-3, RECIPES["lite"].identity_weight)


def test_options_of_a_run_are_a_config_file(given, config, tmp_path):
    """options.json gives the same run again, to its last option."""
    assert main(["train", "-c", config, "--global-weight", "3", "--device", "cpu"]) == 0
    path = tmp_path / "options.json"
    path.write_text(json.dumps(given[0].flat()))
    assert main(["train", "-c", str(path)]) == 0
    assert given[0] == given[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 4", "has an unknown option 'batch_sise'; did you mean 'batch_size'?"),
        ("- 4", "holds no options; give lines such as `batch_size: 4`"),
        ("", "holds no options"),
        ("a: [", "cannot read the config file"),
        (None, "No such file or directory; give a YAML file"),
    ],
    ids=str,
)
def test_config_files_that_cannot_be_used(capsys, given, tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    assert message in refusal(capsys, "train", "-c", path)
    assert not given


def test_flags_are_not_abbreviated(capsys, given, config):
    """An abbreviated --config-file would be accepted, and no file read."""
    with pytest.raises(SystemExit):
        main(["train", "--content-dir", "c", "--style-dir", "s", "--perceptual", "p", "-o", "o", "--config-f", config])
    assert "unrecognized arguments: --config-f" in capsys.readouterr().err
    assert not given
