"""Averages without memory of their own until averaging begins: torch's bits all the same."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from twins import Twins, parameters, same

from asgd_fast import ASGD

T0 = 3
OPTIONS = {"lr": 0.3, "lambd": 1e-2, "t0": T0}
BEGINS = T0 + 2  # the step of the first iterate of the average; the next averages two


def is_lazy(optimizer, param):
    return optimizer.state[param]["ax"].data_ptr() == param.data_ptr()


def step(optimizer, params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
def test_an_average_gets_memory_in_the_step_of_its_first_iterate(dtype):
    params = parameters((3,), (4, 5), (), dtype=dtype)
    optimizer = ASGD(params, **OPTIONS)
    for k in range(1, BEGINS + 5):
        step(optimizer, params, k)
        assert [is_lazy(optimizer, p) for p in params] == [k < BEGINS] * 3
        for p in params:
            ax = optimizer.state[p]["ax"]
            assert type(ax) is torch.Tensor
            assert not ax.requires_grad
            assert (ax.dtype, ax.shape, ax.stride()) == (p.dtype, p.shape, p.stride())
            assert torch.equal(ax, p) == (k <= BEGINS)


@pytest.mark.parametrize("t0", [-5, 0, 0.5, 2, 1e6])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_the_bits_of_torch_with_params_that_skip_steps(dtype, lazy, t0):
    params = parameters((3,), (40, 5), (), (0,), dtype=dtype)
    twins = Twins(params, lr=0.3, lambd=1e-2, t0=t0, weight_decay=0.1, lazy_average=lazy)
    twins.run(12, skip=lambda k, i: (k + i) % 3 == 0)


def test_params_that_are_changed_by_hand_between_steps():
    """By weight clipping, for instance: what counts for the average is how the step left them."""
    twins = Twins(parameters((3,), (40, 5)), **OPTIONS)
    for _ in range(BEGINS + 3):
        twins.step()
        for p in (*twins.params, *twins.theirs_params):
            p.data.clamp_(-0.5, 0.5)
    assert not is_lazy(twins.ours, twins.params[0])
    twins.check()


def test_groups_begin_each_at_its_time():
    params = parameters((3,), (4,), (5,))

    def groups(own):
        return [{"params": own[:1], "t0": 0}, {"params": own[1:], "t0": 4}]

    twins = Twins(params, groups, lr=0.1)
    twins.run(4)
    assert [is_lazy(twins.ours, p) for p in params] == [False, True, True]
    twins.run(5)
    assert [is_lazy(twins.ours, p) for p in params] == [False, False, False]


def test_eager_averages_have_memory_from_the_first_step():
    params = parameters((3,), (4,))
    optimizer = ASGD(params, lazy_average=False)
    step(optimizer, params)
    held = [optimizer.state[p]["ax"] for p in params]
    step(optimizer, params)
    assert not any(is_lazy(optimizer, p) for p in params)
    assert all(optimizer.state[p]["ax"] is ax for p, ax in zip(params, held, strict=True))


def test_a_step_allocates_no_memory_for_lazy_averages():
    params = [nn.Parameter(torch.randn(1 << 16)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = ASGD(params)
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
        optimizer.step()
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 1 << 16


def test_a_checkpoint_holds_copies():
    params = parameters((3,), (4,))
    optimizer = ASGD(params, **OPTIONS)
    step(optimizer, params)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, given: seen.append(given))
    saved = optimizer.state_dict()
    kept = [saved["state"][i]["ax"].clone() for i in range(2)]
    step(optimizer, params)
    for i, p in enumerate(params):
        assert saved["state"][i]["ax"].data_ptr() != p.data_ptr()
        assert torch.equal(saved["state"][i]["ax"], kept[i])
        assert seen[0]["state"][i]["ax"] is saved["state"][i]["ax"]
        assert is_lazy(optimizer, p)  # the state itself is as it was


@pytest.mark.parametrize("steps", range(1, BEGINS + 4))
@pytest.mark.parametrize("to_torch", [True, False], ids=["to torch", "from torch"])
def test_checkpoints_pass_between_the_two(to_torch, steps):
    twins = Twins(parameters((3,), (4, 5)), **OPTIONS)
    twins.run(steps)
    file = io.BytesIO()
    torch.save((twins.ours if to_torch else twins.theirs).state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    (twins.theirs if to_torch else twins.ours).load_state_dict(saved)
    twins.check()
    twins.run(BEGINS + 3)


def test_a_loaded_average_is_given_up_once_it_is_seen_to_be_the_param():
    params, others = parameters((3,), (4,)), parameters((3,), (4,), seed=1)
    optimizer, other = ASGD(params, **OPTIONS), ASGD(others, **OPTIONS)
    step(optimizer, params)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):  # of the params that were not loaded
        assert torch.equal(other.state[q]["ax"], p)
    step(other, others)
    assert all(is_lazy(other, q) for q in others)


def test_an_average_that_differs_is_not_given_up():
    """A param without a gradient keeps what was loaded, as in torch."""
    twins = Twins(parameters((3,), (4,)), **OPTIONS)
    twins.run(2)
    other = Twins(parameters((3,), (4,), seed=1), **OPTIONS)
    other.ours.load_state_dict(twins.ours.state_dict())
    other.theirs.load_state_dict(copy.deepcopy(twins.theirs.state_dict()))
    other.run(3, skip=lambda _, i: i == 1)
    assert not is_lazy(other.ours, other.params[1])
    other.run(BEGINS + 1)


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_optimizer_go_on_alike(way, lazy):
    params = parameters((3,), (4,))
    optimizer = ASGD(params, lazy_average=lazy, **OPTIONS)
    step(optimizer, params)
    twin = way(optimizer)
    others = twin.param_groups[0]["params"]
    for k in range(BEGINS + 3):
        step(optimizer, params, k)
        step(twin, others, k)
        for p, q in zip(params, others, strict=True):
            assert is_lazy(twin, q) == is_lazy(optimizer, p)
            same(q, p)
            same(twin.state[q]["ax"], optimizer.state[p]["ax"])


@pytest.mark.parametrize("steps", range(1, BEGINS + 3))
def test_data_replaced_at_any_step(steps):
    """And the memory that the param had before is not written to any more."""
    twins = Twins(parameters((3,), (4, 5)), **OPTIONS)
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


@pytest.mark.parametrize("edit", [states_in_new_dicts, averages_in_new_tensors, loaded_again])
def test_params_swapped_while_the_state_is_new(edit):
    """An average that lies where another param is now must not write over it."""
    twins = Twins(parameters((2,), (2,)), **OPTIONS)
    twins.run(2)
    for optimizer, (a, b) in twins.sides:
        a.data, b.data = b.data, a.data
        edit(optimizer)
    twins.run(BEGINS + 1)


def test_a_checkpoint_is_a_copy_of_an_average_whose_param_has_moved():
    data = torch.ones(3)
    p = nn.Parameter(data)
    optimizer = ASGD([p], lr=0.1, lambd=0.0)
    step(optimizer, [p])
    expected = p.detach().clone()
    p.data = p.data.clone()
    state_dict = optimizer.state_dict()
    data.fill_(7.0)
    same(state_dict["state"][0]["ax"], expected)


def test_a_checkpoint_by_torchs_own_method_is_a_copy():
    p = nn.Parameter(torch.ones(3))
    optimizer = ASGD([p])
    step(optimizer, [p])
    for twin in (optimizer, copy.deepcopy(optimizer)):
        (own,) = twin.param_groups[0]["params"]
        state_dict = torch.optim.Optimizer.state_dict(twin)
        assert state_dict["state"][0]["ax"].data_ptr() != own.data_ptr()


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


def test_an_average_that_was_put_in_after_loading_stays():
    (p,) = parameters((5,))
    optimizer = ASGD([p], **OPTIONS)
    step(optimizer, [p])
    loaded_again(optimizer)
    mine = optimizer.state[p]["ax"] = torch.zeros(5)
    for _ in range(BEGINS + 1):
        step(optimizer, [p])
    assert optimizer.state[p]["ax"] is mine


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
def test_a_dtype_or_layout_that_changes_leaves_the_average_behind(steps):
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
    assert not is_lazy(optimizer, p)


def test_a_backward_through_an_old_average_is_caught():
    """Only where the average was the param: it is written to by the step."""
    (p,) = parameters((3,))
    optimizer = ASGD([p], **OPTIONS)
    step(optimizer, [p])
    x = torch.ones(3, requires_grad=True)
    loss = (x * optimizer.state[p]["ax"]).sum()
    step(optimizer, [p])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
                values += [entry["ax"].data_ptr() == p.data_ptr(), p._version]
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
        print([optimizer.state[p]["ax"].data_ptr() == p.data_ptr() for p in params])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.stdout.split() == ["True", "True", "[False,", "False]"], result.stderr


def test_the_data_of_a_lazy_average_is_replaced():
    """It becomes a tensor of its own, which the next step writes."""
    twins = Twins(parameters((3,), (4,)), lr=0.3)
    twins.run(2)
    for optimizer, own in twins.sides:
        optimizer.state[own[1]]["ax"].data = torch.zeros(4)
    twins.run(2)
