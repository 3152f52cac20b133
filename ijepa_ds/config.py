"""The configuration of a run: a DeepSpeed JSON with one more object, ``"ijepa"``, that holds ours.

Everything is checked before anything is allocated, and all problems are reported together, each with its key, its value
and, for a misspelt key, the nearest valid one.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ijepa_ds.errors import UserError

# DeepSpeed's own top-level keys that make sense here. DeepSpeed ignores any other silently, so we refuse it.
DEEPSPEED_KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_optimization",
        "bf16",
        "torch_autocast",
        "data_types",
        "gradient_clipping",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "gradient_allreduce_op",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "disable_python_gc",
        "comms_logger",
        "flops_profiler",
        "timers",
        "log_level",
        "zero_allow_untested_optimizer",
    }
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


def within(low: float, high: float = math.inf, **more: Any) -> Any:
    """A field whose number, or each of whose numbers, lies in [low, high]."""
    return field(**more, metadata={"low": low, "high": high})


def free(default: Any, low: float = -math.inf) -> Any:
    """A field that may differ when a run is resumed: it changes what is shown, kept or how fast, not what is learnt."""
    return field(default=default, metadata={"free": True, "low": low, "high": math.inf})


@dataclass(frozen=True)
class RunConfig:
    """Which run this is."""

    name: str  # its folder below `folder`
    folder: str = free("runs")
    seed: int = within(0, 2**63 - 1, default=0)  # of order, crops, masks and initial weights
    stop_after_steps: int | None = free(None, 1)  # end early, with a checkpoint; the schedules keep their length


@dataclass(frozen=True)
class DataConfig:
    """Images, as .beton files made by data_prep/to_ffcv.py."""

    train: str = field(metadata={"free": True})  # files may move; the number of images is compared on a resume
    validation: str | None = free(None)  # with labels: kNN accuracy during training
    image_size: tuple[int, int] = within(4, 4096, default=(224, 224))  # (rows, columns) or one number, pixels
    crop_scale: tuple[float, float] = within(1e-3, 1, default=(0.3, 1.0))  # share of the image's area
    crop_ratio: tuple[float, float] = within(0.1, 10, default=(0.75, 4 / 3))  # width over height
    mean: tuple[float, float, float] = within(0, 1, default=(0.485, 0.456, 0.406))  # ImageNet's, of a pixel's range
    std: tuple[float, float, float] = within(1e-3, 1, default=(0.229, 0.224, 0.225))
    workers: int = free(8, 1)  # decoding threads of each process


@dataclass(frozen=True)
class ModelConfig:
    """Sizes. ``encoder``: tiny to giant or any plain ViT of timm; width, depth, heads and mlp_ratio override it."""

    patch_size: int = within(1, 256)
    encoder: str = "huge"
    width: int | None = within(4, default=None)
    depth: int | None = within(1, default=None)
    heads: int | None = within(1, default=None)
    mlp_ratio: float | None = within(0.1, default=None)
    predictor_width: int = within(4, default=384)
    predictor_depth: int = within(1, default=12)
    predictor_heads: int | None = within(1, default=None)  # as many as the encoder
    activation_checkpointing: bool = free(False)


@dataclass(frozen=True)
class MasksConfig:
    """Mask sampler; see ijepa_ds/method/masks.py."""

    sampler: Literal["multiblock", "reference"] = "multiblock"
    num_targets: int = within(1, 64, default=4)
    target_scale: tuple[float, float] = within(1e-3, 1, default=(0.15, 0.2))  # share of the image's area
    target_aspect_ratio: tuple[float, float] = within(0.05, 20, default=(0.75, 1.5))  # height over width
    context_scale: tuple[float, float] = within(1e-3, 1, default=(0.85, 1.0))
    context_tokens: int | None = within(1, default=None)  # multiblock: K of every image; 72/256 of the patches
    min_keep: int = within(0, default=10)  # reference: a block holds more patches than this
    truncation_group: int = within(1, default=128)  # reference: images that share the smallest context


@dataclass(frozen=True)
class OptimizationConfig:
    """AdamW and its schedules; defaults are those of the released ViT-H/14 run."""

    epochs: float = within(1e-6, 1e6, default=300.0)
    warmup_epochs: float = within(0, default=40.0)
    schedule_scale: float = within(1e-3, 100, default=1.0)  # the schedules' length over the run's
    lr_start: float = within(0, default=2e-4)
    lr_peak: float = within(0, default=1e-3)
    lr_final: float = within(0, default=1e-6)
    weight_decay: tuple[float, float] = within(0, default=(0.04, 0.4))
    momentum: tuple[float, float] = within(0, 1, default=(0.996, 1.0))
    betas: tuple[float, float] = within(0, 1, default=(0.9, 0.999))
    eps: float = within(0, default=1e-8)


@dataclass(frozen=True)
class MonitorConfig:
    """What is shown, and how often; 0 turns a part off."""

    log_steps: int = free(50, 1)
    health_steps: int = free(1000, 0)
    picture_steps: int = free(5000, 0)
    knn_epochs: float = free(10.0, 0)
    knn_train_images: int = free(50000, 1)
    knn_validation_images: int = free(10000, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint is written every so many minutes or steps, whichever comes first, and at the end."""

    minutes: float = free(30.0, 0)
    steps: int = free(0, 0)  # 0: by minutes alone
    keep: int = free(2, 1)


@dataclass(frozen=True)
class IJEPAConfig:
    """The "ijepa" object."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    masks: MasksConfig = MasksConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compile: bool = free(False)  # torch.compile of each transformer block


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

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 2."""
        return self.deepspeed["zero_optimization"].get("stage", 0)

    def as_dict(self) -> dict[str, Any]:
        """The effective configuration, as it would stand in a file."""
        return {**copy.deepcopy(self.deepspeed), "ijepa": _plain(dataclasses.asdict(self.ijepa))}

    def recipe(self) -> dict[str, Any]:
        """Key -> value of everything that a resumed run must share; see :func:`free`."""
        values = {"train_batch_size": self.global_batch}
        for section in dataclasses.fields(self.ijepa):
            part = getattr(self.ijepa, section.name)
            for item in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
                if not item.metadata.get("free"):
                    values[f"ijepa.{section.name}.{item.name}"] = _plain(getattr(part, item.name))
        for key in ("bf16", "torch_autocast", "gradient_clipping"):
            values[key] = self.deepspeed.get(key)
        return values


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a JSON file, apply ``KEY=JSON`` overrides and check it; :class:`UserError` lists every problem."""
    try:
        raw = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the files that come with the project are in ds_configs/") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it there") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold one JSON object, not {_kind(raw)}")
    for override in overrides or []:
        apply_override(raw, override)
    return parse_config(raw, source=str(path))


def parse_config(raw: dict[str, Any], *, source: str = "config") -> Config:
    """Check a configuration given as a dictionary; :class:`UserError` lists every problem."""
    problems: list[str] = []
    deepspeed = _check_deepspeed({key: value for key, value in raw.items() if key != "ijepa"}, problems)
    ijepa = _read(IJEPAConfig, raw.get("ijepa", {}), "ijepa", problems)
    if ijepa is not None:
        _check_together(ijepa, deepspeed, problems)
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"{source} has {len(problems)} problem{'s' * (len(problems) > 1)}:{lines}")
    return Config(deepspeed, ijepa)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value of a configuration as it stands in a file; ``override`` is KEY=JSON with a dotted key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override} is not KEY=JSON, such as --set ijepa.data.workers=4")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text  # a bare word is a string; where a number belongs, the type check refuses it
    *parents, last = key.split(".")
    place = raw
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {override}: '{parent}' is not an object, so nothing can be set inside it")
    place[last] = value


def _check_deepspeed(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    for key in raw:
        if key in _OURS_INSTEAD:
            problems.append(f"{key} is not used here: {_OURS_INSTEAD[key]}")
        elif key not in DEEPSPEED_KEYS:
            problems.append(
                f"{key} is not a key of DeepSpeed that this project uses{_nearest(key, {*DEEPSPEED_KEYS, 'ijepa'})}"
            )
    config = copy.deepcopy(raw)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{key} must be a whole number of images of at least 1, not {json.dumps(value)}")
    for key in ("zero_optimization", "bf16", "torch_autocast", "data_types"):
        if not isinstance(config.setdefault(key, {}), dict):
            problems.append(f"{key} must be an object, not {_kind(config[key])}")
            config[key] = {}
    zero = config["zero_optimization"]
    if zero.get("stage", 0) not in (0, 1, 2):
        problems.append(
            f"zero_optimization.stage = {json.dumps(zero.get('stage'))} cannot be used: stage 3 would shard the "
            "weights that the target encoder's average is taken from; set 2, which holds even ViT-g on one 80 GB GPU"
        )
    if zero.get("round_robin_gradients"):
        problems.append("zero_optimization.round_robin_gradients breaks reading the fp32 weights; leave it out")
    for key in ("offload_optimizer", "offload_param", "cpu_offload"):
        if zero.get(key):
            problems.append(
                f"zero_optimization.{key} is not supported: the target encoder's average lives beside the fp32 weights"
            )
    if config["bf16"].get("enabled") and config["torch_autocast"].get("enabled"):
        problems.append("bf16.enabled and torch_autocast.enabled exclude each other; turn one off")
    _fill_deepspeed(config)
    return config


def _fill_deepspeed(config: dict[str, Any]) -> None:
    """Defaults that differ from DeepSpeed's own, each for the reason given."""
    config.setdefault("gradient_clipping", 0.0)  # DeepSpeed clips at 1.0 since mid-2026; I-JEPA does not clip
    config.setdefault("steps_per_print", 10**9)  # our monitor reports
    config["zero_allow_untested_optimizer"] = True  # torch's AdamW
    zero = config["zero_optimization"]
    if zero.get("stage", 0):
        zero.setdefault("reduce_bucket_size", 200_000_000)  # the default of 5e8 elements takes 1 to 2 GB
        zero.setdefault("allgather_bucket_size", 200_000_000)
        if config["bf16"].get("enabled"):
            config["data_types"].setdefault("grad_accum_dtype", "fp32")  # bf16 sums lose small gradients


def _read(kind: type, raw: Any, prefix: str, problems: list[str]) -> Any:
    """An instance of a config dataclass, or None with the reasons in ``problems``."""
    if not isinstance(raw, dict):
        problems.append(f"{prefix} must be an object, not {_kind(raw)}")
        return None
    before = len(problems)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in raw:
        if key not in fields:
            problems.append(f"{prefix}.{key} is not a setting{_nearest(key, fields)}")
    values = {}
    for name, item in fields.items():
        key = f"{prefix}.{name}"
        if name in raw and dataclasses.is_dataclass(hints[name]):
            values[name] = _read(hints[name], raw[name], key, problems)
        elif name in raw:
            values[name] = _convert(raw[name], hints[name], key, item.metadata, problems)
        elif item.default is dataclasses.MISSING:
            if dataclasses.is_dataclass(hints[name]):
                values[name] = _read(hints[name], {}, key, problems)
            else:
                problems.append(f"{key} is missing")
    return kind(**values) if len(problems) == before else None


def _convert(value: Any, hint: Any, key: str, metadata: Any, problems: list[str]) -> Any:
    shown = json.dumps(value)
    options = [hint] if not isinstance(hint, types.UnionType) else list(typing.get_args(hint))
    if value is None and type(None) in options:
        return None
    hint = next(option for option in options if option is not type(None))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            problems.append(f"{key} = {shown} must be one of {', '.join(choices)}{_nearest(str(value), choices)}")
        return value
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if len(parts) == 2 and parts[0] is int and _is_number(value):
            value = [value, value]
        if not isinstance(value, list) or len(value) != len(parts):
            problems.append(f"{key} = {shown} must be a list of {len(parts)} numbers")
            return None
        return tuple(_convert(v, part, key, metadata, problems) for v, part in zip(value, parts, strict=True))
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint]
    fits = {int: _is_whole(value), float: _is_number(value), bool: isinstance(value, bool), str: isinstance(value, str)}
    if not fits[hint]:
        problems.append(f"{key} = {shown} must be {expected}")
        return None
    if hint in (int, float):
        low, high = metadata.get("low", -math.inf), metadata.get("high", math.inf)
        if not low <= value <= high:
            problems.append(f"{key} = {shown} must lie between {low:g} and {high:g}")
    return hint(value)


def _check_together(ijepa: IJEPAConfig, deepspeed: dict[str, Any], problems: list[str]) -> None:
    """What concerns several settings at once."""
    data, model, masks, optimization = ijepa.data, ijepa.model, ijepa.masks, ijepa.optimization
    for side in sorted(set(data.image_size)):
        if side % model.patch_size:
            near = max(1, round(side / model.patch_size)) * model.patch_size
            problems.append(
                f"ijepa.model.patch_size = {model.patch_size} does not divide ijepa.data.image_size = {side}; "
                f"use an image size of {near}"
            )
    for key, (low, high) in {
        "data.crop_scale": data.crop_scale,
        "data.crop_ratio": data.crop_ratio,
        "masks.target_scale": masks.target_scale,
        "masks.target_aspect_ratio": masks.target_aspect_ratio,
        "masks.context_scale": masks.context_scale,
    }.items():
        if low > high:
            problems.append(f"ijepa.{key} = [{low:g}, {high:g}] must be given as [smallest, largest]")
    if optimization.warmup_epochs > optimization.epochs * optimization.schedule_scale:
        problems.append(
            f"ijepa.optimization.warmup_epochs = {optimization.warmup_epochs:g} is longer than the "
            f"{optimization.epochs:g} epochs of the run"
        )
    for name in ("width", "predictor_width"):
        width = getattr(model, name)
        if width is not None and width % 4:
            problems.append(f"ijepa.model.{name} = {width} must divide by 4 to hold 2-D sine-cosine positions")
    if model.width and model.heads and model.width % model.heads:
        problems.append(f"ijepa.model.width = {model.width} does not divide by ijepa.model.heads = {model.heads}")
    if ijepa.run.name in ("", "..") or Path(ijepa.run.name).name != ijepa.run.name:
        problems.append(f"ijepa.run.name = {json.dumps(ijepa.run.name)} must be a plain folder name")
    batch, micro = deepspeed.get("train_batch_size"), deepspeed.get("train_micro_batch_size_per_gpu")
    if _is_whole(batch) and _is_whole(micro) and min(batch, micro) >= 1:
        if batch % micro:
            problems.append(f"train_micro_batch_size_per_gpu = {micro} does not divide train_batch_size = {batch}")
        group = masks.truncation_group
        if masks.sampler == "reference" and (group % micro or batch % group):
            problems.append(
                f"ijepa.masks.truncation_group = {group} must be a multiple of train_micro_batch_size_per_gpu = "
                f"{micro} and divide train_batch_size = {batch}: its images share one number of context tokens"
            )


def _nearest(key: str, valid: Any) -> str:
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(sorted(valid))}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    return json.loads(json.dumps(value))
