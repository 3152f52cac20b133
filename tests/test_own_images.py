"""docs/own_images.md: its commands convert and pretrain on a folder of unlabelled images, its table is the plan's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from distributed_runs import run_training
from made_up_images import smooth_image
from PIL import Image
from planning import make_plan

from data_prep import to_ffcv
from ijepa_ds.config import load_config
from ijepa_ds.plan.predict import numbers

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "own_images.md").read_text()
ROW = re.compile(r"^\| `(\w+)\.json` \| (\d+) \| ([\d.]+) GB \| (yes|no) \| ([\d,]+) \|$", re.MULTILINE)
# What makes the page's model one that a CPU trains in seconds.
SMALL = {
    "train_batch_size": 50,
    "train_micro_batch_size_per_gpu": 25,
    "bf16": {"enabled": False},
    "data": {"image_size": 32, "workers": 1},
    "model": {"encoder": "tiny", "width": 24, "depth": 1, "heads": 2, "patch_size": 4, "predictor_width": 24},
}


def command(name: str) -> list[str]:
    """The arguments of the page's ``./run.sh NAME``."""
    (line,) = re.findall(rf"^\./run\.sh {name} (.*)$", PAGE, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("row", ROW.findall(PAGE), ids=" ".join)
def test_the_table_is_the_plans(row: tuple[str, ...]) -> None:
    name, micro_batch, memory, fits, speed = row
    plan = make_plan(name, f"train_micro_batch_size_per_gpu={micro_batch}", images=100_000, gpu="rtx3090")
    told = numbers(plan)
    assert f"{told['memory_gb']:.1f}" == memory and told["fits"] == (fits == "yes")
    assert f"{told['images_per_second']:,.0f}" == speed


def test_the_table_is_found() -> None:
    assert len(ROW.findall(PAGE)) == 4


def test_the_commands_train_on_a_hundred_unlabelled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photographs").mkdir()
    for number in range(100):
        Image.fromarray(smooth_image(number, (40, 56))).save(f"photographs/{number}.jpg")
    assert to_ffcv.main([*command("convert"), "--workers", "1"]) == 0
    _, file, *settings = command("pretrain")
    config = load_config(ROOT / file, [setting for setting in settings if setting != "--set"])
    raw = json.loads(json.dumps(config.as_dict()))
    for key, value in SMALL.items():
        section = raw["ijepa"] if key in raw["ijepa"] else raw
        section[key] = {**section[key], **value} if isinstance(value, dict) else value
    raw["ijepa"]["model"]["predictor_depth"], raw["ijepa"]["masks"]["context_tokens"] = 1, 18
    raw["ijepa"]["run"] |= {"folder": str(tmp_path / "runs"), "stop_after_steps": 2}
    raw["ijepa"]["data"]["train"] = str(tmp_path / raw["ijepa"]["data"]["train"])
    raw["ijepa"]["monitor"]["log_steps"] = 1
    run = run_training(raw, 1)
    assert run.exit_codes == [0], run.output
    assert run.folder == tmp_path / "runs" / "own" and len(run.losses) == 2
    assert "100 images" in run.output
