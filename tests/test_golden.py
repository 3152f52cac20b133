"""Twenty losses of a tiny fp32 run on the built-in scenes, kept to full precision: a refactor must not change them.

To write them anew: ``PYTHONPATH=.:tests python tests/test_golden.py``. One may, when a change is MEANT to alter what is
learnt (method, masks, initial weights, order, crops, the scenes), or the pinned versions do; the commit says which.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from distributed_runs import FOLDER, launch_training, once, run_folder, tiny_config

GOLDEN = Path(__file__).parent / "golden" / "losses.txt"
STEPS, SCENES = 20, 64
# One order of every sum on every x86 processor with AVX2.
SAME_ARITHMETIC = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def draws_the_weights_of_the_golden_losses() -> bool:
    """Since 2.12 torch's trunc_normal_ draws other numbers from a generator than before."""
    weight = torch.nn.init.trunc_normal_(torch.empty(1), std=0.02, generator=torch.Generator().manual_seed(0))
    return abs(float(weight) - 0.0308) < 1e-4


same_weights = pytest.mark.skipif(
    not draws_the_weights_of_the_golden_losses(), reason="this torch draws other initial weights from a seed"
)


@once
def scenes_beton() -> Path:
    """The images of the run; also the digest of the batches that a loader makes of them."""
    from data_prep.make_scenes import make_scenes
    from data_prep.to_ffcv import main as to_ffcv

    folder, beton = FOLDER / "golden_scenes", FOLDER / "golden.beton"
    make_scenes(folder, train=SCENES, val=1, size=32, seed=0, workers=1)
    assert to_ffcv([str(folder), str(beton), "--split", "train", "--write-mode", "raw", "--workers", "1"]) in (None, 0)
    return beton


def golden_config(name: str) -> dict:
    return tiny_config(
        train_batch_size=8,
        bf16={"enabled": False},
        ijepa__run__name=name,
        ijepa__data__train=str(scenes_beton()),
        ijepa__optimization__epochs=STEPS * 8 / SCENES,
        ijepa__optimization__warmup_epochs=0.5,
    )


def digest_of_batches() -> str:
    """Of the images and masks that go in: tells a changed loader from a changed model."""
    from types import SimpleNamespace

    from ijepa_ds.build import build_loader, build_sampler
    from ijepa_ds.config import parse_config
    from ijepa_ds.data.beton import inspect_dataset

    config = parse_config(golden_config("digest"))
    only = SimpleNamespace(data_rank=0, data_ranks=1)
    loader = build_loader(config, inspect_dataset(scenes_beton()), build_sampler(config), only)
    digest = hashlib.sha256()
    for batches in loader.from_step(0, STEPS):
        for batch in batches:
            for part in (batch.images, batch.context_block, batch.target_blocks):
                digest.update(part.numpy().tobytes())
    return digest.hexdigest()


@once
def losses(ranks: int) -> list[float]:
    run = launch_training(golden_config(f"golden_{ranks}"), ranks, environment=SAME_ARITHMETIC)
    assert run.exit_codes == [0], run.output[-3000:]
    return run.losses


def golden() -> tuple[str, list[float]]:
    lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return lines[0].split()[1], [float(line.split()[1]) for line in lines[1:]]


def test_the_batches_are_those_of_the_golden_losses():
    assert digest_of_batches() == golden()[0], "scenes, order, crops or masks have changed: so will the losses"


@same_weights
def test_one_rank_has_the_golden_losses():
    assert losses(1) == golden()[1]


@same_weights
def test_two_ranks_have_them_up_to_the_order_of_sums():
    found = losses(2)
    assert len(found) == STEPS
    assert found == pytest.approx(golden()[1], rel=1e-6)


@same_weights
def test_a_run_stopped_by_an_earlier_version_goes_on():
    """golden/format_1: this run after ten steps, written before the package had wings, when sums had another order."""
    config = golden_config("before_wings")
    shutil.copytree(GOLDEN.parent / "format_1", run_folder(config))
    run = launch_training(config, 1, environment=SAME_ARITHMETIC)
    assert run.exit_codes == [0] and "going on from step 10" in run.output, run.output[-3000:]
    assert run.losses == pytest.approx(golden()[1], rel=1e-6)


if __name__ == "__main__":
    rows = "".join(f"{step} {loss!r}\n" for step, loss in enumerate(losses(1), start=1))
    head = (
        "# Losses of 20 fp32 steps on the built-in scenes; see tests/test_golden.py before you write them anew.\n"
        "# The first line is the sha256 of the batches, then step and loss.\n"
    )
    GOLDEN.write_text(f"{head}batches {digest_of_batches()}\n{rows}")
