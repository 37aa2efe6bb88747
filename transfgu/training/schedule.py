"""An epoch's plan follows from its number alone, so a run that is begun again anywhere needs no history.

Every few epochs the student becomes the teacher and a fresh student starts. The weight of the negative label, alpha,
counts epochs since then: a teacher is trusted most when it is new, and the student leans on it less and less.
"""

from dataclasses import dataclass

from transfgu.recipe import TrainingRecipe

SPAN = 10  # epochs that each value of `teacher_every` holds


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """What an epoch begins with."""

    updates_teacher: bool  # the student becomes the teacher, and restarts from its initial weights
    has_teacher: bool  # counting the one made now
    alpha: float  # weight of the negative label in the peer loss; 0 without a teacher


def plan(training: TrainingRecipe, epoch: int) -> EpochPlan:
    """The plan of `epoch`, counted from 0.

    The teacher is first made at the start of epoch `teacher_start`, and after that in every epoch whose number
    `teacher_every` divides; the i-th value of `teacher_every` is that of epochs 10 i to 10 i + 9, the last one from
    then on. Alpha is `alpha_start` in the epoch of an update and rises by `alpha_step` an epoch to `alpha_end`.

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
