"""Triggers on several ranks of gloo, which decide once for all of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Partial, init_device_mesh

from asgd_fast import ASGD, NonMonotonicTrigger


def trigger_of(patience=0, **keywords):
    param = nn.Parameter(torch.ones(2))
    return NonMonotonicTrigger(ASGD([param], lr=0.1), patience, **keywords)


def check_the_mean_decides():
    """Alone the ranks would fire at different checks, or never."""
    rank, n = dist.get_rank(), dist.get_world_size()
    given = [([5.0, 4.0, 5.0, 3.0], [5.0, 4.0, 3.0, 6.5])[r % 2] for r in range(n)]
    means = [sum(losses) / n for losses in zip(*given, strict=True)]
    trigger = trigger_of(process_group=dist.group.WORLD)
    fired = [trigger.step(loss) for loss in given[rank]]
    assert trigger.losses == means[: len(trigger.losses)]
    first = next(i for i in range(1, 4) if means[i] > min(means[:i]))
    assert fired == [i == first for i in range(4)]
    t0 = trigger.optimizer.param_groups[0]["t0"]
    everywhere = [None] * n
    dist.all_gather_object(everywhere, t0)
    assert everywhere == [-1.0] * n


def check_what_one_rank_is_refused_all_are():
    trigger = trigger_of(process_group=dist.group.WORLD)
    trigger.step(1.0)
    first = dist.get_rank() == 0
    with pytest.raises(ValueError, match="is nan"):
        trigger.step(math.nan if first else 1.0)
    with pytest.raises(TypeError if first else ValueError, match="expected a"):
        trigger.step("low" if first else 1.0)
    assert trigger.losses == [1.0]


def check_a_group_of_some_ranks():
    """Others neither wait nor decide."""
    some = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        trigger = trigger_of(process_group=some)
        assert trigger.step(float(dist.get_rank())) is False
        assert trigger.losses == [0.5]


def check_partial_losses():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    summand = torch.tensor(dist.get_rank() + 1.0)
    trigger = trigger_of()
    trigger.step(DTensor.from_local(summand, mesh, [Partial()]))
    n = dist.get_world_size()
    assert trigger.losses == [n * (n + 1) / 2]


def check_a_checkpointed_trigger_goes_on():
    trigger = trigger_of(1, process_group=dist.group.WORLD)
    for loss in (3.0, 2.0):
        trigger.step(loss + dist.get_rank())
    other = trigger_of(process_group=dist.group.WORLD)
    other.load_state_dict(trigger.state_dict())
    losses = [4.0 if dist.get_rank() == 0 else 3.5, 9.0]
    assert [other.step(loss) for loss in losses] == [trigger.step(loss) for loss in losses]
    assert other.state_dict() == trigger.state_dict()
    assert other.has_fired


def check_it_goes_on_from_a_file(folder):
    """With the optimizer, through torch's checkpoints: alike on all ranks, fired or not."""
    for n_checks in (2, 4):
        sides = []
        for _ in range(2):
            module = nn.Module()
            module.param = nn.Parameter(torch.ones(2))
            optimizer = ASGD(module.parameters(), lr=0.1)
            module.trigger = NonMonotonicTrigger(optimizer, 1, process_group=dist.group.WORLD)
            sides.append((module, optimizer))
        (one, optimizer), (other, loaded) = sides
        for module, own in sides:
            module.param.grad = torch.ones(2)
            own.step()
        for loss in (3.0, 2.0, 4.0, 1.0)[:n_checks]:
            one.trigger.step(loss + dist.get_rank())
        state = {
            "optimizer": get_optimizer_state_dict(one, optimizer),
            "trigger": one.trigger.state_dict(),
        }
        dcp.save(state, checkpoint_id=folder / str(n_checks))
        state = {
            "optimizer": get_optimizer_state_dict(other, loaded),
            "trigger": other.trigger.state_dict(),
        }
        dcp.load(state, checkpoint_id=folder / str(n_checks))
        set_optimizer_state_dict(other, loaded, state["optimizer"])
        other.trigger.load_state_dict(state["trigger"])
        assert other.trigger.state_dict() == one.trigger.state_dict()
        assert loaded.param_groups[0]["t0"] == optimizer.param_groups[0]["t0"]
        assert other.trigger.has_fired == (n_checks == 4)
        losses = [4.0 if dist.get_rank() == 0 else 3.5, 9.0]
        assert [other.trigger.step(x) for x in losses] == [one.trigger.step(x) for x in losses]
        t0s = [None] * dist.get_world_size()
        dist.all_gather_object(t0s, loaded.param_groups[0]["t0"])
        assert t0s == [0.0] * len(t0s)


@pytest.mark.heavy
def test_ranks_decide_once(tmp_path):
    on_ranks(
        3,
        tmp_path,
        check_the_mean_decides,
        check_what_one_rank_is_refused_all_are,
        check_a_group_of_some_ranks,
        check_partial_losses,
        check_a_checkpointed_trigger_goes_on,
        partial(check_it_goes_on_from_a_file, tmp_path / "files"),
    )
