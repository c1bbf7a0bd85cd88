"""Averages that do not exist before they begin: torch's bits all the same."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from twins import Twins, entries_of, parameters, same, sealed_or_open

from asgd_fast import ASGD

T0 = 3
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0}
BEGINS = T0 + 2  # the step of the first iterate of the average; the next averages two
lazy_or_eager = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])


def step(optimizer, params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def which_exist(optimizer):
    return ["ax" in entry for entry in optimizer.state.values()]


@lazy_or_eager
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
def test_an_average_exists_from_the_step_of_its_first_iterate_on(dtype, lazy):
    params = parameters((3,), (4, 5), (), dtype=dtype)
    optimizer = ASGD(params, lazy_average=lazy, **OPTIONS)
    for k in range(1, BEGINS + 5):
        step(optimizer, params, k)
        assert which_exist(optimizer) == [k >= BEGINS or not lazy] * 3
        for p in params:
            ax = optimizer.state[p]["ax"]
            assert type(ax) is torch.Tensor
            assert not ax.requires_grad
            assert (ax.dtype, ax.shape, ax.stride()) == (p.dtype, p.shape, p.stride())
            assert torch.equal(ax, p) == (k <= BEGINS)


@sealed_or_open
@lazy_or_eager
@pytest.mark.parametrize("t0", [-5, 0, 0.5, 2, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_the_bits_of_torch_with_params_that_skip_steps(dtype, t0, lazy, looks):
    params = parameters((3,), (40, 5), (), (0,), dtype=dtype)
    options = {"lr": 0.3, "lambd": 1e-2, "t0": t0, "weight_decay": 0.1}
    twins = Twins(params, lazy_average=lazy, looks=looks, **options)
    twins.run(12, skip=lambda k, i: (k + i) % 3 == 0)


@sealed_or_open
def test_groups_begin_each_at_its_time(looks):
    def groups(own):
        return [{"params": own[:1], "t0": 0}, {"params": own[1:], "t0": 4}]

    for steps, begun in ((1, [False] * 3), (2, [True, False, False]), (6, [True] * 3)):
        twins = Twins(parameters((3,), (4,), (5,)), groups, looks=looks, lr=0.1)
        twins.run(steps)
        assert which_exist(twins.ours) == begun
        twins.run(6)


@sealed_or_open
def test_params_that_are_changed_by_hand_between_steps(looks):
    """By weight clipping, for instance: what counts for the average is how the step left them."""
    twins = Twins(parameters((3,), (40, 5)), looks=looks, **OPTIONS)
    for k in range(1, BEGINS + 3):
        twins.step()
        if k >= BEGINS:
            twins.check()
        for p in (*twins.params, *twins.theirs_params):
            p.data.clamp_(-0.5, 0.5)
        for p, entry in entries_of(twins.ours).items():
            assert k >= BEGINS or torch.equal(entry["ax"], p)
    twins.run(2)


def test_an_average_read_before_it_begins_is_a_copy_of_the_param_at_that_moment():
    (p,) = parameters((2, 3, 4, 4))
    p.data = p.data.to(memory_format=torch.channels_last)
    optimizer = ASGD([p], **OPTIONS)
    for k in range(BEGINS - 1):
        step(optimizer, [p], k)
        first, second = optimizer.state[p]["ax"], optimizer.state[p]["ax"]
        before = p.detach().clone()
        with torch.no_grad():
            p.mul_(2)
        third = optimizer.state[p]["ax"]
        second.zero_()
        for ax, wanted in ((first, before), (second, torch.zeros_like(p)), (third, p)):
            same(ax, wanted.detach())
    leaf = torch.ones_like(p, requires_grad=True)
    loss = (leaf * optimizer.state[p]["ax"]).sum()
    before = p.detach().clone()
    step(optimizer, [p])
    loss.backward()  # as nobody has written into the copy
    same(leaf.grad, before)


def test_after_averages_stood_in_the_params_the_params_answer_for_averages_again():
    (p,) = parameters((3,))
    optimizer = ASGD([p], **OPTIONS)
    for k in range(BEGINS + 2):
        step(optimizer, [p], k)
    with optimizer.averaged_parameters():
        same(optimizer.state[p]["ax"], p.detach())
    optimizer.reset_averages()
    assert which_exist(optimizer) == [False]
    p.data = torch.full((3,), 2.0)
    same(optimizer.state[p]["ax"], p.detach())


WRITES = {
    "zero_": lambda entry: entry["ax"].zero_(),
    "fill_": lambda entry: entry["ax"].fill_(torch.nan),
    "data": lambda entry: setattr(entry["ax"], "data", torch.zeros_like(entry["ax"])),
    "another tensor": lambda entry: entry.update(ax=torch.zeros_like(entry["ax"])),
    "deleted": lambda entry: entry.pop("ax", None),
}


@pytest.mark.parametrize("steps", range(1, BEGINS))
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_done_to_an_average_before_it_begins_changes_no_later_bit(write, steps):
    twins = Twins(parameters((3,), (4, 5)), **OPTIONS)
    twins.run(steps)
    for p in twins.params:
        write(twins.ours.state[p])
    for p, q in zip(twins.params, twins.theirs_params, strict=True):
        same(p, q)
    for _ in range(BEGINS):
        twins.step()
        twins.check()


def test_an_average_that_was_put_in_is_the_one_that_begins():
    (p,) = parameters((5,))
    optimizer = ASGD([p], **OPTIONS)
    step(optimizer, [p])
    mine = optimizer.state[p]["ax"] = torch.zeros(5)
    for _ in range(BEGINS + 1):
        step(optimizer, [p])
    assert optimizer.state[p]["ax"] is mine
    assert mine.any()


def test_a_step_allocates_no_memory_for_averages_that_have_not_begun():
    params = [nn.Parameter(torch.randn(1 << 16)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = ASGD(params)
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
        optimizer.step()
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 1 << 16


@lazy_or_eager
def test_a_loaded_average_that_has_not_begun_is_given_up_unless_eager(lazy):
    """Until its param's next step, which torch makes overwrite it."""
    twins = Twins(parameters((3,), (4,)), **OPTIONS)
    twins.run(2)
    other = Twins(parameters((3,), (4,), seed=1), lazy_average=lazy, **OPTIONS)
    other.ours.load_state_dict(twins.ours.state_dict())
    other.theirs.load_state_dict(copy.deepcopy(twins.theirs.state_dict()))
    other.step(other.random_grads(lambda i: i == 1))
    assert which_exist(other.ours) == [not lazy] * 2
    for ax, p in ((other.ours.state[p]["ax"], p) for p in other.params):
        assert torch.equal(ax, p) == (lazy or p is other.params[0])
    assert lazy or torch.equal(other.ours.state[other.params[1]]["ax"], twins.params[1])
    other.run(BEGINS + 1)


@sealed_or_open
@pytest.mark.parametrize("steps", range(1, BEGINS + 3))
def test_data_replaced_at_any_step(steps, looks):
    """And the memory that the param had before is not written to any more."""
    twins = Twins(parameters((3,), (4, 5)), looks=looks, **OPTIONS)
    twins.run(steps)
    before = [p.data for p in twins.params]
    kept = [data.clone() for data in before]
    for own in (twins.params, twins.theirs_params):
        for p in own:
            p.data = p.data * 2
    twins.run(BEGINS + 3)
    for data, value in zip(before, kept, strict=True):
        assert torch.equal(data, value)


def test_params_and_averages_swapped_without_copies():
    twins = Twins(parameters((3,), (4, 5)), **OPTIONS)
    for _ in range(BEGINS + 3):
        twins.run(1)
        for _ in range(2):
            for optimizer, own in twins.sides:
                for p in own:
                    ax = optimizer.state[p]["ax"]
                    p.data, ax.data = ax.data, p.data
        twins.check()


def states_in_new_dicts(optimizer):
    for p, entry in optimizer.state.items():
        optimizer.state[p] = dict(entry)


def averages_in_new_tensors(optimizer):
    for entry in optimizer.state.values():
        entry["ax"] = entry["ax"].view(2)


def loaded_again(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


@sealed_or_open
@pytest.mark.parametrize("edit", [states_in_new_dicts, averages_in_new_tensors, loaded_again])
def test_params_that_exchange_their_memory_while_the_state_is_new(edit, looks):
    twins = Twins(parameters((2,), (2,)), looks=looks, **OPTIONS)
    twins.run(2)
    for optimizer, (a, b) in twins.sides:
        a.data, b.data = b.data, a.data
        edit(optimizer)
    twins.run(BEGINS + 1)


def test_an_average_that_is_its_param_is_followed():
    """As if it were put in by hand: torch then updates both in the same memory."""
    twins = Twins(parameters((3,), (4, 5)), **OPTIONS)
    twins.run(1)
    for optimizer, own in twins.sides:
        optimizer.state[own[0]]["ax"] = own[0].data
    twins.run(BEGINS + 2)


@pytest.mark.heavy
def test_checkpoints_from_several_threads():
    params = parameters(*[(3,)] * 100)
    optimizer = ASGD(params)
    step(optimizer, params)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            dicts = list(pool.map(lambda _: optimizer.state_dict(), range(200)))
    finally:
        sys.setswitchinterval(interval)
    assert all(len(x["state"]) == 100 for x in dicts)


def test_weights_that_are_renormed_when_they_are_read():
    results = []
    for kind, options in ((ASGD, {}), (torch.optim.ASGD, {"foreach": False})):
        torch.manual_seed(0)
        embedding = nn.Embedding(4, 5, max_norm=0.5)
        optimizer = kind(embedding.parameters(), lr=0.5, lambd=0.0, t0=1, **options)
        for _ in range(8):
            optimizer.zero_grad()
            (-embedding(torch.tensor([0, 1, 2])).pow(2).sum()).backward()
            optimizer.step()
        results.append(optimizer.state[embedding.weight]["ax"])
    same(*results)


@pytest.mark.parametrize("steps", [2, T0 + 2])
def test_a_dtype_that_changes_leaves_the_average_behind(steps):
    twins = Twins([nn.Parameter(torch.randn(2, 3, 4, 5))], **OPTIONS)
    twins.run(steps)
    for own in (twins.params, twins.theirs_params):
        own[0].data = own[0].data.to(torch.float64)
    twins.run(BEGINS + 1)
    assert twins.ours.state[twins.params[0]]["ax"].dtype == torch.float32


def test_what_goes_to_torch_gets_memory_once():
    """Expanded gradients each step: no average is made anew in each."""
    twins = Twins(parameters((3, 4)), **OPTIONS)
    addresses = set()
    for _ in range(BEGINS + 3):
        twins.step([torch.randn(4).expand(3, 4)])
        twins.check()
        addresses.add(twins.ours.state[twins.params[0]]["ax"].data_ptr())
    assert len(addresses) == 1


def test_params_that_share_memory():
    memory = torch.randn(12)
    ours = [nn.Parameter(memory[:8]), nn.Parameter(memory[4:])]
    other = memory.clone()
    theirs = [nn.Parameter(other[:8]), nn.Parameter(other[4:])]
    optimizer, torchs = ASGD(ours, **OPTIONS), torch.optim.ASGD(theirs, foreach=False, **OPTIONS)
    for k in range(BEGINS + 3):
        step(optimizer, ours, k)
        step(torchs, theirs, k)
        assert torch.equal(memory, other)
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(optimizer.state[p]["ax"], torchs.state[q]["ax"])


def test_params_shared_with_other_processes_are_eager():
    (p,) = parameters((3,))
    p.share_memory_()
    optimizer = ASGD([p])
    step(optimizer, [p])
    assert which_exist(optimizer) == [True]


@pytest.mark.heavy
def test_memory_that_runs_out_changes_nothing():
    """In a process that may take room for one of two averages."""
    program = f"""
        import resource
        import torch
        from asgd_fast import ASGD
        torch.set_num_threads(1)
        params = [torch.nn.Parameter(torch.full((1 << 24,), float(i))) for i in range(2)]
        optimizer = ASGD(params, lr=0.3, lambd=1e-2, t0={T0})
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range({BEGINS - 1}):
            optimizer.step()

        def facts():
            values = [p[:9].tolist() for p in params]
            for p in params:
                entry = optimizer.state[p]
                values += [float(entry[name]) for name in ("step", "eta", "mu")]
                values += ["ax" in entry, p._version]
            return values

        before = facts()
        pages = int(open("/proc/self/statm").read().split()[0])
        limits = resource.getrlimit(resource.RLIMIT_AS)
        room = pages * resource.getpagesize() + 3 * (1 << 25)  # one average takes 2 of the 3
        resource.setrlimit(resource.RLIMIT_AS, (room, limits[1]))
        try:
            optimizer.step()
        except RuntimeError as error:
            print("allocate" in str(error))
        resource.setrlimit(resource.RLIMIT_AS, limits)
        print(facts() == before)
        optimizer.step()
        print(["ax" in optimizer.state[p] for p in params])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.stdout.split() == ["True", "True", "[True,", "True]"], result.stderr
