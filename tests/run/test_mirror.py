"""The mirror of a run's scalars, with stand-ins for the libraries: what they hear, what fails, what a resume does."""

from __future__ import annotations

import sys
import threading
import types

import pytest

from ijepa_ds.errors import UserError
from ijepa_ds.run import mirror
from ijepa_ds.run.mirror import Mirror, check_mirror
from ijepa_ds.run.monitor import Monitor


class Service:
    """Stands in for both libraries; ``broken`` fails at each metric as a lost network does."""

    def __init__(self, *, broken: bool = False) -> None:
        self.heard: list[tuple[int, dict]] = []
        self.ids: list[str | None] = []
        self.ended, self.broken = 0, broken

    def metrics(self, values, step) -> None:
        if self.broken:
            raise ConnectionError("no route to host")
        self.heard.append((step, dict(values)))

    def end(self) -> None:
        self.ended += 1

    def wandb(self) -> types.ModuleType:
        module = types.ModuleType("wandb")

        def init(**given):
            assert given["resume"] == "allow" and given["config"] == {"config": 1}
            self.ids.append(given["id"])
            return types.SimpleNamespace(
                define_metric=lambda *_, **__: None, finish=self.end,
                log=lambda row: self.metrics({k: v for k, v in row.items() if k != "step"}, row["step"]),
            )  # fmt: skip

        module.init = init  # type: ignore[attr-defined]
        return module

    def mlflow(self) -> types.ModuleType:
        module = types.ModuleType("mlflow")

        def start_run(run_id=None, run_name=None):
            self.ids.append(run_id or "abc")
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

        module.start_run, module.end_run = start_run, self.end  # type: ignore[attr-defined]
        module.log_metrics = lambda values, step: self.metrics(values, step)  # type: ignore[attr-defined]
        module.log_dict = lambda *_: None  # type: ignore[attr-defined]
        return module


def install(monkeypatch: pytest.MonkeyPatch, name: str, *, broken: bool = False) -> Service:
    service = Service(broken=broken)
    monkeypatch.setitem(sys.modules, name, getattr(service, name)())
    return service


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_it_hears_tensorboards_scalars_and_a_resumed_run_goes_on_in_the_same_one(name, tmp_path, monkeypatch) -> None:
    service = install(monkeypatch, name)
    check_mirror(name)
    for step in (10, 20):
        monitor = Monitor(
            tmp_path, enabled=True, total_steps=100, images_per_step=4, mirror=Mirror(name, tmp_path, {"config": 1})
        )
        monitor.scalars(step, {"loss": 0.5, "rankme": float("nan"), "knn/label": 3.0}, console=False)
        monitor.close()
    assert service.heard == [(step, {"train/loss": 0.5, "knn/label": 3.0}) for step in (10, 20)]
    assert len(service.ids) == 2 and service.ids[0] == service.ids[1] and service.ended == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_lost_network_is_one_warning(name, tmp_path, monkeypatch, capsys) -> None:
    service = install(monkeypatch, name, broken=True)
    behind = Mirror(name, tmp_path, {"config": 1})
    for step in range(5):
        behind.scalars(step, {"train/loss": 1.0})
    behind.close()
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "ConnectionError: no route to host" in said and not service.heard


def test_a_server_that_hangs_holds_nothing_up(tmp_path, monkeypatch, capsys) -> None:
    service, release = install(monkeypatch, "mlflow"), threading.Event()
    sys.modules["mlflow"].start_run = lambda **_: release.wait(60)  # type: ignore[attr-defined]
    monkeypatch.setattr(mirror, "SECONDS_TO_CLOSE", 0.1)
    behind = Mirror("mlflow", tmp_path, {})
    for step in range(mirror.WAITING + 5):
        behind.scalars(step, {"train/loss": 1.0})
    behind.close()
    release.set()
    assert capsys.readouterr().err.count("warning") == 1 and not service.heard


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_a_sentence(name, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"needs the package {name} .*; pip install {name}, or leave it out"):
        check_mirror(name)
    check_mirror(None)
