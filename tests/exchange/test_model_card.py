"""Model cards: their code runs and gives our features, their head is YAML, and nobody's file is written over."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from released_files import save_released

from ijepa_ds.build import build_encoder, encoder_dimensions
from ijepa_ds.engine.checkpoint_files import list_checkpoints
from ijepa_ds.evaluation.results import Results, TaskResult
from ijepa_ds.exchange.export import main
from ijepa_ds.exchange.import_run import main as import_checkpoint
from ijepa_ds.exchange.run_encoder import encoder_weights
from ijepa_ds.method.encoder import Dimensions
from ijepa_ds.run.folder import read_run_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at step 0 of an encoder whose MLPs are no whole multiple of its width."""
    path = save_released(
        tmp_path / "made.pth.tar", image_size=(32, 16), patch_size=4, dimensions=Dimensions(48, 2, 4, 145),
        predictor_width=16,
    )  # fmt: skip
    import_checkpoint([str(path), "--out", str(tmp_path / "made"), "--heads", "4"])
    return tmp_path / "made"


def code_of(card: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize(
    ("file_format", "encoder", "card"),
    [
        ("timm", "target", "target_encoder.md"),
        ("timm", "context", "context_encoder.md"),
        ("transformers", "target", "transformers/README.md"),
    ],
)
def test_the_cards_code_loads_the_weights_and_gives_our_features(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys, file_format: str, encoder: str, card: str
) -> None:
    pytest.importorskip(file_format)
    assert main([str(run), "--format", file_format, "--encoder", encoder]) == 0
    path = run / "export" / card
    assert f"its model card: {path}" in capsys.readouterr().out
    monkeypatch.chdir(path.parent)
    names: dict = {}
    exec(code_of(path), names)
    config = read_run_config(run)
    ours = build_encoder(config).eval()
    ours.load_state_dict(encoder_weights(list_checkpoints(run / "checkpoints")[-1], config.grid, encoder))
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.ijepa.data.mean, config.ijepa.data.std))
    with torch.no_grad():
        expected = ours((names["images"] - mean) / std)
    torch.testing.assert_close(names["patches"], expected, rtol=0, atol=1e-5)
    assert names["features"].shape == (1, encoder_dimensions(config).width)


def test_the_released_format_has_one_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main([str(run), "--format", "reference"])
    monkeypatch.chdir(run / "export")
    names: dict = {}
    exec(code_of(Path("checkpoint.md")), names)
    assert names["encoder"]["norm.weight"].shape == (48,)


def test_it_says_what_was_trained_how(run: Path) -> None:
    record = json.loads((run / "config.json").read_text())
    record |= {"images": 5000, "versions": {"torch": "9.9", "ijepa_ds": "0.1.0"}, "commit": "abc123"}
    (run / "config.json").write_text(json.dumps(record))
    main([str(run)])
    text = (run / "export" / "target_encoder.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "timm" and "i-jepa" in yaml.safe_load(head)["tags"]
    for told in ("TARGET encoder", "5,000 images", "ijepa_ds 0.1.0", "commit abc123", "width 48, depth 2, 4 heads"):
        assert told in body
    config = read_run_config(run)
    assert f"| `ijepa.optimization.lr_peak` | {config.ijepa.optimization.lr_peak} |" in body
    assert f"| `train_batch_size` | {config.global_batch} |" in body
    assert "None is in the run's folder yet" in body


def write_results(run: Path, *, encoder: str = "target") -> None:
    task = TaskResult(
        task="knn", label="label", train_images=4000, validation_images=1000,
        grid=[{"features": "last", "value": 43.21}], value=43.21, best_head={"features": "last"},
        baselines={"random": {"values": [28.0, 29.0]}, "pixels": {"values": [36.3]}},
    )  # fmt: skip
    (run / "evaluation").mkdir(exist_ok=True)
    Results(f"{run} at step 7", encoder, None, {}, {}, {}, [task]).write(run / "evaluation" / "results.json")


def test_an_evaluation_is_shown_beside_its_baselines(run: Path, capsys) -> None:
    write_results(run)
    main([str(run)])
    text = (run / "export" / "target_encoder.md").read_text()
    assert "| knn | accuracy, % | 43.21 | 28.50 | 36.30 | 4,000 / 1,000 |" in text and "at step 7" in text
    capsys.readouterr()
    main([str(run), "--encoder", "context"])
    assert "is of the target encoder" in capsys.readouterr().out
    assert "43.21" not in (run / "export" / "context_encoder.md").read_text()
    (run / "evaluation" / "results.json").write_text("{")
    main([str(run)])
    assert "the card has no evaluation" in capsys.readouterr().out
    assert "43.21" not in (run / "export" / "target_encoder.md").read_text()


def test_a_card_that_somebody_wrote_or_edited_stays(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "own"
    out.mkdir()
    (out / "README.md").write_text("mine\n")
    main([str(run), "--format", "transformers", "--out", str(out)])
    assert (out / "README.md").read_text() == "mine\n" and "it stays" in capsys.readouterr().out
    main([str(run)])
    card = run / "export" / "target_encoder.md"
    first = card.read_text()
    main([str(run)])
    assert card.read_text() == first
    card.write_text(first.replace("add them.", "Apache-2.0."))
    main([str(run)])
    assert "Apache-2.0" in card.read_text()


def test_results_hold_what_the_card_reads() -> None:
    named = {field.name for part in (Results, TaskResult) for field in dataclasses.fields(part)}
    from ijepa_ds.exchange import model_card

    assert {*model_card._Results.model_fields, *model_card._Task.model_fields} <= named
