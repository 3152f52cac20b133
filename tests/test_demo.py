"""The demo on a handful of scenes: every step by the commands that a user would type, and reuse by a second call."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_demo(tmp_path: Path) -> str:
    command = [sys.executable, "-m", "ijepa_ds", "demo", "--images", "300", "--validation-images", "200"]
    settings = [f"ijepa.run.folder={tmp_path}/runs", "ijepa.optimization.epochs=1", "ijepa.monitor.log_steps=1"]
    settings.append("train_micro_batch_size_per_gpu=16")
    arguments = ["--data", str(tmp_path / "scenes"), *(part for item in settings for part in ("--set", item))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command + arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_demo_goes_from_nothing_to_a_probed_and_exported_encoder_and_reuses_it(tmp_path: Path) -> None:
    first = run_demo(tmp_path)
    for name in ("scenes", "convert", "pretrain", "evaluate"):
        assert f"== {name}: " in first
    summary = first[first.index("== reached in") :]
    assert "count: trained" in summary and "depth: trained" in summary and "TensorBoard: " in summary
    run = tmp_path / "runs" / "scenes_tiny"
    assert (run / "export" / "target_encoder.safetensors").exists() and list((run / "pictures").glob("masks_*.png"))
    second = run_demo(tmp_path)
    assert "pretrain: " in second and "is there already" in second and "deepspeed run.py" not in second
    assert (
        second[second.index("\ncount: ") :].splitlines()[1:3] == summary[summary.index("\ncount: ") :].splitlines()[1:3]
    )
