"""The tasks of the evaluation. Each measures one candidate at a time, the trained encoder and its baselines alike.

All processes call them together, and the main one's measurements are kept. To add one, write its function and name it
in :data:`TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.labels import Classes
from ijepa_ds.evaluation.probes.recipes import COUNT, DEPTH
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import Setting, any_classes, class_fields, depth_bins, integer_classes, own_field
from ijepa_ds.evaluation.tasks.attentive import attentive
from ijepa_ds.evaluation.tasks.dense import DenseTask
from ijepa_ds.evaluation.tasks.feature_probes import knn, logistic
from ijepa_ds.evaluation.tasks.head_grids import head_grids, linear, transfer
from ijepa_ds.evaluation.tasks.lowshot import few_labels, lowshot


@dataclass(frozen=True)
class Task:
    """How labels are measured, which they are where none is asked for, and how they become classes."""

    measure: Callable[[Setting, Candidate, dict[str, Classes]], Iterator[Measurement]]
    fields: Callable[[Setting], list[str]] = class_fields
    classes: Callable[[Setting, str], Classes] = any_classes

    def prepare(self, setting: Setting) -> dict[str, Classes]:
        """The classes of each label; what measuring would stumble over is refused (:class:`UserError`)."""
        return {field: self.classes(setting, field) for field in self.fields(setting)}


TASKS: dict[str, Task | DenseTask] = {
    "logistic": Task(logistic, Setting.fields),
    "knn": Task(knn, Setting.fields),
    "linear": Task(linear),
    "count": Task(  # Clevr/Count: the number of objects
        partial(head_grids, task="count", recipe=COUNT, regression=True),
        partial(own_field, name="count"),
        integer_classes,
    ),
    "depth": Task(  # Clevr/Dist: the depth of the nearest object, in six bins
        partial(head_grids, task="depth", recipe=DEPTH, regression=True), partial(own_field, name="depth"), depth_bins
    ),
    "transfer": Task(transfer),
    "lowshot": Task(lowshot, classes=few_labels),
    "attentive": Task(attentive),
    "dense": DenseTask(),
}
DEFAULT_TASKS = ("logistic", "knn")
