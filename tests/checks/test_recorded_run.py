"""A trace is read whole or refused with everything that is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from traces import record_trace

from ijepa_ds.checks.recorded_run import read_trace
from ijepa_ds.errors import UserError


@pytest.fixture
def trace(tmp_path):
    return record_trace(tmp_path)


def change_arrays(path, **changes):
    """Replace arrays by name (``__`` for ``/``); None removes one."""
    with np.load(path) as file:
        arrays = dict(file)
    for key, value in changes.items():
        arrays[key.replace("__", "/")] = value
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


def change_settings(path, **changes):
    file = path.with_suffix(".json")
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        read_trace(path)
    return str(error.value)


def test_a_trace_is_read(trace):
    recorded = read_trace(trace)
    assert (len(recorded.settings.steps), recorded.settings.image_size) == (3, (16, 16))
    assert recorded.tensor("step1/context_masks").shape == (1, 2, 4)
    assert recorded.settings.steps[2].loss > 0


def test_a_rectangular_grid_and_another_hidden_width_are_read(tmp_path):
    recorded = read_trace(record_trace(tmp_path, image_size=[16, 24], encoder=(24, 1, 3, 97)))
    encoder, predictor = recorded.build()
    assert encoder.grid == (4, 6) and encoder.blocks[0].mlp.fc1.out_features == 97
    assert predictor.predictor_pos_embed.shape == (1, 24, 8)


def test_everything_missing_extra_and_misshapen_is_named(trace):
    change_arrays(
        trace,
        init__encoder__norm__weight=np.zeros(3, np.float32),
        **{"init/encoder/norm.bias": None, "final/predictor/mask_token": np.zeros((1, 1, 9), np.float32)},
        step2__images=None,
    )
    message = refusal(trace)
    assert "init/encoder/norm.bias is missing" in message
    assert "step2/images is missing" in message
    assert "init/encoder/norm/weight is unknown" in message
    assert "final/predictor/mask_token is [1, 1, 9], not [1, 1, 8]" in message
    assert message.count("\n") == 4


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("step0/context_masks", np.full((1, 2, 3), 16, np.int16), "numbers of patches from 0 to 15"),
        ("step0/target_masks", np.zeros((4, 2, 3), np.float32), "numbers of patches from 0 to 15"),
        ("step1/images", np.full((2, 3, 16, 16), np.nan, np.float32), "finite"),
        ("step1/context_masks", np.zeros((2, 2, 3), np.int16), "is [2, 2, 3], not [1, 2, any]"),
        ("final/encoder/norm.bias", np.array(["x"] * 16), "finite numbers"),
    ],
)
def test_values_that_cannot_be_replayed_are_refused(trace, key, value, text):
    change_arrays(trace, **{key: value})
    message = refusal(trace)
    assert key in message and text in message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": None, "ema": None}, "batch_size is missing\n  - ema is missing"),
        ({"encoder": {"dim": 16, "depth": 2}}, "encoder.heads is missing"),
        ({"encoder": None, "lr": 3}, "encoder.heads is missing\n  - lr must be an object, not a number"),
        ({"weight_decay": [0.1], "epochs": "3"}, 'epochs = "3" must be a number\n  - weight_decay = [0.1] must be'),
        (
            {"steps": [{"loss": 1.0, "lr": 1, "weight_decay": 1, "momentum": 1, "grad_norm_encoder": 1}]},
            "steps[0].grad_norm_predictor is missing",
        ),
        ({"steps": []}, "steps = [] must hold at least 1"),
        ({"targets": 0}, "targets = 0 must be at least 1"),
        ({"patch_size": 5}, "patch_size = 5 does not divide image_size = [16, 16]"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05 is not 1e-6"),
        ({"encoder": {"dim": 16, "depth": 2, "heads": 3}}, "must have a dim that its heads and 4 divide"),
        ({"encoder": {"dim": 16, "depth": 3, "heads": 2}}, "init/encoder/blocks.2.norm1.weight is missing"),
        ({"targets": 3}, "step0/target_masks is [4, 2, 3], not [3, 2, any]"),
    ],
)
def test_settings_that_are_missing_or_do_not_fit_are_named(trace, changes, text):
    change_settings(trace, **changes)
    assert text in refusal(trace)


def test_damaged_files_are_refused_in_one_sentence(trace):
    whole = trace.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"no archive", whole[:3000] + b"x" * 9 + whole[3009:]):
        trace.write_bytes(damaged)
        assert "damaged" in refusal(trace)
    trace.write_bytes(whole)
    trace.with_suffix(".json").write_text("{")
    assert "damaged" in refusal(trace)
    trace.with_suffix(".json").unlink()
    assert ".json" in refusal(trace)
    assert "does not exist" in refusal(trace.parent / "none.npz")


def test_a_pickle_inside_is_not_executed(trace):
    change_arrays(trace, step0__images=np.array([{"a": 1}], dtype=object))
    assert "damaged" in refusal(trace)
