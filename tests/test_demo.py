"""The demo on a handful of scenes: every step by the commands that a user would type, stopped, gone on with, reused."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from ijepa_ds import demo
from ijepa_ds.commands import Commands
from ijepa_ds.config import load_config
from ijepa_ds.errors import UserError
from ijepa_ds.files import PROJECT

PROBE = ["--random-seeds", "2", "--task", "logistic"]


def arguments(folder: Path, *settings: str) -> list[str]:
    """Of the demo, for a small one in ``folder``."""
    small = [f"ijepa.run.folder={folder}/runs", "ijepa.optimization.epochs=2", "ijepa.monitor.log_steps=1"]
    options = ["--images", "300", "--validation-images", "200", "--data", str(folder / "scenes")]
    return [*options, *(part for setting in (*small, *settings) for part in ("--set", setting))]


def stop_after_the_first_step(metrics: Path, over: threading.Event) -> None:
    while not (metrics.exists() and metrics.read_text()):
        if over.wait(0.01):
            return
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_demo_is_stopped_goes_on_to_a_probed_and_exported_encoder_and_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PROBE", PROBE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two files of tests share two cores
    monkeypatch.setattr(demo, "has_fast_bf16", lambda device: False)
    run, over = tmp_path / "runs" / "scenes_tiny", threading.Event()
    watcher = threading.Thread(target=stop_after_the_first_step, args=(run / "metrics.jsonl", over))
    watcher.start()
    try:
        code = demo.main(arguments(tmp_path))
    finally:
        over.set()
        watcher.join()
    stopped = capfd.readouterr().out
    assert code == 128 + signal.SIGTERM, stopped
    assert [name for name in ("scenes", "convert", "pretrain", "evaluate") if f"\n== {name}: " in stopped] == [
        "scenes",
        "convert",
        "pretrain",
    ]
    assert "\n== precision: fp32, because " in stopped
    assert stopped.endswith("\n== pretrain was stopped by SIGTERM; the same command goes on\n")
    assert list((run / "checkpoints").glob("step_*")) and not (run / "export").exists()

    monkeypatch.setattr(demo, "has_fast_bf16", lambda device: True)  # the run keeps the precision that it began with
    assert demo.main(arguments(tmp_path)) == 0
    finished = capfd.readouterr().out
    assert "\n== precision: fp32, with which " in finished and "going on from step" in finished
    assert "convert: " in finished and "to_ffcv.py" not in finished
    summary = finished[finished.index("== reached in") :].splitlines()
    assert [line.split(":")[0] for line in summary[1:3]] == ["count", "depth"]
    assert any(line.startswith("TensorBoard: ") for line in summary)
    assert (run / "export" / "target_encoder.safetensors").exists() and list((run / "pictures").glob("masks_*.png"))

    assert demo.main(arguments(tmp_path)) == 0
    reused = capfd.readouterr().out
    assert "pretrain: " in reused and "run.py" not in reused and "\n== evaluate" not in reused
    assert reused[reused.index("== reached in") :].splitlines()[1:3] == summary[1:3]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scripts of the commands that the demo has called; none of them does anything."""
    scripts: list[str] = []

    def run(self: Commands, command: list[str]) -> int:
        scripts.append(next(Path(part).name for part in command if part.endswith((".py", "evaluate"))))
        return 0

    monkeypatch.setattr(Commands, "run", run)
    return scripts


def test_ranks_that_were_asked_to_stop_by_others_end_the_demo_too(tmp_path, called, capsys) -> None:
    """As a batch system does: they leave with exit code 0, and nothing reaches the demo."""
    assert demo.main(arguments(tmp_path)) == 1
    assert called == ["make_scenes.py", "to_ffcv.py", "to_ffcv.py", "run.py"]
    assert capsys.readouterr().out.endswith(
        "\n== pretraining was asked to stop before its last epoch; the same command goes on\n"
    )


def test_a_run_that_ends_early_as_set_is_not_evaluated(tmp_path, called, capsys) -> None:
    assert demo.main(arguments(tmp_path, "ijepa.run.stop_after_steps=3")) == 1
    assert "evaluate" not in called
    assert "ijepa.run.stop_after_steps = 3; without it the same command goes on" in capsys.readouterr().out


def test_another_recipe_is_what_is_trained(tmp_path, monkeypatch) -> None:
    recipe, trained = tmp_path / "other.json", []
    recipe.write_text((PROJECT / demo.CONFIG).read_text())
    monkeypatch.setattr(Commands, "run", lambda self, command: trained.append(command) or 0)
    demo.main([*arguments(tmp_path), "--config", str(recipe)])
    command = next(command for command in trained if "run.py" in command)
    assert command[command.index("--config") + 1] == str(recipe)


def test_a_step_that_fails_is_one_sentence(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Commands, "run", lambda self, command: 3)
    with pytest.raises(UserError, match="step 'scenes' ended with exit code 3"):
        demo.main(arguments(tmp_path))


@pytest.mark.parametrize("fast", [True, False])
def test_the_precision_is_what_the_device_does_fast(tmp_path, monkeypatch, fast) -> None:
    monkeypatch.setattr(demo, "has_fast_bf16", lambda device: fast)
    monkeypatch.setattr(demo, "why", lambda device: "it was timed")
    chosen, reason = demo.choose_precision(load_config(PROJECT / demo.CONFIG), tmp_path, [])
    assert chosen == [f"bf16.enabled={json.dumps(fast)}"]
    taken, other = ("bf16", "false") if fast else ("fp32", "true")
    assert reason == f"{taken}, because it was timed; --set bf16.enabled={other} overrules it"


@pytest.mark.parametrize(("setting", "taken"), [("bf16.enabled=false", "fp32"), ("bf16.enabled=true", "bf16")])
def test_set_overrules_the_precision(tmp_path, setting, taken) -> None:
    config = load_config(PROJECT / demo.CONFIG, [setting])
    assert demo.choose_precision(config, tmp_path, [setting]) == ([], f"{taken}, as --set has it")
