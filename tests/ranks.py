"""The ranks of a process group of gloo, each in a process of its own, and what is tested there."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from averaging import InsideError, averages_of
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.testing import assert_close

from asgd_fast import ASGD

SECONDS = 150  # within which all ranks must have ended

# Imported once, by the process from which all ranks are forked: it takes longer than most tests.
PRELOADED = [
    "asgd_fast",
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
]


def on_ranks(n, folder, *functions):
    """Run functions on n ranks; what one of them raises is raised here."""
    deadline = time.monotonic() + SECONDS
    mp.set_forkserver_preload(PRELOADED)
    arguments = n, f"file://{folder / 'store'}", functions
    ranks = mp.start_processes(*(_rank, arguments), nprocs=n, join=False, start_method="forkserver")
    try:
        while not ranks.join(max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "the ranks do not end"
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()


def _rank(rank, n, store, functions):
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n, timeout=timeout)
    try:
        for function in functions:
            function()
    finally:
        dist.destroy_process_group()


class Trained:
    """A model whose averages have begun, with what it computes and what they compute."""

    def __init__(self, wrap=lambda model: model):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.x = torch.randn(8, 4)
        self.model = wrap(model)
        self.optimizer = ASGD(self.model.parameters(), lr=0.3, lambd=0.0, t0=0)
        self.train(6)

    def train(self, steps=1):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(self.x).square().mean().backward()
            self.optimizer.step()

    @torch.no_grad()
    def output(self):
        return self.model(self.x)

    def averaged_output(self):
        with self.optimizer.averaged_parameters():
            return self.output()


def check_distributed_data_parallel():
    """What is shipped has the names of the model inside."""
    plain, parallel = Trained(), Trained(nn.parallel.DistributedDataParallel)
    shipped = parallel.optimizer.averaged_state_dict(parallel.model)
    plain.model.load_state_dict(shipped)
    assert_close(plain.output(), parallel.averaged_output())


def check_fully_shard():
    """The averages inside, and the iterates afterwards, whatever the forwards before have kept."""
    for reshards in (True, False, None):

        def wrap(model, reshards=reshards):
            fully_shard(model[0], reshard_after_forward=reshards)
            return fully_shard(model, reshard_after_forward=reshards)

        plain, sharded = Trained(), Trained(wrap)
        iterate, average = plain.output(), plain.averaged_output()
        assert (iterate - average).abs().max() > 0.01
        assert_close(sharded.averaged_output(), average)  # after a backward, which reshards
        for _ in range(2):
            assert_close(sharded.output(), iterate)
            assert_close(sharded.averaged_output(), average)
        try:
            with sharded.optimizer.averaged_parameters():
                sharded.output()
                raise InsideError
        except InsideError:
            plain.train()
        sharded.train()
        assert_close(sharded.output(), plain.output())
        averages = averages_of(plain.optimizer, list(plain.model.parameters()))
        shipped = sharded.optimizer.averaged_state_dict(sharded.model)
        for name, ax in zip(plain.model.state_dict(), averages, strict=True):
            assert_close(shipped[name].full_tensor(), ax)
        average = plain.averaged_output()
        for _ in range(2):  # the second time its parameters are those that were gathered
            sharded.optimizer.copy_averages_to(sharded.model)
            assert_close(sharded.output(), average)


def leave_unfinished(model, x):
    """A forward that raises in the first layer, which has gathered its params."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, 1:])


def leave_pending(model, _x):
    """Gathers that were begun for a forward to come."""
    for module in (model, model[0], model[2]):
        module.unshard(async_op=True)


def leave_prefetched(model, x):
    """The gather of a layer that follows, which is left out."""
    with torch.no_grad():
        model[0](x)


def check_what_forwards_leave_behind():
    """Is read by no forward after the averages have come or gone."""

    def wrap(model):
        for module in (model[0], model[2], model):
            fully_shard(module, reshard_after_forward=False)
        model[0].set_modules_to_forward_prefetch([model[2]])
        return model

    for leave in (leave_unfinished, leave_pending, leave_prefetched):
        plain, sharded = Trained(), Trained(wrap)
        leave(sharded.model, sharded.x)
        assert_close(sharded.averaged_output(), plain.averaged_output())
        with sharded.optimizer.averaged_parameters():
            leave(sharded.model, sharded.x)
        for each in (plain, sharded):
            each.train()
        assert_close(sharded.output(), plain.output())
        leave(sharded.model, sharded.x)
        for each in (plain, sharded):
            each.optimizer.copy_averages_to(each.model)
        assert_close(sharded.output(), plain.output())


def check_fully_sharded_data_parallel():
    """Refused, with nothing changed; averages are in the gathered state, which may be loaded."""
    for use_orig_params in (True, False):

        def wrap(model, use_orig_params=use_orig_params):
            cpu = torch.device("cpu")
            return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=cpu)

        plain = Trained()
        with warnings.catch_warnings(action="ignore"):  # of torch, that there is no GPU
            sharded = Trained(wrap)
            optimizer, model = sharded.optimizer, sharded.model
            for ask in (
                lambda: optimizer.averaged_parameters().__enter__(),  # noqa: B023
                lambda: optimizer.averaged_state_dict(model),  # noqa: B023
                lambda: optimizer.copy_averages_to(model),  # noqa: B023
                lambda: optimizer.copy_averages_to(model.parameters()),  # noqa: B023
            ):
                with pytest.raises(RuntimeError, match="parts of a FullyShardedDataParallel"):
                    ask()
                assert_close(sharded.output(), plain.output())
            plain.train()
            sharded.train()
            assert_close(sharded.output(), plain.output())
            state = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
        averages = averages_of(plain.optimizer, list(plain.model.parameters()))
        if dist.get_rank() == 0:
            for name, ax in zip(plain.model.state_dict(), averages, strict=True):
                assert_close(state[name]["ax"], ax)
        with warnings.catch_warnings(action="ignore"):
            again = Trained(wrap)
            for each in (sharded, again):
                FullyShardedDataParallel.set_state_dict_type(
                    each.model, StateDictType.FULL_STATE_DICT
                )
            again.model.load_state_dict(model.state_dict())
            saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
            loaded = FullyShardedDataParallel.optim_state_dict_to_load(
                again.model, again.optimizer, saved
            )
            again.optimizer.load_state_dict(loaded)
            for each in (sharded, again):
                each.train(2)
            assert torch.equal(again.output(), sharded.output())
            states = [
                FullyShardedDataParallel.optim_state_dict(each.model, each.optimizer)["state"]
                for each in (sharded, again)
            ]
            for name, entry in states[0].items():
                assert torch.equal(states[1][name]["ax"], entry["ax"])
