"""The benchmarks run on tiny sizes, and what they report adds up."""

from __future__ import annotations

import json

import checkpoint
import ema
import measure
import peak
import pytest
import scaling
import torch
import workload
from distributed_runs import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Of this process: a benchmark sets the number of threads for the whole machine's sake."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_peak(tmp_path, capsys) -> None:
    path = tmp_path / "peak.json"
    arguments = ["--smallest", "16", "--largest", "32", "--copy-mb", "0.1", "--seconds", "0", "--json", str(path)]
    peak.main(["--device", "cpu", *arguments])
    results = json.loads(path.read_text())["results"]
    assert [row["size"] for row in results["product_tflops"]] == [16, 32]
    assert all(row["float32"] > 0 for row in results["product_tflops"])
    assert [row["MB"] for row in results["copy_gb_per_second"]] == [0.1]
    assert results["peak_tflops"].keys() == {"bfloat16", "float16", "float32"}
    assert capsys.readouterr().out.startswith("What the device can do at most")


def test_ema_moves_what_it_says() -> None:
    result = ema.main(["--device", "cpu", "--encoder", "tiny", "--rounds", "1"])["results"]
    assert [half["dtype"] for half in result] == ["bfloat16", "float32"]
    sides = result[0]["sides"]
    # Average read and written, masters read; then the cast reads 4 and writes 2 bytes.
    moved = {name: side["gb_per_second"] * side["ms"] * 1e6 / result[0]["parameters"] for name, side in sides.items()}
    assert moved == pytest.approx({ema.OURS: 18, ema.COPY: 18, ema.LOOP: 18, ema.UNCAST: 12})


def test_both_sides_of_the_average_compute_the_same() -> None:
    shapes = {"a": torch.Size([3, 4]), "b": torch.Size([5])}
    shards = ema.masters_of(shapes, torch.bfloat16, CPU)
    average = ema.MovingAverage(shards)
    start = {name: weights.clone() for name, weights in average.weights.items()}
    masters = [shard.master[p.start : p.stop].view(p.shape) for shard in shards for p in shard.placements]
    averages = [master.clone() for master in masters]
    weights = [master.bfloat16() for master in masters]
    for shard in shards:
        shard.master.add_(1.0)
    average.update(ema.MOMENTUM, torch.tensor(True))
    ema.tensor_by_tensor(averages, masters, weights)
    for weight, (name, ours) in zip(weights, average.weights.items(), strict=True):
        assert torch.equal(weight, ours) and not torch.equal(ours, start[name])


def checkpoint_results() -> dict:
    return checkpoint.main(["--config", "tiny", "--rounds", "1"])["results"]


@pytest.mark.long
def test_checkpoint() -> None:
    (results,) = run_ranks(checkpoint_results, 1)
    assert (
        results["seconds"].keys() == results["mb_per_second"].keys() >= {"snapshot", "write", "load", "save, waiting"}
    )
    # Four kinds of fp32 slices, of which the average has no predictor.
    assert 0.3 < results["megabytes"] < 1.0
    felt = results["background"]
    assert 0 < felt["begin_seconds"] <= felt["blocked_seconds"] < felt["complete_seconds"]


def rank_of_scaling() -> dict:
    return scaling.main(["--worker", "--config", "tiny", "--images", "2", "--steps", "1"])


@pytest.mark.long
def test_the_processes_of_the_scaling_benchmark_take_their_steps_together() -> None:
    first, second = run_ranks(rank_of_scaling, 2)
    assert first.keys() == {2, 4, 8} and first == second, "the slowest process's seconds, on every process"
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in first.values())


def test_scaling_adds_up(monkeypatch, capsys) -> None:
    """One process takes 10 ms and 1 ms an image; of two, each takes its half, and 2 ms more."""

    def started(ranks: int, options) -> dict[str, list[float]]:
        images = [options.images * factor for factor in (1, 2, 4)]
        return {str(n): [0.010 + 0.002 * (ranks - 1) + 0.001 * n / ranks] * 3 for n in images}

    monkeypatch.setattr(scaling, "start", started)
    results = scaling.main(["--device", "cpu", "--config", "tiny", "--ranks", "1", "2", "--images", "8"])["results"]
    rows = {(row["processes"], row["images a step"]): row for row in results["rows"]}
    assert rows[2, 32]["strong: speed-up"] == pytest.approx(42 / 28)
    assert rows[2, 32]["strong: efficiency"] == pytest.approx(21 / 28)
    assert rows[2, 32]["weak: efficiency"] == pytest.approx(26 / 28)
    assert rows[2, 8]["weak: efficiency"] is None  # four images on one process were not timed
    assert results["seconds_per_image"][2] == pytest.approx({"fixed_seconds": 0.012, "seconds_per_image": 0.0005})
    assert "processes" in capsys.readouterr().out


def test_batches_have_the_sampler_s_masks() -> None:
    config = workload.config_of("tiny", train_batch_size=4, train_micro_batch_size_per_gpu=2)
    batch = workload.batch_of(config, step=3, size=4, device=CPU)
    sampler = workload.build_sampler(config)
    context, targets = sampler.draw(3, 2)
    assert batch.images.shape == (4, 32, 32, 3) and batch.images.dtype == torch.uint8
    assert batch.context_block[2].tolist() == context.tolist()
    assert batch.target_blocks[:, 2].tolist() == targets.tolist()
    parts = list(workload.micro_batches(batch, 2))
    assert torch.equal(torch.cat([part.target_blocks for part in parts], dim=1), batch.target_blocks)
    largest = sampler.max_target_tokens()
    assert sampler.block_sizes(workload.step_with(sampler, largest)).target_tokens == largest


def test_a_shipped_configuration_takes_changes() -> None:
    config = workload.config_of("vith14", train_batch_size=64, train_micro_batch_size_per_gpu=8, bf16__enabled=False)
    assert (config.global_batch, config.micro_batch, config.deepspeed["bf16"]["enabled"]) == (64, 8, False)


def test_every_benchmark_says_what_it_compares_and_takes_a_file() -> None:
    for path in sorted((measure.ROOT / "benchmarks").glob("*.py")):
        text = path.read_text()
        if "def main(" in text:
            takes_a_file = "measure.parser(" in text or '"--json"' in text
            assert text.startswith('"""') and takes_a_file and "measure.save(" in text, path.name
