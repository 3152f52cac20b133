"""What others wrote is data: no code of this project could execute it, or read JSON past the one reader."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ijepa_ds", "data_prep", "benchmarks")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
SHELL = [ROOT / "run.sh", *sorted((ROOT / "deploy").glob("*.s*h")), *sorted((ROOT / "deploy").glob("*.sbatch"))]

EXECUTES = re.compile(
    r"""(pickle|dill|cloudpickle|marshal|joblib|shelve)\.(load|loads|open|Unpickler)
    |eval|exec|compile|builtins\.(eval|exec|compile)|runpy\..*
    |yaml\.(?!safe_load$|safe_dump$|YAMLError$).*(load|Loader).*
    |os\.(system|popen|exec\w+|spawn\w+)|subprocess\.(getoutput|getstatusoutput)
    |torch\.(jit|hub|package|export)\..*load.*|torch\.jit\.load|numpy\.lib\.format\.read_array|pandas\.read_pickle
    |shutil\.unpack_archive""",
    re.VERBOSE,
)
LEAVES_ITS_FOLDER = ("extract", "extractall")  # methods of tarfile and zipfile
READS_JSON = re.compile(r"json\.(load|loads|JSONDecoder)|pydantic_core\.from_json|orjson\..*|ujson\..*")
THE_READER = ROOT / "ijepa_ds" / "validation.py"


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the full name of what is called: ``np.load`` as ``numpy.load``, a method as ``.name``."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {entry.asname: entry.name for entry in node.names if entry.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {entry.asname or entry.name: f"{node.module}.{entry.name}" for entry in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield full_name(node.func, names), node


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return f".{parts[0]}" if parts else ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def keyword(call: ast.Call, name: str) -> object:
    """A keyword's constant value, None where it is not given."""
    value = next((given.value for given in call.keywords if given.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else value


def problems(source: str, *, is_reader: bool = False) -> list[str]:
    """What in a file's text could execute somebody's data, or write outside of a folder."""
    found = []
    for name, call in calls(ast.parse(source)):
        wrong = (
            EXECUTES.fullmatch(name)
            or (name == "torch.load" and keyword(call, "weights_only") is not True)
            or keyword(call, "allow_pickle") not in (None, False)
            or keyword(call, "shell") not in (None, False)
            or keyword(call, "trust_remote_code") not in (None, False)
            or name.rpartition(".")[2] in LEAVES_ITS_FOLDER
            or (READS_JSON.fullmatch(name) and not is_reader)
            or (name.endswith("validate_json") and not ast.unparse(call.args[0]).startswith("json.dumps("))
        )
        if wrong:
            found.append(f"line {call.lineno}: {ast.unparse(call)[:100]}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_executed(path):
    found = problems(path.read_text(), is_reader=path == THE_READER or path.is_relative_to(ROOT / "benchmarks"))
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "from torch import load; load(path)",
        "import pickle as p; p.loads(data)",
        "from pickle import Unpickler; Unpickler(file).load()",
        "import yaml; yaml.load(file, yaml.FullLoader)",
        "import yaml; yaml.unsafe_load(file)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import numpy as np; np.load(path, allow_pickle=wish)",
        "import subprocess; subprocess.run(f'rm {path}', shell=True)",
        "import os; os.system(path)",
        "import os; os.popen(path)",
        "eval(text)",
        "tarfile.open(path).extractall(folder)",
        "import zipfile; zipfile.ZipFile(path).extract(name)",
        "import shutil; shutil.unpack_archive(path)",
        "import torch; torch.jit.load(path)",
        "import json; json.loads(text)",
        "import json as j; j.load(file)",
        "from json import loads; loads(text)",
        "Model.model_validate_json(text)",
        "TypeAdapter(Model).validate_json(path.read_bytes())",
    ],
)
def test_the_search_finds_it(source):
    assert problems(source)


def test_what_is_harmless_is_left_alone():
    harmless = "import torch, yaml; torch.load(p, weights_only=True); yaml.safe_load(t); re.compile(p); json.dumps(x)"
    assert not problems(harmless) and not problems("import json; json.loads(text)", is_reader=True)
    assert len(SOURCES) > 100 and THE_READER in SOURCES and len(SHELL) >= 3


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_no_shell_builds_a_command_from_a_text(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code = line.partition("#")[0]
        assert not re.search(r"(^|[;&|\s])eval\s", code), f"{path.name}:{number}"
        assert not re.search(r"\b(ba)?sh -c \"[^\"]*\$(?!task\")", code), f"{path.name}:{number}"
