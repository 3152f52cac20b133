"""``python -m ijepa_ds export``: a run's encoder for timm, transformers or the released code's tools.

The tensor names are timm's. Every file says which encoder it holds: the TARGET encoder, unless asked otherwise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ijepa_ds.build import encoder_dimensions, schedules_of
from ijepa_ds.config import Config
from ijepa_ds.engine.checkpoint_files import checkpoint_processes, checkpoint_step, read_weights
from ijepa_ds.errors import UserError
from ijepa_ds.exchange.model_card import write_card
from ijepa_ds.exchange.run_encoder import RunEncoder, encoder_weights
from ijepa_ds.exchange.tensor_names import to_reference, to_transformers
from ijepa_ds.files import replacing
from ijepa_ds.method.ijepa import PREDICTOR
from ijepa_ds.method.positions import sine_cosine_positions
from ijepa_ds.run.folder import find_checkpoint, read_run_record

LAYER_NORM_EPS = 1e-6
_HELP = """
formats:
  timm          target_encoder.safetensors, or context_encoder.safetensors: what
                timm.create_model(MODEL, checkpoint_path=FILE) loads, strictly
  transformers  a folder with config.json and model.safetensors: what
                transformers.IJepaModel.from_pretrained(FOLDER) loads
  reference     checkpoint.pth.tar as the released code writes it: both encoders and the
                predictor, but no optimizer state, so its training cannot go on from it

I-JEPA is evaluated by its TARGET encoder, which is the default. Tools that read the released
code's format often take its key 'encoder', which is the context encoder.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line of ``python -m ijepa_ds export``."""
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_ds export",
        description="Write a run's encoder in a format that other projects load.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder (its newest checkpoint) or one of its checkpoints")
    parser.add_argument("--format", choices=("timm", "transformers", "reference"), default="timm")
    parser.add_argument("--encoder", choices=("target", "context"), default="target", help="default: target")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="positions for images of this size, or rows and columns (default: the run's); they are computed again, "
        "not interpolated",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: below the run folder's export/)")
    options = parser.parse_args(arguments)
    run, checkpoint = find_checkpoint(Path(options.run))
    config, images = read_run_record(run)
    encoder = RunEncoder(checkpoint, config, options.encoder, _image_size(options.image_size, config))
    out = Path(options.out) if options.out else run / "export"
    if out.is_file():
        raise UserError(f"--out {out} is a file; give a folder")
    holds = f"the {options.encoder.upper()} encoder"
    try:
        if options.format == "reference":
            path, left_out = export_reference(encoder, out, images)
            holds = (
                "the TARGET encoder under 'target_encoder', the context encoder under 'encoder' (which other tools "
                f"often take) and the predictor, without {', '.join(left_out)},"
            )
        elif options.format == "transformers":
            default = "transformers" if options.encoder == "target" else "transformers_context"
            path = export_transformers(encoder, out if options.out else out / default)
        else:
            path = _write_timm(encoder, out)
        card, remark = write_card(encoder, path, options.format)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); choose another --out") from None
    print(f"written: {path}, {holds} of {checkpoint}\n{remark or f'its model card: {card}'}")
    return 0


def target_encoder_weights(checkpoint: Path, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The target encoder's fp32 state dict under timm's names, positions in full precision."""
    return encoder_weights(checkpoint, grid, "target")


def export_timm(checkpoint: Path, config: Config, folder: Path) -> Path:
    """Write the target encoder as safetensors that ``timm.create_model(..., checkpoint_path=...)`` loads strictly.

    Its model card is written beside it.
    """
    encoder = RunEncoder(checkpoint, config, "target", config.ijepa.data.image_size)
    path = _write_timm(encoder, folder)
    write_card(encoder, path, "timm")
    return path


def export_transformers(encoder: RunEncoder, folder: Path) -> Path:
    """Write config.json and model.safetensors, which ``IJepaModel.from_pretrained`` loads; returns the folder.

    Images must have exactly ``image_size``, which need not be square. (With ``interpolate_pos_encoding`` the library
    would interpolate positions bicubically from a square grid; export for another size instead.)
    """
    weights = to_transformers(encoder.weights())
    dimensions = encoder_dimensions(encoder.config)
    rows, columns = encoder.image_size
    config = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": dimensions.width,
        "num_hidden_layers": dimensions.depth,
        "num_attention_heads": dimensions.heads,
        "intermediate_size": dimensions.hidden,
        "image_size": rows if rows == columns else [rows, columns],
        "patch_size": encoder.config.ijepa.model.patch_size,
        "num_channels": 3,
        "layer_norm_eps": LAYER_NORM_EPS,  # the library's default is 1e-12
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
        "ijepa_encoder": encoder.metadata()["encoder"],
    }
    _save_safetensors(weights, folder / "model.safetensors", encoder.metadata())
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    return folder


def export_reference(encoder: RunEncoder, folder: Path, images: int | None) -> tuple[Path, list[str]]:
    """Write ``checkpoint.pth.tar`` as the released code does; returns it and the keys that a run of ours cannot fill.

    ``images``: number of training images, from which epoch and learning rate follow; None where it is not known. The
    optimizer's state is left out: its order of parameters is that code's own.
    """
    checkpoint, config = encoder.checkpoint, encoder.config
    step, processes = checkpoint_step(checkpoint), checkpoint_processes(checkpoint)
    predictor = read_weights(checkpoint, "master", f"{PREDICTOR}.")
    positions = sine_cosine_positions(predictor["predictor_norm.weight"].shape[0], encoder.grid)[None]
    content: dict[str, Any] = {
        "encoder": to_reference(encoder_weights(checkpoint, encoder.grid, "context")),
        "predictor": to_reference({"predictor_pos_embed": positions, **predictor}),
        "target_encoder": to_reference(encoder_weights(checkpoint, encoder.grid, "target")),
        "batch_size": config.global_batch // processes,  # there: of one process
        "world_size": processes,
        "epoch": 0,
    }
    left_out = ["opt", "scaler", "loss"]
    if images is not None and step > 0:
        steps_per_epoch = images // config.global_batch
        content["epoch"] = step // steps_per_epoch
        content["lr"] = schedules_of(config, steps_per_epoch).at(step - 1).lr  # of the last step taken
    else:
        left_out.append("lr")
    content["ijepa_ds"] = {**encoder.metadata(), "left_out": left_out}
    path = folder / "checkpoint.pth.tar"
    with replacing(path) as temporary:
        torch.save(content, temporary)
    return path, left_out


def _write_timm(encoder: RunEncoder, folder: Path) -> Path:
    path = folder / f"{encoder.role}_encoder.safetensors"
    _save_safetensors(encoder.weights(), path, encoder.metadata())
    return path


def _save_safetensors(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata=metadata)


def _image_size(sides: list[int] | None, config: Config) -> tuple[int, int]:
    if sides is None:
        return config.ijepa.data.image_size
    patch = config.ijepa.model.patch_size
    if len(sides) > 2 or any(side < patch or side % patch for side in sides):
        raise UserError(
            f"--image-size {' '.join(map(str, sides))} must be one or two multiples of the patch size, {patch} pixels"
        )
    return sides[0], sides[-1]
