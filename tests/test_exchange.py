"""The exported encoder in timm: strict loading by the one call that the documentation shows, and the same features."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from distributed_runs import TrainingRun, assert_same_tensors, once, run_training, tiny_config, write_config
from safetensors import safe_open
from safetensors.torch import load_file

from ijepa_ds.build import build_encoder
from ijepa_ds.checkpoint import read_weights
from ijepa_ds.config import parse_config

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
    from ijepa_ds.errors import UserError
    from ijepa_ds.exchange import main

    assert main([str(exported().folder), "--out", str(tmp_path)]) == 0
    assert "TARGET encoder" in capsys.readouterr().out
    at_the_end = exported().folder / "export" / "target_encoder.safetensors"
    assert_same_tensors(load_file(tmp_path / "target_encoder.safetensors"), load_file(at_the_end))
    with pytest.raises(UserError, match="is not a run folder"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="is not a run folder"):
        main([str(write_config(CONFIG))])
