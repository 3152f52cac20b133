"""--task dense: probes that are right where features tell the class, and scores that were worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_runs import tiny_config
from made_up_masks import made_up, write_dense_folder, write_png
from torch import Tensor

from ijepa_ds.build import build_encoder
from ijepa_ds.config import parse_config
from ijepa_ds.distributed import Process
from ijepa_ds.errors import UserError
from ijepa_ds.evaluation.candidates import candidates
from ijepa_ds.evaluation.command import build_parser, check_options
from ijepa_ds.evaluation.dense_data import DenseData
from ijepa_ds.evaluation.dense_scores import Scores
from ijepa_ds.evaluation.features import BrokenFeaturesError
from ijepa_ds.evaluation.plots import examples_figure
from ijepa_ds.evaluation.probes import patch_probes
from ijepa_ds.evaluation.probes.patch_probes import Probe, Truth, by_position, fit_linear, fit_neighbours
from ijepa_ds.evaluation.results import Measurement, best_of
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.evaluation.subject import Subject
from ijepa_ds.evaluation.tasks.dense import DenseTask, _joined, patch_features, picked_patches

ALONE = Process(0, 1, torch.device("cpu"))
CONFIG = parse_config(tiny_config(ijepa__data__image_size=32, ijepa__model__patch_size=8, bf16={}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_folder(tmp_path_factory.mktemp("dense") / "plain", train=12, val=5)


def setting_of(folder: Path, *options: object) -> Setting:
    arguments = ["--checkpoint", "x", "--task", "dense", "--dense-data", str(folder), "--micro-batch", "5"]
    return Setting(build_parser().parse_args([*arguments, *map(str, options)]), CONFIG, None, ALONE, lambda line: None)


def subject() -> Subject:
    weights = build_encoder(CONFIG, torch.Generator().manual_seed(1)).state_dict()
    return Subject(CONFIG, weights, "a test", Path("x"), Path("x"))


def made_up_truth(images: int = 30, places: int = 10) -> tuple[Tensor, Truth]:
    """Features [P, 8] of 30 images of 10 patches: noise, and the class's own direction at 3 deviations of it."""
    draw = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 4, (images * places,), generator=draw)
    rows = torch.randn(images * places, 8, generator=draw)
    rows[torch.arange(len(rows)), classes] += 3
    numbers = np.repeat(np.arange(images), places), np.tile(np.arange(places), images)
    return rows, Truth(classes, torch.tensor([2, 5, 6, 9]), classes.float() + 1, *numbers)


def shown(rows: Tensor, truth: Truth, part: slice) -> tuple[Tensor, Truth]:
    assert truth.classes is not None and truth.depth is not None
    parts = truth.classes[part], truth.present, truth.depth[part], truth.images[part], truth.places[part]
    return rows[part], Truth(*parts)


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_probes_beat_chance_on_images_that_they_have_not_seen(method: str) -> None:
    rows, truth = made_up_truth()
    assert truth.classes is not None and truth.depth is not None
    fitted, probes = shown(rows, truth, slice(0, 200)), {"linear": fit_linear, "knn": fit_neighbours}
    more = {"seed": 0, "tick": lambda: None} if method == "linear" else {}
    told = probes[method]("last", slice(None), *fitted, **more).predict(rows[200:])
    right = (told["segmentation"].argmax(dim=1) == truth.classes[200:]).float().mean()
    assert told["segmentation"].shape == (100, 4) and right > 0.85  # by chance 0.25
    errors = (told["depth"] - truth.depth[200:]).square().mean().sqrt()
    assert errors < 0.75 < truth.depth[200:].std()  # of the mean alone: 1.1
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(5))
    blind = probes[method]("last", slice(None), *shown(noise, truth, slice(0, 200)), **more).predict(noise[200:])
    assert (blind["segmentation"].argmax(dim=1) == truth.classes[200:]).float().mean() < 0.45


def test_the_linear_probe_predicts_from_its_own_columns_and_without_held_out_images() -> None:
    rows, truth = made_up_truth()
    wide = torch.cat([torch.zeros(300, 3), rows], dim=1)
    probe = fit_linear("last", slice(3, None), *shown(wide, truth, slice(0, 10)), seed=0, tick=lambda: None)
    assert probe.heads["segmentation"]["l2"] == 0.1  # of a single image none can be held out
    changed = wide + torch.cat([torch.ones(3), torch.zeros(8)])
    assert torch.equal(probe.predict(changed)["depth"], probe.predict(wide)["depth"])


def test_neighbours_have_a_weighted_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_probes, "NEIGHBOURS", 2)
    bank, places = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), np.arange(3)
    truth = Truth(torch.tensor([0, 1, 1]), torch.tensor([4, 7]), torch.tensor([2.0, 4.0, 9.0]), places, places)
    told = fit_neighbours("last", slice(None), bank, truth).predict(torch.tensor([[2.0, 0.0]]))
    second = np.exp((np.sqrt(0.5) - 1) / 0.07)  # the weight of [1, 1], whose cosine is that of 45 degrees
    np.testing.assert_allclose(told["segmentation"], [[1 / (1 + second), second / (1 + second)]], rtol=1e-5)
    np.testing.assert_allclose(told["depth"], [(2 + 4 * second) / (1 + second)], rtol=1e-5)


def test_position_alone() -> None:
    places = np.array([0, 0, 0, 2])
    truth = Truth(torch.tensor([1, 1, 0, 0]), torch.tensor([3, 8]), torch.tensor([1.0, 2.0, 6.0, 7.0]), places, places)
    told = by_position(truth, 3).predict(torch.zeros(6, 5))
    assert told["segmentation"].argmax(dim=1).tolist()[::2] == [1, 0, 0]
    assert told["depth"].tolist() == [3.0, 4.0, 7.0] * 2  # the empty place has the mean of all


def fixed(method: str, classes: list[int], depth: float) -> Probe:
    """A probe that says the same of every image: a class of each patch, and one depth."""
    scores = torch.eye(3)[classes]
    heads = {label: {"features": method} for label in ("segmentation", "depth")}
    return Probe(method, heads, lambda rows: {
        "segmentation": scores.repeat(len(rows) // len(classes), 1), "depth": torch.full((len(rows),), depth)
    })  # fmt: skip


def test_scores_by_hand(tmp_path: Path) -> None:
    """Two validation images of 2 x 2 patches: what is counted is pixels of the masks, and patches of known depth."""
    for split in ("train", "val"):
        for number, size in enumerate([(16, 16), (32, 16)]):
            mask, depth = np.zeros(size, np.uint8), np.full(size, 2.0, np.float32)
            mask[:, size[1] // 2 :], mask[0, 0] = 1 + number, 255
            depth[: size[0] // 2] = 5.0
            if number:
                depth[:, : size[1] // 2] = 0.0
            write_png(tmp_path / "images" / split / f"{number}.png", np.zeros((*size, 3), np.uint8))
            write_png(tmp_path / "masks" / split / f"{number}.png", mask)
            (tmp_path / "depth" / split).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "depth" / split / f"{number}.npy", depth)
    config = parse_config(tiny_config(ijepa__data__image_size=16, ijepa__model__patch_size=8))
    data = DenseData(setting_of(tmp_path).options, config)
    truth = Truth(torch.tensor([0]), torch.tensor([0, 1, 2]), torch.tensor([1.0]), np.zeros(1, int), np.zeros(1, int))
    probes = [fixed("linear", [0, 1, 0, 1], 4.0), fixed("knn", [0, 0, 0, 0], 3.0), fixed("position", [2, 2, 2, 2], 2.0)]
    scores = Scores(probes, truth, data, ALONE)
    scores.add([0, 1], torch.zeros(2, 4, 1), data.masks("validation", [0, 1]))
    measured = {(m.task, m.label): m for m in scores.measurements(0.0, 1.0, num_patches=1)}
    # Left halves are class 0, less a pixel each: 127 + 255; right ones 1 (128) and 2 (256). All right ones are said to
    # be 1: class 0 is whole, class 1 has 128 of 128 + 256, class 2 nothing.
    linear = measured["dense_linear", "segmentation"]
    assert linear.extra["iou"] == pytest.approx([100, 100 * 128 / 384, 0], abs=1e-4)
    assert linear.grid[0]["value"] == pytest.approx((100 + 100 / 3) / 3)
    assert linear.grid[0]["pixel_accuracy"] == pytest.approx(100 * (382 + 128) / 766)
    assert linear.confusion == [[382, 0, 0], [0, 128, 0], [0, 256, 0]]
    knn = measured["dense_knn", "segmentation"]
    assert knn.grid[0]["value"] == pytest.approx(100 * 382 / 766 / 3)
    assert knn.extra["position_alone"] == pytest.approx(100 * 256 / 766 / 3)
    # Known depths: 5, 5, 2, 2 of the first image, 5 and 2 of the second.
    depth = [measured[f"dense_{method}", "depth"] for method in ("linear", "knn")]
    assert [m.grid[0]["value"] for m in depth] == pytest.approx([((3 + 3 * 4) / 6) ** 0.5, ((3 * 4 + 3) / 6) ** 0.5])
    assert depth[0].extra["position_alone"] == pytest.approx((3 * 9 / 6) ** 0.5)
    assert (depth[0].metric, depth[0].confusion, linear.metric) == ("RMSE", None, "mean IoU")
    (first, second) = scores.examples()["dense_segmentation"]
    assert second.predictions["linear"].tolist() == [[0] * 8 + [1] * 8] * 32 and second.truth.shape == (32, 16)
    assert scores.examples()["dense_depth"][0].predictions["knn"].tolist() == [[3.0, 3.0]] * 2
    assert first.truth[0, 0] == 255 and first.image.shape == (16, 16, 3)


def test_trained_random_and_pixels_are_measured_alike(folder: Path) -> None:
    setting, task = setting_of(folder), DenseTask()
    data, measured = task.prepare(setting), dict[str, dict[tuple[str, str], Measurement]]()
    for candidate in candidates(subject(), ALONE, torch.float32, random_seeds=1):
        measured[candidate.name] = {(m.task, m.label): m for m in task.measure(setting, candidate, data)}
        if candidate.name == "trained":
            assert setting.examples.keys() == {"dense_segmentation", "dense_depth"}
    trained = next(candidates(subject(), ALONE, torch.float32, random_seeds=1))
    again = {(m.task, m.label): m for m in task.measure(setting, trained, data)}
    for key, first in measured["trained"].items():
        assert first.grid == again[key].grid
        if key[1] == "depth":  # where all patches are right, as here, segmentations are the same
            assert first.grid != measured["random"][key].grid
        assert [head["features"] for head in first.grid] == (["last", "last4"] if "linear" in key[0] else ["last"])
    pixels = measured["pixels"]["dense_linear", "segmentation"]
    assert best_of(pixels.grid)["value"] > 90  # colours are classes; what is lost are corners, rounded by enlarging
    assert best_of(measured["pixels"]["dense_linear", "depth"].grid, lower=True)["value"] < 0.2
    figure = examples_figure(setting.examples["dense_segmentation"], data.names)
    image, mask, _ = made_up(1000)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "truth", "linear", "knn"]
    assert np.array_equal(figure.axes[0].images[0].get_array(), image)
    colours = np.asarray(figure.axes[1].images[0].get_array())
    assert all(len(np.unique(colours[mask == k], axis=0)) == 1 for k in range(3))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1", "2"]
    depths = examples_figure(setting.examples["dense_depth"], data.names)
    assert depths.axes[1].images[0].norm.vmax == 5.0 and len(depths.axes) == 5 * 4 + 1


def test_features_are_of_the_patches_in_their_order(folder: Path) -> None:
    setting = setting_of(folder)
    data, images = DenseTask().prepare(setting), torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    trained, _, pixels = candidates(subject(), ALONE, torch.float32, random_seeds=1)
    rows = patch_features(pixels, setting, data)(images)
    assert rows.shape == (2, 16, 8 * 8 * 3)
    assert torch.equal(rows[1, 6].view(8, 8, 3), images[1, 8:16, 16:24].float() / 255)
    tokens = patch_features(trained, setting, data)(images)
    torch.testing.assert_close(tokens.mean(1), trained.forward(images))
    assert tokens.shape == (2, 16, 2 * 32)


def test_patches_are_drawn_by_the_seed_and_joined_in_order(folder: Path) -> None:
    data = DenseTask().prepare(setting_of(folder))
    few, more, others = (picked_patches(data, n, seed=seed) for n, seed in ((20, 0), (60, 0), (20, 1)))
    assert few.sum() == 20 and (few & more).sum() == 20 and not np.array_equal(few, others)
    rows, samples = torch.arange(20.0)[:, None], np.flatnonzero(few.any(axis=1))
    images = np.nonzero(few)[0]
    shares = [rows[np.isin(images, samples[rank::3])].numpy() for rank in range(3)]
    assert torch.equal(_joined(shares, samples, few), rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--task dense", "--task dense needs --dense-data: a folder of images with masks or depth maps"),
        ("--dense-data x", "--dense-data is of --task dense: add that task, or leave the option out"),
        ("--task dense --dense-data x --patches 0", "--patches = 0 must be at least 1; leave it out for the default"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_options(build_parser().parse_args(["--checkpoint", "x", *arguments.split()]))
    assert str(caught.value) == says


def test_features_that_are_no_numbers_are_refused(folder: Path) -> None:
    setting, task, broken = setting_of(folder), DenseTask(), subject()
    broken.weights["norm.weight"] = broken.weights["norm.weight"] * float("nan")
    trained = next(candidates(broken, ALONE, torch.float32, random_seeds=1))
    with pytest.raises(BrokenFeaturesError, match="diverged or is damaged"):
        list(task.measure(setting, trained, task.prepare(setting)))
