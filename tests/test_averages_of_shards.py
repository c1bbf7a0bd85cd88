"""Averages of models whose params are sharded, on ranks of gloo: right, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from averaging import model_with_batch_norm
from ranks import (
    check_distributed_data_parallel,
    check_fully_shard,
    check_fully_sharded_data_parallel,
    check_what_forwards_leave_behind,
    on_ranks,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

from asgd_fast import ASGD


def check_batch_norm():
    """By the recipe of docs/distributed.md: of all data, of which each rank sees some."""

    def trained(wrap):
        model = model_with_batch_norm()
        wrapped = wrap(model)
        optimizer = ASGD(wrapped.parameters(), lr=0.1, lambd=0.0, t0=0)
        for k in range(5):
            torch.manual_seed(k)
            optimizer.zero_grad()
            wrapped(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
        return wrapped, optimizer

    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(9)
    batches = torch.randn(4 * n, 8, 3) + 1
    wanted, averaging = trained(lambda model: model)
    averaging.copy_averages_to(wanted)
    update_bn(batches, wanted)

    for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
        wrapped, optimizer = trained(wrap)
        own = getattr(wrapped, "module", wrapped)
        before = [buffer.clone() for buffer in own.buffers()]
        with optimizer.averaged_parameters(model=own, update_bn=batches[rank::n]):
            for buffer in own.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= n
            for name, buffer in wanted.named_buffers():
                if buffer.is_floating_point():
                    assert_close(own.get_buffer(name), buffer)
            with torch.no_grad():
                assert_close(own.eval()(batches[0]), wanted.eval()(batches[0]))
        for buffer, other in zip(own.buffers(), before, strict=True):
            assert torch.equal(buffer, other)


@pytest.mark.heavy
@pytest.mark.parametrize("n", [1, 2])
def test_averages_are_right_or_refused(n, tmp_path):
    on_ranks(
        n,
        tmp_path,
        check_distributed_data_parallel,
        check_fully_shard,
        check_what_forwards_leave_behind,
        check_fully_sharded_data_parallel,
        check_batch_norm,
    )
