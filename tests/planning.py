"""Plans of small and of shipped configurations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ijepa_ds.config import load_config
from ijepa_ds.plan.command import plan_of
from ijepa_ds.plan.images import images_of
from ijepa_ds.plan.predict import Plan, Terms

ROOT = Path(__file__).resolve().parents[1]
TINY: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "overlap_comm": True},
    "ijepa": {
        "run": {"name": "tiny"},
        "data": {"train": "nowhere.beton", "image_size": [32, 48]},
        "model": {
            "encoder": "tiny",
            "width": 48,
            "depth": 3,
            "heads": 4,
            "patch_size": 4,
            "predictor_width": 32,
            "predictor_depth": 2,
        },
        "optimization": {"epochs": 2, "warmup_epochs": 1},
    },
}


def write_tiny(folder: Path) -> Path:
    """A small configuration as a file."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def make_plan(config: str | Path, *overrides: str, images: int | None = 1_281_167, **options: Any) -> Plan:
    """Plan a file of ds_configs/ (by its name) or a path, with overrides, as the command line does."""
    path = ROOT / "ds_configs" / f"{config}.json" if isinstance(config, str) else config
    loaded = load_config(path, list(overrides))
    terms = Terms(**{key: options.pop(key) for key in ("efficiency", "price", "host_memory") if key in options})
    given = {"gpu": "a100-80", "gpus": 1, "nodes": None, "interconnect": None, **options}
    return plan_of(loaded, images_of(loaded.ijepa.data.train, images), terms, argparse.Namespace(**given))
