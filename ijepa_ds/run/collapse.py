"""Whether the health of a run shows signs of collapse, said once and not at every look.

The loss does not tell: it falls in a healthy start and in a collapse. So the signs are of the features, and two of them
must agree, for each alone has innocent causes (an untrained encoder may be dominated by the fixed positions, a rank may
settle while features are learnt).
"""

from __future__ import annotations

from collections.abc import Mapping

PAGE = "docs/own_images.md, 'What collapse looks like'"
LEAST_IMAGES = 16  # below, a rank of a few is all that there can be
# In eight healthy runs of this project (width 128, micro-batches of 32 and 128) the rank never was below 3.4, nor
# below half of its highest, and the cosine never above 0.96; a collapse goes past all three and on.
FEW_DIMENSIONS = 2.0  # rankme
FALLEN = 0.5  # share of the highest rankme so far
ONE_DIRECTION = 0.98  # mean cosine; the standard deviation over images says the same: D * std^2 is about 1 - cosine


class CollapseWatch:
    """Tells of a collapse when it is first seen, and again only if the features had recovered in between.

    Before the learning rate's warm-up is over, a low rank and a high cosine may be those of an encoder that has hardly
    been trained: until then one of the two signs must be a fall. What is remembered is of this process: a resumed run
    may have other micro-batches, whose ranks do not compare, and tells of a collapse that lasts once more.

    Args:
        trained_from: the step from which on the encoder counts as trained, the end of the warm-up.
    """

    def __init__(self, trained_from: int) -> None:
        self.trained_from = trained_from
        self._highest, self._highest_step = 0.0, 0
        self._told = False

    def look(self, step: int, signals: Mapping[str, float], *, num_images: int) -> str | None:
        """The line to say after ``step`` steps, if any.

        Args:
            signals: of :func:`ijepa_ds.run.health.health`; one that is NaN is no sign.
            num_images: that they were computed from; nothing is said of fewer than :data:`LEAST_IMAGES`.
        """
        if num_images < LEAST_IMAGES:
            return None
        rank, cosine = signals["rankme"], signals["mean_cosine"]
        if rank > self._highest:
            self._highest, self._highest_step = rank, step
        signs = []
        if fallen := rank < FALLEN * self._highest:
            signs.append(f"their rank has fallen from {self._highest:.1f} at step {self._highest_step} to {rank:.1f}")
        if rank < FEW_DIMENSIONS:
            signs.append(f"they use less than {FEW_DIMENSIONS:g} dimensions (rankme {rank:.2f})")
        if cosine > ONE_DIRECTION:
            signs.append(f"all images have nearly one feature (cosine {cosine:.3f})")
        if len(signs) < 2 or not (fallen or step >= self.trained_from):
            self._told = self._told and bool(signs)  # over only where no sign is left
            return None
        told, self._told = self._told, True
        if told:
            return None
        return f"warning: step {step} shows signs of collapse of the features: {', '.join(signs)}; see {PAGE}"
