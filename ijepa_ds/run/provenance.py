"""What a run was made with: versions and the commit."""

from __future__ import annotations

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
