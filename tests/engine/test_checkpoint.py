"""Checkpoints: bit-equal continuation, any number of ranks, and every way in which writing or reading can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_runs import (
    FOLDER,
    TrainingRun,
    assert_same_tensors,
    averages_of,
    bare_run,
    build_parts,
    checkpoint_tensors,
    masters_of,
    once,
    run_ranks,
    run_training,
    tiny_config,
    train_steps,
)

from ijepa_ds.distributed import barrier
from ijepa_ds.engine.checkpoint_files import list_checkpoints, read_weights, remove_incomplete
from ijepa_ds.errors import UserError

LAST_STEP = 8

# ------------------------------------------------------------------------------------------ stopped and gone on with


def run_config(name: str, **changes: object) -> dict:
    return tiny_config(ijepa__run__name=name, **changes)


@once
def stopped_run(world_size: int) -> list[TrainingRun]:
    """To the middle of an epoch, then, with more switched on, to the end."""
    name = f"stopped_{world_size}"
    first = run_training(run_config(name, ijepa__run__stop_after_steps=3), world_size)
    for copy in ("killed", "other_number"):
        shutil.copytree(first.folder, FOLDER / copy / name)
    extras = {"ijepa__checkpoint__steps": 3, "ijepa__monitor__picture_steps": 2, "ijepa__monitor__health_steps": 2}
    return [first, run_training(run_config(name, **extras), world_size)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_was_stopped_is_bit_equal_to_one_that_was_not(world_size: int) -> None:
    whole, parts = bare_run(world_size), stopped_run(world_size)
    for run in (whole, *parts):
        assert set(run.exit_codes) == {0}, run.output
    assert [row["step"] for row in parts[-1].rows] == list(range(1, LAST_STEP + 1))  # none twice, none missing
    assert parts[-1].losses == whole.losses
    for key in ("lr", "weight_decay", "momentum", "grad_norm", "context_tokens", "target_tokens"):
        assert [row[key] for row in parts[-1].rows] == [row[key] for row in whole.rows], key
    assert_same_tensors(checkpoint_tensors(parts[-1].folder, LAST_STEP), checkpoint_tensors(whole.folder, LAST_STEP))


def test_a_stop_is_said_and_so_is_the_continuation() -> None:
    first, last = stopped_run(1)
    assert "starting at step 0" in first.output and "done: 3 steps" in first.output
    assert "going on from step 3" in last.output and "done: 8 steps" in last.output
    assert last.checkpoints == ["step_000000003", "step_000000006", "step_000000008"]
    assert not (FOLDER / "killed" / "stopped_1" / "export").exists()  # an unfinished run exports nothing
    assert (last.folder / "export" / "target_encoder.safetensors").exists()


def test_a_finished_run_started_again_changes_nothing() -> None:
    last = stopped_run(1)[-1]
    rows, before = last.rows, checkpoint_tensors(last.folder, LAST_STEP)
    again = run_training(run_config("stopped_1"), 1)
    assert again.exit_codes == [0] and "done: 8 steps" in again.output
    assert again.rows == rows
    assert_same_tensors(checkpoint_tensors(last.folder, LAST_STEP), before)


# --------------------------------------------------------------------------------------------- killed and interrupted


def die_while_saving() -> None:
    """On the last rank, SIGKILL after half of the first checkpoint's file has been written."""
    if os.environ["RANK"] != str(int(os.environ["WORLD_SIZE"]) - 1):
        return
    from ijepa_ds.engine import checkpoint_writer

    whole = checkpoint_writer.write_rank_file

    def half(path: Path, *arguments: object) -> None:
        whole(path, *arguments)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_writer.write_rank_file = half


def terminate_after_the_fifth_step() -> None:
    """On the last rank, SIGTERM while step 5 of the run runs (the second of a run that goes on from step 3)."""
    if os.environ["RANK"] != str(int(os.environ["WORLD_SIZE"]) - 1):
        return
    from ijepa_ds.engine.moving_average import MovingAverage

    update, calls = MovingAverage.update, []

    def update_and_terminate(self, momentum: float, applied: torch.Tensor) -> None:
        update(self, momentum, applied)
        calls.append(momentum)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    MovingAverage.update = update_and_terminate


@once
def killed_run() -> list[TrainingRun]:
    """Two ranks from step 3: SIGKILL while step 4 is saved, then SIGTERM in step 5, then to the end."""
    stopped_run(2)
    in_the_copy = {"ijepa__run__folder": str(FOLDER / "killed")}
    config = run_config("stopped_2", ijepa__checkpoint__steps=4, **in_the_copy)
    killed = run_training(config, 2, prepare=die_while_saving)
    killed_checkpoints, killed_rows = killed.checkpoints, killed.rows
    terminated = run_training(run_config("stopped_2", **in_the_copy), 2, prepare=terminate_after_the_fifth_step)
    states = [(killed_checkpoints, killed_rows), (terminated.checkpoints, terminated.rows)]
    return [killed, terminated, run_training(run_config("stopped_2", **in_the_copy), 2), states]


def test_a_kill_while_saving_leaves_the_checkpoint_before() -> None:
    killed, terminated, _, states = killed_run()
    assert killed.exit_codes[1] == -signal.SIGKILL
    checkpoints, rows = states[0]
    assert checkpoints == ["step_000000003", "tmp.step_000000004"]
    assert rows[-1]["step"] in (4, 5, 6)  # trained on while it was written, until the other rank was missed
    assert "going on from step 3" in terminated.output


def test_sigterm_to_one_rank_stops_all_with_a_checkpoint() -> None:
    terminated, states = killed_run()[1], killed_run()[3]
    assert terminated.exit_codes == [0, 0], terminated.output
    checkpoints, rows = states[1]
    # Asked for in step 5, heard of by all in step 6; tmp.step_000000004 was removed at the start.
    assert checkpoints == ["step_000000003", "step_000000006"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "stopped by another rank after step 6; the same command goes on" in terminated.output
    assert "done" not in terminated.output and "Traceback" not in terminated.output


def test_what_comes_after_kill_and_sigterm_is_bit_equal() -> None:
    last, whole = killed_run()[2], bare_run(2)
    assert last.exit_codes == [0, 0], last.output
    assert [row["step"] for row in last.rows] == list(range(1, LAST_STEP + 1))
    assert last.losses == whole.losses
    assert_same_tensors(checkpoint_tensors(last.folder, LAST_STEP), checkpoint_tensors(whole.folder, LAST_STEP))


def test_a_run_goes_on_with_another_number_of_ranks() -> None:
    stopped_run(2)
    run = run_training(run_config("stopped_2", ijepa__run__folder=str(FOLDER / "other_number")), 1)
    assert run.exit_codes == [0] and "going on from step 3" in run.output
    assert run.losses == pytest.approx(bare_run(2).losses, rel=1e-5)  # another order of summation
    assert run.losses[:3] == bare_run(2).losses[:3]


# ------------------------------------------------------------------------------------------------ any number of ranks


BF16 = {"bf16": {"enabled": True}}  # working weights that are not the masters


def save_here(folder: Path, stage: int) -> dict:
    """In a rank: two steps, saved, and two more."""
    parts = build_parts(tiny_config(zero_optimization={"stage": stage}, **BF16))
    train_steps(parts, range(2))
    parts.save(folder, 2)
    masters, averages = masters_of(parts), averages_of(parts)
    return {"masters": masters, "averages": averages, "losses": train_steps(parts, range(2, 4))}


def load_and_save_again(source: Path, folder: Path, stage: int) -> dict:
    """In a rank: another seed's model takes a checkpoint's state, and saves it again."""
    if stage == PLAIN:
        parts = build_parts(tiny_config(ijepa__run__seed=9), plain=True)
    else:
        parts = build_parts(tiny_config(zero_optimization={"stage": stage}, ijepa__run__seed=9, **BF16))
    dtype = parts.trainable.target_encoder.dtype
    step = parts.load(source)
    masters, averages = masters_of(parts), averages_of(parts)
    parts.save(folder, 2)
    parts.trainable.features(torch.zeros(1, 3, 32, 32))
    working = {n: p.detach().clone() for n, p in parts.trainable.module.named_parameters() if p.requires_grad}
    encoder = parts.trainable.target_encoder.encoder
    target = {f"context_encoder.{n}": p.detach().clone() for n, p in encoder.named_parameters()}
    del target["context_encoder.pos_embed"]
    return {
        "step": step,
        "adam": parts.adam_steps(),
        "working_is_cast": all(torch.equal(p, masters[name].to(dtype)) for name, p in working.items()),
        "target_is_cast": all(torch.equal(p, averages[name].to(dtype)) for name, p in target.items()),
        "losses": train_steps(parts, range(2, 4)),
    }


def load_all(cases: list[tuple[Path, Path, int]]) -> list[dict]:
    return [load_and_save_again(*case) for case in cases]


@once
def saved(world_size: int) -> tuple[Path, list[dict]]:
    folder = FOLDER / f"saved_{world_size}"
    return folder / "step_000000002", run_ranks(save_here, world_size, folder, 2)


@once
def loaded(world_size: int) -> list[list[dict]]:
    """What ``world_size`` ranks read of 1 and 2 ranks' checkpoints: see LOADED."""
    return run_ranks(
        load_all,
        world_size,
        [
            (saved(of)[0], FOLDER / f"again_{of}_{world_size}_{stage}", stage)
            for of, stage in LOADED
            if stage != PLAIN or world_size == 1
        ],
    )


PLAIN = -1  # in place of a ZeRO stage: without DeepSpeed, on one rank
LOADED = [(1, 2), (2, 2), (2, 0), (2, 1), (2, PLAIN)]
CASES = [(case, world_size) for case in range(len(LOADED)) for world_size in (1, 2)][:-1]


@pytest.mark.parametrize(("case", "world_size"), CASES)
def test_any_number_of_ranks_reads_what_any_other_wrote(case: int, world_size: int) -> None:
    of, stage = LOADED[case]
    for rank in loaded(world_size):
        assert rank[case]["step"] == 2 and rank[case]["adam"] == {2.0}
        assert rank[case]["working_is_cast"] and rank[case]["target_is_cast"]
        assert rank[case]["losses"] == pytest.approx(loaded(1)[0][0]["losses"], rel=5e-3)
        if of == world_size and stage == 2:  # as if it had never been saved
            assert rank[case]["losses"] == saved(of)[1][0]["losses"]
    again = FOLDER / f"again_{of}_{world_size}_{stage}" / "step_000000002"
    assert len(list(again.glob("rank_*.safetensors"))) == (1 if stage in (0, PLAIN) else world_size)
    for kind in ("master", "exp_avg", "exp_avg_sq", "target"):
        assert_same_tensors(read_weights(again, kind), read_weights(saved(of)[0], kind))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_holds_what_was_in_memory(world_size: int) -> None:
    checkpoint, ranks = saved(world_size)
    for rank in ranks:
        assert_same_tensors(read_weights(checkpoint, "master"), rank["masters"])
        assert_same_tensors(read_weights(checkpoint, "target"), rank["averages"])
    encoder = read_weights(checkpoint, "target", "context_encoder.")
    assert "blocks.0.attn.qkv.weight" in encoder and not any(name.startswith("predictor") for name in encoder)


# ---------------------------------------------------------------------------------------------------- what goes wrong


def attempt(function, *arguments: object, **options: object) -> str:
    """The sentence with which it is refused; anything else is raised."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    return str(error.value)


def fail_to_write(folder: Path) -> dict:
    """In a rank: a good checkpoint; then a limit on the last rank's file, an unusable folder; then room again."""
    parts = build_parts(tiny_config())
    train_steps(parts, range(1))
    parts.save(folder, 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    is_last = parts.process.rank == parts.process.world_size - 1
    messages = []
    for size in (20_000, 0):
        if is_last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            messages.append(attempt(parts.save, folder, 2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    barrier(parts.process)  # rank 0 removes what was half written after the others have raised
    kept = sorted(path.name for path in folder.iterdir())
    not_a_folder = folder / "step_000000001" / "state.json"
    messages.append(attempt(parts.save, not_a_folder, 2))
    parts.save(folder, 3)
    return {"messages": messages, "kept": kept, "after": sorted(path.name for path in folder.iterdir())}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_that_cannot_be_written_is_one_sentence_on_every_rank(world_size: int) -> None:
    folder = FOLDER / f"full_{world_size}"
    for rank in run_ranks(fail_to_write, world_size, folder):
        for message, place in zip(rank["messages"], (folder, folder, folder / "step_000000001"), strict=True):
            assert message.startswith("the checkpoint of step 2 could not be written to " + str(place))
            assert "\n" not in message and "free some space" in message
        assert rank["kept"] == ["step_000000001"] and rank["after"] == ["step_000000001", "step_000000003"]


def damaged_copies() -> dict[str, Path]:
    source, copies = saved(2)[0], {}
    for name in ("truncated", "missing", "empty", "garbage", "no_ranks", "state", "state_list", "state_keys", "format"):
        copies[name] = FOLDER / "damaged" / name / "step_000000002"
        shutil.copytree(source, copies[name])
    for name, size in (("truncated", 10_000), ("empty", 0)):
        os.truncate(copies[name] / "rank_00001.safetensors", size)
    (copies["missing"] / "rank_00000.safetensors").unlink()
    (copies["garbage"] / "rank_00001.safetensors").write_bytes(b"\x80garbage" * 1000)
    for path in copies["no_ranks"].glob("rank_*"):
        path.unlink()
    (copies["state"] / "state.json").write_bytes(b"\x00\xff{" * 10)
    (copies["state_list"] / "state.json").write_text("[1, 2]")
    (copies["state_keys"] / "state.json").write_text('{"format": 1}')
    state = json.loads((copies["format"] / "state.json").read_text())
    (copies["format"] / "state.json").write_text(json.dumps({**state, "format": 99}))
    return copies


def read_damaged(copies: dict[str, Path]) -> dict[str, str]:
    """In a rank: how each is refused; and an intact one of a wider model, and of the same model with other blocks."""
    parts = build_parts(tiny_config())
    found = {}
    for name, path in copies.items():
        try:
            found[name] = f"read as step {parts.load(path)}"
        except UserError as error:
            found[name] = str(error)
        except Exception as error:
            found[name] = f"not a UserError: {error!r}"
    for name, changes in (("wider", {"ijepa__model__width": 48}), ("deeper", {"ijepa__model__depth": 3})):
        other = build_parts(tiny_config(**changes))
        found[name] = attempt(other.load, saved_path())
    return found


def saved_path() -> Path:
    return FOLDER / "saved_2" / "step_000000002"


@once
def damaged() -> tuple[dict[str, Path], dict[str, str]]:
    copies = damaged_copies()
    return copies, run_ranks(read_damaged, 1, copies)[0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("truncated", "rank_00001.safetensors is damaged"),
        ("empty", "rank_00001.safetensors is damaged"),
        ("garbage", "rank_00001.safetensors is damaged"),
        ("missing", "rank_00000.safetensors is missing"),
        ("no_ranks", "rank_00000.safetensors is missing"),
        ("state", "is damaged"),
        ("state_list", "is damaged"),
        ("state_keys", "is damaged"),
        ("format", "has format 99"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_a_sentence_that_names_it(name: str, says: str) -> None:
    copies, messages = damaged()
    assert says in messages[name] and str(copies[name]) in messages[name], messages[name]
    assert "\n" not in messages[name] and not messages[name].startswith("not a UserError")
    with pytest.raises(UserError):
        read_weights(copies[name], "target")


@pytest.mark.parametrize("name", ["wider", "deeper"])
def test_a_checkpoint_of_another_model_is_refused(name: str) -> None:
    message = damaged()[1][name]
    assert message.startswith(f"{saved_path()} is of another model") and "tensors differ, such as context" in message


def keep_two(folder: Path) -> list[list[str]]:
    parts = build_parts(tiny_config())
    listings = []
    for step in (5, 10, 100, 1000):
        parts.save(folder, step, keep=2)
        listings.append([path.name for path in list_checkpoints(folder)])
    return listings


def test_only_the_newest_stay() -> None:
    (listings,) = run_ranks(keep_two, 1, FOLDER / "kept")
    five, ten, hundred, thousand = (f"step_{step:09d}" for step in (5, 10, 100, 1000))
    assert listings == [[five], [five, ten], [ten, hundred], [hundred, thousand]]
    assert sorted(path.name for path in (FOLDER / "kept").iterdir()) == [hundred, thousand]


def test_what_is_unfinished_is_not_listed_and_is_removed(tmp_path: Path) -> None:
    for name in ("step_000000001", "tmp.step_000000002", "step_000000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00000.safetensors").write_bytes(b"")
    for name in ("step_000000001", "tmp.step_000000002"):
        (tmp_path / name / "state.json").write_text("{}")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000000001"]
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000001", "step_000000003"]


@dataclasses.dataclass
class Reader:
    """In place of a GPU's event, after which a copy of the state is done."""

    wait: Callable[[], object]


def train_while_writing(folder: Path) -> dict:
    """In a rank: a snapshot, a step more, and only then the files."""
    from ijepa_ds.engine.checkpoint_writer import Where, Writing
    from ijepa_ds.engine.snapshot import HostCopies

    parts = build_parts(tiny_config())
    train_steps(parts, range(1))
    masters, averages = masters_of(parts), averages_of(parts)
    state, waited = parts.trainable.state(), []
    copied = HostCopies().take(state)
    state.hold(Reader(lambda: waited.append(all(torch.equal(masters_of(parts)[n], v) for n, v in masters.items()))))
    train_steps(parts, range(1, 2))
    moved = any(not torch.equal(masters[name], values) for name, values in masters_of(parts).items())
    Writing(Where(folder, keep=1), 1, copied, parts.process).finish()
    return {"masters": masters, "averages": averages, "moved": moved, "waited": waited}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_snapshot_stays_as_it_was_while_training_goes_on(world_size: int) -> None:
    folder = FOLDER / f"snapshot_{world_size}"
    for rank in run_ranks(train_while_writing, world_size, folder):
        assert rank["moved"] and rank["waited"] == [True]  # once, before anything moved
        assert_same_tensors(read_weights(folder / "step_000000001", "master"), rank["masters"])
        assert_same_tensors(read_weights(folder / "step_000000001", "target"), rank["averages"])
