"""Compute an epoch's plan from its number alone, so a resumed run needs no history.

Every few epochs the student becomes the teacher and a new student starts. The weight of the negative labels, alpha,
depends on the epochs since then: a teacher is most reliable when it is new, and the student relies on it less and less.
"""

from dataclasses import dataclass

from transfgu.recipe import TrainingRecipe

SPAN = 10  # epochs that each value of `teacher_every` holds


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The plan of an epoch."""

    updates_teacher: bool  # the student becomes the teacher, and restarts from its initial weights
    has_teacher: bool  # including one that starts now
    alpha: float  # weight of the negative label in the peer loss; 0 without a teacher


def plan(training: TrainingRecipe, epoch: int) -> EpochPlan:
    """Return the plan of `epoch`, counted from 0.

    The first teacher starts with epoch `teacher_start`, and later ones with every epoch whose number `teacher_every`
    divides; the i-th value of `teacher_every` holds for epochs 10 i to 10 i + 9, the last one from then on. Alpha is
    `alpha_start` in the epoch of an update and rises by `alpha_step` per epoch to `alpha_end`.

    Source: TransFGU (Yin et al. 2022), the published training scripts.
    """
    updated = next((past for past in range(epoch, -1, -1) if _updates(training, past)), None)
    if updated is None:
        return EpochPlan(updates_teacher=False, has_teacher=False, alpha=0.0)
    alpha = min(training.alpha_start + training.alpha_step * (epoch - updated), training.alpha_end)
    return EpochPlan(updates_teacher=updated == epoch, has_teacher=True, alpha=alpha)


def _updates(training: TrainingRecipe, epoch: int) -> bool:
    if epoch <= training.teacher_start:
        return epoch == training.teacher_start
    every = training.teacher_every[min(epoch // SPAN, len(training.teacher_every) - 1)]
    return epoch % every == 0
