"""Replaying a run that other code recorded: the same through the method alone and through the engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from distributed_runs import run_ranks
from test_recorded_run import change_arrays, change_settings
from traces import record_trace

from ijepa_ds.checks.replay import main

OTHER = {
    "image_size": [16, 24],
    "encoder": (24, 2, 3, 72),
    "predictor": (12, 2, 3),
    "batch_size": 4,
    "targets": 3,
    "steps": 4,
}


@pytest.fixture
def trace(tmp_path):
    return record_trace(tmp_path)


def test_a_recorded_run_replays(trace, capsys):
    assert main([str(trace)]) == 0
    out = capsys.readouterr().out
    assert "within every tolerance" in out
    assert out.count("grad_norm_encoder") == 3 and "predictor/predictor_blocks.0.attn.qkv.weight" in out


def test_other_sizes_grids_and_numbers_of_targets_replay(tmp_path, capsys):
    assert main([str(record_trace(tmp_path, **OTHER))]) == 0
    assert "target_encoder/blocks.1.mlp.fc2.bias" in capsys.readouterr().out


def test_one_image_one_target_one_step_replays(tmp_path):
    assert main([str(record_trace(tmp_path, batch_size=1, targets=1, steps=1))]) == 0


@pytest.mark.parametrize(
    "key", ["final/target_encoder/blocks.1.attn.qkv.bias", "final/predictor/mask_token", "final/encoder/pos_embed"]
)
def test_a_final_weight_beyond_the_tolerance_is_named(trace, key, capsys):
    with np.load(trace) as file:
        wrong = file[key].copy()
    wrong.reshape(-1)[-1] += 5e-5
    change_arrays(trace, **{key: wrong})
    assert main([str(trace)]) == 1
    assert f"Worst: {key.replace('/', ': ', 1)} differs by 5.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "factor", "code"),
    [
        ("loss", 1 + 3e-5, 1),
        ("loss", 1 + 3e-6, 0),
        ("grad_norm_encoder", 1 + 3e-4, 1),
        ("grad_norm_predictor", 1 + 3e-5, 0),
        ("momentum", 1 + 1e-6, 1),
        ("lr", 0.0, 1),
        ("loss", float("nan"), 1),
    ],
)
def test_a_scalar_beyond_its_tolerance_fails(trace, name, factor, code, capsys):
    steps = json.loads(trace.with_suffix(".json").read_text())["steps"]
    steps[1][name] *= factor
    change_settings(trace, steps=steps)
    assert main([str(trace)]) == code
    if code:
        assert f"Worst: step 1: {name}" in capsys.readouterr().out


def test_predictions_of_another_order_fail(trace, capsys):
    """Block-major: image by image must not pass."""
    with np.load(trace) as file:
        predictions = file["step0/predictions"]
    swapped = predictions.reshape(4, 2, *predictions.shape[1:]).swapaxes(0, 1).reshape(predictions.shape)
    change_arrays(trace, **{"step0/predictions": swapped})
    assert main([str(trace)]) == 1
    assert "step 0: predictions" in capsys.readouterr().out


def replay_through_engine(path: str, *more: str) -> tuple[int, str]:
    """Runs on every rank."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([path, "--engine", *more])
    return code, out.getvalue()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engine_replays_it_too(tmp_path, ranks):
    found = run_ranks(replay_through_engine, ranks, str(record_trace(tmp_path, **OTHER)))
    assert [code for code, _ in found] == [0] * ranks
    assert f"ZeRO-2 on {ranks} processes" in found[0][1] and "within every tolerance" in found[0][1]
    assert all(not text for _, text in found[1:])


def test_the_engine_notices_a_wrong_weight_on_two_ranks(tmp_path):
    path = record_trace(tmp_path, **OTHER)
    with np.load(path) as file:
        wrong = file["final/encoder/norm.bias"] + np.float32(1e-3)
    change_arrays(path, **{"final/encoder/norm.bias": wrong})
    found = run_ranks(replay_through_engine, 2, str(path))
    assert [code for code, _ in found] == [1, 1]
    assert "Worst: final: encoder/norm.bias" in found[0][1]


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_other_precisions_are_reported_and_not_judged(trace, precision):
    ((code, text),) = run_ranks(replay_through_engine, 1, str(trace), "--precision", precision)
    assert code == 0 and "not judged" in text
