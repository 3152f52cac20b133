"""What a run was made with: versions and the commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata

from ijepa_ds.files import PROJECT

_PACKAGES = ("torch", "deepspeed", "timm", "ffcv", "numpy", "numba", "ijepa_ds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "unknown"
    return installed


def git_commit() -> str:
    """The commit of this source tree, with a mark where files differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], cwd=PROJECT, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def source_hash() -> str:
    """A short hash of this package's source: it tells copies and container images apart, of which git knows nothing."""
    digest = hashlib.sha256()
    package = PROJECT / "ijepa_ds"
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
