"""Mutated configurations: each is refused in a sentence, or everything that follows takes it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import build_parts, run_ranks, tiny_config, train_steps

from ijepa_ds.build import autocast_dtype, build_sampler, check_batch, check_stages, schedules_of, shapes_of
from ijepa_ds.config import Config, load_config, parse_config
from ijepa_ds.distributed import Process
from ijepa_ds.engine.zero_internals import without_host_reads
from ijepa_ds.errors import UserError
from ijepa_ds.run.folder import RunFolder

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
LIMIT = 20  # seconds until a configuration is taken to hang
DEEPSPEED = {
    "bf16": {"enabled": True, "immediate_grad_update": False, "check_grad_overflow": True},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 1e6,
        "allgather_bucket_size": 10**6,
        "contiguous_gradients": True,
        "compute_grad_norm": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "use_multi_rank_bucket_allreduce": True,
        "parameter_alignment": True,
        "load_from_fp32_weights": True,
        "stage3_max_live_parameters": 1e9,
    },
    "gradient_clipping": 1.0,
    "communication_data_type": "fp32",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "dump_state": False,
    "disable_python_gc": False,
    "comms_logger": {"enabled": False, "prof_all": True, "prof_ops": [], "verbose": False, "debug": False},
    "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "top_modules": 1, "output_file": None},
    "timers": {"throughput": {"enabled": False, "synchronized": True}},
    "log_level": "warning",
}
TEXTS = ["", "/", "..", "a/b", "\0", "\ud800", "x" * 300, "auto", "true", "4096", "NaN", "bf16", "-1", "%s{}"]
NUMBERS = [0, -1, 1, 2, 3, 7, 4096, 2**31, 2**63, 10**30, 10**399, 0.5, -0.1, 1e-300, 1e-9, 1e300, 5e8, 1.5]
OTHERS = [None, True, False, [], {}, [4096], [0.1, 0.2], [1, 0], [[1]], {"enabled": True}, {"a": 1}, ["a", "a"], [None]]


# ------------------------------------------------------------------------------------------------------------ mutations


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of everything within a configuration."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def near(value: Any, draw: random.Random) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice([0, 1, 2, value + 1, 2 * value, 64, 4096, 10**6, 10**9, 10**15, 10**30])
    if isinstance(value, float):
        return value * draw.choice([0.0, 1e-9, 0.5, 2, 10, 1e6, 1e12]) + draw.choice([0, 0, 0, 1])
    if isinstance(value, list):
        return [near(inner, draw) for inner in value]
    if isinstance(value, dict):
        return {key: inner for key, inner in value.items() if draw.random() < 0.5}
    return draw.choice([None, "fp32", "bf16", "fp16", "sum", "error", "reference", "multiblock", "tiny", 3])


def changed(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One to three values replaced, removed, renamed or moved."""
    config = copy.deepcopy(config)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        *parents, last = draw.choice(list(places(config)))
        place = config
        for parent in parents:
            place = place[parent]
        kind = draw.random()
        if kind < 0.4:
            place[last] = near(place[last], draw)
        elif kind < 0.75:
            place[last] = copy.deepcopy(draw.choice(draw.choice([TEXTS, NUMBERS, OTHERS])))
        elif kind < 0.85:
            del place[last]
        elif isinstance(place, dict):
            place[draw.choice([f"{last}s", str(last)[1:], "x" * 500, "a\nb", ""])] = place.pop(last)
    return config


def garbled(text: str, draw: random.Random) -> bytes:
    """A file as no program writes it."""
    raw = bytearray(text.encode())
    at = draw.randrange(len(raw))
    number = next(place for place in range(at, at + len(raw)) if chr(raw[place % len(raw)]).isdigit()) % len(raw)
    kind = draw.randrange(8)
    if kind == 0:
        raw[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del raw[at:]
    elif kind == 2:
        raw[number:number] = b"9" * draw.choice([300, 4_000, 5_000, 100_000])
    elif kind == 3:
        raw[number : number + 1] = draw.choice([b"NaN", b"-Infinity", b"1e999", b"0x10", b"1_0", b"\xff", b"''"])
    elif kind == 4:
        depth = draw.choice([70, 990, 100_000])
        raw[number : number + 1] = b"[" * depth + b"]" * depth
    elif kind == 5:
        depth = draw.choice([70, 990, 100_000])
        raw[number : number + 1] = b'{"a":' * depth + b"1" + b"}" * depth
    elif kind == 6:
        raw[1:1] = b'"ijepa": {}, "train_batch_size": 1, '
    else:
        raw[at:at] = draw.choice([b"\xff", b"\0", b"\xef\xbb\xbf", b"//", b",", b"}", b"{"])
    return bytes(raw)


def override(draw: random.Random) -> str:
    """A value as the command line gives it."""
    key = ".".join(map(str, draw.choice([*places(tiny_config()), ("a",) * 2000, ("bf16",) + ("a",) * 500, ("", "")])))
    values = ["9" * 5000, "[" * 2000, '{"a":1,"a":2}', "NaN", "1e999", "null", "{}", "[]", '"\\ud800"', "a=b", "-", "1"]
    return f"{key}={draw.choice(values)}"


# --------------------------------------------------------------------------------------------------------- what follows


def follow(config: Config) -> None:
    """What a run does before it builds a model, on one process; :class:`UserError` where it refuses."""
    assert parse_config(json.loads(json.dumps(config.as_dict()))) == config
    check_batch(config, Process(0, 1, torch.device("cpu")))
    check_stages(config)
    sampler = build_sampler(config)
    sampler.block_sizes(0)
    for step in (0, 1, 1000):
        schedules_of(config, 100).at(step)
    shapes_of(config)
    autocast_dtype(config)
    without_host_reads(config.deepspeed)
    RunFolder(config).check_writable()
    RunFolder(config).check_belongs(config, 16)


def read_by_deepspeed(config: Config) -> None:
    """DeepSpeed's own reading of its part."""
    from deepspeed.runtime.config import DeepSpeedConfig

    follow(config)
    DeepSpeedConfig({**without_host_reads(config.deepspeed), "train_batch_size": config.micro_batch})


@contextlib.contextmanager
def time_limit(seconds: int = LIMIT) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(row, load: Callable[[], Config], then: Callable[[Config], None], what: str) -> Config | None:
    """Count what came of one configuration; it, if it was taken."""
    try:
        with time_limit():
            config = load()
            then(config)
    except UserError as error:
        lines = str(error).split("\n")
        plain = "Traceback" not in str(error) and len(str(error)) < 20_000 and all(lines)
        row.count("refused" if plain else "traceback", f"{what[:300]}: {str(error)[:300]}")
    except TimeoutError:
        row.count("hung", what[:500])
    except Exception:
        row.count("traceback", f"{what[:300]}: {traceback.format_exc()[-600:]}")
    else:
        row.count("survived")
        return config
    return None


def attack(row, folder: Path, count: int, then: Callable[[Config], None]) -> list[Config]:
    """``count`` mutated configurations, in equal parts by kind; those that were taken."""
    draw, taken = random.Random(count), []
    given = [json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json")) if path.stem != "schema"]
    runs = {"ijepa__run__folder": str(folder)}
    full = tiny_config(**DEEPSPEED, **runs)
    for turn in range(count):
        base = tiny_config(**runs) if turn % 2 else draw.choice(given)
        path, overrides = folder / f"{turn}.json", []
        if turn % 4 == 0:
            path.write_bytes(garbled(json.dumps(base), draw))
        elif turn % 8 == 1:
            path.write_text(json.dumps(base))
            overrides = [override(draw) for _ in range(draw.choice([1, 2]))]
        else:
            path.write_text(json.dumps(changed(base if turn % 8 == 2 else full, draw)))
        what = f"{path.read_bytes()[:20_000].decode(errors='replace')} {overrides}" if turn % 4 else f"garbled {turn}"
        config = judge(row, lambda path=path, overrides=overrides: load_config(path, overrides), then, what)
        if config is not None:
            taken.append(config)
    return taken


def test_mutated_configurations_are_refused_in_a_sentence_or_taken_by_what_follows(row, tmp_path):
    mine = row("mutated configurations, short")
    attack(mine, tmp_path, 120, follow)
    mine.hold(120)


@pytest.mark.long
def test_two_thousand_mutated_configurations_that_deepspeed_reads_too(row, tmp_path):
    mine = row("mutated configurations")
    attack(mine, tmp_path, 2000, read_by_deepspeed)
    mine.hold(2000)


def taken_by_the_engine(configs: list[dict[str, Any]]) -> list[str]:
    """Of each configuration, what came of an engine and one step in a process of its own: DeepSpeed keeps globals."""
    outcomes = []
    for raw in configs:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                os.write(writer, _engine_and_step(raw).encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            outcomes.append(pipe.read().decode() or "the process died")
        os.waitpid(child, 0)
    return outcomes


def _engine_and_step(raw: dict[str, Any]) -> str:
    try:
        with time_limit(15 * LIMIT):  # torch's compiler is imported in each
            train_steps(build_parts(raw), range(1))
        return "survived"
    except UserError as error:
        return f"too late: {error}"[:600]  # it could have been said before the model was built
    except Exception:
        changes = {key: value for key, value in raw.items() if value != DEEPSPEED.get(key) and key != "ijepa"}
        return f"{changes}: {traceback.format_exc()[-400:]}"


@pytest.mark.long
def test_what_is_accepted_of_deepspeeds_settings_its_engine_takes(row):
    mine = row("accepted settings of DeepSpeed in its engine")
    draw, taken, seen = random.Random(5), list[dict[str, Any]](), set[str]()
    model = {"width": 16, "depth": 1, "heads": 2, "predictor_width": 16, "predictor_depth": 1}
    small = tiny_config(train_micro_batch_size_per_gpu=8, **{f"ijepa__model__{key}": n for key, n in model.items()})
    ours = {key: small[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "ijepa")}
    while len(taken) < 200:
        raw = {**changed(DEEPSPEED, draw), **ours}
        for _ in range(draw.randrange(3)):
            raw = {**changed({key: raw[key] for key in DEEPSPEED if key in raw}, draw), **ours}
        with contextlib.suppress(UserError):
            parse_config(raw)
            if (text := json.dumps(raw)) not in seen:
                seen.add(text)
                taken.append(raw)
    [outcomes] = run_ranks(taken_by_the_engine, 1, taken)
    for outcome in outcomes:
        mine.count("survived" if outcome == "survived" else "traceback", outcome)
    mine.hold(len(taken))
