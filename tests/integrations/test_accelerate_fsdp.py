"""accelerate's FSDP2 on two ranks of gloo, beside torch's ASGD in it: the same bits."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from integrations.recipes import loader, model, train
from ranks import on_ranks

from asgd_fast import ASGD
from asgd_fast.integrations.train_eval import TrainEvalASGD


class Run:
    """What accelerate prepares, of an accelerator of its own, so that this saves nothing else."""

    def __init__(self, kind, state_dict_type, **options):
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType

        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=state_dict_type)
        self.accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        for state in (PartialState, AcceleratorState):  # it has FSDP for accelerators alone
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        own = model()
        options = {"lr": 0.1, "lambd": 0.01, "weight_decay": 0.01, "t0": 3, **options}
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            own, kind(own.parameters(), **options), loader()
        )

    def train(self, epochs=1):
        for _ in range(epochs):
            train(self.model, self.optimizer, self.loader)

    def params(self):
        return [param.full_tensor().detach().clone() for param in self.model.parameters()]

    def averages(self):
        entries = self.optimizer.state_dict()["state"].values()
        return [entry["ax"].full_tensor().clone() for entry in entries]


def assert_bits(tensors, others):
    for tensor, other in zip(tensors, others, strict=True):
        assert torch.equal(tensor, other)


def as_one_of_several():
    """Tell accelerate what torchrun would."""
    rank, n = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}


torchs = partial(torch.optim.ASGD, foreach=False)


def check_steps_averages_and_checkpoints(folder):
    for state_dict_type in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        run, oracle = Run(ASGD, state_dict_type), Run(torchs, state_dict_type)
        for each in (run, oracle):
            each.train(2)
        iterates, averages = oracle.params(), oracle.averages()
        assert_bits(run.params(), iterates)
        assert_bits(run.averages(), averages)
        with run.optimizer.optimizer.averaged_parameters():
            assert_bits(run.params(), averages)
        assert_bits(run.params(), iterates)
        path = folder / state_dict_type
        run.accelerator.save_state(path)
        oracle.train()
        for kind in (ASGD, torchs):
            loaded = Run(kind, state_dict_type, lr=9.0)
            loaded.accelerator.load_state(path)
            loaded.train()
            assert_bits(loaded.params(), oracle.params())
            assert_bits(loaded.averages(), oracle.averages())


def check_modes(folder):
    """In eval mode the model has the averages, and nothing is saved."""
    run, oracle = (Run(kind, "SHARDED_STATE_DICT") for kind in (TrainEvalASGD, torchs))
    for each in (run, oracle):
        each.train(2)
    run.optimizer.eval()
    assert_bits(run.params(), oracle.averages())
    with pytest.raises(RuntimeError, match="call train"):
        run.accelerator.save_state(folder / "eval")
    run.optimizer.train()
    assert_bits(run.params(), oracle.params())
    run.accelerator.save_state(folder / "train")
    loaded = Run(TrainEvalASGD, "SHARDED_STATE_DICT", lr=9.0)
    loaded.accelerator.load_state(folder / "train")
    for each in (loaded, oracle):
        each.train()
    assert_bits(loaded.params(), oracle.params())
    assert_bits(loaded.averages(), oracle.averages())


@pytest.mark.heavy
def test_fully_sharded_by_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    on_ranks(
        *(2, tmp_path, as_one_of_several),
        partial(check_steps_averages_and_checkpoints, tmp_path),
        partial(check_modes, tmp_path),
    )
