"""Optimizers of which each rank steps other params, or other values of them, on ranks of gloo.

The oracle is torch's ASGD of all params in one process; of averages begun by hand, plain means.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from averaging import InsideError
from ranks import on_ranks
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.optim.swa_utils import update_bn

from asgd_fast import ASGD, NonMonotonicTrigger
from asgd_fast.integrations.train_eval import TrainEvalASGD

with warnings.catch_warnings(action="ignore"):  # of torch, that its torch.jit is deprecated
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

OPTIONS = {"lr": 0.1, "lambd": 0.01, "weight_decay": 0.1}
SHAPES = [(4, 3), (5,), (2, 2), (1,)]


class Run:
    """A model, an optimizer, and its iterates; gradients depend on the step and the param alone.

    With `rank` they depend on the rank, too.
    """

    def __init__(self, make, shapes=SHAPES, rank=0):
        torch.manual_seed(0)
        self.model = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.params = list(self.model)
        self.optimizer = make(self.params)
        self.rank = rank
        self.made = 0
        self.iterates = [[] for _ in shapes]

    def train(self, steps, *skipped):
        for _ in range(steps):
            torch.manual_seed(1000 * self.rank + self.made)
            for i, param in enumerate(self.params):
                grad = torch.randn(param.shape)
                param.grad = None if i in skipped else grad
            self.optimizer.step()
            self.made += 1
            for i, param in enumerate(self.params):
                if i not in skipped:
                    self.iterates[i].append(param.detach().clone())

    def values(self):
        return [param.detach().clone() for param in self.params]

    def averages(self):
        """In one process."""
        state = self.optimizer.state_dict()["state"]
        return [state[i]["ax"] for i in range(len(self.params))]

    def means(self, *firsts):
        """Of the iterates from their first ones on."""
        pairs = zip(self.iterates, firsts, strict=True)
        return [torch.stack(made[first:]).double().mean(0).float() for made, first in pairs]


def zero(kind=ASGD, **options):
    """Each rank steps some of the params."""
    return lambda params: ZeroRedundancyOptimizer(params, kind, **{**OPTIONS, **options})


def plain(kind=ASGD, **options):
    return lambda params: kind(params, **{**OPTIONS, **options})


def assert_bits(tensors, others):
    for tensor, other in zip(tensors, others, strict=True):
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other)


def everywhere(value):
    """What all ranks have; it must be the same."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(other == value for other in values)
    return value


def check_averages_on_all_ranks():
    for is_bucket in (False, True):
        run = Run(zero(t0=1, parameters_as_bucket_view=is_bucket))
        oracle = Run(plain(torch.optim.ASGD, foreach=False, t0=1))
        for each in (run, oracle):
            each.train(6)
        assert_bits(run.values(), oracle.values())
        optimizer = run.optimizer.optim
        with optimizer.averaged_parameters():
            assert_bits(run.values(), oracle.averages())
        assert_bits(run.values(), oracle.values())
        with pytest.raises(InsideError), optimizer.averaged_parameters():
            raise InsideError
        assert_bits(run.values(), oracle.values())
        shipped = optimizer.averaged_state_dict(run.model)
        assert_bits(shipped.values(), oracle.averages())
        for each in (run, oracle):
            each.train(2)
        assert_bits(run.values(), oracle.values())
        other = copy.deepcopy(run.model)
        for target in (other, list(other), run.params):
            with pytest.raises(RuntimeError, match=r"copy_averages_to: this rank of a ZeroRedun"):
                optimizer.copy_averages_to(target)
        assert_bits(list(other), oracle.values())
        loss = (run.params[0] ** 2).sum() + (run.params[1] ** 2).sum()
        optimizer.copy_averages_to(run.model)
        assert_bits(run.values(), oracle.averages())
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            loss.backward()


def check_modes_are_refused():
    """On the rank that asks, without waiting for others."""
    run = Run(zero(TrainEvalASGD, t0=1))
    run.train(6)
    before = run.values()
    if dist.get_rank() == 0:
        for call in (run.optimizer.optim.eval, run.optimizer.optim.train):
            with pytest.raises(RuntimeError, match=rf"^{call.__name__}: .*ZeroRedundancyOptimizer"):
                call()
    assert_bits(run.values(), before)
    with run.optimizer.optim.averaged_parameters():
        pass
    run.train(1)


def check_started_averages():
    """Of two params on three ranks, with other step counts, so that one rank knows of no step."""
    run = Run(zero(), SHAPES[:2])
    run.train(3)
    run.train(2, 1)
    trigger = NonMonotonicTrigger(run.optimizer, 0, process_group=dist.group.WORLD)
    assert [trigger.step(loss) for loss in (1.0, 2.0)] == [False, True]
    for _ in range(4):
        groups = run.optimizer.param_groups + run.optimizer.optim.param_groups
        assert everywhere([group["t0"] for group in groups]) == [4.0, 4.0]
        run.train(1)
    with run.optimizer.optim.averaged_parameters():
        torch.testing.assert_close(run.values(), run.means(5, 3), rtol=0, atol=1e-6)


def check_checkpoints():
    """From all ranks to one process and back, started averages of other step counts included."""
    for skipped in ((), (1, 3)):
        run, oracle = Run(zero()), Run(plain())
        for each in (run, oracle):
            each.train(2)
            each.train(2, *skipped)
            (each.optimizer if each is oracle else each.optimizer.optim).start_averaging()
            each.train(3)
        run.optimizer.consolidate_state_dict(0)
        saved = [run.optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(saved)
        alone, again = Run(plain(lr=9.0)), Run(zero(lr=9.0))
        for each in (alone, again):
            each.optimizer.load_state_dict(copy.deepcopy(saved[0]))
            each.model.load_state_dict(run.model.state_dict())
            each.made = run.made
            each.train(4, 0)
        oracle.train(4, 0)
        assert_bits(alone.values(), oracle.values())
        assert_bits(alone.averages(), oracle.averages())
        assert_bits(again.values(), oracle.values())
        with again.optimizer.optim.averaged_parameters():
            assert_bits(again.values(), oracle.averages())


def check_checkpoints_of_one_process():
    """On all ranks: averages started at other step counts, some of them 0, and those of torch."""
    always, later = ((1, 3), ()), ((), (1, 3))  # who has no gradient in two steps, and in two more
    for (first, second), kind in ((later, ASGD), (always, ASGD), (((), ()), torch.optim.ASGD)):
        is_ours = kind is ASGD
        wide = {"average_dtype": torch.float64} if is_ours else {}
        for after in (0, 3):
            oracle = Run(plain(kind, **(wide or {"t0": 2})))
            oracle.train(2, *first)
            oracle.train(2, *first, *second)
            if is_ours:
                oracle.optimizer.start_averaging()
            oracle.train(after, *first)
            saved = copy.deepcopy(oracle.optimizer.state_dict())
            run = Run(zero(partial(ASGD, **wide), lr=9.0))
            run.optimizer.load_state_dict(copy.copy(saved) | {"state": dict(saved["state"])})
            run.model.load_state_dict(oracle.model.state_dict())
            run.made = oracle.made
            loaded = copy.deepcopy(saved)
            for each in (run, oracle):
                each.train(2, 0)
                each.train(2)
            assert everywhere(run.optimizer.param_groups[0]["t0"]) == (3 if is_ours else 2)
            assert_bits(run.values(), oracle.values())
            with run.optimizer.optim.averaged_parameters():
                assert_bits(run.values(), [ax.float() for ax in oracle.averages()])
            for i, entry in loaded["state"].items():
                assert_bits([saved["state"][i]["ax"]], [entry["ax"]])


def check_what_cannot_be_loaded():
    """Is refused by name in the next step; on all ranks here, so that none waits."""
    oracle = Run(plain(t0=1))
    oracle.train(4)
    saved = oracle.optimizer.state_dict()
    for entry in saved["state"].values():
        del entry["eta"]
    run = Run(zero(t0=1))
    run.optimizer.load_state_dict(saved)
    before = run.values()
    with pytest.raises(KeyError, match=r"state\[\d\]: missing \['eta'\]"):
        run.train(1)
    assert_bits(run.values(), before)


def check_keywords_of_the_whole():
    """Are refused, as the wrapper puts them into groups, with what to write instead."""
    for keywords in ({"average_dtype": torch.float64}, {"lazy_average": False}):
        (name,) = keywords
        with pytest.raises(TypeError, match=rf"^{name}: .*partial\(ASGD, {name}=\.\.\.\)"):
            Run(zero(**keywords))
        run, oracle = Run(zero(partial(ASGD, **keywords), t0=1)), Run(plain(t0=1, **keywords))
        for each in (run, oracle):
            each.train(6)
        run.optimizer.consolidate_state_dict(0)
        if dist.get_rank() == 0:
            state = run.optimizer.state_dict()["state"]
            assert_bits([state[i]["ax"] for i in range(len(SHAPES))], oracle.averages())


def check_batch_norm():
    """Of a model of one param, which one rank steps: all make the forwards, which communicate."""
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False))
    model = nn.parallel.DistributedDataParallel(inside)
    optimizer = zero(t0=0)(list(model.parameters()))
    batches = torch.randn(4, 8, 3) + 1
    for batch in batches:
        optimizer.zero_grad()
        model(batch).pow(3).mean().backward()
        optimizer.step()
    shipped = copy.deepcopy(inside)
    shipped.load_state_dict(optimizer.optim.averaged_state_dict(model))
    update_bn(batches, shipped)
    with optimizer.optim.averaged_parameters(model=model, update_bn=batches):
        assert_bits(list(inside.buffers()), list(shipped.buffers()))


def check_post_local_sgd():
    """Ranks whose params are averaged in each second step; and so may their averages be."""
    rank, n = dist.get_rank(), dist.get_world_size()

    def local(make):
        averager = PeriodicModelAverager(period=2, warmup_steps=1)
        return lambda params: PostLocalSGDOptimizer(make(params), averager)

    run = Run(local(plain(t0=2)), rank=rank)
    oracle = Run(local(plain(torch.optim.ASGD, foreach=False, t0=2)), rank=rank)
    for each in (run, oracle):
        each.train(7)
        each.optimizer.optim.state_dict()
    assert_bits(run.values(), oracle.values())
    assert_bits(run.averages(), oracle.averages())
    trigger = NonMonotonicTrigger(run.optimizer, 0, process_group=dist.group.WORLD)
    assert [trigger.step(loss) for loss in (1.0, 2.0)] == [False, True]
    assert everywhere(run.optimizer.param_groups[0]["t0"]) == 6.0
    means = [torch.zeros_like(param) for param in run.params]
    run.train(3)
    run.optimizer.optim.copy_averages_to(means)
    for mean in means:
        dist.all_reduce(mean)
        mean /= n
    own = run.means(7, 7, 7, 7)
    for mean, wanted in zip(means, own, strict=True):
        dist.all_reduce(wanted)
        torch.testing.assert_close(mean, wanted / n, rtol=0, atol=1e-6)


def test_copies_in_the_place_of_params_are_refused():
    """As DeepSpeed's ZeRO has them: the model would be evaluated as it is."""
    run = Run(plain(t0=1))
    run.train(6)
    before = run.values()
    flat = torch.cat([param.detach().flatten() for param in run.params]).requires_grad_()
    for copies in ([flat], []):  # those of stage 3 are in the groups within a step alone
        run.optimizer.param_groups[0]["params"] = copies
        with pytest.raises(RuntimeError, match="averaged_parameters: the groups no longer have"):
            run.optimizer.averaged_parameters().__enter__()
        assert_bits(run.values(), before)
    with pytest.raises(RuntimeError, match="start_averaging: the groups no longer have"):
        run.optimizer.start_averaging()
    assert run.optimizer.param_groups[0]["t0"] == 1


def test_copies_may_be_averaged_from_any_step_on():
    run = Run(plain())
    run.train(2)
    flat = torch.ones(5, requires_grad=True)
    run.optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(5)
    run.optimizer.step()
    run.optimizer.start_averaging()
    assert run.optimizer.param_groups[0]["t0"] == 0


@pytest.mark.heavy
def test_each_rank_steps_some_of_the_params(tmp_path):
    on_ranks(
        3,
        tmp_path,
        check_averages_on_all_ranks,
        check_modes_are_refused,
        check_started_averages,
        check_checkpoints,
        check_checkpoints_of_one_process,
        check_what_cannot_be_loaded,
        check_keywords_of_the_whole,
        check_batch_norm,
        check_post_local_sgd,
    )
