"""What the documents name is there: files and anchors, commands and their options."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ijepa_ds
from ijepa_ds.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("ds_configs/*.md"),
        *ROOT.glob("deploy/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
    ]
)
SCRIPTS = {"run.py": "ijepa_ds.train"} | {
    f"data_prep/{name}.py": f"data_prep.{name}" for name in ("to_ffcv", "make_scenes")
}
# Options of other programs that the documents name.
OF_DEEPSPEED = "--module --num_gpus --num_nodes --hostfile --no_ssh --node_rank --master_addr --master_port"
OF_OTHERS = "--nodes --ntasks-per-node --gpus-per-node --gpus-per-task --nnodes --nproc_per_node --logdir --check"
OTHERS_OPTIONS = {*OF_DEEPSPEED.split(), *OF_OTHERS.split()}
CODE_FILES = (".py", ".md", ".sh", ".toml", ".cff")  # files of these kinds are ours even where no folder is named

CODE_BLOCK = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:python -m|deepspeed .*--module) ijepa_ds(?: ([\w-]+))?([^|;&]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


@functools.cache
def tracked() -> frozenset[str]:
    """Files and folders of the repository, those not committed yet included."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = [Path(line) for line in listing.stdout.splitlines() if (ROOT / line).exists()]
    if not files:  # a copy without git
        files = [path.relative_to(ROOT) for path in ROOT.rglob("*") if ".venv" not in path.parts]
    return frozenset(str(path) for file in files for path in (file, *file.parents))


@functools.cache
def options_of(module: str) -> frozenset[str]:
    """All options in the --help of a module's ``main``."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [module, "--help"])
        importlib.import_module(module).main()
    return frozenset(OPTION.findall(shown.getvalue()))


@functools.cache
def every_option() -> frozenset[str]:
    modules = [*(module for module, _ in COMMANDS.values()), *SCRIPTS.values()]
    benchmarks = [re.findall(r'add_argument\("(--[\w-]+)"', path.read_text()) for path in ROOT.glob("benchmarks/*.py")]
    return frozenset().union(OTHERS_OPTIONS, *map(options_of, modules), *benchmarks)


def code_of(text: str) -> list[str]:
    """Lines of code blocks, continued ones joined, and code spans."""
    blocks = CODE_BLOCK.findall(text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()[1:-1]]
    return lines + [" ".join(span.split()) for span in CODE_SPAN.findall(CODE_BLOCK.sub("", text))]


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(text: str, folder: Path) -> list[str]:
    missing = []
    for target in LINK.findall(CODE_BLOCK.sub("", text)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = folder / path if path else None
        if file is not None and not file.exists():
            missing.append(f"the link {target}")
        elif anchor and file is not None and anchor not in anchors(file):
            missing.append(f"the heading of {target}")
    return missing


def alternatives(name: str) -> list[str]:
    """``a{0,1}.json`` is a0.json and a1.json."""
    braces = re.search(r"\{([^{}]*)\}", name)
    if braces is None:
        return [name]
    parts = (name[: braces.start()] + part + name[braces.end() :] for part in braces[1].split(","))
    return [whole for part in parts for whole in alternatives(part)]


def missing_paths(text: str, folder: Path) -> list[str]:
    """Names in code that must be files of the repository: below one of its folders, or of a kind that only we write."""
    folders = {name.partition("/")[0] for name in tracked() if "/" in name}
    missing = []
    for word in re.findall(r"[\w./*{},-]+", " ".join(code_of(text))):
        word = word.strip(",").rstrip(".").removeprefix("./")
        for name in alternatives(word):
            ours = name.partition("/")[0] in folders if "/" in name else name.endswith(CODE_FILES)
            if not ours or re.search(r"\b[A-Z][A-Z_]+\b", Path(name).stem) or name in {".", ".."}:
                continue
            places = [ROOT.glob(name), folder.glob(name), *([] if "/" in name else [ROOT.glob(f"[a-z]*/**/{name}")])]
            found = (str(path.relative_to(ROOT)) for place in places for path in place)
            if not any(path in tracked() for path in found):
                missing.append(f"the path {name}")
    return missing


def unknown_commands(text: str) -> list[str]:
    unknown = []
    for line in code_of(text):
        for name, rest in COMMAND.findall(line):
            if name and name not in COMMANDS and not name.isupper():
                unknown.append(f"the command {name}")
            elif name in COMMANDS:
                known = options_of(COMMANDS[name][0])
                unknown += [f"{option} of {name}" for option in OPTION.findall(rest) if option not in known]
        for script, module in SCRIPTS.items():
            rest = line.partition(f"{script} ")[2]
            unknown += [f"{option} of {script}" for option in OPTION.findall(rest) if option not in options_of(module)]
        unknown += [f"the option {option}" for option in OPTION.findall(line) if option not in every_option()]
        for name in re.findall(r"\./run\.sh ([a-z]+)", line):
            if f"\n  {name} " not in (ROOT / "run.sh").read_text():
                unknown.append(f"./run.sh {name}")
    return unknown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    missing = missing_links(text, document.parent) + missing_paths(text, document.parent) + unknown_commands(text)
    assert not missing, f"{document.relative_to(ROOT)} names what is not there: {', '.join(missing)}"


@pytest.mark.parametrize(
    ("planted", "missing"),
    [
        ("see [this](docs/nowhere.md)", ["the link docs/nowhere.md"]),
        ("see [this](docs/recipe.md#no-such-heading)", ["the heading of docs/recipe.md#no-such-heading"]),
        ("`ijepa_ds/nowhere.py`", ["the path ijepa_ds/nowhere.py"]),
        ("`tests/test_{demo,nowhere}.py` and `nowhere.py`", ["the path tests/test_nowhere.py", "the path nowhere.py"]),
        ("```bash\nruff check benchmarks/nowhere\n```", ["the path benchmarks/nowhere"]),
        ("`python -m ijepa_ds exprot`", ["the command exprot"]),
        ("```\npython -m ijepa_ds export \\\n  --nothing 3\n```", ["--nothing of export", "the option --nothing"]),
        ("`data_prep/to_ffcv.py --train 3`", ["--train of data_prep/to_ffcv.py"]),
        ("`./run.sh pretain`", ["./run.sh pretain"]),
        ("`runs/NAME/x.json`, `ds_configs/FILE.json`, [paper](https://arxiv.org), `python -m ijepa_ds COMMAND`", []),
        ("`tests/test_demo.py`, `ds_configs/*.json`, `deepspeed --module ijepa_ds evaluate --label count`", []),
    ],
)
def test_what_is_not_there_is_found(planted: str, missing: list[str]) -> None:
    assert missing_links(planted, ROOT) + missing_paths(planted, ROOT) + unknown_commands(planted) == missing


def test_version_and_licence_are_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ijepa_ds.__version__ and citation["license"] == "Apache-2.0"
    assert f"\n## {ijepa_ds.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    reference = citation["references"][0]
    assert reference["year"] == 2023 and len(reference["authors"]) == 8


def test_every_version_of_the_changelog_begins_with_what_changes_what_is_learnt() -> None:
    versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    first = [re.search(r"^### (.+)$", version, re.MULTILINE)[1] for version in versions]
    assert first and set(first) == {"Changes what is learnt"}
