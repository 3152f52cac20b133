"""Damaged checkpoints, made here in this process: each is refused in a sentence, none is read as something else.

The long form counts: ``pytest -m long -s tests/engine/test_damage.py``
"""

from __future__ import annotations

import collections
import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_runs import assert_same_tensors, run_ranks

from ijepa_ds.distributed import Process
from ijepa_ds.engine import checkpoint_files, checkpoint_writer, rank_files
from ijepa_ds.engine.checkpoint import load, load_newest
from ijepa_ds.engine.checkpoint_files import SavedState, list_checkpoints, open_checkpoint, problem_of, read_weights
from ijepa_ds.engine.checkpoint_writer import save, write_own
from ijepa_ds.engine.rank_files import Damaged
from ijepa_ds.engine.shards import Placement, Shard
from ijepa_ds.engine.snapshot import views
from ijepa_ds.engine.trainable import State
from ijepa_ds.errors import UserError
from ijepa_ds.run.checkpoints_command import main as list_command

OLD = Path(__file__).parents[1] / "golden" / "format_1" / "checkpoints" / "step_000000010"
ALONE = Process(0, 1, torch.device("cpu"))
SHAPES = {"context_encoder.a": [7, 5], "context_encoder.b": [11], "predictor.c": [3, 2, 4]}
KINDS = ("master", "exp_avg", "exp_avg_sq", "target")
TOTAL = 70  # elements of all parameters


def state_of(rank: int = 0, world_size: int = 1, seed: int | None = 0) -> State:
    """A rank's equal slice of three parameters; without a ``seed`` all zeros, to be filled."""
    starts = (0, 35, 46)
    placements = tuple(
        Placement(name, start, torch.Size(shape)) for (name, shape), start in zip(SHAPES.items(), starts, strict=True)
    )
    length = TOTAL // world_size
    slices = {}
    for number, kind in enumerate(KINDS):
        values = torch.zeros(TOTAL)
        if seed is not None:
            values = torch.randn(TOTAL, generator=torch.Generator().manual_seed(10 * seed + number))
        known = placements[:2] if kind == "target" else placements
        own = values[rank * length : (rank + 1) * length].clone()
        slices[kind] = [(Shard("group", known, rank * length, length, None), own)]
    steps = torch.tensor(0.0 if seed is None else 3.0)
    return State(slices, {"group": [steps]}, True, "zero")


def save_as_two(folder: Path, step: int, seed: int = 0) -> Path:
    """What two ranks would write, without them."""
    path, records = folder / f"step_{step:09d}", {}
    path.mkdir(parents=True)
    for rank in range(2):
        record = write_own(path, step, views(state_of(rank, 2, seed)), Process(rank, 2, torch.device("cpu")))
        records[rank_files.rank_file(rank)] = record
    state = SavedState(format=2, step=step, processes=2, layout="zero", shapes=SHAPES, files=records)
    (path / "state.json").write_bytes(checkpoint_files.state_json(state))
    return path


def whole(path: Path) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": tensor for kind in KINDS for name, tensor in read_weights(path, kind).items()}


def taken(path: Path) -> dict[str, torch.Tensor]:
    """All that a lone process takes of a checkpoint, with the steps."""
    state = state_of(seed=None)
    step = load(path, state, ALONE)
    values = {kind: slices[0][1] for kind, slices in state.slices.items()}
    return {**values, "steps": torch.tensor([float(step), float(state.adam_steps["group"][0])])}


# ------------------------------------------------------------------------------------------------------- byte by byte


def flipped(source: Path, folder: Path, generator: random.Random) -> Path:
    """A copy in which one bit, or one byte, of one file is another."""
    shutil.rmtree(folder, ignore_errors=True)
    path = folder / source.name
    shutil.copytree(source, path)
    file = generator.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    # Half of them in the head, which is small beside the tensors of a true checkpoint.
    place = generator.randrange(min(len(content), generator.choice((2000, len(content)))))
    content[place] ^= generator.choice((1 << generator.randrange(8), generator.randrange(1, 256)))
    file.write_bytes(content)
    return path


def count_flips(source: Path, folder: Path, read: Callable[[Path], dict], number: int) -> collections.Counter:
    """How ``number`` flips end: refused in a sentence, without effect, silent or with a traceback."""
    counts, generator, good = collections.Counter(), random.Random(0), read(source)
    for _ in range(number):
        path = flipped(source, folder, generator)
        try:
            found = read(path)
        except UserError as error:
            counts["refused" if "\n" not in str(error) and str(path) in str(error) else "no sentence"] += 1
            continue
        except Exception as error:
            counts[f"traceback: {error!r:.80}"] += 1
            continue
        same = found.keys() == good.keys() and all(torch.equal(found[key], good[key]) for key in good)
        counts["without effect" if same else "silent"] += 1
    return counts


def test_no_flipped_byte_is_silent(tmp_path):
    source = save_as_two(tmp_path, 8)
    for read in (taken, whole):
        counts = count_flips(source, tmp_path / "flipped", read, 100)
        assert counts == {"refused": 100}, counts  # of format 2 each byte counts


def test_no_flipped_byte_of_an_earlier_version_is_silent(tmp_path):
    counts = count_flips(OLD, tmp_path / "flipped", whole, 30)
    assert counts["refused"] > 10 and counts.keys() <= {"refused", "without effect"}, counts


@pytest.mark.long
def test_five_hundred_flipped_bytes(tmp_path):
    source = save_as_two(tmp_path, 8)
    for name, path, read in (("load", source, taken), ("read_weights", source, whole), ("format 1", OLD, whole)):
        counts = count_flips(path, tmp_path / "flipped", read, 500)
        print(f"500 flips, {name}: {dict(counts)}")
        assert counts.keys() <= ({"refused", "without effect"} if path == OLD else {"refused"}), counts


# --------------------------------------------------------------------------------------------------- chosen mistakes


def edited(path: Path, change: Callable[[dict], object], *, honest: bool = True) -> None:
    """Change state.json; ``honest``: with the checksum of what it then says."""
    file = path / "state.json"
    raw = json.loads(file.read_text())
    change(raw)
    if honest:
        raw["crc32"] = rank_files.crc32(checkpoint_files._canonical(raw))
    file.write_text(json.dumps(raw))


STATE_MISTAKES = {
    "negative": (lambda raw: raw.update(step=-5), "step = -5 must be at least 0"),
    "null": (lambda raw: raw.update(step=None), "step = null must be a whole number"),
    "float": (lambda raw: raw.update(step=1e30), "step = 1e+30 must be a whole number"),
    "huge": (lambda raw: raw.update(step=10**30), "step = 1"),
    "text": (lambda raw: raw.update(step="12"), 'step = "12" must be a whole number'),
    "switch": (lambda raw: raw.update(step=True), "step = true must be a whole number"),
    "another step": (lambda raw: raw.update(step=9), "it is of step 9, the folder is named for another"),
    "list of shapes": (lambda raw: raw.update(shapes=[1, 2]), "shapes must be an object, not a list"),
    "text in shapes": (lambda raw: raw["shapes"].update({"predictor.c": ["x"]}), 'predictor.c[0] = "x" must be'),
    "huge shape": (lambda raw: raw["shapes"].update({"predictor.c": [2**52, 2**52]}), "lacks elements of"),
    "no shape": (lambda raw: raw["shapes"].pop("predictor.c"), "predictor.c is no parameter of its model"),
    "path": (lambda raw: raw["files"].update({"../../x": raw["files"].popitem()[1]}), "state.json is damaged"),
    "no files": (lambda raw: raw.update(files={}), "it holds no rank's file"),
    "processes": (lambda raw: raw.update(processes=3), "of 2, where step 8, rank 0 of 3 belongs"),
    "newer format": (lambda raw: raw.update(format=99), "has format 99"),
    "format of none": (lambda raw: raw.update(format=0), "format = 0 must be"),
}


@pytest.mark.parametrize("name", STATE_MISTAKES)
def test_a_state_that_cannot_be_is_one_sentence(name, tmp_path):
    change, says = STATE_MISTAKES[name]
    path = save_as_two(tmp_path, 8)
    edited(path, change)
    with pytest.raises(UserError) as error:
        taken(path)
    assert says in str(error.value) and "\n" not in str(error.value), error.value
    assert problem_of(path) is not None


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"null", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}"])
def test_a_state_that_is_no_json_object_is_one_sentence(content, tmp_path):
    path = save_as_two(tmp_path, 8)
    (path / "state.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"state.json is damaged \([^\n]+--verify says which are whole$"):
        taken(path)


def test_a_change_that_is_not_owned_to_is_found(tmp_path):
    path = save_as_two(tmp_path, 8)
    edited(path, lambda raw: raw.update(layout="stages"), honest=False)
    with pytest.raises(Damaged, match=r"state.json is damaged .*its checksum differs"):
        taken(path)


def test_a_file_of_another_step_or_rank_is_refused_by_name(tmp_path):
    newer, older = save_as_two(tmp_path, 8, seed=1), save_as_two(tmp_path, 4, seed=2)
    first, second = (rank_files.rank_file(rank) for rank in range(2))
    shutil.copy(older / second, newer / second)
    with pytest.raises(Damaged, match="it is of step 4, rank 1 of 2, where step 8, rank 1 of 2 belongs"):
        taken(newer)
    shutil.copy(older / first, older / second)
    with pytest.raises(Damaged, match="it is of step 4, rank 0 of 2, where step 4, rank 1 of 2 belongs"):
        read_weights(older, "target")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(kind, value, tmp_path, monkeypatch):
    state = state_of()
    state.slices[kind][0][1][40] = value
    with pytest.raises(UserError, match="step 8 is not saved: its weights or moments are not finite"):
        save(tmp_path, 8, state, ALONE, keep=1)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(checkpoint_writer, "_unfit", lambda copied: None)  # as an earlier version, or another program
    path = save(tmp_path, 8, state, ALONE, keep=1)
    with pytest.raises(Damaged, match=f"{kind} context_encoder.b holds NaN or infinity"):
        taken(path)


def test_it_is_a_file_that_others_read_too(tmp_path):
    from safetensors.torch import load_file

    path = save(tmp_path, 8, state_of(), ALONE, keep=1)
    tensors = load_file(path / "rank_00000.safetensors")
    assert {name: tensors[f"master/{name}"].tolist() for name in SHAPES} == {
        name: values.flatten().tolist() for name, values in read_weights(path, "master").items()
    }
    contents = open_checkpoint(path)
    assert (contents.state.layout, contents.files[0].adam_steps) == ("zero", {"group": 3.0})


# ---------------------------------------------------------------------------------------------- the newest good one


def damage(path: Path, file: str = "rank_00001.safetensors") -> None:
    content = bytearray((path / file).read_bytes())
    content[-3] ^= 4
    (path / file).write_bytes(content)


def read_the_newest(folders: list[Path]) -> list:
    """In a rank: the step and warning that come of each folder, or the sentence; and the master's values."""
    from ijepa_ds.engine.zero import init_distributed

    process, found = init_distributed(), []
    for folder in folders:
        state = state_of(process.rank, process.world_size, seed=None)
        try:
            loaded = load_newest(folder, state, process)
            found.append((loaded.step, loaded.warning, state.slices["master"][0][1]))
        except UserError as error:
            found.append(str(error))
    return found


def test_all_ranks_take_the_newest_checkpoint_that_none_finds_damaged(tmp_path):
    folders = [tmp_path / name for name in ("one", "all")]
    for folder in folders:
        for step in (2, 4, 6):
            save_as_two(folder, step, seed=step)
    damage(folders[0] / "step_000000006")  # rank 0 reads none of this file
    damage(folders[0] / "step_000000004", "state.json")
    for path in folders[1].iterdir():
        damage(path)
    ranks = run_ranks(read_the_newest, 2, folders)
    for rank, found in enumerate(ranks):
        step, warning, values = found[0]
        assert step == 2 and torch.equal(values, state_of(rank, 2, seed=2).slices["master"][0][1])
        assert warning.startswith("warning: ") and "\n" not in warning
        assert "step_000000006/rank_00001.safetensors is damaged (target context_encoder.b is not what" in warning
        assert "step_000000004/state.json is damaged" in warning and "going on from step 2" in warning
        assert found[1].startswith(f"no checkpoint in {folders[1]} is whole: ") and "\n" not in found[1]
    assert ranks[0][0][1] == ranks[1][0][1] and ranks[0][1] == ranks[1][1]
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["damaged.step_000000004", "damaged.step_000000006", "step_000000002"]
    assert len(list_checkpoints(folders[1])) == 3  # nothing is touched where nothing can be gone on from


def test_what_was_set_aside_goes_when_the_run_has_come_as_far_again(tmp_path):
    for step in (2, 4):
        save_as_two(tmp_path, step)
    damage(tmp_path / "step_000000004")
    assert load_newest(tmp_path, state_of(seed=None), ALONE).step == 2
    listings = []
    for step in (3, 4):
        save(tmp_path, step, state_of(), ALONE, keep=1)
        listings.append(sorted(path.name for path in tmp_path.iterdir()))
    assert listings == [["damaged.step_000000004", "step_000000003"], ["step_000000004"]]


# ------------------------------------------------------------------------------------------------ which of them stay


def names(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(folder.iterdir())]


def test_every_so_many_epochs_one_stays(tmp_path):
    for step in range(0, 50, 5):
        save(tmp_path, step, state_of(), ALONE, keep=2, keep_every=20)
    assert names(tmp_path) == [20, 40, 45]


def test_a_later_checkpoint_is_not_counted_among_those_that_stay(tmp_path):
    for step in (9, 1, 2):  # 9: of a run that has been gone back from by hand
        save(tmp_path, step, state_of(), ALONE, keep=1)
    assert names(tmp_path) == [2, 9]


def test_a_kill_while_pruning_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, state_of(), ALONE, keep=1)

    def killed(path: Path, **_: object) -> None:
        if Path(path).exists():
            (Path(path) / "rank_00000.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(checkpoint_files.shutil, "rmtree", killed)
        save(tmp_path, 2, state_of(), ALONE, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000002", "tmp.step_000000001"]
    (tmp_path / "step_000000001").mkdir()  # what an earlier version left
    checkpoint_files.remove_incomplete(tmp_path)
    assert names(tmp_path) == [2]


# --------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def full_disk(tmp_path, monkeypatch) -> Callable[[int], None]:
    """A disk that holds so many checkpoints."""
    room = [100]
    write_file = rank_files.write_synced

    def write(path: Path, content: Callable) -> None:
        if len(list(tmp_path.glob("*/rank_*"))) >= room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(path, content)

    monkeypatch.setattr(rank_files, "write_synced", write)
    return lambda checkpoints: room.__setitem__(0, checkpoints)


def test_where_there_is_no_room_what_would_go_goes_first(tmp_path, full_disk):
    said: list[str] = []
    full_disk(2)
    for step in (1, 2, 3, 4):
        save(tmp_path, step, state_of(), ALONE, keep=2, say=said.append)
    assert names(tmp_path) == [3, 4]
    assert [line.split(":")[1] for line in said] == [
        f" step_00000000{step} removed before it is written, not after" for step in (1, 2)
    ]


@pytest.mark.parametrize(("keep", "keep_every"), [(1, 0), (3, 0), (1, 1)])
def test_where_nothing_may_go_it_is_one_sentence_and_all_stay(keep, keep_every, tmp_path, full_disk):
    for step in (1, 2)[: max(1, keep - 1)] if not keep_every else (1, 2):
        save(tmp_path, step, state_of(), ALONE, keep=keep, keep_every=keep_every)
    before = names(tmp_path)
    full_disk(len(before))
    with pytest.raises(UserError, match=r"step 9 could not be written .*No space left on device\); free some space"):
        save(tmp_path, 9, state_of(), ALONE, keep=keep, keep_every=keep_every)
    assert names(tmp_path) == before


def test_the_last_whole_one_is_not_removed_for_a_damaged_one(tmp_path, full_disk):
    for step in (1, 2):
        save(tmp_path, step, state_of(), ALONE, keep=2)
    damage(tmp_path / "step_000000002", "rank_00000.safetensors")
    full_disk(2)
    with pytest.raises(UserError, match="could not be written"):
        save(tmp_path, 3, state_of(), ALONE, keep=2)
    assert names(tmp_path) == [1, 2]


def test_room_is_not_made_where_room_is_not_what_lacks(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, state_of(), ALONE, keep=2)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint_writer, "write_synced", broken)
    with pytest.raises(UserError, match="Input/output error"):
        save(tmp_path, 3, state_of(), ALONE, keep=2)
    assert names(tmp_path) == [1, 2]


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_lists_and_verifies(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    for step in (2, 4):
        save_as_two(folder, step)
    assert list_command([str(tmp_path), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.endswith("whole") for line in lines[1:])
    assert lines[2].split()[:2] == ["step_000000004", "4"] and " 2  zero " in lines[2]
    damage(folder / "step_000000004")
    shutil.copytree(OLD, folder / OLD.name)
    (folder / "tmp.step_000000012").mkdir()
    assert list_command([str(tmp_path)]) == 0  # only heads are read
    assert list_command([str(tmp_path), "--verify"]) == 1
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].endswith("whole") and lines[2].endswith("whole") and lines[3].endswith("unfinished")
    assert "step_000000004/rank_00001.safetensors is damaged (" in lines[1]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "checkpoints").mkdir()])
def test_the_command_refuses_what_is_no_run(make, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=r"is no run folder|has no checkpoint yet"):
        list_command([str(tmp_path)])


def test_earlier_checkpoints_are_read_whole():
    content = torch.load(OLD / "rank_00000.pt", weights_only=True)
    expected = {n: v.view(open_checkpoint(OLD).state.shapes[n]) for n, (_, v) in content["master"].items()}
    assert_same_tensors(read_weights(OLD, "master"), expected)
    assert problem_of(OLD) is None
