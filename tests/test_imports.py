"""Who imports whom: wings of the package may import the wings and files named here, and nothing else of the project."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ijepa_ds"

GROUND = (
    "__init__ errors files progress validation random_streams activity launch meeting distributed hardware allocator "
    "stage_balance"
)
# A wing (a folder) or a file of the top level -> what it may import beside itself and the ground.
MAY_IMPORT = {
    "method": "",
    "deepspeed_settings": "",
    "settings": "deepspeed_settings",
    "config_rules": "settings",
    "config": "settings config_rules",
    "config_reference": "settings exchange",
    "data": "method",
    "engine": "method config",
    "run": "method settings config engine",
    "build": "method config data",
    "exchange": "method config build engine run",
    "plan": "method config build",
    "checks": "method config build engine exchange",
    "evaluation": "method config build data engine run exchange",
    "train": "method config build data engine run exchange evaluation",
    "commands": "",
    "demo": "config run engine evaluation commands",
    "__main__": "",
}
ONLY_IN = {
    "deepspeed": {"engine.zero", "engine.zero_internals", "engine.stages"},
    "ffcv": {"data.beton", "data.ffcv_pipeline"},
}


def module_name(path: Path) -> str:
    """``evaluation/probes/knn.py`` is evaluation.probes.knn, ``evaluation/__init__.py`` is evaluation."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def wing(module: str) -> str:
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


def test_every_wing_says_what_it_may_import():
    assert {wing(module) for module in MODULES} - set(GROUND.split()) == MAY_IMPORT.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_its_wing_may(module):
    own = wing(module)
    allowed = {own, *GROUND.split(), *MAY_IMPORT.get(own, "").split()}
    if own in GROUND.split():
        allowed = {"__init__", "errors", "files", "progress", "validation", "launch", "activity"}
    for other in our_imports(MODULES[module]):
        assert other in MODULES, f"{module} imports {other}, which does not exist"
        assert wing(other) in allowed, f"{module} imports {other}: {own} may import {', '.join(sorted(allowed))}"


def test_the_wings_stand_on_one_another_and_no_files_import_each_other_in_a_circle():
    for graph in (
        {name: set(names.split()) for name, names in MAY_IMPORT.items()},
        {module: our_imports(path) - {module} for module, path in MODULES.items()},
    ):
        waiting = dict(graph)
        while ready := {node for node, needs in waiting.items() if not needs & waiting.keys()}:
            waiting = {node: needs for node, needs in waiting.items() if node not in ready}
        assert not waiting, f"a circle among {sorted(waiting)}"


@pytest.mark.parametrize(("library", "homes"), ONLY_IN.items())
def test_deepspeed_and_ffcv_are_imported_in_few_files(library, homes):
    users = {
        module for module, path in MODULES.items() if any(name.partition(".")[0] == library for name in imported(path))
    }
    assert users == homes


def test_only_the_standard_library_and_pydantic_are_needed_to_check_a_config():
    for module in ("config", "config_rules", "settings", "deepspeed_settings", "errors", "validation"):
        outside = {name.partition(".")[0] for name in imported(MODULES[module])} - {PACKAGE}
        assert outside <= {*sys.stdlib_module_names, "pydantic", "pydantic_core"}
