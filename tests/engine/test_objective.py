"""The options beside the plain method in whole runs: the same losses for any layout and after a resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_runs import (
    GLOBAL_BATCH,
    TrainingRun,
    bare_run,
    build_parts,
    checkpoint_tensors,
    once,
    run_ranks,
    run_training,
    tiny_config,
    train_beton,
)

from ijepa_ds.config import parse_config
from ijepa_ds.engine.checkpoint_files import SavedState, state_json
from ijepa_ds.engine.trainable import ShardedTrainable
from ijepa_ds.errors import UserError
from ijepa_ds.run.folder import RunFolder

ALL = {
    "ijepa__objective": {"vicreg": 0.01, "vicreg_group": 2, "target_layers": 2, "predict_share": 0.5},
    "ijepa__model__stochastic_positions": 0.1,
    "ijepa__data__flip": True,
}
CONTEXTS = {"ijepa__objective": {"contexts": 2, "vicreg": 0.01, "vicreg_group": 2}}
CONSTANT = {"schedule": "constant_then_cooldown", "warmup_epochs": 0.5, "momentum": [0.9, 1.0]}


def trained(name: str, world_size: int, **changes: Any) -> TrainingRun:
    run = run_training(tiny_config(ijepa__run__name=name, **changes), world_size)
    assert set(run.exit_codes) == {0}, run.output
    return run


@once
def alone() -> TrainingRun:
    return trained("all_options", 1, **ALL)


def test_with_all_options_the_losses_do_not_depend_on_the_ranks() -> None:
    two = trained("all_options_2_ranks", 2, train_micro_batch_size_per_gpu=8, **ALL)
    assert two.losses == pytest.approx(alone().losses, rel=1e-5)
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(alone().losses, bare_run(1).losses, strict=True))  # they are on


def test_and_not_on_the_stages() -> None:
    stages = {"ijepa__pipeline": {"stages": 2, "largest_bubble": 1}, "zero_optimization": {"stage": 1}}
    two = trained("all_options_2_stages", 2, **stages, **ALL)
    assert two.losses == pytest.approx(alone().losses, rel=1e-5)


def test_a_resumed_run_draws_what_it_would_have_drawn() -> None:
    trained("all_options_stopped", 1, ijepa__run__stop_after_steps=3, **ALL)
    assert trained("all_options_stopped", 1, **ALL).losses == alone().losses


def test_two_contexts_an_image_do_not_depend_on_the_ranks() -> None:
    one = trained("contexts", 1, **CONTEXTS)
    two = trained("contexts_2_ranks", 2, train_micro_batch_size_per_gpu=2, **CONTEXTS)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)


def arrived() -> dict[str, Any]:
    """In a rank: where each option has come to."""
    from ijepa_ds.build import build_loader, build_sampler
    from ijepa_ds.data.beton import inspect_dataset

    parts = build_parts(tiny_config(**ALL, ijepa__objective__contexts=3))
    trainable, config = parts.trainable, parts.config
    loader = build_loader(config, inspect_dataset(config.ijepa.data.train), build_sampler(config), trainable)
    regulariser = trainable.module.regulariser
    return {
        "vicreg": (regulariser.group, regulariser.variance, regulariser.covariance),
        "target_layers": trainable.target_encoder.layers,
        "noise": trainable.module.predictor.noise_std,
        "loader": (loader.crops.flip, loader.draws.contexts, loader.draws.keys, loader.sampler.predict_share),
    }


def test_every_option_arrives_where_it_acts() -> None:
    """That two layouts agree does not say that an option is on."""
    train_beton()
    [found] = run_ranks(arrived, 1)
    assert found == {
        "vicreg": (2, 0.25, 0.01),
        "target_layers": 2,
        "noise": pytest.approx(0.1**0.5),
        "loader": (True, 3, True, 0.5),
    }


@dataclass
class TwoContexts:
    """Three images, whose two contexts have two target blocks each."""

    images: torch.Tensor  # [3, 16, 5]: here an image is its features
    target_blocks: torch.Tensor  # [2, 2 * 3, 4]
    context_block: torch.Tensor = field(default_factory=lambda: torch.zeros(6, 1))


@pytest.mark.parametrize("at_once", [1, 2])
def test_each_context_gets_the_targets_of_its_own_blocks(at_once: int) -> None:
    """Wherever they are computed: in one pass an image, or of several micro-batches."""

    def select(images: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        assert blocks.shape[1] == len(images)  # an image is passed once
        return torch.cat(
            [torch.stack([image[own] for image, own in zip(images, block, strict=True)]) for block in blocks]
        )

    draw = torch.Generator().manual_seed(0)
    batches = [
        TwoContexts(torch.randn(3, 16, 5, generator=draw), torch.randint(16, (2, 6, 4), generator=draw))
        for _ in range(2)
    ]
    engine = SimpleNamespace(batches_at_once=at_once, to_input=lambda images: images, target_encoder=select)
    found = list(ShardedTrainable.with_targets(engine, iter(batches)))
    for batch, (same, _, targets) in zip(batches, found, strict=True):
        assert same is batch
        for m, block in enumerate(targets.unflatten(0, (2, 6))):
            for position, features in enumerate(block):  # contexts of the first kind, then of the second
                assert torch.equal(features, batch.images[position % 3][batch.target_blocks[m, position]])


# ------------------------------------------------------------------------------------------------------ length of a run


def constant(name: str, epochs: float, cooldown: float, **changes: Any) -> dict[str, Any]:
    schedule = {**CONSTANT, "epochs": epochs, "cooldown_epochs": cooldown}
    return tiny_config(ijepa__run__name=name, ijepa__optimization=schedule, **changes)


def test_a_run_is_extended_and_cooled_down_by_the_same_command() -> None:
    """Four steps an epoch: 4 steps, then 6 of which the last 2 cool down, against that in one run."""
    one = {"ijepa__checkpoint": {"minutes": 0, "keep": 1}}
    whole = run_training(constant("cooled", 1.5, 0.5, **one))
    assert whole.checkpoints == ["step_000000004", "step_000000006"]  # before the cool-down, and the last
    run_training(constant("extended", 1, 0))
    extended = run_training(constant("extended", 1.5, 0.5))
    assert extended.exit_codes == [0], extended.output
    assert extended.losses == whole.losses
    kept, again = checkpoint_tensors(whole.folder, 4), checkpoint_tensors(extended.folder, 4)
    assert all((kept[name] == again[name]).all() for name in kept)
    longer = parse_config(constant("cooled", 3, 0.5))
    with pytest.raises(UserError, match="began or would have begun at step 4: its length can no longer change"):
        RunFolder(longer).check_belongs(longer, 4 * GLOBAL_BATCH)
    before = str(whole.folder / "checkpoints" / "step_000000004")
    branch = run_training(constant("branch", 1.5, 0.5, ijepa__run__start_from=before))
    assert f"going on from step 4 of {before}" in branch.output and branch.exit_codes == [0], branch.output
    assert branch.losses == whole.losses[4:]


@pytest.mark.parametrize(
    ("step", "epochs", "cooldown", "seed", "says"),
    [
        (4, 1.5, 0.5, 0, None),
        (4, 3, 0.5, 0, None),
        (4, 1, 0, 0, None),
        (6, 1.5, 0.5, 0, None),
        (6, 3, 0.5, 0, "would have begun at step 4: its length can no longer change"),
        (4, 1.5, 0.5, 1, r"\(ijepa.run.start_from\) is of another recipe(.|\n)*ijepa.run.seed: 0 there, 1 here"),
    ],
)
def test_what_a_run_may_start_from(
    tmp_path: Path, step: int, epochs: float, cooldown: float, seed: int, says: str | None
) -> None:
    """A run of 6 steps, of which the last 2 cooled down, with the checkpoints of steps 4 and 6."""
    folder = {"ijepa__run__folder": str(tmp_path)}
    there = parse_config(constant("there", 1.5, 0.5, **folder))
    RunFolder(there).prepare(there, 4 * GLOBAL_BATCH)
    for saved in (4, 6):
        checkpoint = tmp_path / "there" / "checkpoints" / f"step_{saved:09d}"
        checkpoint.mkdir()
        state = SavedState(format=2, step=saved, shapes={})
        (checkpoint / "state.json").write_bytes(state_json(state))
    start = {"ijepa__run__start_from": str(tmp_path / "there" / "checkpoints" / f"step_{step:09d}")}
    here = parse_config(constant("here", epochs, cooldown, ijepa__run__seed=seed, **folder, **start))
    if says is None:
        RunFolder(here).check_belongs(here, 4 * GLOBAL_BATCH)
        assert str(RunFolder(here).start(here)) == start["ijepa__run__start_from"]
        own = tmp_path / "here" / "checkpoints" / "step_000000005"
        own.mkdir(parents=True)
        (own / "state.json").touch()
        assert RunFolder(here).start(here) is None  # what there is of its own counts
    else:
        with pytest.raises(UserError, match=says):
            RunFolder(here).check_belongs(here, 4 * GLOBAL_BATCH)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ijepa__objective": {"vicreg": 0.1, "vicreg_group": 3}}, "vicreg_group = 3 does not divide"),
        ({"ijepa__objective": {"contexts": 2}, "ijepa__masks__sampler": "reference"}, "contexts = 2 does not go with"),
        ({"ijepa__objective": {"contexts": 2}, "ijepa__pipeline__stages": 2}, "hand one context an image"),
        ({"ijepa__optimization": {"cooldown_epochs": 1}}, "needs ijepa.optimization.schedule = constant_then_cooldown"),
        (
            {"ijepa__optimization": {**CONSTANT, "epochs": 2, "cooldown_epochs": 1.6}},
            "together longer than the 2 epochs",
        ),
        ({"ijepa__optimization": {**CONSTANT, "epochs": 2, "schedule_scale": 1.25}}, "is a cosine's"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], says: str) -> None:
    settings = {"ijepa__masks__truncation_group": 16, **changes}
    with pytest.raises(UserError, match=says):
        parse_config(tiny_config(**settings))


def test_targets_of_more_blocks_than_there_are_are_refused() -> None:
    run = run_training(tiny_config(ijepa__run__name="refused", ijepa__objective__target_layers=3))
    assert run.exit_codes == [2] and "target_layers = 3 is more than the encoder's 2 blocks" in run.output
