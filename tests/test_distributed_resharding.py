"""Checkpoints between ranks of other numbers and models of other wrappers: the same bits go on.

The oracle is a run in one process that nobody interrupts: torch's ASGD, and our own where torch's
does not have the settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from twins import NAMES

from asgd_fast import ASGD

T0 = 3
STEPS = 4  # after loading
KINDS = {"ours": ASGD, "torch": partial(torch.optim.ASGD, foreach=False)}
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


@dataclass
class Case:
    """What is saved: by which class, and where its averages stand."""

    source: str
    target: str
    steps: int
    dtype: torch.dtype = torch.float32
    keywords: dict = field(default_factory=dict)
    starts: bool = False  # whether averages are started by hand
    skips: bool = False  # whether params have other numbers of steps


CASES = [
    *(
        Case(source, target, steps)
        for (source, target), steps in product(
            [("ours", "ours"), ("ours", "torch"), ("torch", "ours")],
            [1, T0 + 4],  # before the averages begin, and after
        )
    ),
    *(
        Case("ours", "ours", steps, torch.bfloat16, {"average_dtype": torch.float32})
        for steps in (1, T0 + 4)
    ),
    Case("ours", "ours", 2, starts=True),
    Case("ours", "torch", 2, starts=True),
    Case("ours", "ours", 2, starts=True, skips=True),
    Case("ours", "ours", T0 + 4, keywords={"averaging": ("ema", 0.5)}),
    Case("ours", "ours", 2, keywords={"averaging": ("polynomial", 2)}, starts=True, skips=True),
]


FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)

# How each of them is saved, and how loaded.
WAYS = {
    "Stateful": ("save_stateful", "load_stateful"),
    "meanwhile": ("save_meanwhile", "load_stateful"),
    "full": ("save_full", "load_full"),
    "flattened": ("save_flattened", "load_flattened"),
}


class Run:
    """A model and its optimizer, with gradients that depend on the step alone.

    Parameters
    ----------
    wrapper : {"plain", "DDP", "FSDP2"}
    kind : {"ours", "torch"}
    case : Case
    """

    def __init__(self, wrapper, kind, case):
        torch.manual_seed(0)
        # 7 rows on 2 or 3 ranks are unequal parts, and 1 row leaves some without any.
        model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 1)).to(case.dtype)
        if wrapper == "DDP":
            model = nn.parallel.DistributedDataParallel(model)
        elif wrapper == "FSDP2":
            fully_shard(model)
        self.model, self.case = model, case
        options = {"lr": 0.1, "lambd": 0.01, "weight_decay": 0.1, "t0": T0, **case.keywords}
        self.optimizer = KINDS[kind](model.parameters(), **options)

    def train(self, first, steps, *skipped):
        for step in range(first, first + steps):
            torch.manual_seed(step)
            for i, param in enumerate(self.model.parameters()):
                grad = torch.randn(param.shape).to(param.dtype)
                if isinstance(param, DTensor):
                    grad = distribute_tensor(grad, param.device_mesh, param.placements)
                param.grad = None if i in skipped else grad
            self.optimizer.step()

    def begin(self):
        """Train up to where the checkpoint is made."""
        case = self.case
        if case.skips:
            self.train(100, 2, 0)
        self.train(0, case.steps)
        if case.starts:
            self.optimizer.start_averaging()
            self.train(case.steps, 3)

    def go_on(self):
        self.train(50, STEPS)

    def check(self, expected, what):
        """Go on to the bits that are expected."""
        self.go_on()
        for got, want in zip(self.tensors(), expected, strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want), (what, self.case)

    def save(self, path):
        state = {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }
        dcp.save(state, checkpoint_id=path)

    def load(self, path):
        model = get_model_state_dict(self.model)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(
            *(self.model, self.optimizer, state["optimizer"]),
            options=StateDictOptions(strict=False),
        )

    def save_stateful(self, path):
        dcp.save({"app": self}, checkpoint_id=path)

    def load_stateful(self, path):
        dcp.load({"app": self}, checkpoint_id=path)

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state):
        set_state_dict(
            *(self.model, self.optimizer),
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def save_meanwhile(self, path):
        """Train while it is written, by a group of its own: both communicate."""
        writing = dcp.async_save({"app": self}, checkpoint_id=path, process_group=group_for_files())
        self.train(200, 3)
        writing.result()

    def save_full(self, path):
        """In one file, by one rank."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model = get_model_state_dict(self.model, options=options)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if dist.get_rank() == 0:
            torch.save({"model": model, "optimizer": optimizer}, path)

    def load_full(self, path):
        """From one rank, which sends it to the others."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state = {"model": {}, "optimizer": {}}
        if dist.get_rank() == 0:
            state = torch.load(path, weights_only=True)
        set_model_state_dict(self.model, state["model"], options=options)
        set_optimizer_state_dict(*(self.model, self.optimizer, state["optimizer"]), options=options)

    def save_flattened(self, path):
        """Without nested dicts and lists, as stages of a pipeline save theirs."""
        dcp.save(self.flattened(), checkpoint_id=path)

    def load_flattened(self, path):
        state = self.flattened()
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=FLATTENED)

    def flattened(self):
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=FLATTENED),
        }

    def tensors(self):
        """All params, averages and scalars in full."""
        tensors = [param.detach() for param in self.model.parameters()]
        for _, entry in sorted(self.optimizer.state_dict()["state"].items()):
            tensors += [entry[name] for name in NAMES]
        return [x.full_tensor() if isinstance(x, DTensor) else x.clone() for x in tensors]


@cache
def group_for_files():
    return dist.new_group(backend="gloo")


def wanted(case):
    """The tensors of a run that nobody interrupts."""
    kind = "ours" if case.starts or case.keywords else "torch"
    run = Run("plain", kind, case)
    run.begin()
    run.go_on()
    return run.tensors()


def save_all(folder, *wrappers):
    for wrapper in wrappers:
        for i, case in enumerate(CASES):
            run = Run(wrapper, case.source, case)
            run.begin()
            run.save(folder / f"{wrapper}-{i}")


def begun_cases():
    """Those that save averages that have begun, with their numbers."""
    return [(i, case) for i, case in enumerate(CASES) if case.steps > T0 or case.skips]


def save_in_all_ways(folder):
    for i, case in begun_cases():
        for name, (save, _) in WAYS.items():
            run = Run("FSDP2", case.source, case)
            run.begin()
            getattr(run, save)(folder / f"{name}-{i}")


def load_all(folder, *ways):
    for i, case in enumerate(CASES):
        expected = wanted(case)
        for source, wrapper in ways:
            run = Run(wrapper, case.target, case)
            run.load(folder / f"{source}-{i}")
            run.check(expected, (source, wrapper))


def load_in_all_ways(folder):
    for i, case in begun_cases():
        expected = wanted(case)
        for name, wrapper in (*((name, "FSDP2") for name in WAYS), ("full", "DDP")):
            run = Run(wrapper, case.target, case)
            getattr(run, WAYS[name][1])(folder / f"{name}-{i}")
            run.check(expected, (name, wrapper))


def test_checkpoints_go_on_where_other_ranks_stood(tmp_path):
    saved, one, three, four = (tmp_path / name for name in ("saved", "one", "three", "four"))
    for folder in (saved, one, three, four):
        folder.mkdir()
    save_all(saved, "plain")
    on_ranks(
        *(2, tmp_path),
        partial(save_all, saved, "DDP", "FSDP2"),
        partial(save_in_all_ways, saved),
    )
    load_all(saved, ("DDP", "plain"), ("FSDP2", "plain"))
    on_ranks(1, one, partial(load_all, saved, ("FSDP2", "FSDP2")))
    ways = [("FSDP2", "FSDP2"), ("DDP", "FSDP2"), ("plain", "FSDP2"), ("FSDP2", "DDP")]
    on_ranks(3, three, partial(load_all, saved, *ways))
    on_ranks(4, four, partial(load_in_all_ways, saved))
