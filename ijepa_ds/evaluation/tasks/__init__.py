"""The tasks of the evaluation. Each measures one encoder at a time, the trained one and its baselines alike."""

from __future__ import annotations

from collections.abc import Callable

from ijepa_ds.evaluation.candidates import Encoder
from ijepa_ds.evaluation.labels import classes_of
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import Setting, any_classes, class_fields, depth_bins, own_field
from ijepa_ds.evaluation.subsets import subsets
from ijepa_ds.evaluation.tasks.attentive import attentive
from ijepa_ds.evaluation.tasks.feature_probes import knn, logistic
from ijepa_ds.evaluation.tasks.head_grids import count, depth, linear, transfer
from ijepa_ds.evaluation.tasks.lowshot import lowshot


def check_tasks(setting: Setting, tasks: list[str]) -> None:
    """Refuse what the last of ``tasks`` would stumble over before the first has run for hours.

    Raises:
        UserError: a label or classes that a task cannot use.
    """
    for task in tasks:
        if task in ("logistic", "knn"):
            fields = setting.labels or setting.data.fields
        else:
            fields = (own_field(setting, task),) if task in ("count", "depth") else class_fields(setting)
        for field in fields:
            if task == "count":
                classes_of(field, *setting.data.labels(field))
            elif task == "depth":
                depth_bins(setting, field)
            else:
                any_classes(setting, field)
            if task == "lowshot":
                subsets(setting, field)


Measure = Callable[[Setting, Encoder], list[Measurement]]


TASKS: dict[str, Measure] = {
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
