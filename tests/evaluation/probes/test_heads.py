"""The stacked heads against the same heads one by one: torch's modules, timm's LARS, torch's SGD and schedules."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from distributed_runs import run_ranks
from timm.optim import Lars
from torch import nn

from ijepa_ds.distributed import Process
from ijepa_ds.evaluation.inputs import CachedInputs
from ijepa_ds.evaluation.probes import heads as heads_module
from ijepa_ds.evaluation.probes.heads import HeadGrid, HeadStack
from ijepa_ds.evaluation.probes.recipes import COUNT, DEPTH, LINEAR, PRESETS, Head, Recipe

PROCESS = Process(0, 1, torch.device("cpu"))
WIDTH, CLASSES, STEPS = 12, 5, 20
VIEWS = {"last": slice(-4, None), "last4": slice(None)}


def batches(num_rows: int = 40) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features far from the origin, of different spreads, with labels that depend on them."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, CLASSES, generator=draw)
    rows = [torch.randn(num_rows, WIDTH, generator=draw) for _ in range(STEPS)]
    spread = torch.linspace(0.2, 3, WIDTH)
    return [(row * spread + 2, (row @ mix).argmax(dim=1)) for row in rows]


def grid_of(optimizer: str, lrs: tuple[float, ...], weight_decays: tuple[float, ...]) -> HeadGrid:
    recipe = Recipe(optimizer, 5, 40, lrs, weight_decays, (2, 4), lr_scales=("as given",))
    heads = recipe.heads(("last", "last4"))
    return HeadGrid(heads, VIEWS, WIDTH, inputs_of(PROCESS), optimizer=optimizer)


def inputs_of(process: Process) -> CachedInputs:
    return CachedInputs(torch.zeros(40, WIDTH), torch.arange(40) % CLASSES, batch=40, seed=3, process=process)


def module_like(stack: HeadStack) -> nn.Sequential:
    """One head as a user of torch would write it, from the stack's initial weights."""
    linear = nn.Linear(stack.weight.shape[2], CLASSES)
    linear.weight.data.copy_(stack.weight[0])
    linear.bias.data.zero_()
    return nn.Sequential(*([nn.BatchNorm1d(stack.weight.shape[2])] if stack.normed else []), linear)


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_each_head_of_the_grid_is_what_it_would_be_on_its_own(optimizer, monkeypatch):
    monkeypatch.setattr(heads_module, "CHUNK_ELEMENTS", 700)  # several chunks of rows, the last one smaller
    grid = grid_of(optimizer, (0.2, 0.02), (5e-4, 0.1, 0.0))
    factors = [0.1 ** (step // 8) for step in range(STEPS)]
    modules = [(stack, [module_like(stack) for _ in stack.heads]) for stack in grid.stacks]
    starts = [stack.weight.clone() for stack in grid.stacks]
    losses = [grid.step(*batch, total=40, lr_factor=f) for batch, f in zip(batches(), factors, strict=True)]
    assert len(grid.order) == 24 == len(losses[0])
    position = 0
    for (stack, singles), start in zip(modules, starts, strict=True):
        columns = VIEWS[stack.heads[0].features]
        assert (stack.weight - start).abs().max() > 1e-2
        for index, (head, module) in enumerate(zip(stack.heads, singles, strict=True)):
            groups = [
                {"params": [module[-1].weight], "weight_decay": head.weight_decay},
                {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0},
            ]
            if optimizer == "lars":
                single = Lars(groups, lr=head.lr, momentum=0.9)
            else:
                single = torch.optim.SGD(groups, lr=head.lr, momentum=0.9, nesterov=True)
            for step, ((rows, labels), factor) in enumerate(zip(batches(), factors, strict=True)):
                for group in single.param_groups:
                    group["lr"] = head.lr * factor
                single.zero_grad()
                loss = nn.functional.cross_entropy(module(rows[:, columns]), labels)
                assert float(losses[step][position]) == pytest.approx(loss.item(), rel=2e-4, abs=1e-4)
                loss.backward()
                single.step()
            torch.testing.assert_close(stack.weight[index], module[-1].weight.detach(), rtol=1e-4, atol=1e-5)
            rows, _ = batches()[0]
            module.eval()
            ours = grid.predict([rows])[:, position]
            assert (ours == module(rows[:, columns]).argmax(dim=1)).float().mean() > 0.97
            position += 1


@pytest.mark.parametrize("nonzero_gradient", [True, False])
def test_lars_gives_timms_weights_to_a_millionth(nonzero_gradient):
    draw = torch.Generator().manual_seed(1)
    lr, weight_decay = torch.tensor([0.5, 0.05, 3.0]), torch.tensor([5e-4, 0.0, 0.2])
    shapes = [(3, 4, 6), (3, 4), (3, 6)]
    ours = [torch.randn(shape, generator=draw) for shape in shapes]
    theirs = [[nn.Parameter(tensor[head].clone()) for tensor in ours] for head in range(3)]
    optimizers = [
        Lars(
            [{"params": p[:1], "weight_decay": float(weight_decay[h])}, {"params": p[1:], "weight_decay": 0.0}],
            lr=float(lr[h]),
            momentum=0.9,
        )
        for h, p in enumerate(theirs)
    ]
    momenta = [torch.zeros_like(tensor) for tensor in ours]
    for _ in range(20):
        gradients = [torch.randn(shape, generator=draw) * nonzero_gradient for shape in shapes]
        for head, (parameters, optimizer) in enumerate(zip(theirs, optimizers, strict=True)):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient[head].clone()
            optimizer.step()
        heads_module.lars_step(ours, [g.clone() for g in gradients], momenta, lr=lr, weight_decay=weight_decay)
    for head, parameters in enumerate(theirs):
        for tensor, parameter in zip(ours, parameters, strict=True):
            assert (tensor[head] - parameter).abs().max() < 1e-6 * max(1.0, float(parameter.detach().abs().max()))


def test_a_trained_grid_predicts_and_its_rows_may_come_in_any_batches():
    grid = grid_of("sgd", (0.1,), (0.0,))
    for rows, labels in batches() * 3:
        grid.step(rows, labels, total=len(rows), lr_factor=1.0)
    rows, labels = batches()[0]
    whole = grid.predict([rows])
    assert whole.shape == (40, 4) and (whole == grid.predict(rows.split(7))).all()
    correct = (whole == labels[:, None]).float().mean(dim=0)
    by_head = dict(zip([(head.features, head.norm) for head in grid.order], correct.tolist(), strict=True))
    assert by_head["last4", "bn"] > 0.75 and by_head["last4", "linear"] > 0.75 > by_head["last", "bn"]


def step_on_ranks() -> list[torch.Tensor]:
    from ijepa_ds.engine.zero import init_distributed

    return step_on(init_distributed())


def step_on(process: Process) -> list[torch.Tensor]:
    heads = LINEAR.adapted(batch=256).heads(("last", "last4"))
    grid = HeadGrid(heads, VIEWS, WIDTH, inputs_of(process), optimizer="lars")
    for rows, labels in batches(41):  # not divisible: the ranks' shares differ
        mine = slice(process.rank, None, process.world_size)
        loss = grid.step(rows[mine], labels[mine], total=41, lr_factor=1.0)
    return [loss, grid.predict([batches()[0][0]]), *(p for stack in grid.stacks for p in stack.parameters)]


def test_two_processes_train_what_one_trains():
    for one, first, second in zip(step_on(PROCESS), *run_ranks(step_on_ranks, 2), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [LINEAR, DEPTH, *PRESETS.values()])
def test_rates_fall_as_torchs_schedulers_have_it(recipe):
    steps = 3
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    if recipe.milestones is None:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    else:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [m * steps for m in recipe.milestones])
    for step in range(recipe.epochs * steps):
        assert recipe.lr_factor(step, steps) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-5, abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_the_linear_grid_has_48_heads_with_both_readings_of_the_rate():
    heads = LINEAR.heads(("last", "last4"))
    assert len(heads) == len(set(heads)) == 48
    assert {head.lr for head in heads} == {0.05, 0.01, 0.001, 3.2, 0.64, 0.064}
    assert {head.lr for head in COUNT.heads(("last",))} == {0.01}
    small = LINEAR.adapted(batch=256)  # the two readings are one
    assert small.batch == 256 and len(small.heads(("last", "last4"))) == 24
    assert dataclasses.replace(LINEAR, batch=100).heads(("x",))[0] == Head("x", "linear", 0.05, 5e-4)


def test_a_recipe_takes_other_numbers():
    other = LINEAR.adapted(epochs=5, batch=64, lrs=[0.3], weight_decays=[0.0])
    assert (other.epochs, other.batch, other.lrs, other.milestones) == (5, 64, (0.3,), (1.5, 3.0, 4.5))
    assert LINEAR.adapted() == LINEAR
