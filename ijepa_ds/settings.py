"""What a configuration's file may hold: each setting with its default, its bounds and its meaning.

What several settings must be together: ``config_rules.py``. ``python -m ijepa_ds.config_reference`` writes the schema
and the table of all settings anew.
"""

from __future__ import annotations

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
from ijepa_ds.validation import Bounds, Checked, Count, Files, ImageSize, Pair, Triple, is_path, must

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
