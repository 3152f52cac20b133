"""Task ``dense``: segmentation and depth from patch tokens, by linear probes and by nearest neighbours.

Probes are fitted on a part of the training images' patches. Segmentations are enlarged bilinearly to the mask's own
size and scored there (mean IoU); depth is scored on the patches (RMSE). Each process fits the same probes and measures
its share of the images.

Shapes: B images, H x W pixels, N patches of p x p, F features of a patch, P fitted patches, C classes that these have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ijepa_ds.build import input_of_encoder
from ijepa_ds.distributed import gather
from ijepa_ds.evaluation.candidates import BLOCKS, Candidate
from ijepa_ds.evaluation.dense_data import DenseData, say_missing
from ijepa_ds.evaluation.dense_scores import Scores
from ijepa_ds.evaluation.features import BrokenFeaturesError
from ijepa_ds.evaluation.inputs import central_crops
from ijepa_ds.evaluation.probes.patch_probes import Probe, Truth, by_position, fit_linear, fit_neighbours
from ijepa_ds.evaluation.results import Measurement
from ijepa_ds.evaluation.setting import Setting
from ijepa_ds.random_streams import SUBSET, permutation

PATCHES = 65536  # that probes are fitted on


class DenseTask:
    """As :class:`ijepa_ds.evaluation.tasks.Task`, on a folder in place of labelled .beton files."""

    def prepare(self, setting: Setting) -> DenseData:
        """Read all masks and depth maps; whatever is wrong with them is refused (:class:`UserError`)."""
        data = DenseData(setting.options, setting.config, setting.progress)
        setting.say(data.describe())
        say_missing(data, setting.say)
        return data

    def measure(self, setting: Setting, candidate: Candidate, data: DenseData) -> Iterator[Measurement]:
        """Linear probes on each view and neighbours on the narrowest, for each of segmentation and depth."""
        began, device = time.monotonic(), setting.process.device
        features = patch_features(candidate, setting, data)
        picked = picked_patches(data, setting.options.patches or PATCHES, seed=setting.seed)
        rows, rate = fitted_rows(setting, candidate, data, features, picked)
        truth, rows = truth_of(data, picked, device), rows.to(device)
        probes = fit_probes(setting, candidate, rows, truth)
        if candidate.name == "trained":  # it is the same beside any candidate
            probes.append(by_position(truth, data.grid[0] * data.grid[1]))
        scores = Scores(probes, truth, data, setting.process)
        score_images(setting, candidate, data, features, scores)
        if setting.process.is_main:
            if candidate.name == "trained":
                setting.examples |= scores.examples()
            yield from scores.measurements(began, rate, num_patches=len(rows))


def patch_features(candidate: Candidate, setting: Setting, data: DenseData) -> Callable[[Tensor], Tensor]:
    """Make the function from uint8 images on the device [B, H, W, 3] to features of their patches, fp32 [B, N, F].

    Of an encoder its last four blocks' normed tokens, the last block's last; of raw pixels those of each patch.
    """
    module, patch = candidate.module, data.patch
    if module is None:
        rows, columns = data.grid

        def pixels(images: Tensor) -> Tensor:
            blocks = images.view(len(images), rows, patch, columns, patch, 3).transpose(2, 3)
            return blocks.reshape(len(images), rows * columns, -1).float() / 255

        return pixels
    weight, blocks_out = module.patch_embed.proj.weight, min(BLOCKS, len(module.blocks))
    prepare = input_of_encoder(setting.config, weight.device, weight.dtype)

    @torch.no_grad()
    def tokens(images: Tensor) -> Tensor:
        blocks = module(prepare(images), blocks_out=blocks_out)
        return torch.cat([block.float() for block in (blocks if blocks_out > 1 else [blocks])], dim=2)

    return tokens


def picked_patches(data: DenseData, limit: int, *, seed: int) -> np.ndarray:
    """At most ``limit`` of the training patches of which all is known, drawn by the seed: bool [n, N]."""
    known = data.known("train")
    places = np.flatnonzero(known)
    picked = np.zeros(known.size, bool)
    picked[places[permutation(seed, 0, len(places), purpose=SUBSET)[:limit]]] = True
    return picked.reshape(known.shape)


def truth_of(data: DenseData, picked: np.ndarray, device: torch.device) -> Truth:
    """Classes and depths of the ``picked`` patches [n, N], in their order."""
    train, (images, places) = data.patches["train"], np.nonzero(picked)
    classes, present = None, torch.empty(0, dtype=torch.int64)
    if train.classes is not None:
        present, classes = torch.from_numpy(train.classes[picked]).long().unique(return_inverse=True)
        classes = classes.to(device)
    depth = None if train.depth is None else torch.from_numpy(train.depth[picked]).to(device)
    return Truth(classes, present.to(device), depth, images, places)


def fitted_rows(
    setting: Setting, candidate: Candidate, data: DenseData, features: Callable[[Tensor], Tensor], picked: np.ndarray
) -> tuple[Tensor, float]:
    """The ``picked`` patches' features in order, fp32 [P, F] on the CPU of every process, and images per second."""
    process, samples = setting.process, np.flatnonzero(picked.any(axis=1))
    mine, parts, done, began = samples[process.rank :: process.world_size], [], 0, time.monotonic()
    progress = setting.progress(f"patches of train, {candidate}", len(samples))
    for batch in central_crops(data.loader("train"), samples, features, process):
        chosen = torch.from_numpy(picked[mine[done : done + len(batch)]]).to(batch.device)
        parts.append(finite(batch[chosen]).cpu())
        done += len(batch)
        progress.show(min(len(samples), done * process.world_size))
    progress.end(len(samples))
    rate, rows = len(samples) / (time.monotonic() - began), torch.cat(parts) if parts else torch.empty(0, 0)
    return rows if process.world_size == 1 else _joined(gather(rows.numpy(), process), samples, picked), rate


def _joined(shares: list[np.ndarray], samples: np.ndarray, picked: np.ndarray) -> Tensor:
    """The rows of all ranks, each of which had every so many-th of the ``samples``, in the order of one process's."""
    images, rows = np.nonzero(picked)[0], torch.empty(int(picked.sum()), max(share.shape[1] for share in shares))
    for rank, share in enumerate(shares):
        if len(share):
            rows[torch.from_numpy(np.isin(images, samples[rank :: len(shares)]))] = torch.from_numpy(share)
    return rows


def finite(rows: Tensor) -> Tensor:
    """``rows``, which must be numbers."""
    if not bool(torch.isfinite(rows).all()):
        raise BrokenFeaturesError(
            "the features of patches hold NaN or infinity: the checkpoint has diverged or is damaged"
        )
    return rows


def fit_probes(setting: Setting, candidate: Candidate, rows: Tensor, truth: Truth) -> list[Probe]:
    """A linear probe on each view of the rows [P, F], and neighbours on the last block's tokens."""
    views, probes = candidate.views, list[Probe]()
    progress = setting.progress(f"linear probes of patches, {candidate}", len(views), "fits")
    for view, columns in views.items():
        probes.append(
            fit_linear(view, columns, rows, truth, seed=setting.seed, tick=lambda: progress.show(len(probes)))
        )
    progress.end(len(probes))
    first, columns = next(iter(views.items()))  # `last`: four times as wide would take four times as long
    return [*probes, fit_neighbours(first, columns, rows, truth)]


def score_images(
    setting: Setting, candidate: Candidate, data: DenseData, features: Callable[[Tensor], Tensor], scores: Scores
) -> None:
    """Show every validation image to every probe."""
    process, total = setting.process, len(data.samples["validation"])
    mine, done = np.arange(process.rank, total, process.world_size), 0
    progress = setting.progress(f"patches of validation, {candidate}", total)
    for batch in central_crops(data.loader("validation"), np.arange(total), features, process):
        images = mine[done : done + len(batch)].tolist()
        scores.add(images, finite(batch), data.masks("validation", images))
        done += len(batch)
        progress.show(min(total, done * process.world_size))
    scores.sum_over_ranks()
    progress.end(total)
