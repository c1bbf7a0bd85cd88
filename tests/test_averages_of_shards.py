"""Averages of models whose params are sharded, on ranks of gloo: right, or refused."""

from __future__ import annotations

import pytest
from ranks import (
    check_distributed_data_parallel,
    check_fully_shard,
    check_fully_sharded_data_parallel,
    on_ranks,
)


@pytest.mark.heavy
@pytest.mark.parametrize("n", [1, 2])
def test_averages_are_right_or_refused(n, tmp_path):
    on_ranks(
        n,
        tmp_path,
        check_distributed_data_parallel,
        check_fully_shard,
        check_fully_sharded_data_parallel,
    )
