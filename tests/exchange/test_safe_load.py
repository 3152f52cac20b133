"""Files that nobody vouches for: nothing in them runs, and what is damaged is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from released_files import save_released
from safetensors.torch import save_file

from ijepa_ds.errors import UserError
from ijepa_ds.exchange.safe_load import read_pickle, read_safetensors, tensor_problems


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


class Evaluating(Malicious):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.marker)!r})",)


def save_old_format(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_bare_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, 2))


@pytest.mark.parametrize("kind", [Malicious, Evaluating])
@pytest.mark.parametrize("save", [torch.save, save_old_format, save_bare_pickle])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, kind, save) -> None:
    marker, path = tmp_path / "marker", tmp_path / "checkpoint.pth.tar"
    save({"encoder": {"module.norm.weight": torch.ones(2)}, "opt": kind(marker)}, path)
    with pytest.raises(UserError, match=r"checkpoint\.pth\.tar carries \S+, which is neither a tensor nor a plain"):
        read_pickle(path)
    assert not marker.exists()
    if save is save_bare_pickle:  # the file would have done it
        pickle.loads(path.read_bytes())
        assert marker.exists()


def test_other_objects_and_arrays_are_refused(tmp_path) -> None:
    for content in ({"a": Path("x")}, {"a": np.ones(3)}, {"a": np.dtype}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match=r"x\.pth"):
            read_pickle(tmp_path / "x.pth")


@pytest.mark.parametrize("save", [torch.save, save_old_format])
def test_plain_values_and_numpys_scalars_come_back(tmp_path, save) -> None:
    content = {
        "tensor": torch.arange(3.0),
        "lr": np.float64(1e-3),
        "loss": np.float32(0.25),
        "epoch": np.int64(300),
        "flag": np.bool_(True),
        "groups": [{"betas": (0.9, 0.999), "names": {"a", "b"}, "none": None}],
    }
    save(content, tmp_path / "x.pth")
    loaded = read_pickle(tmp_path / "x.pth")
    assert torch.equal(loaded.pop("tensor"), content.pop("tensor"))
    assert loaded == content
    assert [type(loaded[key]) for key in ("lr", "loss", "epoch", "flag")] == [float, float, int, bool]


def test_numpys_constructors_are_let_in_for_numbers_alone(tmp_path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"a": np.str_("text")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="cannot be read"):
        read_pickle(tmp_path / "x.pth")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, part) -> None:
    path = save_released(tmp_path / "x.pth.tar")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match=r"x\.pth\.tar cannot be read: it is truncated, damaged") as error:
        read_pickle(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_refused(tmp_path, part) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read"):
        read_safetensors(path)


def test_what_is_no_dictionary_is_refused(tmp_path) -> None:
    torch.save([torch.ones(1)], tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds a list, not a dictionary"):
        read_pickle(tmp_path / "x.pth")


def test_values_that_are_no_weights_are_all_named() -> None:
    problems = tensor_problems(
        {
            "good": torch.ones(2),
            "half": torch.ones(2, dtype=torch.bfloat16),
            "nan": torch.tensor([1.0, float("nan")]),
            "infinite": torch.tensor([float("inf")]),
            "whole": torch.ones(2, dtype=torch.int64),
            "sparse": torch.ones(2, 2).to_sparse(),
            "elsewhere": torch.ones(2, device="meta"),
            "number": 3,
        }
    )
    assert [problem.split()[0] for problem in problems] == ["nan", "infinite", "whole", "sparse", "elsewhere", "number"]
