"""Trainings in processes of their own: killed, out of room, several at once, and on interpreted kernels."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY, files, pictures
from train_in_two import record_double

import a2k.checkpoint
import a2k.train
from a2k.checkpoint import save_encoder
from a2k.model import CONFIGS
from a2k.train import Trainer
from a2k.train_options import RECIPES, TrainOptions

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STEPS = 24
KILLED_IN_A_SAVE = """
import os, signal, sys
from pathlib import Path
import torch
from a2k.train_state import StateFiles

torch.save = lambda state, file: os.kill(os.getpid(), signal.SIGKILL)
StateFiles(Path(sys.argv[1]), 3).save(1, {})
"""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_vgg) -> TrainOptions:
    """Of a run that nothing interrupts."""
    tmp_path = tmp_path_factory.mktemp("whole")
    save_encoder(tiny_vgg, "vgg16", tmp_path / "vgg.safetensors")
    return TrainOptions(
        content_dir=str(pictures(tmp_path / "content", 5, width=50)),
        style_dir=str(pictures(tmp_path / "style", 5, height=40)),
        perceptual=str(tmp_path / "vgg.safetensors"),
        output=str(tmp_path / "run"),
        recipe=replace(RECIPES["styled"], autoencode_steps=1, local_weight=0.4),
        crop=(32,),
        scale=(1.0, 2.0),
        batch_size=2,
        steps=STEPS,
        checkpoint_steps=3,
        validate_steps=4,
        holdout=2,
        workers=0,
    )


@pytest.fixture
def options(whole_run, tmp_path) -> TrainOptions:
    return replace(whole_run, output=str(tmp_path / "run"))


def command(options: TrainOptions, *flags: str) -> list[str]:
    arguments = []
    for name, value in options.flat().items():
        if value is not None and not isinstance(value, bool):
            values = value if isinstance(value, tuple) else [value]
            arguments += ["--" + name.replace("_", "-"), *map(str, values)]
    return [sys.executable, str(HERE / "train_tiny.py"), "train", *arguments, *flags]


def complete(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options)


def log_of(run: str) -> list[dict]:
    """All but how long the steps took."""
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


@pytest.fixture(scope="module")
def whole_log(whole_run) -> list[dict]:
    process = complete(command(whole_run))
    assert process.returncode == 0, process.stderr
    return log_of(whole_run.output)


def start_and_wait(options: TrainOptions, lines: int) -> subprocess.Popen:
    """A training that has logged so many lines."""
    process = subprocess.Popen(command(options), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = Path(options.output) / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    return process


def test_a_killed_run_goes_on_bit_for_bit(options, whole_log):
    step = random.randrange(4, STEPS // 2)
    process = start_and_wait(options, step)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed_at = len((Path(options.output) / "log.jsonl").read_text().splitlines())
    resumed = complete(command(options, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert log_of(options.output) == whole_log, f"killed at step {killed_at}"
    assert killed_at < STEPS == len(whole_log)
    assert [entry["step"] for entry in whole_log if "validation_style" in entry] == list(range(4, STEPS + 1, 4))


def test_half_a_state_is_deleted(options):
    """What a run leaves that is killed while it saves; where it goes on, and where another begins."""
    killed = [sys.executable, "-c", KILLED_IN_A_SAVE, options.output]
    for flags in ((), ("--resume",)):
        assert subprocess.run(killed, timeout=60).returncode == -signal.SIGKILL
        assert any(name.startswith(".") for name in files(Path(options.output) / "states"))
        process = complete(command(replace(options, steps=1), *flags))
        assert process.returncode == 0, process.stderr
        assert files(Path(options.output) / "states") == ["step_00000001.pt"]


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_saves_and_leaves(options, number):
    process = start_and_wait(options, 5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"interrupted; saving" in err and b"Traceback" not in err
    step = log_of(options.output)[-1]["step"]
    assert 5 <= step < STEPS
    assert out.decode() == f"{options.output}/weights.safetensors  step {step}\n"
    assert files(Path(options.output) / "states")[-1] == f"step_{step:08d}.pt"


def test_a_full_disk_loses_nothing(options, whole_log):
    """The limit on a file's size stands in for the disk: a log fits, a state does not."""
    run = Path(options.output)
    process = start_and_wait(options, 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    before = {name: (run / name).read_bytes() for name in files(run) if name != "log.jsonl"}
    limit = len(before["weights.safetensors"]) // 2  # of the files that are written, the smallest that is not text

    def fill_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = complete(command(options, "--resume"), preexec_fn=fill_disk)
    assert full.returncode == 2, full.stderr
    for part in ("a2k: error: cannot write ", "File too large", "; choose another path or make room"):
        assert part in full.stderr
    assert "Traceback" not in full.stderr
    assert {name: (run / name).read_bytes() for name in files(run) if name != "log.jsonl"} == before
    again = complete(command(options, "--resume"))
    assert again.returncode == 0, again.stderr
    assert log_of(options.output) == whole_log


def torchrun(*arguments: object) -> None:
    process = complete(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, arguments)]
    )
    assert process.returncode == 0, process.stderr


def test_two_processes(options, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "styled", TINY)
    monkeypatch.setattr(a2k.checkpoint, "VGG_CHANNELS", TINY.channels)
    monkeypatch.setattr(a2k.train, "plot_losses", lambda log, target: None)
    # All steps at nearly the same weights.
    recipe = replace(options.recipe, lr=1e-7, clip=1e9, content_weight=1.0, identity_weight=1.0)
    options = replace(options, recipe=recipe, steps=4, batch_size=4, accumulate=2, crop=(64, 32))
    options = replace(options, checkpoint_steps=99, validate_steps=99)
    torch.save(options, tmp_path / "options.pt")
    torchrun(HERE / "train_in_two.py", tmp_path / "options.pt", tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]

    trainer = Trainer(replace(options, output=options.output + "_single", batch_size=8))
    single = record_double(trainer)
    trainer.run()
    for number, (step, *parts) in enumerate(zip(single, *ranks, strict=True)):
        for kind in ("content", "style"):
            assert not torch.equal(*(part[kind] for part in parts))
            torch.testing.assert_close(torch.cat([part[kind] for part in parts]), step[kind], rtol=0, atol=0)
        assert any(name.startswith("a2k3.") for name in step["grads"]) == (number > 0)  # the first one copies
        for name, expected in step["grads"].items():
            for part in parts:
                actual = part["grads"][name]
                assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-12, (number, name)
    assert len(single) == 4

    whole, split, *doubles = (log_of(options.output + suffix) for suffix in ("", "_split", "_double", "_single"))
    assert whole == split  # stopped by one process, and resumed by both
    for entry, expected in zip(*doubles, strict=True):
        assert {k: x for k, x in entry.items() if x is not None} == pytest.approx(
            {k: x for k, x in expected.items() if x is not None}, rel=1e-6
        )
    assert len(files(Path(options.output) / "states")) == 1


def test_interpreted_kernels_follow_the_reference(options, tmp_path):
    pytest.importorskip("triton")
    recipe = replace(options.recipe, lr=5e-4, content_weight=1.0, identity_weight=1.0, autoencode_steps=0)
    options = replace(options, recipe=recipe, steps=3, checkpoint_steps=99, validate_steps=99)
    torch.save(options, tmp_path / "options.pt")
    process = subprocess.run(
        [sys.executable, str(HERE / "train_interpreted.py"), str(tmp_path / "options.pt")],
        env={**ENVIRONMENT, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    logs = json.loads(process.stdout)
    for entry, expected in zip(logs["triton"], logs["reference"], strict=True):
        for name in ("global", "local", "content", "identity"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-4), (entry["step"], name)
    assert len(logs["triton"]) == 3
