"""The configuration of a run: a DeepSpeed JSON with one more object, ``"ijepa"``, that holds ours.

Everything is checked before anything is allocated, and all problems are reported together, each with its key, its value
and, for a misspelt key, the nearest valid one. ``python -m ijepa_ds.config_reference`` writes the schema and the table
of all settings anew.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ijepa_ds.deepspeed_settings import (
    BFloat16,
    CommsLogger,
    DataTypes,
    FlopsProfiler,
    Timers,
    TorchAutocast,
    ZeroOptimization,
)
from ijepa_ds.errors import UserError, listing
from ijepa_ds.validation import (
    Bounds,
    Checked,
    Count,
    Files,
    ImageSize,
    NotJSON,
    Pair,
    Triple,
    Unwieldy,
    check,
    check_levels,
    is_path,
    json_kind,
    load_json,
    must,
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
CHANGEABLE: dict[str, Any] = {"changeable_on_resume": True}  # in the metadata of a setting


def fixed(default: Any, description: str, **bounds: Any) -> Any:
    """A setting that a resumed run must share; ``...`` stands for no default."""
    return Field(default, description=description, **bounds)


def changeable_on_resume(default: Any, description: str, **bounds: Any) -> Any:
    """A setting that changes what is shown, kept or how fast, not what is learnt: a resumed run may change it."""
    return Field(default, description=description, json_schema_extra=CHANGEABLE, **bounds)


FolderName = Annotated[
    str,
    must(
        lambda name: name not in ("", "..") and is_path(name) and Path(name).name == name, "must be a plain folder name"
    ),
]
Batch = Annotated[int, Field(ge=1, le=10**9)]
Few = Annotated[int, Field(ge=1, le=1024)]
Share = Annotated[float, Field(ge=1e-3, le=1)]
Unit = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Below1 = Annotated[float, Field(ge=0, le=1 - 1e-9)]
Ratio = Annotated[float, Field(ge=0.05, le=20)]
Corrections = Annotated[
    list[Literal["random_cut", "free_corner", "last_row", "two_numbers"]],
    must(lambda names: len({*names}) == len(names), "names one twice"),
]
Width = Annotated[int, Field(ge=4, le=2**16, multiple_of=4)]  # 2-D sine-cosine positions need four parts


class RunConfig(Checked):
    """Which run this is."""

    name: FolderName = fixed(..., "its folder below `folder`")
    folder: Annotated[str, must(is_path, "cannot be the name of a folder")] = changeable_on_resume(
        "runs", "where the folders of runs are"
    )
    seed: int = fixed(0, "of order, crops, masks and initial weights", ge=0, le=2**63 - 1)
    stop_after_steps: Count | None = changeable_on_resume(
        None, "end after so many, with a checkpoint; the schedules keep their length"
    )
    start_from: Annotated[str, must(is_path, "cannot be the name of a file")] | None = changeable_on_resume(
        None, "a run's folder, or one of its checkpoints/step_N, that a new run of the same recipe goes on from"
    )
    silence_seconds: float = changeable_on_resume(
        60.0, "a process that gives no sign of life for so long counts as dead, and all others leave", ge=5, le=86400
    )
    deterministic: bool = changeable_on_resume(
        False, "the same bits again on the same GPUs, also after a resume; slower. A CPU always gives them"
    )
    nonfinite_steps: int = changeable_on_resume(
        20, "steps in a row with a loss or gradient that is not finite after which the run ends; 0: never", ge=0
    )


class DataConfig(Checked):
    """Images, as .beton files made by data_prep/to_ffcv.py."""

    # Files may move; the number of images is compared on a resume.
    train: Files = changeable_on_resume(..., "the .beton to learn from: a file, a pattern with *, or a list of them")
    validation: Files | None = changeable_on_resume(None, "the same with labels: kNN accuracy during training")
    image_size: ImageSize = fixed((224, 224), "rows and columns in pixels, or one number for both")
    crop_scale: Bounds[Share] = fixed((0.3, 1.0), "least and largest share of the image's area that a crop has")
    crop_ratio: Bounds[Annotated[float, Field(ge=0.1, le=10)]] = fixed((0.75, 4 / 3), "of a crop, width over height")
    mean: Triple[Unit] = fixed((0.485, 0.456, 0.406), "subtracted from red, green, blue; share of a pixel's range")
    std: Triple[Share] = fixed((0.229, 0.224, 0.225), "divides what is left; share of a pixel's range")
    flip: bool = fixed(False, "mirror every other image, by chance")
    workers: Few = changeable_on_resume(8, "decoding threads of each process")


class ModelConfig(Checked):
    """Sizes of encoder and predictor, which are vision transformers."""

    patch_size: int = fixed(..., "side of a patch in pixels", ge=1, le=256)
    encoder: str = fixed("huge", "tiny, small, base, large, huge, giant or any plain ViT of timm")
    width: Width | None = fixed(None, "of its tokens, instead of the named encoder's")
    depth: Few | None = fixed(None, "number of blocks, instead of the named encoder's")
    heads: Few | None = fixed(None, "attention heads, instead of the named encoder's")
    mlp_ratio: float | None = fixed(None, "hidden width of the MLPs over `width`, likewise", ge=0.1, le=1000)
    predictor_width: Width = fixed(384, "of the predictor's tokens")
    predictor_depth: Few = fixed(12, "number of blocks")
    predictor_heads: Few | None = fixed(None, "attention heads; null: as many as the encoder has")
    stochastic_positions: NotNegative = fixed(
        0.0, "variance of the noise on the mask tokens' positions (StoP, whose authors take 0.25); 0: none"
    )
    activation_checkpointing: bool = changeable_on_resume(
        False, "keep the activations of one block alone: less memory, about a third more arithmetic"
    )


class MasksConfig(Checked):
    """Which patches are seen and which are predicted; see ijepa_ds/method/masks.py."""

    sampler: Literal["multiblock", "reference"] = fixed("multiblock", "the paper's masks, or the released code's")
    num_targets: int = fixed(4, "target blocks of an image", ge=1, le=64)
    target_scale: Bounds[Share] = fixed((0.15, 0.2), "share of the image's area in a target block")
    target_aspect_ratio: Bounds[Ratio] = fixed((0.75, 1.5), "of a target block, height over width")
    context_scale: Bounds[Share] = fixed((0.85, 1.0), "share of the image's area in the context block")
    context_tokens: Count | None = fixed(None, "multiblock: patches that every image keeps; null: 72/256 of all")
    min_keep: int = fixed(10, "reference: a block holds more patches than this", ge=0)
    truncation_group: Count = fixed(128, "reference: images that share the smallest context's number of tokens")
    corrections: Corrections = fixed([], "reference: which of its peculiarities are mended; see docs/recipe.md")


class ObjectiveConfig(Checked):
    """What is predicted, and what the loss adds, beside the plain method; see docs/recipe.md."""

    contexts: int = fixed(
        1, "contexts of an image, each with targets of its own, that share its target pass", ge=1, le=16
    )
    target_layers: Few = fixed(1, "the target encoder's last blocks of whose normalised outputs targets are the mean")
    predict_share: Share = fixed(1.0, "share of each target block's patches that is predicted, drawn by chance")
    vicreg: NotNegative = fixed(0.0, "weight of variance and covariance of the mean context (C-JEPA); 0: none")
    vicreg_group: int = fixed(32, "images of which these are; it divides the micro-batch", ge=2, le=65536)
    vicreg_width: Annotated[int, Field(ge=0, le=2**16)] = fixed(256, "of the projection that they are of; 0: no such")
    vicreg_variance: NotNegative = fixed(25.0, "share of the variance in the weighted sum")
    vicreg_covariance: NotNegative = fixed(1.0, "share of the covariance")


class OptimizationConfig(Checked):
    """AdamW and its schedules; defaults are those of the released ViT-H/14 run."""

    epochs: float = fixed(300.0, "passes over the training images", ge=1e-6, le=1e6)
    warmup_epochs: NotNegative = fixed(40.0, "epochs in which the learning rate rises")
    schedule: Literal["cosine", "constant_then_cooldown"] = fixed(
        "cosine", "of the learning rate after the warm-up; the latter can be extended, or cooled down at any time"
    )
    cooldown_epochs: NotNegative = fixed(0.0, "constant_then_cooldown: last epochs, in which the learning rate falls")
    schedule_scale: float = fixed(1.0, "the schedules' length over the run's", ge=1e-3, le=100)
    lr_start: NotNegative = fixed(2e-4, "learning rate of the first step")
    lr_peak: NotNegative = fixed(1e-3, "learning rate after the warm-up")
    lr_final: NotNegative = fixed(1e-6, "learning rate at the schedule's end")
    weight_decay: Pair[NotNegative] = fixed((0.04, 0.4), "of weights, not of biases and norms; first and last")
    momentum: Pair[Unit] = fixed((0.996, 1.0), "of the target encoder's average, first and last")
    betas: Pair[Below1] = fixed((0.9, 0.999), "of AdamW")
    eps: NotNegative = fixed(1e-8, "of AdamW")


class MonitorConfig(Checked):
    """What is shown, and how often; 0 turns a part off."""

    log_steps: Count = changeable_on_resume(50, "steps from one line of scalars to the next")
    spike_deviations: NotNegative = changeable_on_resume(
        8.0, "standard deviations of a step's loss above the last 200 from which on a warning tells of it"
    )
    health_steps: int = changeable_on_resume(1000, "steps from one look at the features to the next", ge=0)
    picture_steps: int = changeable_on_resume(5000, "steps from one picture to the next", ge=0)
    knn_epochs: NotNegative = changeable_on_resume(10.0, "epochs from one kNN accuracy to the next")
    knn_train_images: Count = changeable_on_resume(50000, "labelled images among which neighbours are sought")
    knn_validation_images: Count = changeable_on_resume(10000, "images that are classified")
    mirror: Literal["wandb", "mlflow"] | None = changeable_on_resume(
        None, "the service whose package sends TensorBoard's scalars there, too; null: none"
    )


class CheckpointConfig(Checked):
    """A checkpoint is written every so many minutes or steps, whichever comes first, and at the end."""

    minutes: NotNegative = changeable_on_resume(30.0, "minutes from one checkpoint to the next; 0: by steps alone")
    steps: int = changeable_on_resume(0, "steps from one checkpoint to the next; 0: by minutes alone", ge=0)
    keep: Count = changeable_on_resume(2, "checkpoints that stay, the newest")
    background: bool = changeable_on_resume(
        True, "train on while one is written, from a copy in the host's memory; it needs as much of it as one is large"
    )
    keep_epochs: int = changeable_on_resume(
        0, "also write one every so many epochs, and keep these beside the newest; 0: none", ge=0
    )


class PipelineConfig(Checked):
    """The trained networks cut into stages, each on devices of its own; see docs/scaling.md."""

    stages: Count = changeable_on_resume(1, "parts that follow one another; 1: none, every process has it all (ZeRO)")
    largest_bubble: Unit = changeable_on_resume(
        0.2, "share of a stage's time, waiting for the first or last micro-batches, above which a run is refused"
    )


class IJEPAConfig(Checked):
    """The settings of this project."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    masks: MasksConfig = MasksConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    monitor: MonitorConfig = MonitorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    pipeline: PipelineConfig = PipelineConfig()
    compile: bool | None = changeable_on_resume(
        None, "torch.compile of the transformer blocks, for every shape before the first step; null: on GPUs"
    )


class ConfigFile(Checked):
    """DeepSpeed's keys that make sense here, and "ijepa". DeepSpeed ignores any other silently; here it is refused.

    null is as if a key were left out.
    """

    unknown: ClassVar[str] = "is not a key of DeepSpeed that this project uses"

    train_batch_size: Batch = fixed(..., "images of one optimizer step, over all processes")
    train_micro_batch_size_per_gpu: Batch = changeable_on_resume(..., "images of one forward pass of one process")
    zero_optimization: ZeroOptimization = changeable_on_resume(ZeroOptimization(), "ZeRO's `stage` and its other keys")
    bf16: BFloat16 = fixed(BFloat16(), 'bf16 weights with fp32 masters: {"enabled": true}')
    torch_autocast: TorchAutocast = fixed(
        TorchAutocast(), 'fp32 weights under autocast: {"enabled": true, "dtype": "bfloat16"}'
    )
    data_types: DataTypes = changeable_on_resume(DataTypes(), "of what is summed")
    gradient_clipping: NotNegative | None = fixed(0.0, "largest gradient norm; 0: none, as I-JEPA has it")
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = changeable_on_resume(
        None, "of gradients between processes; null: that of the sums"
    )
    prescale_gradients: bool | None = changeable_on_resume(None, "divide gradients before they are summed")
    gradient_predivide_factor: Annotated[float, Field(ge=1e-6, le=1e6)] | None = changeable_on_resume(
        None, "by what prescale_gradients divides"
    )
    gradient_allreduce_op: Literal["mean", "sum"] | None = changeable_on_resume(
        None, "how gradients of processes are joined"
    )
    steps_per_print: Count | None = changeable_on_resume(10**9, "from one line of DeepSpeed's own to the next")
    wall_clock_breakdown: bool | None = changeable_on_resume(None, "print the time of forward, backward and step")
    memory_breakdown: bool | None = changeable_on_resume(None, "print the memory in use")
    dump_state: bool | None = changeable_on_resume(None, "print the engine's state")
    disable_python_gc: bool | None = changeable_on_resume(None, "collect no garbage while training")
    comms_logger: CommsLogger | None = changeable_on_resume(None, "log communication")
    flops_profiler: FlopsProfiler | None = changeable_on_resume(None, "profile a step's arithmetic")
    timers: Timers | None = changeable_on_resume(None, "DeepSpeed's timers: `throughput`")
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = changeable_on_resume(
        None, "of DeepSpeed's messages"
    )
    zero_allow_untested_optimizer: bool | None = changeable_on_resume(
        True, "always true: the optimizer is torch's AdamW"
    )
    ijepa: IJEPAConfig


DEEPSPEED_KEYS = frozenset(ConfigFile.model_fields) - {"ijepa"}


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
    problems += more + (_disagreements_of_deepspeed(file) if file else []) + _disagreements(raw, ijepa)
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


def _disagreements(raw: dict[str, Any], ijepa: IJEPAConfig | None) -> list[str]:
    """What is wrong with several settings at once, as far as each is right by itself."""
    problems = []
    if all(isinstance(raw.get(key), dict) and raw[key].get("enabled") for key in ("bf16", "torch_autocast")):
        problems.append("bf16.enabled and torch_autocast.enabled exclude each other; turn one off")
    zero = raw.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("overlap_comm") and zero.get("contiguous_gradients") is False:
        problems.append(
            "zero_optimization.contiguous_gradients = false waits for the GPU at every bucket of "
            "overlap_comm; leave it out"
        )
    if ijepa is not None:
        problems += _disagreements_of_ours(ijepa)
        if ijepa.pipeline.stages > 1:
            problems += _disagreements_with_stages(raw, ijepa.pipeline.stages)
    batch, micro = raw.get("train_batch_size"), raw.get("train_micro_batch_size_per_gpu")
    if type(batch) is type(micro) is int and min(batch, micro) >= 1:
        if batch % micro:
            problems.append(f"train_micro_batch_size_per_gpu = {micro} does not divide train_batch_size = {batch}")
        stages = ijepa.pipeline.stages if ijepa is not None else 1
        if micro % stages:
            problems.append(
                f"train_micro_batch_size_per_gpu = {micro} does not divide by ijepa.pipeline.stages = {stages}, whose "
                "processes share the target encoder's work on a micro-batch"
            )
        if ijepa is not None and ijepa.objective.vicreg and micro % ijepa.objective.vicreg_group:
            problems.append(
                f"ijepa.objective.vicreg_group = {ijepa.objective.vicreg_group} does not divide "
                f"train_micro_batch_size_per_gpu = {micro}: a group's images lie in one micro-batch"
            )
        group = ijepa.masks.truncation_group if ijepa is not None and ijepa.masks.sampler == "reference" else batch
        if group != batch and (group % micro or batch % group):
            problems.append(
                f"ijepa.masks.truncation_group = {group} must be a multiple of train_micro_batch_size_per_gpu = "
                f"{micro} and divide train_batch_size = {batch}: its images share one number of context tokens"
            )
    return problems


def _disagreements_of_deepspeed(file: ConfigFile) -> list[str]:
    problems, zero, bf16 = [], file.zero_optimization, file.bf16.enabled
    sums = file.data_types.grad_accum_dtype
    if zero.stage == 0 and sums not in (None, "bf16" if bf16 else "fp32"):
        problems.append(
            f"data_types.grad_accum_dtype = {sums} needs zero_optimization.stage = 1 or 2; without, sums are as the "
            "weights are: leave it out"
        )
    fp32_sums_of_bf16 = bf16 and ("grad_accum_dtype" not in file.data_types.model_fields_set or sums == "fp32")
    if not zero.compute_grad_norm and (zero.stage == 0 or (zero.stage == 1 and fp32_sums_of_bf16)):
        problems.append(
            f"zero_optimization.compute_grad_norm = false does not go with stage = {zero.stage}"
            f"{' and fp32 sums of bf16 gradients' if zero.stage else ''}; leave it out"
        )
    divides = file.prescale_gradients or file.gradient_predivide_factor not in (None, 1)
    if zero.stage == 2 and zero.reduce_scatter and divides:
        problems.append(
            "prescale_gradients and gradient_predivide_factor do not go with zero_optimization.stage = 2 and its "
            "reduce_scatter; leave them out"
        )
    return problems


def _disagreements_with_stages(raw: dict[str, Any], stages: int) -> list[str]:
    problems, zero = [], raw.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage != 1:
        problems.append(
            f"zero_optimization.stage = {stage} does not go with ijepa.pipeline.stages = {stages}; "
            "set 1: a pipeline adds up whole gradients and shards AdamW's state"
        )
    if raw.get("wall_clock_breakdown"):
        problems.append(
            f"wall_clock_breakdown = true does not go with ijepa.pipeline.stages = {stages}: DeepSpeed would start a "
            "timer twice, and end; leave it out"
        )
    return problems


def _disagreements_of_objective(ijepa: IJEPAConfig) -> list[str]:
    objective, problems = ijepa.objective, []
    if ijepa.masks.corrections and ijepa.masks.sampler != "reference":
        problems.append(
            f"ijepa.masks.corrections are of ijepa.masks.sampler = reference; {ijepa.masks.sampler} needs none: leave "
            "them out"
        )
    if objective.contexts > 1 and ijepa.masks.sampler == "reference":
        problems.append(
            f"ijepa.objective.contexts = {objective.contexts} does not go with ijepa.masks.sampler = reference, whose "
            "groups share a number of context tokens; use multiblock"
        )
    if objective.contexts > 1 and ijepa.pipeline.stages > 1:
        problems.append(
            f"ijepa.objective.contexts = {objective.contexts} does not go with ijepa.pipeline.stages = "
            f"{ijepa.pipeline.stages}, which hand one context an image from stage to stage; leave one of them out"
        )
    return problems


def _disagreements_of_schedule(optimization: OptimizationConfig) -> list[str]:
    problems, length = [], optimization.epochs * optimization.schedule_scale
    if optimization.warmup_epochs > length:
        problems.append(
            f"ijepa.optimization.warmup_epochs = {optimization.warmup_epochs:g} is longer than the "
            f"{optimization.epochs:g} epochs of the run"
        )
    if optimization.schedule == "cosine":
        if optimization.cooldown_epochs:
            problems.append(
                f"ijepa.optimization.cooldown_epochs = {optimization.cooldown_epochs:g} needs "
                "ijepa.optimization.schedule = constant_then_cooldown; a cosine falls all the time"
            )
        return problems
    if optimization.schedule_scale != 1:
        problems.append(
            f"ijepa.optimization.schedule_scale = {optimization.schedule_scale:g} is a cosine's; leave it out of "
            "constant_then_cooldown"
        )
    if optimization.warmup_epochs + optimization.cooldown_epochs > optimization.epochs:
        problems.append(
            f"ijepa.optimization.cooldown_epochs = {optimization.cooldown_epochs:g} and warmup_epochs = "
            f"{optimization.warmup_epochs:g} are together longer than the {optimization.epochs:g} epochs of the run"
        )
    return problems


def _disagreements_of_ours(ijepa: IJEPAConfig) -> list[str]:
    model = ijepa.model
    problems = []
    for side in sorted(set(ijepa.data.image_size)):
        if side % model.patch_size:
            near = max(1, round(side / model.patch_size)) * model.patch_size
            problems.append(
                f"ijepa.model.patch_size = {model.patch_size} does not divide ijepa.data.image_size = {side}; "
                f"use an image size of {near}"
            )
    problems += _disagreements_of_schedule(ijepa.optimization) + _disagreements_of_objective(ijepa)
    if model.width and model.heads and model.width % model.heads:
        problems.append(f"ijepa.model.width = {model.width} does not divide by ijepa.model.heads = {model.heads}")
    return problems
