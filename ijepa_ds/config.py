"""The configuration of a run: a DeepSpeed JSON with one more object, ``"ijepa"``, that holds ours.

Everything is checked before anything is allocated, and all problems are reported together, each with its key, its value
and, for a misspelt key, the nearest valid one.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa_ds.config_rules import disagreements, disagreements_of_deepspeed
from ijepa_ds.errors import UserError, listing
from ijepa_ds.settings import CHANGEABLE, ConfigFile, IJEPAConfig
from ijepa_ds.validation import (
    Checked,
    NotJSON,
    Unwieldy,
    check,
    check_levels,
    json_kind,
    load_json,
    parse_json,
    reason,
)

_OURS_INSTEAD = {
    "optimizer": "the optimizer is AdamW; set it in ijepa.optimization",
    "scheduler": "learning rate, weight decay and momentum are schedules of ijepa.optimization",
    "gradient_accumulation_steps": "it is derived from train_batch_size, train_micro_batch_size_per_gpu and the "
    "number of processes, so that one file serves any number of GPUs; leave it out",
    "fp16": "fp16 needs loss scaling, which the target encoder's average does not follow; use bf16",
    "activation_checkpointing": "set ijepa.model.activation_checkpointing",
    "checkpoint": "set ijepa.checkpoint",
    "compile": "set ijepa.compile",
    "tensorboard": "scalars are written to the run folder; see ijepa.monitor",
    "amp": "use bf16 or torch_autocast",
}


@dataclass(frozen=True)
class Config:
    """A checked configuration: ``deepspeed`` is what DeepSpeed gets, ``ijepa`` is ours."""

    deepspeed: dict[str, Any]
    ijepa: IJEPAConfig

    @property
    def global_batch(self) -> int:
        """Images of one optimizer step."""
        return self.deepspeed["train_batch_size"]

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass of one process."""
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.ijepa.model.patch_size
        return self.ijepa.data.image_size[0] // patch, self.ijepa.data.image_size[1] // patch

    def as_dict(self) -> dict[str, Any]:
        """The effective configuration, as it would stand in a file."""
        return {**copy.deepcopy(self.deepspeed), "ijepa": self.ijepa.model_dump(mode="json")}

    def changed(self, section: str, **values: Any) -> Config:
        """The configuration with other values in one section of ``ijepa``; they are not checked."""
        part = getattr(self.ijepa, section).model_copy(update=values)
        return dataclasses.replace(self, ijepa=self.ijepa.model_copy(update={section: part}))

    def recipe(self) -> dict[str, Any]:
        """Key -> value of everything that a resumed run must share: all but :func:`changeable_on_resume` settings."""
        values = {key: self.deepspeed.get(key) for key in _fixed_settings(ConfigFile)}
        for name, section in self.ijepa:
            if isinstance(section, Checked):
                plain = section.model_dump(mode="json")
                values |= {f"ijepa.{name}.{key}": plain[key] for key in _fixed_settings(type(section))}
        return values


def _fixed_settings(model: type[Checked]) -> list[str]:
    return [
        name for name, field in model.model_fields.items() if field.json_schema_extra != CHANGEABLE and name != "ijepa"
    ]


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a JSON file, apply ``KEY=JSON`` overrides and check it; :class:`UserError` lists every problem."""
    try:
        raw = load_json(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the files that come with the project are in ds_configs/") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); give a file of ds_configs/") from None
    except Unwieldy as error:
        raise UserError(f"{path} is no configuration ({error}); mend it there") from None
    except NotJSON as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it there") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold one JSON object, not {json_kind(raw)}")
    for override in overrides or []:
        apply_override(raw, override)
    return parse_config(raw, source=str(path))


def parse_config(raw: dict[str, Any], *, source: str = "config") -> Config:
    """Check a configuration given as a dictionary; :class:`UserError` lists every problem."""
    try:
        check_levels(raw)
    except Unwieldy as error:
        raise UserError(f"{source} is no configuration ({error}); mend it there") from None
    raw = {key: value for key, value in raw.items() if key != "$schema"}
    problems = [f"{key} is not used here: {_OURS_INSTEAD[key]}" for key in raw if key in _OURS_INSTEAD]
    file, more = check(ConfigFile, {key: value for key, value in raw.items() if key not in _OURS_INSTEAD})
    ijepa = file.ijepa if file else check(IJEPAConfig, raw.get("ijepa"))[0]
    problems += more + (disagreements_of_deepspeed(file) if file else []) + disagreements(raw, ijepa)
    if problems or ijepa is None:
        raise UserError(f"{source} has {len(problems)} problem{'s' * (len(problems) > 1)}:{listing(problems)}")
    return Config(_for_deepspeed(raw), ijepa)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value of a configuration as it stands in a file; ``override`` is KEY=JSON with a dotted key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override} is not KEY=JSON, such as --set ijepa.data.workers=4")
    try:
        value = parse_json(text)
    except Unwieldy as error:
        raise UserError(f"--set {key} cannot be taken ({error}); give another value") from None
    except NotJSON:
        value = text  # a bare word is a string; where a number belongs, the type check refuses it
    *parents, last = key.split(".")
    place = raw
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {override}: '{parent}' is not an object, so nothing can be set inside it")
    place[last] = value


def _for_deepspeed(raw: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed gets, with defaults that differ from its own, each for the reason given."""
    config = copy.deepcopy({key: value for key, value in raw.items() if key != "ijepa" and value is not None})
    for key in ("zero_optimization", "bf16", "torch_autocast", "data_types"):
        config.setdefault(key, {})
    config.setdefault("gradient_clipping", 0.0)  # DeepSpeed clips at 1.0 since mid-2026; I-JEPA does not clip
    config.setdefault("steps_per_print", 10**9)  # our monitor reports
    config["zero_allow_untested_optimizer"] = True  # torch's AdamW
    zero = config["zero_optimization"]
    if zero.get("stage", 0):
        # A bucket travels while backward goes on, all but the last one: few large ones (5e8 by default) overlap little.
        zero.setdefault("reduce_bucket_size", 50_000_000)
        if config["bf16"].get("enabled"):
            config["data_types"].setdefault("grad_accum_dtype", "fp32")  # bf16 sums lose small gradients
    return config
