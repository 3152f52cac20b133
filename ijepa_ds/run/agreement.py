"""What the processes of a run must have alike, and that they write into one folder: looked at before it begins."""

from __future__ import annotations

import json
import os
from typing import Any

from ijepa_ds.config import Config
from ijepa_ds.errors import UserError
from ijepa_ds.meeting import Card, Facts, Meeting, join
from ijepa_ds.run.folder import VISIBLE, RunFolder
from ijepa_ds.run.lock import hold, release
from ijepa_ds.run.provenance import git_commit, source_hash, versions


def agree_on_run(config: Config, num_images: int, files: list[str]) -> None:
    """Go on only if all processes mean the same run: configuration, data, code, packages, folder; no other is in it.

    Else every process ends with exit code 2, after rank 0 has said which node is not like the others. A process that
    is alone has nothing to compare. ``files``: the .beton files that are read, of training and of validation.
    """
    meeting, folder = join(), RunFolder(config)
    if meeting.ranks.alone:
        hold(folder.path)
        return
    facts = facts_of(config, num_images, files, whole=meeting.ranks.local_rank == 0)
    meeting.agree("start", Card(meeting.node, facts=facts))
    agree_on_folder(meeting, folder)


def facts_of(config: Config, num_images: int, files: list[str], *, whole: bool) -> Facts:
    """What must be alike; ``whole``: also what is a node's, which one of its processes says for all."""
    data = {"the number of images in ijepa.data.train": str(num_images)}
    data |= {f"the size of {file}": f"{os.path.getsize(file)} bytes" for file in files}
    alike = {"data": data, "config": flat(config.as_dict())}  # of each process: nothing says that one command began all
    if not whole:
        return alike
    code = {"the commit": git_commit(), "the hash of the source files": source_hash()}
    packages = {f"the version of {package}": version for package, version in versions().items()}
    return {**alike, "code": code, "packages": packages}


def agree_on_folder(meeting: Meeting, folder: RunFolder) -> None:
    """Refuse a run folder that is not one and the same on all nodes: checkpoints would lie about in pieces.

    Rank 0 locks it before anything is written there; what the others write is part of saves that only it completes.
    """
    mark, mistake = "", None
    if meeting.ranks.rank == 0:
        try:
            hold(folder.path)
            mark = folder.leave_mark()
        except UserError as error:
            mistake = str(error)
    mark = meeting.tell("mark", mark)
    try:
        if mark and not folder.sees(mark):
            mistake = (
                f"{folder.path} is not rank 0's folder of that name: what rank 0 writes there is not seen here within "
                f"{VISIBLE:.0f} s; set ijepa.run.folder to a file system that all nodes share"
            )
        meeting.agree("folder", Card(meeting.node, mistake))
    except BaseException:
        release(folder.path)
        raise
    finally:
        if meeting.ranks.rank == 0:
            folder.remove_mark(mark)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as JSON."""
    items: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            items |= flat(value, f"{prefix}{key}.")
        else:
            items[f"{prefix}{key}"] = json.dumps(value)
    return items
