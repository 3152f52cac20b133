"""What is wrong with several settings at once, as far as each is right by itself: one sentence each, with the cure."""

from __future__ import annotations

from typing import Any

from ijepa_ds.settings import ConfigFile, IJEPAConfig, OptimizationConfig


def disagreements(raw: dict[str, Any], ijepa: IJEPAConfig | None) -> list[str]:
    """Of a file as it stands; ``ijepa`` is None where its settings are wrong by themselves."""
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


def disagreements_of_deepspeed(file: ConfigFile) -> list[str]:
    """Of DeepSpeed's keys, whose types are right."""
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
