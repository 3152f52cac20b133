"""Importing a released-format checkpoint: a run goes on from it, it exports bit for bit, what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import (
    FOLDER,
    assert_same_tensors,
    checkpoint_tensors,
    once,
    run_training,
    tiny_config,
    write_config,
)
from released_files import released_checkpoint, save_released
from safetensors.torch import load_file

from ijepa_ds.config import load_config
from ijepa_ds.engine.checkpoint_files import checkpoint_step, list_checkpoints, read_weights
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.subject import load_subject
from ijepa_ds.exchange.export import main as export
from ijepa_ds.exchange.import_run import main
from ijepa_ds.method.encoder import Dimensions
from ijepa_ds.run.folder import read_run_record

RELEASED = released_checkpoint()


@once
def released_file() -> Path:
    return save_released(FOLDER / "released.pth.tar", RELEASED)


def config_file(name: str, **changes: Any) -> tuple[dict[str, Any], Path]:
    config = tiny_config(ijepa__run__name=name, **changes)
    return config, write_config(config)


def our_names(key: str) -> dict[str, torch.Tensor]:
    """A part of the released checkpoint under our names, without positions."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in RELEASED[key].items()}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("pos_embed")}


def test_the_checkpoint_holds_all_weights_and_no_moments(capsys) -> None:
    config, path = config_file("imported_whole")
    run = FOLDER / "runs" / "imported_whole"
    assert main([str(released_file()), "--out", str(run), "--config", str(path)]) == 0
    assert "the TARGET encoder (reference format)" in capsys.readouterr().out
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    assert checkpoint_step(checkpoint) == 0
    assert_same_tensors(read_weights(checkpoint, "target", "context_encoder."), our_names("target_encoder"))
    assert_same_tensors(read_weights(checkpoint, "master", "context_encoder."), our_names("encoder"))
    assert_same_tensors(read_weights(checkpoint, "master", "predictor."), our_names("predictor"))
    for kind in ("exp_avg", "exp_avg_sq"):
        assert all(not tensor.any() for tensor in read_weights(checkpoint, kind).values())
    written, images = read_run_record(run)
    assert images is None and load_config(run / "recipe.json") == written == load_config(path)
    assert config["ijepa"]["run"]["name"] == written.ijepa.run.name
    weights = load_subject(run).weights
    assert_same_tensors({n: t for n, t in weights.items() if n != "pos_embed"}, our_names("target_encoder"))
    with pytest.raises(UserError, match="holds checkpoints already and is not overwritten"):
        main([str(released_file()), "--out", str(run), "--config", str(path)])


def test_export_import_export_is_equal_bit_for_bit(tmp_path) -> None:
    _, path = config_file("unused")
    main([str(released_file()), "--out", str(tmp_path / "one"), "--config", str(path)])
    assert export([str(tmp_path / "one"), "--format", "reference"]) == 0
    exported = tmp_path / "one" / "export" / "checkpoint.pth.tar"
    content = torch.load(exported, weights_only=True)
    for key in ("encoder", "predictor", "target_encoder"):
        assert_same_tensors(content[key], dict(RELEASED[key]))
    main([str(exported), "--out", str(tmp_path / "two"), "--heads", "2"])
    for encoder in ("target", "context"):
        for run in ("one", "two"):
            export([str(tmp_path / run), "--encoder", encoder])
        files = [tmp_path / run / "export" / f"{encoder}_encoder.safetensors" for run in ("one", "two")]
        assert_same_tensors(*map(load_file, files))


def test_training_goes_on_from_it() -> None:
    """Two steps from the imported weights, at a learning rate of zero: only the average moves, towards the context."""
    momentum = 0.75
    still = {"lr_start": 0.0, "lr_peak": 0.0, "lr_final": 0.0, "momentum": [momentum, momentum], "epochs": 0.5,
             "warmup_epochs": 0}  # fmt: skip
    config, path = config_file("imported_trained", ijepa__optimization=still, bf16={})
    run = FOLDER / "runs" / "imported_trained"
    main([str(released_file()), "--out", str(run), "--config", str(path)])
    training = run_training(config)
    assert training.exit_codes == [0] and "going on from step 0" in training.output, training.output
    assert training.checkpoints == ["step_000000000", "step_000000002"] and len(training.losses) == 2
    after = checkpoint_tensors(run, 2)
    for key, prefix in (("encoder", "context_encoder"), ("predictor", "predictor")):
        expected = our_names(key)
        assert_same_tensors({name: after[f"master/{prefix}.{name}"] for name in expected}, expected)
    context, target = our_names("encoder"), our_names("target_encoder")
    for name in target:
        expected = context[name] + momentum**2 * (target[name] - context[name])
        torch.testing.assert_close(after[f"target/context_encoder.{name}"], expected, rtol=0, atol=1e-6)
    assert read_run_record(run)[1] == 67  # known now, and compared from here on


def test_another_recipe_does_not_go_on_from_it() -> None:
    config, path = config_file("imported_other", ijepa__run__seed=0)
    main([str(released_file()), "--out", str(FOLDER / "runs" / "imported_other"), "--config", str(path)])
    config["ijepa"]["run"]["seed"] = 1
    training = run_training(config)
    assert training.exit_codes == [2] and "ijepa.run.seed: 0 there, 1 here" in training.output
    assert "images in ijepa.data.train" not in training.output


def test_without_a_config_it_is_inferred_and_printed(tmp_path, capsys) -> None:
    path = save_released(
        tmp_path / "x.pth.tar", image_size=(32, 48), patch_size=8, dimensions=Dimensions(192, 2, 3, 576),
        predictor_width=48,
    )  # fmt: skip
    main([str(path), "--out", str(tmp_path / "run"), "--set", "ijepa.data.workers=3"])
    out = capsys.readouterr().out
    assert "no --config was given; no file of ds_configs/ has these sizes" in out
    config = load_config(tmp_path / "run" / "recipe.json")
    model, data = config.ijepa.model, config.ijepa.data
    assert (model.width, model.depth, model.heads, model.mlp_ratio, model.patch_size) == (192, 2, 3, 3.0, 8)
    assert (model.predictor_width, model.predictor_depth) == (48, 2)
    assert data.image_size == (32, 48) and data.workers == 3 and config.ijepa.run.name == "run"
    assert json.dumps(config.as_dict(), indent=2) in out


def test_heads_are_asked_for(tmp_path) -> None:
    with pytest.raises(UserError, match="give their number with --heads or a configuration with --config"):
        main([str(released_file()), "--out", str(tmp_path / "run")])
    _, path = config_file("unused")
    with pytest.raises(UserError, match=r"--heads 4 is not .*'s 2"):
        main([str(released_file()), "--out", str(tmp_path / "run"), "--config", str(path), "--heads", "4"])
    assert not (tmp_path / "run").exists()


def test_every_size_that_differs_is_named(tmp_path) -> None:
    changes = {
        "width": 60,
        "heads": 3,
        "depth": 3,
        "patch_size": 8,
        "predictor_width": 36,
        "predictor_depth": 1,
        "mlp_ratio": 3,
    }
    _, path = config_file("unused", **{f"ijepa__model__{key}": value for key, value in changes.items()})
    with pytest.raises(UserError) as error:
        main([str(released_file()), "--out", str(tmp_path / "run"), "--config", str(path)])
    for expected in (
        "width: 32 in the file, 60 in the configuration", "depth: 2 in the file, 3", "patch_size: 4 in the file, 8",
        "hidden width of the MLPs: 128 in the file, 180", "predictor_width: 16 in the file, 36",
        "predictor_depth: 2 in the file, 1",
    ):  # fmt: skip
        assert expected in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_image_size_has_its_positions_computed_again(tmp_path, capsys) -> None:
    _, path = config_file("unused", ijepa__data__image_size=[48, 32])
    main([str(released_file()), "--out", str(tmp_path / "run"), "--config", str(path)])
    assert "the file's grid is 8 x 8, the run's 12 x 8" in capsys.readouterr().out


def test_nothing_is_written_for_a_damaged_or_a_hostile_file(tmp_path) -> None:
    content = {**RELEASED, "target_encoder": {**RELEASED["target_encoder"]}}
    del content["target_encoder"]["module.norm.weight"]
    damaged = save_released(tmp_path / "x.pth.tar", content)
    for path in (damaged, tmp_path / "nowhere.pth.tar"):
        with pytest.raises(UserError, match=r"\.pth\.tar"):
            main([str(path), "--out", str(tmp_path / "run"), "--heads", "2"])
    assert not (tmp_path / "run").exists()
