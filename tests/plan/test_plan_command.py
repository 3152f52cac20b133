"""``python -m ijepa_ds plan``: table, JSON, picture, and what is refused."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from planning import ROOT, write_tiny

from ijepa_ds.errors import UserError
from ijepa_ds.plan.command import main

VITH14 = ("--config", str(ROOT / "ds_configs" / "vith14.json"))


def test_the_table_says_what_is_asked_for_and_what_is_assumed(capsys) -> None:
    assert main([*VITH14, "--gpus", "16", "--images", "1281167", "--price", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("prediction for 16 x A100 80GB on 2 nodes (InfiniBand, 200 Gb/s a GPU)")
    for said in ("652.7 million", "GFLOP an image    665.1", "fits", "28.9 hours, 463 GPU hours, cost 926"):
        assert said in shown
    assert "nothing of this project has been measured on a GPU yet" in " ".join(shown.split())


def test_json_and_picture(tmp_path: Path, capsys) -> None:
    json_path, png = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ["--gpus", "2", "--images", "1000", "--json", str(json_path), "--png", str(png)]
    assert main(["--config", str(write_tiny(tmp_path)), *options]) == 0
    assert f"written: {png}" in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    told = json.loads(json_path.read_text())
    assert told["kind"] == "prediction" and told["cost"] is None and told["fits"] is True
    assert told["memory_gb"] == pytest.approx(sum(told["memory_of"].values()))
    assert [row["gpus"] for row in told["over_gpus"]] == [1, 2, 4, 8, 16, 32, 64]


def test_json_alone(tmp_path: Path, capsys) -> None:
    main(["--config", str(write_tiny(tmp_path)), "--json", "-"])
    told = json.loads(capsys.readouterr().out)
    assert {"parameters", "images_per_second", "hours", "gpu_hours", "largest_micro_batch", "gflop_per_image"} <= set(
        told
    )
    assert any("ImageNet's, since nowhere.beton is not here" in sentence for sentence in told["assumptions"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--gpu", "v100"],
            r"V100 32GB has no arithmetic for bf16: --set bf16.enabled=false computes in fp32; or use a10",
        ),
        (["--gpu", "a1000"], r"--gpu a1000 is not known; choose one of: a100-40, a100-80, h100, h200, b200, l40s, rtx"),
        (["--interconnect", "wifi"], "--interconnect wifi is not known; choose one of: none, ib-200, ib-400, efa-400"),
        (["--gpus", "12", "--nodes", "2"], "train_batch_size = 2048 does not divide into 12 processes"),
        (["--efficiency", "0"], r"--efficiency = 0.0 must be above 0 and at most 1"),
        (["--efficiency", "nan"], r"--efficiency = nan must be above 0 and at most 1"),
        (
            ["--images", "2047"],
            r"2,047 images \(--images\) are fewer than one global batch; lower train_batch_size = 2048",
        ),
        (["--images", "0"], "--images = 0 must be a number of at least 1"),
        (["--price", "nan"], "--price = nan must be a number of at least 0"),
        (["--set", "ijepa.pipeline.stages=3", "--gpus", "16"], "problem"),
        (["--png", "/nowhere/at/all.png"], "/nowhere/at/all.png cannot be written"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at/all.json cannot be written"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main([*VITH14, *options])


def test_a_v100_computes_in_fp32(capsys) -> None:
    assert main([*VITH14, "--gpu", "v100", "--set", "bf16.enabled=false"]) == 0
    assert "15.7 TFLOP/s, the data sheet's dense fp32 peak" in " ".join(capsys.readouterr().out.split())


def test_neither_deepspeed_nor_ffcv_is_imported() -> None:
    """They take seconds, and need not be there: no import at the top of a file leads to them."""
    seen, waiting = set(), ["ijepa_ds.plan.command"]
    while waiting:
        name = waiting.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        path = path if path.exists() else path.with_suffix("") / "__init__.py"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                assert node.module.partition(".")[0] not in ("deepspeed", "ffcv"), f"{name} imports {node.module}"
            elif isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"deepspeed", "ffcv"}, f"{name} imports one of them"
    assert {"ijepa_ds.plan.predict", "ijepa_ds.build", "ijepa_ds.method.masks"} <= seen
