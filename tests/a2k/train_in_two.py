"""A training in two processes, under torchrun: python train_in_two.py OPTIONS FOLDER.

OPTIONS is a file that `torch.save` wrote. Runs: one in float64, of which every process saves its batches and
gradients to FOLDER/rank{n}.pt; one; one that the second process alone is asked to stop after two steps; and that one
resumed.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from train_tiny import use_tiny_networks

from a2k.train import Trainer
from a2k.train_options import TrainOptions


def record_double(trainer: Trainer) -> list[dict]:
    """Have the trainer compute in float64 and save nothing; what its steps compute, to be filled as it runs."""
    trainer.losses.double()
    trainer.average.double()
    trainer._begin_phase()
    trainer.save = lambda: None
    steps, gradients = [], trainer._gradients

    def recording(content, style):
        content, style = content.double(), style.double()
        losses = gradients(content, style)
        grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        steps.append({"content": content, "style": style, "grads": grads})
        return losses

    trainer._gradients = recording
    return steps


def main(options: TrainOptions, folder: Path) -> None:
    use_tiny_networks()
    trainer = Trainer(replace(options, output=options.output + "_double"))
    rank, steps = trainer.processes.rank, record_double(trainer)
    trainer.run()
    torch.save(steps, folder / f"rank{rank}.pt")
    Trainer(options).run()

    split = replace(options, output=options.output + "_split")
    trainer = Trainer(split)
    train_step = trainer.train_step

    def step(*batch):
        trainer.stop_requested = rank == 1 and trainer.step == 1
        return train_step(*batch)

    trainer.train_step = step
    trainer.run()
    assert trainer.step == 2
    torch.distributed.barrier()
    trainer = Trainer(replace(split, resume=True))
    assert trainer.step == 2
    trainer.run()
    trainer.processes.leave()


if __name__ == "__main__":
    main(torch.load(sys.argv[1], weights_only=False), Path(sys.argv[2]))
