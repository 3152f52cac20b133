"""How layers are cut into pipeline stages, and what a pipeline waits."""

from __future__ import annotations

from collections.abc import Sequence


def split_layers(costs: Sequence[float], stages: int) -> list[int]:
    """Cut consecutive layers into stages so that the dearest stage costs as little as it can.

    Args:
        costs: of each layer, in any unit.
        stages: at most as many as there are layers; each gets one layer at least.

    Returns:
        stages + 1 bounds: stage s has the layers from bounds[s] up to bounds[s + 1], exclusive.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} layers cannot be cut into {stages} stages")
    up_to = [0.0]
    for cost in costs:
        up_to.append(up_to[-1] + cost)
    # dearest[n]: of the first n layers in as many stages as were dealt with; cuts: where the last of them begins.
    dearest, cuts = list(up_to), []
    for stage in range(1, stages):
        best, begin = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(stage + 1, count + 1):
            best[end], begin[end] = min(
                (max(dearest[start], up_to[end] - up_to[start]), start) for start in range(stage, end)
            )
        dearest = best
        cuts.append(begin)
    bounds = [count]
    for begin in reversed(cuts):
        bounds.append(begin[bounds[-1]])
    return [0, *reversed(bounds)]


def bubble(stages: int, micro_batches: int) -> float:
    """The share of a pipeline's time in which a stage waits for the first micro-batches to come, or the last to leave.

    Of one forward, one backward pass in turns, with stages of equal cost: (S - 1) / (M + S - 1).
    """
    return (stages - 1) / (micro_batches + stages - 1)
