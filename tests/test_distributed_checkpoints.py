"""Checkpoints of ASGD through torch's tools: each way there is, from and to torch's own class.

torch's class on both sides, through the same tool, is the oracle; of started averages, plain means.
"""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracle import weights_of
from runs import OPTIONS
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from twins import NAMES, same

from asgd_fast import ASGD

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

T0 = 4


class Side:
    """A model with its optimizer, and every iterate that it made."""

    def __init__(self, make, *shapes, dtype=torch.float64, **options):
        self.params = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
        self.model = nn.Module()
        for i, p in enumerate(self.params):
            self.model.register_parameter(f"p{i}", p)
        self.optimizer = make(self.model.parameters(), **{**OPTIONS, **options})
        self.iterates = [[] for _ in self.params]

    def run(self, steps, *skipped, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            for i, p in enumerate(self.params):
                grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                p.grad = None if i in skipped else grad
            self.optimizer.step()
            for i, (p, made) in enumerate(zip(self.params, self.iterates, strict=True)):
                if i not in skipped:
                    made.append(p.detach().double().numpy().copy())

    def entries(self):
        state = self.optimizer.state_dict()["state"]
        return [state[i] for i in range(len(self.params))]

    def follow(self, source):
        """Begin where another has come to, but for the optimizer's state."""
        self.model.load_state_dict(source.model.state_dict())
        self.iterates = copy.deepcopy(source.iterates)

    def check(self, *firsts, every=1, averaging="mean"):
        """Assert that averages are the means of the iterates from their first ones on."""
        for entry, made, first in zip(self.entries(), self.iterates, firsts, strict=True):
            averaged = made[first::every]
            weights = [float(weight) for weight in weights_of(averaging, len(averaged))]
            mean = np.average(averaged, axis=0, weights=weights)
            np.testing.assert_allclose(entry["ax"].numpy(), mean, rtol=0, atol=1e-12)


def by_state_dict(source, target, _path):
    target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))


def by_file(source, target, _path):
    file = io.BytesIO()
    torch.save(source.optimizer.state_dict(), file)
    file.seek(0)
    target.optimizer.load_state_dict(torch.load(file, weights_only=True))


def by_tool(**options):
    def way(source, target, _path):
        own = StateDictOptions(strict=False, **options)
        saved = get_optimizer_state_dict(source.model, source.optimizer, options=own)
        set_optimizer_state_dict(target.model, target.optimizer, copy.deepcopy(saved), options=own)

    return way


def by_distributed_file(**options):
    def way(source, target, path):
        own = StateDictOptions(strict=False, **options)
        saved = get_optimizer_state_dict(source.model, source.optimizer, options=own)
        dcp.save({"optimizer": saved}, checkpoint_id=path)
        into = {"optimizer": get_optimizer_state_dict(target.model, target.optimizer, options=own)}
        dcp.load(into, checkpoint_id=path)
        set_optimizer_state_dict(target.model, target.optimizer, into["optimizer"], options=own)

    return way


class Whole:
    """A model and its optimizer as torch's tutorial saves them."""

    def __init__(self, side):
        self.side = side

    def state_dict(self):
        return {"optimizer": get_optimizer_state_dict(self.side.model, self.side.optimizer)}

    def load_state_dict(self, state_dict):
        own = StateDictOptions(strict=False)  # params may have no state yet
        set_optimizer_state_dict(
            self.side.model, self.side.optimizer, state_dict["optimizer"], options=own
        )


def by_stateful(source, target, path):
    dcp.save({"app": Whole(source)}, checkpoint_id=path)
    dcp.load({"app": Whole(target)}, checkpoint_id=path)


def by_optimizer(source, target, path):
    """Which loads what the target's state has already."""
    dcp.save({"optimizer": source.optimizer}, checkpoint_id=path)
    if not target.optimizer.state:
        target.run(1)
        target.follow(source)
    dcp.load({"optimizer": target.optimizer}, checkpoint_id=path)


FILES = {
    "nested file": by_distributed_file(),
    "flattened file": by_distributed_file(flatten_optimizer_state_dict=True),
    "full file": by_distributed_file(full_state_dict=True),
    "Stateful": by_stateful,
    "the optimizer": by_optimizer,
}
WAYS = {
    "state_dict": by_state_dict,
    "torch.save": by_file,
    "nested": by_tool(),
    "flattened": by_tool(flatten_optimizer_state_dict=True),
    "full": by_tool(full_state_dict=True),
    "full on the CPU": by_tool(full_state_dict=True, cpu_offload=True),
    **FILES,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def carried(way, path, source_type, target_type, steps):
    """The target that has gone on from a source, by one way."""
    torch.manual_seed(0)
    options = {"t0": T0, "weight_decay": 0.1, "dtype": torch.float32}
    source = Side(source_type, (3,), (4, 5), **options)
    source.run(steps)
    target = Side(target_type, (3,), (4, 5), lr=9.0, dtype=torch.float32)
    target.follow(source)
    way(source, target, path)
    target.run(T0 + 3, seed=1)
    return target


@ways
@pytest.mark.parametrize("steps", [1, T0, T0 + 1, T0 + 2, T0 + 5])
@pytest.mark.parametrize(
    "types",
    [(ASGD, torch.optim.ASGD), (torch.optim.ASGD, ASGD), (ASGD, ASGD)],
    ids=["ours to torch", "torch to ours", "ours to ours"],
)
def test_checkpoints_go_both_ways_through_every_tool(types, steps, way, tmp_path):
    ours = carried(way, tmp_path / "ours", *types, steps)
    theirs = carried(way, tmp_path / "theirs", torch.optim.ASGD, torch.optim.ASGD, steps)
    for p, q in zip(ours.params, theirs.params, strict=True):
        same(p, q)
    for entry, wanted in zip(ours.entries(), theirs.entries(), strict=True):
        for name in NAMES:
            same(entry[name], wanted[name])
    groups = [side.optimizer.state_dict()["param_groups"] for side in (ours, theirs)]
    assert groups[0] == groups[1]


@ways
@pytest.mark.parametrize("before", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize("target_type", [ASGD, torch.optim.ASGD], ids=["ours", "torch"])
def test_started_averages_go_on(double_scalars, target_type, after, before, way, tmp_path):
    source = Side(ASGD, (3,), (4, 5))
    source.run(before)
    source.optimizer.start_averaging()
    source.run(after, seed=1)
    target = Side(target_type, (3,), (4, 5))
    target.follow(source)
    way(source, target, tmp_path / "file")
    target.run(4, seed=2)
    target.check(before, before)


@ways
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr_schedule": "current"},
        {"average_every": 3},
        {"averaging": ("ema", 0.5)},
        {"averaging": ("polynomial", 2), "average_every": 2},
    ],
    ids=["default", "current", "every", "ema", "polynomial"],
)
@pytest.mark.parametrize("after", range(6))
def test_averages_started_at_different_steps_go_on(double_scalars, after, options, way, tmp_path):
    """Of params that had other numbers of steps, one of them none."""
    source = Side(ASGD, (3,), (4, 5), (2,), **options)
    source.run(2, 2)
    source.run(3, 1, 2)
    source.optimizer.start_averaging()
    source.run(after, 2, seed=1)
    firsts = [5, 2, 0]
    target = Side(ASGD, (3,), (4, 5), (2,), lr=9.0, **options)
    if way in (WAYS["full"], WAYS["full on the CPU"], *FILES.values()):
        # These load into what the target has, so it may have no state where the source has none.
        target.run(1, 2)
    target.follow(source)
    way(source, target, tmp_path / "file")
    target.run(4, 0, seed=2)
    target.run(4, seed=3)
    own = {"averaging": options.get("averaging", "mean")}
    target.check(*firsts, every=options.get("average_every", 1), **own)
    for key in ("t0", "lr"):
        groups = [side.optimizer.param_groups[0] for side in (source, target)]
        assert groups[0][key] == groups[1][key]


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, T0 + 2, T0 + 6])
@ways
def test_the_bits_of_wide_averages_come_back(way, steps, wide, tmp_path):
    options = {"average_dtype": wide, "dtype": torch.bfloat16, "t0": T0}
    source = Side(ASGD, (3,), (4, 5), **options)
    source.run(steps)
    target = Side(ASGD, (3,), (4, 5), lr=9.0, **options)
    target.follow(source)
    way(source, target, tmp_path / "file")
    for entry, wanted in zip(target.entries(), source.entries(), strict=True):
        assert entry["ax"].dtype == wide
        for name in NAMES:
            same(entry[name], wanted[name])
    for side in (source, target):
        side.run(T0 + 3, seed=1)
    for entry, wanted in zip(target.entries(), source.entries(), strict=True):
        same(entry["ax"], wanted["ax"])


@pytest.mark.parametrize("options", [{}, {"lr_schedule": "torch", "average_every": 1}], ids=str)
def test_a_checkpoint_has_torchs_keys_at_any_moment(options):
    source = Side(ASGD, (3,), (4, 5), (2,), **options)
    theirs = Side(torch.optim.ASGD, (3,), (4, 5), (2,))
    for side in (source, theirs):
        side.run(2, 2)
        side.run(1, 1, 2)
    wanted = theirs.optimizer.state_dict()
    for _ in range(3):
        saved = source.optimizer.state_dict()
        assert saved["state"].keys() == wanted["state"].keys()
        for entry, other in zip(saved["state"].values(), wanted["state"].values(), strict=True):
            assert type(entry) is dict
            assert list(entry) == list(other)
        assert [g.keys() for g in saved["param_groups"]] == [
            g.keys() for g in wanted["param_groups"]
        ]
        source.optimizer.start_averaging()
        source.run(1, 2, seed=2)


@pytest.mark.parametrize(
    "own",
    [{"lr_schedule": "current"}, {"average_every": 3}, {"averaging": ("ema", 0.5)}],
    ids=str,
)
@ways
def test_hyperparameters_that_torch_does_not_have_come_back(way, own, tmp_path):
    source, target = Side(ASGD, (3,), **own), Side(ASGD, (3,), lr=9.0, **own)
    source.run(2)
    way(source, target, tmp_path / "file")
    group = target.optimizer.param_groups[0]
    for name, value in own.items():
        found = group[name]
        assert (tuple(found) if type(found) is list else found) == value  # what torch makes of it
    assert target.optimizer.param_groups[0]["lr"] == OPTIONS["lr"]


OWN = {
    "every": {"average_every": 3},
    "ema": {"averaging": ("ema", 0.5)},
    "polynomial": {"averaging": ("polynomial", 2)},
}
own_settings = pytest.mark.parametrize("own", OWN.values(), ids=OWN)
through_files = pytest.mark.parametrize("way", FILES.values(), ids=FILES)


@own_settings
@through_files
@pytest.mark.parametrize("steps", [T0 + 3, T0 + 4, T0 + 9])
def test_who_loses_settings_in_a_file_of_shards_is_told(way, own, steps, tmp_path):
    """torch loads from there what the target has."""
    source, target = Side(ASGD, (3,), t0=T0, **own), Side(ASGD, (3,), t0=T0)
    source.run(steps)
    target.follow(source)
    with pytest.warns(UserWarning, match=f"load_state_dict: mu is [0-9.]+ after step {steps}, "):
        way(source, target, tmp_path / "file")


@own_settings
@through_files
def test_a_file_of_shards_without_settings_loads_before_they_are_set(way, own, tmp_path):
    """Into an optimizer at the defaults, which then goes on as after load_state_dict."""
    source = Side(torch.optim.ASGD, (3,), t0=T0)
    source.run(T0 + 3)
    asked, target = Side(ASGD, (3,), **own), Side(ASGD, (3,), lr=9.0)
    if way is not WAYS["the optimizer"]:
        with pytest.raises(CheckpointException, match=f"Missing key .*{next(iter(own))}"):
            way(source, asked, tmp_path / "missing")
    for side in (asked, target):
        side.follow(source)
    asked.optimizer.load_state_dict(source.optimizer.state_dict())
    way(source, target, tmp_path / "file")
    target.optimizer.param_groups[0].update(own)
    for side in (asked, target):
        side.run(5, seed=1)
    same(asked.params[0], target.params[0])
    for name in NAMES:
        same(asked.entries()[0][name], target.entries()[0][name])


def asked_of_copy(side):
    get_optimizer_state_dict(side.model, side.optimizer)
    side.model, side.optimizer = copy.deepcopy((side.model, side.optimizer))
    side.params = list(side.model.parameters())


ASKED = {
    "nested": lambda side: get_optimizer_state_dict(side.model, side.optimizer),
    "flattened": lambda side: get_optimizer_state_dict(
        *(side.model, side.optimizer), options=StateDictOptions(flatten_optimizer_state_dict=True)
    ),
    "copied": asked_of_copy,
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": torch.tensor(0.3)}, {"lazy_average": False}, {"average_dtype": torch.float64}],
    ids=["default", "tensor lr", "eager", "wide"],
)
def test_asking_for_state_before_training_makes_no_step(options, ask):
    """In torch's class the first step of the training has no effect."""
    sides = []
    for asks in (True, False):
        torch.manual_seed(0)
        side = Side(ASGD, (3,), (4, 5), dtype=torch.float32, t0=1, **copy.deepcopy(options))
        before = [p.detach().clone() for p in side.params]
        if asks:
            ask(side)
            for p, q in zip(side.params, before, strict=True):
                same(p.detach(), q)
            side.optimizer.param_groups[0]["lr"] *= 2
            entries = [] if ask is asked_of_copy else side.entries()
            for entry, p in zip(entries, side.params, strict=bool(entries)):
                assert [float(entry[name]) for name in ("step", "mu")] == [0, 1]
                assert entry["eta"] == torch.tensor(0.6)
                same(entry["ax"], p.detach().to(entry["ax"].dtype))
        else:
            side.optimizer.param_groups[0]["lr"] *= 2
        side.run(4)
        sides.append(side)
    one, other = sides
    for p, q in zip(one.params, other.params, strict=True):
        same(p, q)
    for entry, wanted in zip(one.entries(), other.entries(), strict=True):
        for name in NAMES:
            same(entry[name], wanted[name])


@ways
def test_a_checkpoint_from_before_training_begins_it(way, tmp_path):
    """Whatever lr the target was made with, as after a step."""
    source = Side(ASGD, (3,), (4, 5), t0=1)
    get_optimizer_state_dict(source.model, source.optimizer)
    target = Side(ASGD, (3,), (4, 5), lr=9.0)
    target.follow(source)
    way(source, target, tmp_path / "file")
    if way is WAYS["the optimizer"]:
        target.follow(source)
    for side in (source, target):
        side.run(4)
    for p, q in zip(source.params, target.params, strict=True):
        same(p, q)
    for entry, wanted in zip(target.entries(), source.entries(), strict=True):
        for name in NAMES:
            same(entry[name], wanted[name])
