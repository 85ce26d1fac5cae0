import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import TINY, files, pictures, refusal, tiny_model

import a2k.train
import a2k.train_losses
from a2k.checkpoint import WeightsError, load_encoder, load_model, save_model
from a2k.cli import main
from a2k.decoder import LEAST_DEVIATION, style_vector
from a2k.images import ImageError
from a2k.model import CONFIGS
from a2k.schedules import SCHEDULES
from a2k.train import Trainer
from a2k.train_log import LOSSES, describe, plot_losses, smooth, trim_log
from a2k.train_options import RECIPES, Recipe, TrainingError, TrainOptions

KEYS = {"step", "global", "local", "lr", "seconds"}
RECIPE = replace(RECIPES["styled"], autoencode_steps=1, local_weight=0.4)
STATE = {
    "step": 3,
    "style_start": 1,
    "best": 0.0,
    "random": {},
    "optimizer": {},
    "model": {},
    "average": {},
    "hints": {},
}
LAST_STATE = "states/step_00000003.pt"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tiny_vgg, vgg16_file):
    """Tiny networks, and no plots."""
    monkeypatch.setitem(CONFIGS, "styled", TINY)
    monkeypatch.setitem(CONFIGS, "vgg16", replace(TINY, encoder="vgg16", residual="content"))

    def load(path):
        return (tiny_vgg, "vgg16") if path == str(vgg16_file) else load_encoder(path)

    monkeypatch.setattr(a2k.train, "load_encoder", load)
    monkeypatch.setattr(a2k.train, "plot_losses", lambda log, target: target.touch())


@pytest.fixture
def options(tmp_path, vgg16_file) -> TrainOptions:
    """Four steps, of which the first one copies the photo."""
    return TrainOptions(
        content_dir=str(pictures(tmp_path / "content", 5, width=50)),
        style_dir=str(pictures(tmp_path / "style", 5, height=40)),
        perceptual=str(vgg16_file),
        output=str(tmp_path / "run"),
        recipe=RECIPE,
        crop=(32,),
        batch_size=2,
        steps=4,
        holdout=2,
        workers=0,
    )


@pytest.fixture
def command(options):
    return [
        *("train", "--content-dir", options.content_dir, "--style-dir", options.style_dir),
        *("--perceptual", options.perceptual, "-o", options.output, "--crop", 32, "--batch-size", 2, "--steps", 3),
        *("--autoencode-steps", 1, "--local-weight", 0.4, "--holdout", 2, "--workers", 0),
    ]


def log_of(run: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def tensors_of(run: Path | str) -> dict[str, torch.Tensor]:
    return load_model(Path(run) / "weights.safetensors").state_dict()


def read_states(trainer: Trainer) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in trainer.states.all()}


def stop_after(trainer: Trainer, steps: int, error: type[BaseException] | None = None) -> None:
    """Have the training asked to stop in that step, or fail in the one after it."""
    train_step = trainer.train_step

    def step(*batch):
        if trainer.step == steps and error:
            raise error("stopped by the test")
        trainer.stop_requested = trainer.step == steps - 1 and not error
        return train_step(*batch)

    trainer.train_step = step


# --- a run


def test_command(capsys, tmp_path, command, monkeypatch):
    monkeypatch.setattr(a2k.train, "load_encoder", load_encoder)
    monkeypatch.setattr(a2k.train, "plot_losses", plot_losses)
    assert main([str(x) for x in (*command, "--checkpoint-steps", 2)]) == 0
    run = tmp_path / "run"
    captured = capsys.readouterr()
    assert captured.out == f"{run / 'weights.safetensors'}  step 3\n"
    assert "warning" not in captured.err.lower()
    samples = ["samples/step_000002.png", "samples/step_000003.png"]
    states = ["states/step_00000002.pt", LAST_STATE]
    lists = [".lock", "content_files.json", "style_files.json"]
    boards = [name for name in files(run) if name.startswith("tensorboard/events.out.tfevents.")]
    names = ["log.jsonl", "loss.png", "options.json", "weights.safetensors", *lists, *boards, *samples, *states]
    assert files(run) == sorted(names)
    assert len(boards) == 1
    assert load_model(run / "weights.safetensors").config == TINY
    Image.open(run / "loss.png").verify()
    grid = Image.open(run / samples[0])
    assert grid.width == grid.height == 3 * 192 + 4 * 6  # two held-out photos and paintings and a margin
    assert json.loads((run / "options.json").read_text())["autoencode_steps"] == 1

    log = log_of(run)
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert all(set(entry) >= KEYS for entry in log)
    assert log[0]["pixel"] > 0
    assert log[0]["global"] is log[0]["local"] is None
    for entry in log[1:]:
        assert "pixel" not in entry
        assert min(entry["global"], entry["local"], entry["seconds"], entry["lr"]) > 0


def test_options_of_the_command(monkeypatch, command):
    given = []
    monkeypatch.setattr(a2k.train, "main", given.append)
    options = ("--lr", 0.5, "--global-weight", 1, "--local-weight", 2, "--content-weight", 3, "--keys", "cumulative")
    assert (
        main(
            [
                str(x)
                for x in (*command, *options, "--scale", 1, 3, "--seed", 7, "--dtype", "bfloat16", "--device", "cpu")
            ]
        )
        == 0
    )
    assert main([str(x) for x in command[:9]]) == 0
    first, default = given
    recipe = first.recipe
    assert (recipe.lr, recipe.global_weight, recipe.local_weight, recipe.content_weight) == (0.5, 1, 2, 3)
    assert (recipe.keys, recipe.autoencode_steps, first.seed, first.dtype) == ("cumulative", 1, 7, "bfloat16")
    assert (first.scale, default.scale) == ((1, 3), (2, 2))
    assert (default.recipe, default.crop, default.batch_size) == (RECIPES["styled"], (256,), 8)
    assert (default.holdout, default.workers, default.resume, default.weights) == (40, 1, False, None)


def test_published_recipe():
    for kind in ("vgg19", "vgg16"):
        assert RECIPES[kind] == Recipe(lr=2e-4, global_weight=10, local_weight=1.25, content_weight=0)
        assert (RECIPES[kind].keys, RECIPES[kind].autoencode_steps) == ("cumulative", 0)


def test_seed(options):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = Trainer(replace(options, output=options.output + name, seed=seed, steps=1))
        trainer.run()
        runs.append(trainer.model.state_dict())
    for name, x in runs[0].items():
        torch.testing.assert_close(x, runs[1][name], rtol=0, atol=0)
    assert not torch.equal(runs[0]["decoder.conv1_1.weight"], runs[2]["decoder.conv1_1.weight"])


def test_bfloat16(options):
    losses = []
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(replace(options, output=options.output + dtype, dtype=dtype))
        trainer.run()
        losses.append([entry["global"] for entry in log_of(trainer.folder)[1:]])
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [(replace(RECIPE, content_weight=1.0), {"content"}), (replace(RECIPE, content_weight=0.0), set())],
)
def test_content_loss_only_where_it_counts(options, recipe, names):
    Trainer(replace(options, recipe=recipe, steps=2)).run()
    assert set(log_of(options.output)[1]) & {"content"} == names


@pytest.mark.parametrize("config", RECIPES)
def test_every_loss_of_the_log_is_shown(options, config):
    """In the plot, at the progress bar, and among the losses of TensorBoard."""
    Trainer(replace(options, recipe=replace(RECIPES[config], autoencode_steps=1), steps=2)).run()
    log = log_of(options.output)
    logged = {name for entry in log for name in entry}
    assert logged - {"step", "lr", "seconds"} <= set(LOSSES)
    assert ("sharpness " in describe(log[1])) == (config == "styled")


def test_no_local_loss_where_it_does_not_count(options, monkeypatch):
    monkeypatch.setattr(a2k.train_losses, "local_targets", None)
    Trainer(replace(options, recipe=replace(RECIPE, local_weight=0.0), steps=2)).run()
    assert log_of(options.output)[1]["local"] is None


def test_autoencoding_learns(options):
    recipe = replace(RECIPE, autoencode_steps=10**6, lr=1e-2)
    trainer = Trainer(replace(options, recipe=recipe, steps=400))
    batches = [torch.stack([trainer.data[i][0], trainer.data[i + 1][0]]) for i in range(0, 8, 2)]
    trainer.step = 200  # past the warm-up
    losses = [trainer.train_step(batches[i % 4], batches[i % 4])["pixel"] for i in range(25)]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_style_loss_learns(options):
    """By itself: the colours are right from the start, and what the content costs hides the rest."""
    weights = {"content_weight": 0.0, "sharpness_weight": 0.0, "local_weight": 0.0}
    recipe = replace(RECIPE, autoencode_steps=0, lr=1e-2, **weights)
    trainer = Trainer(replace(options, recipe=recipe, steps=1000))
    content, style = (torch.stack(images) for images in zip(*(trainer.data[i] for i in range(2)), strict=True))
    trainer.train_step(content, style)
    trainer.step = 300  # past the warm-up
    losses = [trainer.train_step(content, style)["global"] for _ in range(25)]
    assert max(losses[-4:]) < 0.1 * losses[0]


def test_the_decoder_learns_what_statistics_are_usual(options):
    """While it copies, and a last time when the styles begin; the averaged network too."""
    options = replace(options, recipe=replace(RECIPE, autoencode_steps=2))
    trainer = Trainer(replace(options, steps=2))
    trainer.run()
    assert not torch.equal(trainer.model.decoder.vector_mean, tiny_model().decoder.vector_mean)
    trainer = Trainer(replace(options, steps=4, resume=True))
    crops = torch.cat([torch.stack(trainer.data[i]) for i in range(len(trainer.data))])
    with torch.no_grad():
        vectors = style_vector(trainer.model.encoder(crops))
    trainer.run()
    for model in (trainer.model, trainer.average):
        torch.testing.assert_close(model.decoder.vector_mean, vectors.mean(0))
        torch.testing.assert_close(model.decoder.vector_deviation, vectors.std(0).clamp_min(LEAST_DEVIATION))


def test_the_averaged_network_knows_what_is_usual_while_it_copies(options):
    Trainer(replace(options, recipe=replace(RECIPE, autoencode_steps=10), steps=1)).run()
    saved, model = tensors_of(options.output), Trainer(replace(options, resume=True)).model.decoder
    for name in ("vector_mean", "vector_deviation"):
        torch.testing.assert_close(saved[f"decoder.{name}"], getattr(model, name), rtol=0, atol=0)
        assert not torch.equal(getattr(model, name), getattr(tiny_model().decoder, name))


@pytest.mark.parametrize("config", ("styled", "vgg16"))
def test_a_step_is_the_same_however_it_is_split(options, config, tiny_vgg, monkeypatch):
    """Photos and paintings are copied by their place in the step, be it of 8 x 1, 4 x 2, 2 x 4 or 1 x 8 pairs."""
    monkeypatch.setattr(a2k.train, "load_encoder", lambda path: (copy.deepcopy(tiny_vgg), "vgg16"))
    recipe = replace(RECIPES[config], autoencode_steps=0, identity_weight=1.0)
    for pairs, splits in ((8, (1, 2, 4, 8)), (6, (1, 2, 3))):
        found = []
        for accumulate in splits:
            split = replace(options, config=config, recipe=recipe, batch_size=pairs // accumulate)
            trainer = Trainer(replace(split, accumulate=accumulate))
            trainer.losses.double()
            batch = [torch.stack(x).double() for x in zip(*(trainer.data[i] for i in range(pairs)), strict=True)]
            losses = trainer._gradients(*batch)
            found.append((losses, [p.grad for p in trainer.parameters if p.grad is not None]))
        for step in found[1:]:
            torch.testing.assert_close(step, found[0])


def test_autoencoding_leaves_the_attention_alone(options):
    trainer = Trainer(replace(options, steps=1))
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.run()
    changed = {name.split(".")[0] for name, x in trainer.model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"encoder", "decoder"}


# --- averaged weights


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_saved(options, decay):
    trainer = Trainer(replace(options, recipe=replace(RECIPE, ema_decay=decay, lr=1e-2)))
    name, train_step = "decoder.conv1_1.weight", trainer.train_step
    weights = [trainer.model.state_dict()[name].clone()]

    def step(*batch):
        entry = train_step(*batch)
        weights.append(trainer.model.state_dict()[name].clone())
        return entry

    trainer.train_step = step
    trainer.run()
    expected = weights[0]
    for number, weight in enumerate(weights[1:], 1):
        factor = min(decay, (1 + number) / (10 + number))
        expected = factor * expected + (1 - factor) * weight
    saved = tensors_of(options.output)[name]
    torch.testing.assert_close(saved, expected)
    assert torch.equal(saved, weights[-1]) == (decay == 0)


def test_the_samples_are_of_the_average(options):
    trainer = Trainer(options)
    before = trainer.sample_grid().tobytes()
    torch.nn.init.zeros_(trainer.model.decoder.conv1_1.weight)
    assert trainer.sample_grid().tobytes() == before
    torch.nn.init.zeros_(trainer.average.decoder.conv1_1.weight)
    assert trainer.sample_grid().tobytes() != before


# --- going on


def test_resume_is_as_if_never_stopped(options):
    whole = Trainer(options)
    whole.run()
    split = replace(options, output=options.output + "2")
    trainer = Trainer(split)
    stop_after(trainer, 2)
    trainer.run()
    assert trainer.step == 2
    assert [entry["step"] for entry in log_of(split.output)] == [1, 2]
    resumed = Trainer(replace(split, resume=True))
    assert resumed.step == 2
    state = trainer.states.load(set())[0]
    assert torch.equal(torch.get_rng_state(), state["random"]["cpu"])
    resumed.run()
    logs = [log_of(run) for run in (options.output, split.output)]
    for entry, expected in zip(*logs, strict=True):
        assert entry | {"seconds": 0} == expected | {"seconds": 0}
    for name, x in tensors_of(options.output).items():
        torch.testing.assert_close(tensors_of(split.output)[name], x, rtol=0, atol=0)


def test_resume_where_a_folder_has_changed(options):
    """A picture that came is left out, so that the others keep their places."""
    Trainer(options).run()
    split = replace(options, output=options.output + "2")
    trainer = Trainer(split)
    stop_after(trainer, 2)
    trainer.run()
    for folder in (options.content_dir, options.style_dir):
        Image.new("RGB", (40, 40)).save(Path(folder) / "!first.png")
    Trainer(replace(split, resume=True)).run()
    for entry, expected in zip(log_of(split.output), log_of(options.output), strict=True):
        assert entry | {"seconds": 0} == expected | {"seconds": 0}


def test_resume_with_another_folder(capsys, command, tmp_path):
    assert main([str(x) for x in command]) == 0
    pictures(tmp_path / "other", 1)
    (tmp_path / "other" / "0.png").rename(tmp_path / "other" / "new.png")
    message = refusal(capsys, *command, "--resume", "--content-dir", tmp_path / "other")
    lists = tmp_path / "run" / "content_files.json"
    assert f"--content-dir {tmp_path / 'other'} has none of the 2 validation pictures that {lists} lists" in message


def test_a_new_run_takes_no_list_from_one_that_died(options):
    """Before its first state."""
    trainer = Trainer(options)
    stop_after(trainer, 1, RuntimeError)
    with pytest.raises(RuntimeError):
        trainer.run()
    pictures(Path(options.content_dir), 6)
    Trainer(replace(options, steps=1)).run()
    names = json.loads((Path(options.output) / "content_files.json").read_text())
    assert names == [f"{number}.png" for number in range(6)]


def test_resume_after_a_crash_logs_every_step_once(options):
    trainer = Trainer(replace(options, checkpoint_steps=2))
    stop_after(trainer, 3, RuntimeError)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        trainer.run()
    with open(Path(options.output) / "log.jsonl", "a") as log:
        log.write('{"step": 4, "glo')
    Trainer(replace(options, resume=True)).run()
    assert [entry["step"] for entry in log_of(options.output)] == [1, 2, 3, 4]


def test_a_log_without_a_checkpoint_is_begun_anew(options):
    trainer = Trainer(options)
    stop_after(trainer, 1, RuntimeError)
    with pytest.raises(RuntimeError):
        trainer.run()
    Trainer(options).run()
    assert [entry["step"] for entry in log_of(options.output)] == [1, 2, 3, 4]


def test_resume_of_a_finished_run(capsys, command, tmp_path):
    command = [str(x) for x in command]
    assert main(command) == 0
    before = tensors_of(tmp_path / "run")
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out.count("step 3\n") == 2
    torch.testing.assert_close(tensors_of(tmp_path / "run"), before, rtol=0, atol=0)
    assert main([*command, "--resume", "--steps", "4"]) == 0
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_resume_to_fewer_steps_than_there_are(capsys, command, tmp_path):
    """Else options.json would tell of another run."""
    assert main([str(x) for x in command]) == 0
    capsys.readouterr()
    before = (tmp_path / "run" / "options.json").read_text()
    message = refusal(capsys, *command, "--resume", "--steps", 2)
    assert f"steps is 2, but {tmp_path / 'run' / LAST_STATE} is of step 3; give more" in message
    assert (tmp_path / "run" / "options.json").read_text() == before


def test_one_run_in_a_folder_at_a_time(capsys, command, tmp_path):
    """In another process, as one process may lock a file twice."""
    (tmp_path / "run").mkdir()
    code = "import sys, filelock as f; x = f.FileLock(sys.argv[1]); x.acquire(); print(1, flush=True); sys.stdin.read()"
    arguments = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        message = refusal(capsys, *command)
        other.stdin.close()
    assert f"another process trains in {tmp_path / 'run'}; stop it, or give another -o" in message
    assert files(tmp_path / "run") == [".lock"]
    assert main([str(x) for x in command]) == 0


def test_a_run_is_not_overwritten(capsys, command, tmp_path):
    (tmp_path / "run" / "states").mkdir(parents=True)
    (tmp_path / "run" / LAST_STATE).write_bytes(b"earlier")
    message = refusal(capsys, *command)
    assert f"{tmp_path / 'run'} holds a run already; go on with --resume or give another -o" in message
    assert files(tmp_path / "run") == [LAST_STATE]


def test_no_run_to_resume(capsys, command, tmp_path):
    assert f"{tmp_path / 'run'} holds no run to resume; leave out --resume" in refusal(capsys, *command, "--resume")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"", "step_00000003.pt is not a whole weights file (EOFError)"),
        (b"a text of some length", "step_00000003.pt is not a whole weights file"),
        ({"step": 3}, "step_00000003.pt is not the state of a training"),
        ([1], "step_00000003.pt holds a list"),
        (STATE, "step_00000003.pt does not fit a StyA2K: it lacks"),
        *(
            ({k: x for k, x in STATE.items() if k != key}, "step_00000003.pt is not the state of a training")
            for key in STATE
        ),
    ],
    ids=str,
)
def test_bad_state(capsys, command, tmp_path, state, message):
    path = tmp_path / "run" / LAST_STATE
    path.parent.mkdir(parents=True)
    path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
    assert message in refusal(capsys, *command, "--resume")
    assert files(tmp_path / "run") == [LAST_STATE]


@pytest.mark.parametrize("state", (b"a text", [1], {"step": 3}, {1: Path}), ids=str)
def test_a_bad_state_can_be_done_without(capsys, command, tmp_path, state):
    path = tmp_path / "run" / LAST_STATE
    path.parent.mkdir(parents=True)
    path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
    assert refusal(capsys, *command, "--resume").endswith("; delete it and leave out --resume\n")
    path.with_name("step_00000002.pt").write_bytes(b"")
    message = refusal(capsys, *command, "--resume")
    assert message.endswith("; delete it to go on from the one before\n")
    assert str(path) in message and "get" not in message.replace(str(tmp_path), "")


def test_a_checkpoint_is_whole_or_the_earlier_one(options, monkeypatch):
    trainer = Trainer(options)
    trainer.run()
    before = (read_states(trainer), tensors_of(options.output))

    def fail(state, path):
        path.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"cannot write .*step_00000004\.pt: No space left on device"):
        trainer.save()
    assert read_states(trainer) == before[0]
    torch.testing.assert_close(tensors_of(options.output), before[1], rtol=0, atol=0)
    assert [name for name in files(Path(options.output)) if name.startswith(".")] == [".lock"]


# --- networks


def test_vgg_trains_all_but_its_encoder(options, tiny_vgg):
    trainer = Trainer(replace(options, config="vgg16", recipe=RECIPES["vgg16"], steps=2))
    assert trainer.losses.shares_encoder
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.run()
    after = tensors_of(options.output)
    for name, x in tiny_vgg.state_dict().items():
        torch.testing.assert_close(after[f"encoder.{name}"], x, rtol=0, atol=0)
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert {name.split(".")[0] for name in changed} == {"a2k3", "a2k4", "a2k5", "decoder"}
    learning = {id(p) for p in trainer.optimizer.param_groups[0]["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in learning) != name.startswith("encoder.")
    entry = log_of(options.output)[0]
    assert entry["global"] > 0
    assert "pixel" not in entry


def test_network_of_another_encoder_than_the_perceptual_one(options):
    """Weights may bring an encoder of their own; its features are used and not the perceptual ones."""
    save_model(tiny_model(CONFIGS["vgg16"]), Path(options.output + ".safetensors"))
    options = replace(options, config="vgg16", weights=options.output + ".safetensors", recipe=RECIPES["vgg16"])
    trainer = Trainer(options)
    assert not trainer.losses.shares_encoder
    calls = []
    trainer.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    assert trainer.train_step(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32))["global"] > 0
    assert calls


def test_config_unlike_the_perceptual_network(capsys, command, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "vgg19", replace(TINY, encoder="vgg19"))
    message = refusal(capsys, *command, "--config", "vgg19")
    assert re.search(r"--config vgg19 needs a vgg19 file as --perceptual, but .*vgg16\.safetensors is vgg16", message)
    assert not (tmp_path / "run").exists()


def test_start_from_weights(options, tiny_file):
    recipe = replace(RECIPES["styled"], autoencode_steps=100)
    trainer = Trainer(replace(options, weights=str(tiny_file), recipe=recipe, steps=1))
    for name, x in load_model(tiny_file).state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], x, rtol=0, atol=0)
    trainer.run()
    assert log_of(options.output)[0]["global"] > 0  # no need to learn to copy


def test_resume_of_a_start_from_weights(options, tiny_file):
    """The phase that copies the photo is not made up for."""
    options = replace(options, recipe=replace(RECIPE, autoencode_steps=100), steps=1)
    Trainer(replace(options, weights=str(tiny_file))).run()
    Trainer(replace(options, resume=True, steps=2)).run()
    assert all(entry["global"] > 0 for entry in log_of(options.output))


def test_resume_without_the_weights_of_the_start(capsys, command, tmp_path, tiny_file):
    """The state has all that counts of them."""
    start = tmp_path / "start.safetensors"
    start.write_bytes(tiny_file.read_bytes())
    command = [str(x) for x in (*command, "--weights", start)]
    assert main(command) == 0
    start.unlink()
    assert main([*command, "--resume", "--steps", "4"]) == 0
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_resume_of_a_vgg_network_with_another_perceptual_one(options, tiny_vgg, monkeypatch, dtype):
    """The losses are by the other; the network keeps the encoder that its decoder has learnt from."""
    options = replace(options, config="vgg16", recipe=RECIPES["vgg16"], dtype=dtype)
    Trainer(replace(options, steps=2)).run()
    other = copy.deepcopy(tiny_vgg)
    for x in other.parameters():
        x.mul_(1.5)
    expected = other.state_dict()["conv1_1.weight"].clone()
    monkeypatch.setattr(a2k.train, "load_encoder", lambda path: (other, "vgg16"))
    resumed = Trainer(replace(options, resume=True))
    assert not resumed.losses.shares_encoder
    torch.testing.assert_close(resumed.losses.perceptual.conv1_1.weight.float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(resumed.validation.perceptual.conv1_1.weight, expected)
    resumed.run()
    for name, x in tiny_vgg.state_dict().items():
        assert torch.equal(tensors_of(options.output)[f"encoder.{name}"], x)


def test_weights_of_another_config(capsys, command, tmp_path):
    save_model(tiny_model(replace(TINY, num_heads=4)), tmp_path / "w.safetensors")
    message = refusal(capsys, *command, "--weights", tmp_path / "w.safetensors")
    assert f"--weights {tmp_path / 'w.safetensors'} is not a styled network" in message
    assert "none.safetensors' are neither a file" in refusal(capsys, *command, "--weights", "none.safetensors")


# --- bad input


def test_a_broken_picture_is_named(options):
    broken = [Path(folder) / "1.png" for folder in (options.content_dir, options.style_dir)]
    for path in broken:
        path.write_bytes(b"broken")
    with pytest.warns(UserWarning, match="skipped") as caught:
        Trainer(options).run()
    messages = {str(warning.message) for warning in caught}
    assert all(any(f"skipped: cannot read {path}: " in message for message in messages) for path in broken)
    assert len(log_of(options.output)) == 4


def test_a_broken_picture_among_the_samples(options):
    broken = Path(options.content_dir) / "3.png"  # the first one held back
    broken.write_bytes(b"broken")
    with pytest.warns(UserWarning, match=f"skipped: cannot read {broken}"):
        trainer = Trainer(options)
    assert [len(images) for images in trainer.samples] == [1, 2]
    assert trainer.sample_grid().size == (3 * 192 + 4 * 6, 2 * 192 + 3 * 6)


def test_nothing_but_broken_pictures(capsys, command, tmp_path):
    for path in (tmp_path / "content").iterdir():
        path.write_bytes(b"broken")
    with pytest.warns(UserWarning, match="skipped"):
        assert "none of 2 pictures in" in refusal(capsys, *command)
    assert not (tmp_path / "run").exists()


def test_an_empty_folder(capsys, command, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(capsys, *command, "--style-dir", tmp_path / "empty")
    assert f"{tmp_path / 'empty'} has no pictures in it" in message
    assert not (tmp_path / "run").exists()


def test_the_best_weights_are_kept(options, monkeypatch):
    trainer = Trainer(replace(options, validate_steps=1))
    scores = iter((3.0, 1.0, 2.0, 4.0))
    monkeypatch.setattr(trainer.validation, "measure", lambda model: {"validation_style": next(scores)})
    averages, validate = [], trainer.validate

    def recording():
        averages.append(trainer.average.state_dict()["decoder.merge.weight"].clone())
        return validate()

    trainer.validate = recording
    trainer.run()
    best = load_model(Path(options.output) / "best.safetensors").state_dict()["decoder.merge.weight"]
    assert [torch.equal(best, x) for x in averages] == [False, True, False, False]


def test_a_copy_is_not_the_best_network(options, monkeypatch):
    """However low its losses: its attention has not learnt yet."""
    trainer = Trainer(replace(options, validate_steps=1))
    scores = iter((1.0, 3.0, 2.0, 4.0))
    monkeypatch.setattr(trainer.validation, "measure", lambda model: {"validation_style": next(scores)})
    trainer.run()
    assert trainer.best == 2.0


@pytest.mark.parametrize("change", ({}, {"crop": (48,)}, {"holdout": 1}, {"batch_size": 1}, {"perceptual": "other"}))
def test_the_best_sum_is_of_one_scale(options, tiny_vgg, monkeypatch, change):
    """It goes on where the same pictures are compared by the same network."""
    trainer = Trainer(replace(options, validate_steps=2))
    trainer.run()
    other = copy.deepcopy(tiny_vgg)
    if "perceptual" in change:
        torch.nn.init.ones_(other.conv1_1.bias)
    monkeypatch.setattr(a2k.train, "load_encoder", lambda path: (other, "vgg16"))
    resumed = Trainer(replace(options, resume=True, **change))
    assert trainer.best < float("inf")
    assert resumed.best == (trainer.best if set(change) <= {"batch_size"} else float("inf"))


def test_long_and_tiny_pictures(options):
    for path, size in (("content/0.png", (1, 5000)), ("content/4.png", (5000, 1)), ("style/4.png", (1, 1))):
        Image.new("RGB", size).save(Path(options.content_dir).parent / path)
    trainer = Trainer(options)
    assert [image.size for image in trainer.samples[0]] == [(50, 34), (a2k.train.SAMPLE_SIZE, 1)]
    trainer.run()
    assert len(log_of(options.output)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--crop", 40), "crop is 40; it must be a multiple of 16, at least 32"),
        (("--crop", 16), "crop is 16; it must be"),
        (("--crop", -32), "crop is -32; it must be"),
        (("--crop", 32, 48, 20), "crop is 20; it must be"),
        (("--crop", 96, 32), "batch_size is 2; with crops of 32 and 96 it must be at least 9, for one pair"),
        (("--scale", 0.5, 2), "scale is 0.5 2; give a lowest of at least 1"),
        (("--scale", 3, 2), "scale is 3 2; give a lowest of at least 1"),
        (("--batch-size", 0), "batch_size is 0; it must be at least 1"),
        (("--steps", 0), "steps is 0; it must be at least 1"),
        (("--checkpoint-steps", 0), "checkpoint_steps is 0; it must be at least 1"),
        (("--workers", -1), "workers is -1; it must be at least 0"),
        (("--workers", 1000000), "workers is 1000000; on "),
        (("--seed", -1), "seed is -1; it must be at least 0"),
        (("--lr", -1), "lr is -1.0; it must be above 0 and finite"),
        (("--lr", 0), "lr is 0.0; it must be above 0 and finite"),
        (("--lr", "inf"), "lr is inf; it must be above 0 and finite"),
        (("--seed", 2**64), f"seed is {2**64}; it must be below 2**63"),
        (("--ema-decay", 1), "ema_decay is 1.0; it must be at least 0 and below 1"),
        (("--ema-decay", -0.1), "ema_decay is -0.1; it must be"),
        (("--autoencode-steps", -1), "autoencode_steps is -1; it must be at least 0"),
        (("--checkpoint-minutes", -1), "checkpoint_minutes is -1.0; it must be at least 0"),
        (("--checkpoint-minutes", "nan"), "checkpoint_minutes is nan; it must be at least 0"),
        (("--global-weight", -1), "global_weight is -1.0; it must be at least 0 and finite"),
        (("--local-weight", "nan"), "local_weight is nan; it must be at least 0 and finite"),
        (("--content-weight", "inf"), "content_weight is inf; it must be at least 0 and finite"),
        (("--sharpness-weight", -1), "sharpness_weight is -1.0; it must be"),
        (("--identity-weight", -1), "identity_weight is -1.0; it must be"),
        (("--holdout", 5), "has 5 images, of which holdout=5 leaves none; lower it"),
        (("--holdout", -1), "holdout is -1; it must be at least 0"),
        (("--content-dir", "none"), "none does not exist"),
        (("--perceptual", "none"), "none does not exist"),
        (("--device", "nonsense"), "device 'nonsense' cannot be used"),
    ],
    ids=str,
)
def test_options_out_of_range(capsys, command, tmp_path, change, message):
    assert message in refusal(capsys, *command, *change)
    assert not (tmp_path / "run").exists()


def test_network_as_the_perceptual_one(capsys, command, tiny_file):
    assert "is not a VGG encoder file" in refusal(capsys, *command, "--perceptual", tiny_file)


@pytest.mark.parametrize("name", ("file", "file/run"))
def test_unwritable_run(capsys, command, tmp_path, name):
    (tmp_path / "file").write_text("earlier")
    message = refusal(capsys, *command, "-o", tmp_path / name)
    assert f"cannot write to {tmp_path / name}: " in message
    assert message.endswith("; choose another -o\n")
    assert (tmp_path / "file").read_text() == "earlier"


def test_a_loss_that_is_nan_stops_the_run(options):
    Trainer(replace(options, steps=2)).run()
    before = tensors_of(options.output)
    trainer = Trainer(replace(options, resume=True))
    torch.nn.init.constant_(trainer.model.decoder.conv1_1.bias, float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 3; lower --lr and --resume"):
        trainer.run()
    torch.testing.assert_close(tensors_of(options.output), before, rtol=0, atol=0)


def test_a_loss_that_is_nan_before_the_first_state(options):
    """There is nothing to resume."""
    trainer = Trainer(options)
    torch.nn.init.constant_(trainer.model.decoder.conv1_1.bias, float("nan"))
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1; lower --lr$"):
        trainer.run()


def test_gradients_that_are_not_finite(options, monkeypatch):
    """Some are dropped, as of pictures of one colour; many in a row end the run."""
    clip, norms = torch.nn.utils.clip_grad_norm_, [float("inf"), float("nan"), None] + 10 * [float("inf")]

    def clip_grad_norm(parameters, most):
        norm, forced = clip(parameters, most), norms.pop(0)
        return norm if forced is None else norm.new_tensor(forced)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm)
    trainer = Trainer(replace(options, steps=20))
    parameters = trainer.model.decoder.parameters
    before = [x.detach().clone() for x in parameters()]
    batch = [torch.stack(x) for x in zip(*(trainer.data[i] for i in range(options.batch_size)), strict=True)]
    for step in (1, 2):
        with pytest.warns(UserWarning, match=f"norm is (inf|nan) at step {step}; it is dropped"):
            trainer.train_step(*batch)
        torch.testing.assert_close(list(parameters()), before, rtol=0, atol=0)
    trainer.train_step(*batch)
    assert any((x != y).any() for x, y in zip(parameters(), before, strict=True))
    with (
        pytest.warns(UserWarning, match="it is dropped"),
        pytest.raises(TrainingError, match=r"norm is inf up to step 13; lower --lr$"),
    ):
        for _ in range(10):
            trainer.train_step(*batch)


def test_without_matplotlib(capsys, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "training plots its losses with matplotlib; pip install 'a2k[train]'" in refusal(capsys, *command)
    assert not (tmp_path / "run").exists()


def test_errors_are_of_three_kinds(options):
    for change, error in (
        ({"crop": (0,)}, TrainingError),
        ({"holdout": 9}, ImageError),
        ({"perceptual": "none"}, WeightsError),
    ):
        with pytest.raises(error):
            Trainer(replace(options, **change))


# --- small parts


def test_linear_schedule():
    factors = [SCHEDULES["linear"](step, step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 200)
    assert factors[199] == factors[500] == factors[600] == 1
    assert factors[800] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01
    assert SCHEDULES["linear"](0, 500, 1000) == pytest.approx(1 / 200)  # a phase warms up anew
    assert 0 < SCHEDULES["linear"](0, 0, 1) <= 1


def test_constant_schedule():
    assert [SCHEDULES["constant"](step, step, 1000) for step in (0, 99, 199, 999)] == [1 / 200, 0.5, 1, 1]


def test_cosine_schedule():
    factors = [SCHEDULES["cosine"](step, step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 200)
    assert (factors[250], factors[500], factors[750]) == pytest.approx((0.853553, 0.5, 0.146447), abs=1e-6)
    assert 0 < factors[-1] < 1e-5
    assert SCHEDULES["cosine"](0, 500, 1000) == pytest.approx(1 / 400)


@pytest.mark.parametrize("steps", (5, 1000))
def test_published_schedule(steps):
    factors = [SCHEDULES["published"](step, step, steps) for step in range(steps)]
    expected = [factor for factor in (1, 1, 0.3, 0.09, 0.027) for _ in range(steps // 5)]
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_sets_the_learning_rate(options, schedule):
    trainer = Trainer(replace(options, recipe=replace(RECIPE, schedule=schedule)))
    trainer.run()
    factors = [SCHEDULES[schedule](phase, step, 4) for phase, step in ((0, 0), (0, 1), (1, 2), (2, 3))]
    assert [entry["lr"] for entry in log_of(options.output)] == pytest.approx([RECIPE.lr * x for x in factors])
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(RECIPE.lr * factors[-1])


def test_smooth():
    assert smooth((1.0, 3.0, 5.0, 7.0), window=2) == [1, 2, 4, 6]
    assert smooth(()) == []


def test_trim_log(tmp_path):
    log = tmp_path / "log.jsonl"
    trim_log(log, 3)
    assert not log.exists()
    entries = [f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)]
    log.write_text("".join(entries) + '{"st')
    trim_log(log, 3)
    assert log.read_text() == "".join(entries[:3])


def test_plot_of_nothing(tmp_path):
    (tmp_path / "log.jsonl").touch()
    plot_losses(tmp_path / "log.jsonl", tmp_path / "loss.png")
    Image.open(tmp_path / "loss.png").verify()
