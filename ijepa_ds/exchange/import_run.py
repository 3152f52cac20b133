"""``python -m ijepa_ds import``: a run folder from a checkpoint in the released code's format.

The folder holds a complete checkpoint of step 0: masters from encoder and predictor, the average from the target
encoder, moments zero. So a run can go on from it, and it can be evaluated and exported.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ijepa_ds.build import build_ijepa, build_sampler, build_target, encoder_dimensions
from ijepa_ds.config import Config, apply_override, load_config, parse_config
from ijepa_ds.engine.checkpoint_files import list_checkpoints
from ijepa_ds.engine.checkpoint_writer import save
from ijepa_ds.engine.plain import Plain
from ijepa_ds.engine.shards import fill
from ijepa_ds.engine.trainable import TARGET
from ijepa_ds.errors import UserError
from ijepa_ds.exchange.inferred_config import infer_config, size_differences
from ijepa_ds.exchange.read import ReferenceCheckpoint, read_reference
from ijepa_ds.method.ijepa import CONTEXT_ENCODER
from ijepa_ds.run.folder import RunFolder
from ijepa_ds.run.lock import hold, release

_HELP = """
The file is read as tensors and plain values; nothing in it is executed. Sizes are read off the
tensors. Heads are not in them: they follow from a named width (192, 384, 768, 1024, 1280, 1408),
from --config or from --heads.

Afterwards:
  deepspeed run.py --config RUN/recipe.json      go on from it, at step 0 of the recipe
  python -m ijepa_ds evaluate --checkpoint RUN   probe its target encoder
  python -m ijepa_ds export RUN --format timm    hand it on
The optimizer's moments start at zero, as the step does.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds import``."""
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_ds import",
        description="Make a run folder from a checkpoint in the released code's format.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT.pth.tar")
    parser.add_argument("--out", required=True, metavar="RUN", help="the run folder to make, such as runs/released")
    parser.add_argument("--config", metavar="FILE.json", help="a file of ds_configs/ (default: inferred, and printed)")
    parser.add_argument("--heads", type=int, help="attention heads, where the width is none of the named ones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="such as ijepa.data.workers=4")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if list_checkpoints(out / "checkpoints"):
        raise UserError(f"{out} holds checkpoints already and is not overwritten; choose another --out")
    if out.name in ("", ".."):
        raise UserError(f"--out {options.out} must end in a folder name, such as runs/released")
    config, checkpoint, origin = _configure(options, out)
    epochs = "" if checkpoint.epoch is None else f"; trained for {checkpoint.epoch} epochs"
    print(checkpoint.target.describe() + epochs)
    grid = checkpoint.target.grid
    if grid != config.grid:
        print(f"positions are computed again: the file's grid is {grid[0]} x {grid[1]}, the run's "
              f"{config.grid[0]} x {config.grid[1]}")  # fmt: skip
    build_sampler(config)  # refuses a grid that has no masks, before anything is written
    write_run(config, checkpoint)
    recipe = out / "recipe.json"
    recipe.write_text(json.dumps(config.as_dict(), indent=2) + "\n")
    if options.config is None:
        print(f"{json.dumps(config.as_dict(), indent=2)}\nno --config was given; {origin}")
    print(f"written: {out}, to go on from with: deepspeed run.py --config {recipe}")
    return 0


def _configure(options: argparse.Namespace, out: Path) -> tuple[Config, ReferenceCheckpoint, str]:
    """The run's configuration and the weights that fit it."""
    run = [f"ijepa.run.folder={json.dumps(str(out.parent))}", f"ijepa.run.name={json.dumps(out.name)}"]
    if options.config is None:
        checkpoint = read_reference(options.checkpoint, heads=options.heads)
        raw, origin = infer_config(checkpoint.target, checkpoint.predictor_sizes)
        for override in [*options.set, *run]:
            apply_override(raw, override)
        config = parse_config(raw, source="the configuration inferred from the tensors")
    else:
        config = load_config(options.config, [*options.set, *run])
        heads = encoder_dimensions(config).heads
        if options.heads not in (None, heads):
            raise UserError(f"--heads {options.heads} is not {options.config}'s {heads}; give one of the two")
        # One head divides any width: a width that is not the configuration's is told below, among all differences.
        checkpoint, origin = read_reference(options.checkpoint, heads=1).with_heads(heads), options.config
    differences = size_differences(config, checkpoint.target, checkpoint.predictor_sizes)
    if differences:
        lines = "".join(f"\n  - {difference}" for difference in differences)
        raise UserError(f"{options.checkpoint} does not fit {options.config or 'the configuration'}:{lines}")
    return config, checkpoint, origin


def write_run(config: Config, checkpoint: ReferenceCheckpoint) -> Path:
    """Make the run folder of ``config`` with a checkpoint of step 0; returns the checkpoint's folder.

    The number of training images stays open: the data need not be there yet.
    """
    model = build_ijepa(config)
    positions = model.predictor.predictor_pos_embed.data
    model.context_encoder.load_state_dict(checkpoint.context.state_dict(config.grid))
    model.predictor.load_state_dict({**checkpoint.predictor, "predictor_pos_embed": positions})
    optimization = config.ijepa.optimization
    trainable = Plain(
        model, build_target(config), betas=optimization.betas, eps=optimization.eps, to_input=lambda images: images
    )
    state = trainable.state()
    fill(state.slices[TARGET], {f"{CONTEXT_ENCODER}.{n}": w for n, w in checkpoint.target.weights.items()})
    folder = RunFolder(config)
    hold(folder.path)
    try:
        folder.prepare(config, num_images=None)
        return save(folder.checkpoints, 0, state, trainable.process, keep=config.ijepa.checkpoint.keep)
    finally:
        release(folder.path)
