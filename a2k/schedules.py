"""Learning-rate schedules: the factor of the learning rate at a step of a run.

All take (phase_step, step, steps): steps since the loss last changed, step of the run from 0, steps in all.
"""

import math

WARMUP = 200  # steps
TAIL = 0.4  # of the run, over which "linear" falls


def warm_up(phase_step: int) -> float:
    """Linear over the first steps of each phase, then 1."""
    return min(1.0, (phase_step + 1) / WARMUP)


def linear(phase_step: int, step: int, steps: int) -> float:
    """Warm-up, constant, then linear to zero over the last 40% of the run."""
    return min(warm_up(phase_step), (steps - step) / max(1.0, TAIL * steps))


def constant(phase_step: int, step: int, steps: int) -> float:
    """Warm-up, then constant."""
    return warm_up(phase_step)


def cosine(phase_step: int, step: int, steps: int) -> float:
    """Warm-up under half a cosine that falls to zero at the end (Loshchilov & Hutter 2017, without restarts)."""
    return warm_up(phase_step) * (1 + math.cos(math.pi * step / steps)) / 2


def published(phase_step: int, step: int, steps: int) -> float:
    """Zhu et al. 2023: 1 in the first two fifths of the run (epochs), then times 0.3 in each of the others."""
    epoch = 1 + 5 * step // steps
    return 0.3 ** max(0, epoch - 2)


SCHEDULES = {"linear": linear, "constant": constant, "cosine": cosine, "published": published}
