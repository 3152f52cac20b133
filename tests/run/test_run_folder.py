"""Where a run may be written, told before anything is built."""

from __future__ import annotations

import os

import pytest
from distributed_runs import tiny_config

from ijepa_ds.config import parse_config
from ijepa_ds.errors import UserError
from ijepa_ds.run.folder import RunFolder


def folder_in(parent) -> RunFolder:
    return RunFolder(parse_config(tiny_config(ijepa__run__folder=str(parent))))


def test_a_folder_that_can_be_made_is_accepted_and_not_made(tmp_path):
    folder_in(tmp_path / "new" / "runs").check_writable()
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="runs is not a folder"):
        folder_in(tmp_path / "runs").check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="is not writable"):
        folder_in(tmp_path / "runs").check_writable()
