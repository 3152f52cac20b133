"""YAML files of the released code: every key is translated, listed or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from ijepa_ds.config import load_config, parse_config
from ijepa_ds.errors import UserError
from ijepa_ds.exchange.reference_yaml import Released, main

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
# The values of the released in1k_vith14_ep300.
RELEASED = {
    "data": {
        "batch_size": 128, "color_jitter_strength": 0.0, "crop_scale": [0.3, 1.0], "crop_size": 224,
        "image_folder": "imagenet_full_size/061417/", "num_workers": 12, "pin_mem": True, "root_path": "/datasets",
        "use_color_distortion": False, "use_gaussian_blur": False, "use_horizontal_flip": False,
    },
    "logging": {"folder": "/logs/vith14", "write_tag": "jepa"},
    "mask": {
        "allow_overlap": False, "aspect_ratio": [0.75, 1.5], "enc_mask_scale": [0.85, 1.0], "min_keep": 10,
        "num_enc_masks": 1, "num_pred_masks": 4, "patch_size": 14, "pred_mask_scale": [0.15, 0.2],
    },
    "meta": {
        "copy_data": False, "load_checkpoint": False, "model_name": "vit_huge", "pred_depth": 12, "pred_emb_dim": 384,
        "read_checkpoint": None, "use_bfloat16": True,
    },
    "optimization": {
        "ema": [0.996, 1.0], "epochs": 300, "final_lr": 1e-6, "final_weight_decay": 0.4, "ipe_scale": 1.0, "lr": 0.001,
        "start_lr": 0.0002, "warmup": 40, "weight_decay": 0.04,
    },
}  # fmt: skip


def write(path: Path, **changes) -> str:
    values = copy.deepcopy(RELEASED)
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_released_vith14_gives_our_vith14(tmp_path, capsys) -> None:
    assert main([write(tmp_path / "x.yaml"), "--out", str(tmp_path / "x.json")]) == 0
    assert load_config(tmp_path / "x.json").recipe() == load_config(CONFIGS / "vith14.json").recipe()
    said = capsys.readouterr().out
    assert "128 images a GPU there x 16 GPUs = 2048 a step; 16 GPUs are those of the released" in said
    assert "--sampler reference" in said and "written:" in said
    for key in ("data.pin_mem", "logging.write_tag", "meta.copy_data", "data.color_jitter_strength"):
        assert f"{key} has no counterpart: " in said
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        main([write(tmp_path / "x.yaml"), "--out", str(tmp_path / "x.json")])


def test_vith16_at_448(tmp_path, capsys) -> None:
    path = write(tmp_path / "x.yaml", data__batch_size=16, data__crop_size=448, mask__patch_size=16)
    main([path, "--world-size", "128"])
    printed = capsys.readouterr()
    assert parse_config(json.loads(printed.out)).recipe() == load_config(CONFIGS / "vith16_448.json").recipe()
    assert "give --world-size" not in printed.err


def test_the_faithful_sampler_and_other_data(tmp_path, capsys) -> None:
    path = write(tmp_path / "x.yaml", data__batch_size=64, mask__min_keep=4, meta__use_bfloat16=False)
    main([path, "--sampler", "reference", "--train", "a.beton", "--world-size", "8"])
    config = parse_config(json.loads(capsys.readouterr().out))
    masks, data = config.ijepa.masks, config.ijepa.data
    assert (masks.sampler, masks.truncation_group, masks.min_keep) == ("reference", 64, 4)
    assert (config.global_batch, data.train, data.validation) == (512, "a.beton", None)
    assert config.deepspeed["bf16"] == {"enabled": False}


def test_every_key_is_known_and_none_is_lost(tmp_path, capsys) -> None:
    """A change of any value changes the result, is listed, or is refused."""
    main([write(tmp_path / "x.yaml")])
    plain = capsys.readouterr()
    changed = {
        "count": 3, "batch_size": 64, "crop_size": 28, "num_workers": 3, "patch_size": 28, "min_keep": 3,
        "num_pred_masks": 3, "pred_depth": 3, "pred_emb_dim": 64, "epochs": 50, "warmup": 3, "model_name": "vit_base",
    }  # fmt: skip
    for section, values in RELEASED.items():
        for name, value in values.items():
            if isinstance(value, bool):
                new = not value
            elif isinstance(value, list):
                new = [part * 0.9 for part in value]
            else:
                new = changed.get(name, 0.5 if isinstance(value, float) else 2)
            path = write(tmp_path / "y.yaml", **{f"{section}__{name}": new})
            try:
                main([path])
                printed = capsys.readouterr()
                listed = f"{section}.{name} has no counterpart" in printed.err or name == "min_keep"
                assert printed.out != plain.out or listed, (section, name)
            except UserError as error:
                assert f"{section}.{name}" in str(error), (section, name)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mask__allow_overlap": True}, ["mask.allow_overlap = true must be false: the context block never overlaps"]),
        ({"mask__num_enc_masks": 2}, ["mask.num_enc_masks = 2 must be 1"]),
        ({"data__use_horizontal_flip": True, "data__use_gaussian_blur": True}, ["2 problems", "no flips", "no blur"]),
        ({"data__use_color_distortion": True}, ["has no colour augmentation"]),
        ({"meta__model_name": "vit_colossal"}, ['"vit_colossal" must be one of vit_tiny, vit_small']),
        ({"mask__number": 3}, ["mask.number is not a key of the released code"]),
        ({"mask__num_pred_mask": 3}, ["is not a key of the released code; did you mean num_pred_masks?"]),
        ({"mask__num_pred_masks": 0, "optimization__lr": -1}, ["num_pred_masks = 0 must be at least", "lr = -1 must"]),
        ({"optimization__epochs": True, "meta__use_bfloat16": 1}, ["epochs = true must be a number", "true or false"]),
        ({"optimization__lr": "fast"}, ['optimization.lr = "fast" must be a number']),
        ({"optimization__ema": 0.9}, ["optimization.ema = 0.9 must be a list of 2 numbers"]),
        ({"data__crop_size": 225}, ["x.yaml, converted, has 1 problem", "patch_size = 14 does not divide"]),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(tmp_path, changes, expected) -> None:
    with pytest.raises(UserError) as error:
        main([write(tmp_path / "x.yaml", **changes)])
    assert all(part in str(error.value) for part in expected), error.value


def test_all_missing_keys_are_named(tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("data: {batch_size: 128}\n")
    with pytest.raises(UserError) as error:
        main([str(tmp_path / "x.yaml")])
    assert "data.crop_size is missing" in str(error.value) and "optimization.lr is missing" in str(error.value)


def test_numbers_that_yaml_takes_for_text(tmp_path, capsys) -> None:
    text = Path(write(tmp_path / "x.yaml")).read_text().replace("1.0e-06", "1e-6")
    assert "1e-6" in text and isinstance(yaml.safe_load(text)["optimization"]["final_lr"], str)
    (tmp_path / "x.yaml").write_text(text)
    main([str(tmp_path / "x.yaml")])
    assert json.loads(capsys.readouterr().out)["ijepa"]["optimization"]["lr_final"] == 1e-6


@pytest.mark.parametrize("text", ["a: [", "- 1", "data: 3", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_such_file(tmp_path, text) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml (cannot be read as YAML|must hold sections)"):
        main([str(tmp_path / "x.yaml")])
    with pytest.raises(UserError, match="cannot be read as YAML"):
        main([str(tmp_path / "nowhere.yaml")])


def test_every_key_of_the_released_files_has_a_row_in_the_documents() -> None:
    table = (CONFIGS.parent / "docs" / "configuration.md").read_text()
    rows = {f"{section}.{name}" for section, values in RELEASED.items() for name in values}
    assert {row for row in rows if f"| `{row}` |" not in table} == set()
    assert {f"{section}.{key}" for section, key, _, _ in Released.fields()} == rows


def test_every_key_of_ours_that_is_named_exists() -> None:
    ours = load_config(CONFIGS / "vith14.json").as_dict()["ijepa"]
    settings = {f"ijepa.{section}.{key}" for section, part in ours.items() if isinstance(part, dict) for key in part}
    targets = {target for _, _, _, target in Released.fields() if target.startswith("ijepa.")}
    assert len(targets) > 15 and targets <= settings
