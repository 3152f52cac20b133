"""The tasks of the evaluation. Each measures one candidate at a time, the trained encoder and its baselines alike.

A task is a function of a :class:`~ijepa_ds.evaluation.setting.Setting` and a
:class:`~ijepa_ds.evaluation.candidates.Candidate` that gives measurements; all processes call it together, and the main
one's are kept. To add one, write the function and name it in :data:`TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable

from ijepa_ds.evaluation.candidates import Candidate
from ijepa_ds.evaluation.labels import classes_of
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import Setting, any_classes, class_fields, depth_bins, own_field
from ijepa_ds.evaluation.subsets import subsets
from ijepa_ds.evaluation.tasks.attentive import attentive
from ijepa_ds.evaluation.tasks.feature_probes import knn, logistic
from ijepa_ds.evaluation.tasks.head_grids import count, depth, linear, transfer
from ijepa_ds.evaluation.tasks.lowshot import lowshot

TASKS: dict[str, Callable[[Setting, Candidate], list[Measurement]]] = {
    "logistic": logistic,
    "knn": knn,
    "linear": linear,
    "count": count,
    "depth": depth,
    "transfer": transfer,
    "lowshot": lowshot,
    "attentive": attentive,
}
DEFAULT_TASKS = ("logistic", "knn")


def check_tasks(setting: Setting, tasks: list[str]) -> None:
    """Refuse what the last of ``tasks`` would stumble over before the first has run for hours.

    Raises:
        UserError: a label or classes that a task cannot use.
    """
    for task in tasks:
        if task == "count":
            field = own_field(setting, task)
            classes_of(field, *setting.data.labels(field))
        elif task == "depth":
            depth_bins(setting, own_field(setting, task))
        else:
            every = task in ("logistic", "knn") and not setting.options.label
            for field in setting.data.fields if every else class_fields(setting):
                any_classes(setting, field)
                if task == "lowshot":
                    subsets(setting, field)
