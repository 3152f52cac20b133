"""The warm-up: it leaves nothing behind, and a whole run after it compiles nothing more."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import (
    averages_of,
    bare_run,
    build_parts,
    masters_of,
    run_ranks,
    run_training,
    tiny_config,
    train_steps,
)

from ijepa_ds.build import build_sampler, is_compiled
from ijepa_ds.config import Config, parse_config
from ijepa_ds.engine import warm_up as module
from ijepa_ds.engine.warm_up import Shapes, compile_and_warm_up, warm_up
from ijepa_ds.errors import UserError

SHAPES = Shapes(num_images=4, image_size=(32, 32), context_tokens=18, num_targets=4, target_tokens=[16, 12, 9])


# --------------------------------------------------------------------------------------------------- whole runs


def compile_without_inductor() -> None:
    """In a rank, before it trains: torch's own backend would take minutes; a shape that is compiled later raises."""
    import ijepa_ds.train

    def strict(*arguments) -> None:
        compile_and_warm_up(*arguments, backend="eager")  # traced and guarded all the same
        torch.compiler.set_stance("fail_on_recompile")

    ijepa_ds.train.compile_and_warm_up = strict


def test_a_compiled_run_compiles_nothing_after_its_warm_up_and_trains_as_an_eager_one():
    """With the loader's own batches: their strides count, too."""
    config = tiny_config(ijepa__run__name="compiled", ijepa__compile=True)
    run = run_training(config, 1, prepare=compile_without_inductor)
    assert run.exit_codes == [0], run.output[-3000:]
    assert "compiling for target blocks of 16, 12, 9 patches" in run.output
    assert len({row["target_tokens"] for row in run.rows}) > 1
    assert run.losses == pytest.approx(bare_run(1).losses, rel=1e-4)


def compile_lightly() -> None:
    import ijepa_ds.train

    ijepa_ds.train.compile_and_warm_up = lambda *arguments: compile_and_warm_up(*arguments, backend="eager")


def test_a_compiled_run_has_pictures_health_and_a_probe_of_other_batches():
    config = tiny_config(ijepa__run__name="compiled_watched", ijepa__compile=True)
    config["ijepa"]["monitor"].update(health_steps=2, picture_steps=4)
    run = run_training(config, prepare=compile_lightly)
    assert run.exit_codes == [0], run.output[-3000:]
    assert any("rankme" in key for row in run.rows for key in row), run.rows[:3]


# --------------------------------------------------------------------------------------------------- the rehearsal


def rehearse_then_train(rehearsals: int, **changes) -> tuple:
    parts = build_parts(tiny_config(**changes))
    # Made-up batches are [B, 3, H, W] already, the warm-up's zeros are as the loader's.
    as_made_up = parts.trainable.to_input
    parts.trainable.to_input = lambda images: as_made_up(
        images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images
    )
    for _ in range(rehearsals):
        warm_up(parts.trainable, SHAPES, parts.process)
    return train_steps(parts, range(3)), masters_of(parts), averages_of(parts), parts.adam_steps()


PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "ZeRO 0": {"zero_optimization": {"stage": 0}},
    "ZeRO 1, bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
}


def with_and_without() -> list[bool]:
    """In a rank: whether each precision trains bit for bit as if nothing had been tried before."""
    same = []
    for changes in PRECISIONS.values():
        (losses, *state), (after, *state_after) = (rehearse_then_train(n, **changes) for n in (0, 2))
        tensors = zip(state[:2], state_after[:2], strict=True)
        same.append(
            losses == after
            and state[2] == state_after[2]
            and all(torch.equal(one[name], other[name]) for one, other in tensors for name in one)
        )
    return same


def test_nothing_of_a_rehearsal_remains():
    for same in run_ranks(with_and_without, 2):
        assert dict(zip(PRECISIONS, same, strict=True)) == dict.fromkeys(PRECISIONS, True)


def run_out_of_memory() -> str:
    parts = build_parts(tiny_config())

    def forward(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    parts.trainable.module.forward = forward
    parts.trainable.to_input = lambda images: images.permute(0, 3, 1, 2).float()
    with pytest.raises(UserError) as error:
        warm_up(parts.trainable, SHAPES, parts.process)
    return str(error.value)


def test_a_micro_batch_that_does_not_fit_is_refused_with_its_cure():
    (message,) = run_ranks(run_out_of_memory, 1)
    assert message.startswith("4 images at once, with target blocks of 16 patches, do not fit")
    assert "lower train_micro_batch_size_per_gpu (tried to allocate 20 GiB)" in message


def fail_to_compile() -> str:
    """In a rank: a backend that cannot do it, such as inductor without a C++ compiler."""

    def backend(*_: object) -> None:
        raise OSError("no C++ compiler")

    parts = build_parts(tiny_config())
    parts.trainable.to_input = lambda images: images.permute(0, 3, 1, 2).float()
    with pytest.raises(UserError) as error:
        compile_and_warm_up(parts.trainable, SHAPES, parts.process, backend=backend)
    return str(error.value)


def test_blocks_that_cannot_be_compiled_are_refused_with_the_cure():
    (message,) = run_ranks(fail_to_compile, 1)
    assert message.startswith("torch cannot compile the blocks here; set ijepa.compile to false (")
    assert "no C++ compiler" in message and "\n" not in message


# --------------------------------------------------------------------------------------------------- the environment


@pytest.fixture
def environment(monkeypatch, tmp_path):
    import torch._inductor.config

    for name in ("TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with torch._inductor.config.patch(compile_threads=32):
        yield monkeypatch


def test_compiled_code_is_kept_in_the_users_cache_by_four_processes(environment, tmp_path):
    module._set_up_inductor()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "ijepa_ds" / "inductor"
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "4"
    assert sys.modules["torch._inductor.config"].compile_threads == 4


def test_what_the_environment_says_stays(environment, tmp_path):
    environment.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    environment.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    module._set_up_inductor()
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "7"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert sys.modules["torch._inductor.config"].compile_threads == 32
    assert list(tmp_path.iterdir()) == []


def test_without_a_cache_folder_torchs_own_is_used(environment, tmp_path):
    (tmp_path / "file").touch()
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    module._set_up_inductor()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


# --------------------------------------------------------------------------------------------------- the setting


def config_with(setting: bool | None, sampler: str) -> Config:
    masks = {"sampler": sampler, "truncation_group": 16}
    return parse_config(tiny_config(ijepa__compile=setting, ijepa__masks=masks))


@pytest.mark.parametrize(
    ("setting", "sampler", "device", "compiled"),
    [
        (None, "multiblock", "cuda", True),
        (None, "multiblock", "cpu", False),
        (None, "reference", "cuda", False),
        (False, "multiblock", "cuda", False),
        (True, "multiblock", "cpu", True),
    ],
)
def test_gpus_compile_where_the_setting_says_nothing(setting, sampler, device, compiled):
    assert is_compiled(config_with(setting, sampler), torch.device(device)) is compiled


def test_contexts_of_many_lengths_are_not_compiled():
    with pytest.raises(UserError, match=r"ijepa\.compile = true needs context blocks of one length"):
        build_sampler(config_with(True, "reference"))
