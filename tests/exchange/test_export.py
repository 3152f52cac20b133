"""Exported encoders: timm and transformers load them strictly and give our features; all formats are read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from distributed_runs import TrainingRun, assert_same_tensors, once, read_rows, run_training, tiny_config, write_config
from released_files import SMALL, save_released
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import IJepaModel

from ijepa_ds.build import build_encoder, encoder_dimensions
from ijepa_ds.config import parse_config
from ijepa_ds.engine.checkpoint_files import list_checkpoints, read_weights
from ijepa_ds.errors import UserError
from ijepa_ds.exchange.export import encoder_weights, main
from ijepa_ds.exchange.import_run import main as import_checkpoint
from ijepa_ds.exchange.read import read_encoder
from ijepa_ds.method.encoder import Dimensions, VisionTransformer
from ijepa_ds.run.folder import read_run_config

CONFIG = tiny_config(
    ijepa__run__name="exported", ijepa__data__image_size=[32, 16], ijepa__optimization__epochs=1, bf16={}
)


@once
def exported() -> TrainingRun:
    return run_training(CONFIG, 2)


def test_timm_gives_the_average_encoders_features() -> None:
    run = exported()
    assert run.exit_codes == [0, 0], run.output
    # timm filters what it loads by checkpoint_path strictly: a missing or an unknown name raises.
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=(32, 16),
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
        checkpoint_path=str(run.folder / "export" / "target_encoder.safetensors"),
    ).eval()
    config = parse_config(CONFIG)
    ours = build_encoder(config).eval()
    average = read_weights(run.folder / "checkpoints" / "step_000000004", "target", "context_encoder.")
    missing = ours.load_state_dict(average, strict=False).missing_keys
    assert missing == ["pos_embed"]
    images = torch.randn(3, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), ours(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(model(images), ours(images).mean(1), rtol=0, atol=1e-5)
    assert (average["norm.weight"] - 1).abs().max() > 1e-5  # it has been trained


def test_the_file_says_what_it_holds() -> None:
    with safe_open(exported().folder / "export" / "target_encoder.safetensors", "np") as file:
        assert file.metadata()["encoder"].startswith("target") and file.metadata()["step"] == "4"
        assert file.metadata()["run"] == "exported"
        assert all(file.get_tensor(name).dtype == np.float32 for name in file.keys())  # noqa: SIM118
        assert file.get_tensor("pos_embed").shape == (1, 32, 32)


def test_the_command_writes_the_newest_checkpoints_encoder(tmp_path, capsys) -> None:
    assert main([str(exported().folder), "--out", str(tmp_path)]) == 0
    assert "TARGET encoder" in capsys.readouterr().out
    at_the_end = exported().folder / "export" / "target_encoder.safetensors"
    assert_same_tensors(load_file(tmp_path / "target_encoder.safetensors"), load_file(at_the_end))
    with pytest.raises(UserError, match="is not a run folder"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="is not a run folder"):
        main([str(write_config(CONFIG))])


# -------------------------------------------------------------------------------- three formats, both encoders

SIZES = [
    pytest.param((32, 32), 4, Dimensions(32, 2, 2), id="32 px"),
    pytest.param((32, 16), 4, Dimensions(48, 3, 4, 144), id="not square"),
    pytest.param((28, 28), 14, Dimensions(192, 2, 3), id="named width"),
    pytest.param((32, 64), 16, Dimensions(44, 1, 1, 192), id="the giant's MLP ratio"),
]


@pytest.fixture
def make_run(tmp_path):
    """A run folder with a checkpoint of step 0, from random weights that differ between the two encoders."""

    def make(image_size, patch_size, dimensions, name="run") -> Path:
        path = save_released(
            tmp_path / f"{name}.pth.tar", image_size=image_size, patch_size=patch_size, dimensions=dimensions,
            predictor_width=4 * dimensions.heads,
        )  # fmt: skip
        import_checkpoint([str(path), "--out", str(tmp_path / name), "--heads", str(dimensions.heads)])
        return tmp_path / name

    return make


def our_features(run: Path, encoder: str, images: torch.Tensor) -> torch.Tensor:
    """Features [B, N, D] of a run's encoder in our own code, at the images' size."""
    config = read_run_config(run)
    model = config.ijepa.model
    ours = VisionTransformer(images.shape[2:], model.patch_size, encoder_dimensions(config)).eval()
    ours.load_state_dict(encoder_weights(list_checkpoints(run / "checkpoints")[-1], ours.grid, encoder))
    with torch.no_grad():
        return ours(images)


@pytest.mark.parametrize("encoder", ["target", "context"])
@pytest.mark.parametrize(("image_size", "patch_size", "dimensions"), SIZES)
def test_timm_and_transformers_load_all_and_give_our_features(
    make_run, capsys, image_size, patch_size, dimensions, encoder
) -> None:
    run = make_run(image_size, patch_size, dimensions)
    images = torch.randn(3, 3, *image_size)
    ours = our_features(run, encoder, images)
    other = our_features(run, {"target": "context", "context": "target"}[encoder], images)
    assert (ours - other).abs().max() > 0.1
    for file_format in ("timm", "transformers"):
        main([str(run), "--format", file_format, "--encoder", encoder])
        assert f"the {encoder.upper()} encoder of" in capsys.readouterr().out
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=image_size, patch_size=patch_size, embed_dim=dimensions.width,
        depth=dimensions.depth, num_heads=dimensions.heads, mlp_ratio=dimensions.hidden / dimensions.width,
        class_token=False, global_pool="avg", fc_norm=False, num_classes=0,
        checkpoint_path=str(run / "export" / f"{encoder}_encoder.safetensors"),
    ).eval()  # fmt: skip
    folder = run / "export" / ("transformers" if encoder == "target" else "transformers_context")
    theirs, report = IJepaModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.ijepa_encoder.startswith(encoder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["encoder"].startswith(encoder)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs(images).last_hidden_state, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_size", [(48, 48), (48, 32)])
def test_another_image_size_gets_its_own_positions(make_run, tmp_path, image_size) -> None:
    run = make_run((32, 32), 4, SMALL)
    images = torch.randn(2, 3, *image_size)
    size = ["--image-size", *map(str, dict.fromkeys(image_size))]
    main([str(run), *size, "--out", str(tmp_path)])
    main([str(run), *size, "--format", "transformers", "--out", str(tmp_path / "t")])
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=image_size, patch_size=4, embed_dim=32, depth=2, num_heads=2,
        class_token=False, global_pool="avg", fc_norm=False, num_classes=0,
        checkpoint_path=str(tmp_path / "target_encoder.safetensors"),
    ).eval()  # fmt: skip
    theirs, ours = IJepaModel.from_pretrained(tmp_path / "t"), our_features(run, "target", images)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs(images).last_hidden_state, ours, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="must be one or two multiples of the patch size, 4"):
        main([str(run), "--image-size", "30"])


def test_what_was_exported_is_read_back_bit_for_bit(make_run) -> None:
    run = make_run((32, 16), 4, SMALL)
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    for file_format, name in {
        "timm": "target_encoder.safetensors",
        "transformers": "transformers",
        "reference": "checkpoint.pth.tar",
    }.items():
        main([str(run), "--format", file_format])
        foreign = read_encoder(run / "export" / name, heads=2)
        assert (foreign.role, foreign.grid, foreign.dimensions) == ("target", (8, 4), SMALL)
        assert_same_tensors(foreign.state_dict(), encoder_weights(checkpoint, (8, 4), "target"))
    main([str(run), "--encoder", "context"])
    assert read_encoder(run / "export" / "context_encoder.safetensors", heads=2).role == "context"
    assert not list(run.rglob("*.tmp"))


def test_the_released_format_after_training(tmp_path, capsys) -> None:
    run = exported().folder
    main([str(run / "checkpoints" / "step_000000004"), "--format", "reference", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "the TARGET encoder under 'target_encoder'" in said and "without opt, scaler, loss, of" in said
    content = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert {key: content[key] for key in ("epoch", "batch_size", "world_size")} == {
        "epoch": 1, "batch_size": 8, "world_size": 2,
    }  # fmt: skip
    assert content["lr"] == pytest.approx(read_rows(run)[-1]["lr"])
    assert content["ijepa_ds"]["encoder"].startswith("target") and content["ijepa_ds"]["step"] == "4"
    for key, positions in (
        ("encoder", "pos_embed"),
        ("target_encoder", "pos_embed"),
        ("predictor", "predictor_pos_embed"),
    ):
        assert f"module.{positions}" in content[key] and all(name.startswith("module.") for name in content[key])
    average = read_weights(run / "checkpoints" / "step_000000004", "target", "context_encoder.")
    target = {name.removeprefix("module."): t for name, t in content["target_encoder"].items()}
    assert_same_tensors({name: target[name] for name in average}, average)
    assert not torch.equal(target["norm.weight"], content["encoder"]["module.norm.weight"])


def test_where_it_cannot_write(make_run, tmp_path) -> None:
    run = make_run((32, 32), 4, SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give a folder"):
        main([str(run), "--out", str(tmp_path / "file")])
    with pytest.raises(UserError, match="cannot be written"):
        main([str(run), "--out", str(tmp_path / "file" / "below")])
