"""Steps of DTensors and sharded models, beside torch's ASGD on ranks of gloo: the same bits."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from asgd_fast import ASGD

# Of params whose shards are equal, unequal, and empty on some ranks.
SHAPES = [(8, 4), (7, 3), (1, 5), (12,)]
EQUAL_SHAPES = [(6, 4), (12,)]


def placed(mesh, placements, dtype=torch.float32, shapes=SHAPES):
    """Params that are the same in each call."""
    torch.manual_seed(0)
    return [
        nn.Parameter(distribute_tensor(torch.randn(shape, dtype=dtype), mesh, placements))
        for shape in shapes
    ]


def give_grads(params, step, placements=None):
    """Gradients that are the same in each call with the same step."""
    torch.manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, dtype=param.dtype)
        if placements == [Partial()]:  # of which each rank has a summand of its own
            summand = grad * (dist.get_rank() + 0.1)
            grad = DTensor.from_local(summand, param.device_mesh, placements)
        elif isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, placements or param.placements)
        param.grad = grad


def parts_of(tensors):
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


@torch.no_grad()
def assert_same(ours, theirs, params, others, what):
    """Params, averages and scalars have the same bits on this rank."""
    assert_bits(params, others, what)
    one, two = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].keys() == two[key].keys()
        assert_bits(one[key].values(), two[key].values(), f"{what}, state {key}")


def assert_bits(tensors, others, what):
    for tensor, other in zip(parts_of(tensors), parts_of(others), strict=True):
        assert tensor.dtype == other.dtype, what
        assert torch.equal(tensor, other), what


def beside_torch(mesh, placements, *, grads=None, steps=5, extra=0, shapes=SHAPES, **keywords):
    """Step the same params with ours and torch's, from before averaging begins to after."""
    params, others = (placed(mesh, placements, shapes=shapes) for _ in range(2))
    for each in (params, others):
        each += [nn.Parameter(torch.full((3,), 0.5)) for _ in range(extra)]
    ours = ASGD(params, lr=0.1, t0=1, **keywords)
    theirs = torch.optim.ASGD(others, lr=0.1, t0=1, foreach=False, **keywords)
    for step in range(steps):
        for each, optimizer in ((params, ours), (others, theirs)):
            give_grads(each, step, grads)
            optimizer.step()
        what = f"{placements}, grads {grads}, {keywords}, step {step}"
        assert_same(ours, theirs, params, others, what)
    return ours, params


def check_placements():
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    for placements in ([Shard(0)], [Replicate()]):
        for keywords in ({}, {"weight_decay": 0.1, "maximize": True}, {"lambd": 0.01}):
            beside_torch(mesh, placements, **keywords)
        beside_torch(mesh, placements, extra=2)  # plain params in the same group


def check_gradients_placed_otherwise():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for weight_decay in (0, 0.1):
        for placements, grads in (
            ([Shard(0)], [Replicate()]),
            ([Replicate()], [Shard(0)]),
            ([Replicate()], [Partial()]),
            ([Shard(0)], [Partial()]),
        ):
            beside_torch(
                # torch refuses in-place operations of unequal shards and whole tensors.
                *(mesh, placements),
                grads=grads,
                weight_decay=weight_decay,
                shapes=EQUAL_SHAPES,
            )


def check_gradients_whose_parts_have_other_strides():
    """On some ranks only, and beside parts without elements: the bits of torch's with all of each.

    Torch itself does not take all of these DTensors.
    """
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    shapes = [(4, 4), (5, 3), (1, 2), (3, 7)]
    for placements in ([Shard(0)], [Shard(1)], [Replicate()]):
        for grads in ([Partial()], [Shard(0)], [Shard(1)], [Replicate()]):
            params = placed(mesh, placements, shapes=2 * shapes)
            others = [nn.Parameter(param.full_tensor().detach().clone()) for param in params]
            ours = ASGD(params, lr=0.1, t0=1)
            theirs = torch.optim.ASGD(others, lr=0.1, t0=1, foreach=False)
            for step in range(4):
                give_grads(others, step)
                for param, other in zip(params, others, strict=True):
                    if grads == [Partial()]:  # whose sum is exact
                        summand = other.grad * (2.0, -1.0, 0.0)[dist.get_rank()]
                        param.grad = DTensor.from_local(summand, mesh, grads)
                    else:
                        param.grad = distribute_tensor(other.grad, mesh, grads)
                ours.step()
                theirs.step()
            what = f"{placements}, grads {grads}"
            assert_bits([param.full_tensor() for param in params], others, what)
            averages = [ax.full_tensor() for ax in ours.averages]
            assert_bits(averages, [theirs.state[other]["ax"] for other in others], what)


def check_params_that_only_some_ranks_leave_to_torch():
    """For their parts have gaps there: all ranks send each other the gradients none the less."""
    n, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (n,))
    torch.manual_seed(rank)
    parts = [torch.randn(3, 8)[:, ::2] if rank == 0 else torch.randn(3, 4) for _ in range(3)]
    params = [nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)])) for part in parts]
    plain = [nn.Parameter(part.clone()) for part in parts]
    ours = ASGD(params, lr=0.1, t0=1)
    theirs = torch.optim.ASGD(plain, lr=0.1, t0=1, foreach=False)
    for step in range(4):
        give_grads(params, step, [Replicate()])
        for param, part in zip(params, plain, strict=True):
            whole = param.grad.to_local()
            part.grad = whole[3 * rank : 3 * rank + 3].clone()
        ours.step()
        theirs.step()
    assert_bits(params, plain, "params")
    assert_bits(ours.averages, [theirs.state[part]["ax"] for part in plain], "averages")


def check_two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(0)], [Shard(0), Replicate()]):
        beside_torch(mesh, placements, weight_decay=0.1)


def check_half_types():
    """Each rank's part has the bits of a plain tensor: computed in float32 and rounded once."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for keywords in ({}, {"average_dtype": torch.float32}, {"averaging": ("ema", 0.5)}):
        params = placed(mesh, [Shard(0)], torch.bfloat16)
        plain = [nn.Parameter(param.detach().to_local().clone()) for param in params]
        ours, like = (ASGD(each, lr=0.1, t0=1, lambd=0.01, **keywords) for each in (params, plain))
        for step in range(5):
            give_grads(params, step)
            for param, part in zip(params, plain, strict=True):
                part.grad = param.grad.to_local().clone()
            ours.step()
            like.step()
        assert_bits(params, plain, "bfloat16")
        assert_bits(ours.averages, like.averages, "bfloat16")
        assert all(type(ax) is DTensor for ax in ours.averages)


def check_averages():
    """Averages stand in for the params, and go back with the same bits; none exists too early."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ours, params = beside_torch(mesh, [Shard(0)], extra=1, steps=2)
    assert all(param not in ours.state or "ax" not in ours.state[param] for param in params)
    for placements, keywords in (
        ([Shard(0)], {}),
        ([Replicate()], {}),
        ([Shard(0)], {"average_dtype": torch.float64}),
    ):
        ours, params = stepped(mesh, placements, **keywords)
        iterates = [part.clone() for part in parts_of(param.detach() for param in params)]
        averages = [part.clone() for part in parts_of(ours.averages)]
        with ours.averaged_parameters():
            rounded = [ax.to(torch.float32) for ax in averages]
            assert_bits([param.detach() for param in params], rounded, "inside")
        assert_bits([param.detach() for param in params], iterates, "after")
        assert_bits(ours.averages, averages, "after")
        loss = (params[0] * params[0]).sum()
        with (
            ours.averaged_parameters(),
            pytest.raises(RuntimeError, match="modified by an inplace"),
        ):
            loss.backward()


def stepped(mesh, placements, **keywords):
    """Params whose averages have begun, a plain one among them."""
    params = [*placed(mesh, placements), nn.Parameter(torch.full((3,), 0.5))]
    optimizer = ASGD(params, lr=0.1, t0=1, **keywords)
    for step in range(5):
        give_grads(params, step)
        optimizer.step()
    return optimizer, params


@torch.no_grad()
def check_averages_copied():
    """To plain tensors, to DTensors of other placements and meshes, and from plain params."""
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,))
    ours, params = stepped(mesh, [Shard(0)])
    averages = [ax.full_tensor() if isinstance(ax, DTensor) else ax for ax in ours.averages]
    other = init_device_mesh("cpu", (1, n))
    for where, placements in (
        (None, None),
        (mesh, [Shard(0)]),
        (mesh, [Replicate()]),
        (other, [Replicate(), Shard(0)]),
    ):
        targets = [torch.zeros(param.shape) for param in params]
        if where is not None:
            targets = [distribute_tensor(target, where, placements) for target in targets]
        ours.copy_averages_to(targets)
        full = [x.full_tensor() if isinstance(x, DTensor) else x for x in targets]
        assert_bits(full, averages, placements)
    targets = [torch.zeros(param.shape) for param in params]
    targets[-1] = DTensor.from_local(targets[-1], mesh, [Partial()])
    with pytest.raises(TypeError, match="target: tensor 4: a DTensor of placements"):
        ours.copy_averages_to(targets)
    assert not any(target.any() for target in targets[:-1])
    ours.copy_averages_to(params)
    assert_bits(params, ours.averages, "the params themselves")


def check_versions():
    """A backward through values that a step has changed is refused, as for plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(distribute_tensor(torch.randn(8), mesh, [Shard(0)]))
    optimizer = ASGD([param], lr=0.1)
    loss = (param * param).sum()
    give_grads([param], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def check_parts_that_are_replaced():
    """As `fully_shard` does it, and of averages: each step asks for them anew."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params, others = placed(mesh, [Shard(0)]), placed(mesh, [Shard(0)])
    ours = ASGD(params, lr=0.1, t0=1)
    theirs = torch.optim.ASGD(others, lr=0.1, t0=1, foreach=False)
    for step in range(7):
        for tensor in (*params, *(ours.averages if step > 4 else ())):
            tensor._local_tensor = tensor._local_tensor.clone()
        for each, optimizer in ((params, ours), (others, theirs)):
            give_grads(each, step)
            optimizer.step()
        assert_same(ours, theirs, params, others, f"replaced, step {step}")


def calls_of_python(mesh, n, placements, t0):
    """How many functions written in Python a step of n params calls."""
    params = placed(mesh, placements, shapes=[(6, 4)] * n)
    optimizer = ASGD(params, lr=0.1, t0=t0)
    calls = []
    for step in range(4):
        give_grads(params, step)
        calls.clear()
        sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code))
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    return [code.co_name for code in calls]


def check_no_python_is_called_for_each_param():
    """One call takes about as long as all else that a step does with a small param."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placements, t0 in product(([Shard(0)], [Replicate()]), (0, 100)):
        few, many = (calls_of_python(mesh, n, placements, t0) for n in (2, 9))
        assert few == many


def check_state_asked_for():
    """What torch's tools do before training makes no step, and has all ranks decide alike."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    trained = []
    for asks in (True, False):
        model = nn.Module()
        model.params = nn.ParameterList(placed(mesh, [Shard(0)]))
        optimizer = ASGD(model.parameters(), lr=0.1, t0=1)
        if asks:
            state = get_optimizer_state_dict(model, optimizer)["state"]
            assert [float(entry["step"]) for entry in state.values()] == [0] * len(SHAPES)
        for step in range(3):
            give_grads(list(model.parameters()), step)
            optimizer.step()
        trained.append((optimizer, list(model.parameters())))
    (one, params), (other, others) = trained
    assert_same(one, other, params, others, "asked")
    # A first step with lr and gradients of 0 that nobody but the user makes is a step.
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    param.grad = torch.zeros_like(param)
    optimizer = ASGD([param], lr=0.0)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def beside_torch_in_training(shard, what, *, width=7, seed=None):
    """Train a model that is sharded in place, with ours and torch's; return ours.

    Ranks have examples of their own, but those with the same `seed`.
    """
    trained = []
    for kind, keywords in ((ASGD, {}), (torch.optim.ASGD, {"foreach": False})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
        shard(model)
        optimizer = kind(model.parameters(), lr=0.1, t0=2, weight_decay=0.01, **keywords)
        torch.manual_seed(dist.get_rank() if seed is None else seed)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()
        trained.append((optimizer, list(model.parameters())))
    (ours, params), (theirs, others) = trained
    assert_same(ours, theirs, params, others, what)
    return ours


def check_fully_shard():
    """fully_shard with mixed precision, offloaded to the CPU or not, beside torch's ASGD."""
    for options in (
        {},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    ):

        def shard(model, options=options):
            for layer in (model[0], model[2], model):
                fully_shard(layer, **options)

        beside_torch_in_training(shard, options)


def check_tensor_parallel():
    """Beside torch's ASGD, sharded once more by fully_shard or not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for shards in (False, True):

        def shard(model, shards=shards):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(model, mesh["tensor"], plan)
            if shards:
                fully_shard(model, mesh=mesh["data"])

        what = f"tensor parallel, fully_shard: {shards}"
        ours = beside_torch_in_training(shard, what, width=8, seed=mesh.get_local_rank("data"))
        kinds = {type(each) for ax in ours.averages for each in ax.placements}
        assert (_StridedShard in kinds) == shards


def whether_an_engine_steps(mesh, placements, grads=None, **keywords):
    """Whether a step leaves averages out that have not begun, as engines do and torch does not."""
    params = [nn.Parameter(torch.ones(6, 6))]
    if placements is not None:
        params = placed(mesh, placements, shapes=[(6, 6)])
    optimizer = ASGD(params, **keywords)
    give_grads(params, 0, grads)
    optimizer.step()
    return "ax" not in optimizer.state[params[0]]


def check_where_steps_run():
    """The table of docs/distributed.md, row by row."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    decay = {"weight_decay": 0.1}
    rows = {
        ("plain tensors", "plain"): [(None, None, {}), (None, None, decay)],
        ("DTensors, sharded or replicated", "DTensors of the same placements"): [
            (placements, None, keywords)
            for placements in ([Shard(0)], [Shard(1)], [Replicate()])
            for keywords in ({}, decay)
        ],
        ("the same", "of other placements"): [
            ([Shard(0)], [Replicate()], decay),
            ([Shard(0)], [Shard(1)], decay),
            ([Replicate()], [Shard(0)], decay),
        ],
        ("the same", "sums over the ranks (`Partial`)"): [
            ([Shard(0)], [Partial()], {}),
            ([Replicate()], [Partial()], {}),
        ],
        ("the same", "`Partial`, with weight decay"): [
            ([Shard(0)], [Partial()], decay),
            ([Replicate()], [Partial()], decay),
        ],
    }
    found = {
        row: {whether_an_engine_steps(mesh, *case[:2], **case[2]) for case in cases}
        for row, cases in rows.items()
    }
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    table = page.read_text(encoding="utf-8").partition("| --- | --- | --- |\n")[2]
    lines = table.partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert found == {(params, grads): {"engine" in step} for params, grads, step in cells}


@pytest.mark.heavy
@pytest.mark.parametrize("n", [2, 3])
def test_steps_have_the_bits_of_torch(n, tmp_path):
    on_ranks(
        n,
        tmp_path,
        check_placements,
        check_gradients_placed_otherwise,
        check_gradients_whose_parts_have_other_strides,
        check_params_that_only_some_ranks_leave_to_torch,
        check_half_types,
        check_averages,
        check_averages_copied,
        check_parts_that_are_replaced,
        check_no_python_is_called_for_each_param,
        check_state_asked_for,
        check_versions,
        check_where_steps_run,
        check_fully_shard,
    )


@pytest.mark.heavy
def test_two_dimensions_have_the_bits_of_torch(tmp_path):
    on_ranks(4, tmp_path, check_two_dimensions, check_tensor_parallel)
