"""``python -m ijepa_ds``: which command is meant."""

from __future__ import annotations

import sys

import pytest

from ijepa_ds.__main__ import COMMANDS, main
from ijepa_ds.errors import UserError


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ijepa_ds", *arguments])
    return main()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--local_rank=0",)])
def test_without_a_command_all_are_listed(monkeypatch, capsys, arguments):
    assert call(monkeypatch, *arguments) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == list(COMMANDS)


def test_an_unknown_command_is_refused_with_the_known_ones(monkeypatch):
    with pytest.raises(UserError, match=r"'exprot' is not a command; choose one of: .*export"):
        call(monkeypatch, "exprot")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_also_below_the_launcher(monkeypatch, capsys, name):
    """The launcher's own argument comes first."""
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--local_rank=1", name, "--help")
    assert end.value.code == 0
    assert f"ijepa_ds {name}" in capsys.readouterr().out
