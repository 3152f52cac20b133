"""The layers of the package: a file imports only what stands above it, so that a reader can start at the top."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = "ijepa_ds"
FOLDER = Path(__file__).resolve().parents[1] / PACKAGE

# A file may import from any line above its own, and from what stands to its left on the same line.
LAYERS = """
__init__ errors untrusted tensor_names
config random_streams schedules positions masks distributed
encoder
predictor
architecture foreign
ijepa trace dataset pipeline labelled_loader loader monitor health pictures
shards
optimizer
target_encoder
engine
checkpoint
run_folder
build convert_config
exchange inferred_config importer replay mask_statistics
evaluation
train
demo
__main__
"""
ORDER = {name: place for place, name in enumerate(LAYERS.split())}
ONLY_IN = {"deepspeed": {"engine"}, "ffcv": {"dataset", "pipeline"}}


def module_name(path: Path) -> str:
    """``evaluation/knn.py`` is evaluation.knn, ``evaluation/__init__.py`` is evaluation."""
    parts = path.relative_to(FOLDER).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(FOLDER.rglob("*.py"))}


def layer(module: str) -> str:
    """All files of evaluation/ are one layer."""
    return module.partition(".")[0]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, within functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative imports are not used here"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in inner if name.removeprefix(f"{PACKAGE}.") in MODULES}
            found |= submodules or {node.module}
    return found


def our_imports(path: Path) -> set[str]:
    """The same, ours alone and without the package's name."""
    ours = {name for name in imported(path) if name.partition(".")[0] == PACKAGE}
    return {name.removeprefix(PACKAGE).removeprefix(".") or "__init__" for name in ours}


def test_every_file_has_its_place_in_the_layers():
    unknown = {layer(module) for module in MODULES} - ORDER.keys()
    assert not unknown, f"give {', '.join(sorted(unknown))} a place in LAYERS"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_stands_above_it(module):
    own = ORDER[layer(module)]
    for other in our_imports(MODULES[module]):
        assert other in MODULES, f"{module} imports {other}, which does not exist"
        beside = layer(other) == layer(module) == "evaluation"
        assert beside or ORDER[layer(other)] < own, f"{module} imports {other}, which stands below it"


def test_no_files_import_each_other_in_a_circle():
    waiting = {module: our_imports(path) - {module} for module, path in MODULES.items()}
    while ready := {module for module, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {module: needs for module, needs in waiting.items() if module not in ready}
    assert not waiting, f"a circle among {sorted(waiting)}"


@pytest.mark.parametrize(("library", "homes"), ONLY_IN.items())
def test_deepspeed_and_ffcv_are_imported_in_few_files(library, homes):
    users = {
        module for module, path in MODULES.items() if any(name.partition(".")[0] == library for name in imported(path))
    }
    assert users == homes


def test_encoder_predictor_masks_and_schedules_know_nothing_of_the_config():
    for module in (
        "encoder",
        "predictor",
        "ijepa",
        "masks",
        "schedules",
        "positions",
        "random_streams",
        "loader",
        "pipeline",
    ):
        assert "config" not in our_imports(MODULES[module])


def test_only_the_standard_library_is_needed_to_check_a_config():
    for module in ("config", "errors"):
        outside = {name.partition(".")[0] for name in imported(MODULES[module])} - {PACKAGE}
        assert outside <= sys.stdlib_module_names
