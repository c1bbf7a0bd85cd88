"""What a model, its checkpoints and autograd see of averaged_parameters()."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from averaging import (
    LAYOUTS,
    OPTIONS,
    STEPS,
    averages_of,
    facts,
    model_with_batch_norm,
    same_values,
    saves_inside,
    stepped,
    trained,
)
from torch import nn
from torch.nn.utils import parametrize
from twins import Twins, parameters, same

pytestmark = pytest.mark.usefixtures("seeded")


@saves_inside
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_a_checkpoint_taken_inside_is_that_of_outside(wide):
    params = [*parameters((3,), (4, 5)), nn.Parameter(torch.randn(20)[::2])]
    optimizer = stepped(params, average_dtype=wide)
    outside = copy.deepcopy(optimizer.state_dict())
    with optimizer.averaged_parameters():
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        held = optimizer.state_dict()
        kept = copy.deepcopy(held)
    file.seek(0)
    for inside in (torch.load(file), kept, held):  # whenever it is saved
        assert inside["param_groups"] == outside["param_groups"]
        for i, entry in outside["state"].items():
            assert list(inside["state"][i]) == list(entry)
            for name, value in entry.items():
                same_values(inside["state"][i][name], value)


def test_the_models_own_state_dict_holds_the_averages_inside():
    model = model_with_batch_norm()
    optimizer = trained(model)
    averages = dict(
        zip(
            [name for name, _ in model.named_parameters()],
            averages_of(optimizer, list(model.parameters())),
            strict=True,
        )
    )
    before = copy.deepcopy(model.state_dict())
    with optimizer.averaged_parameters():
        inside = copy.deepcopy(model.state_dict())
        for name, value in inside.items():
            wanted = averages.get(name, before[name])  # buffers are as they were
            assert torch.equal(value, wanted)
        copied = copy.deepcopy(model)
    for name, value in copied.state_dict().items():
        assert torch.equal(value, inside[name])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not torch.equal(inside["0.weight"], before["0.weight"])


@saves_inside
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_data_replaced_inside(make, wide):
    """The iterate goes into the new memory, and the average is not touched."""
    twins = Twins([nn.Parameter(make())], **OPTIONS)
    (p,), (q,) = twins.params, twins.theirs_params
    twins.ours.average_dtype = wide
    for _ in range(STEPS):
        twins.step()
    (ax,) = averages_of(twins.ours, [p])
    iterate = p.detach().clone()
    with twins.ours.averaged_parameters():
        p.data = replaced = torch.full_like(p, 7.0)
        held = twins.ours.state_dict()["state"][0]["ax"]
        assert torch.equal(held, ax)
    assert torch.equal(held, ax)
    assert p.data_ptr() == replaced.data_ptr()
    assert torch.equal(p, iterate)
    assert torch.equal(twins.ours.state[p]["ax"], ax)
    for _ in range(3):
        twins.step()
        assert torch.equal(p, q)
    if wide is None:
        assert torch.equal(twins.ours.state[p]["ax"], twins.theirs.state[q]["ax"])


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("target", [torch.float16, torch.float64], ids=str)
def test_a_model_converted_inside(target, wide):
    """To the iterate in the new dtype; the averages stay as they were."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = trained(model, average_dtype=wide)
    params = list(model.parameters())
    iterates, averages = [p.detach().clone() for p in params], averages_of(optimizer, params)
    with optimizer.averaged_parameters():
        model.to(target)
        for p, ax in zip(params, averages, strict=True):
            same(p, ax.float().to(target))
    for p, iterate, ax in zip(params, iterates, averages, strict=True):
        same(p, iterate.to(target))
        same(optimizer.state[p]["ax"], ax)


def test_buffers_are_not_touched():
    model = model_with_batch_norm()
    optimizer = trained(model)
    before = [(b.data_ptr(), b._version, b.tolist()) for b in model.buffers()]
    with optimizer.averaged_parameters():
        assert [(b.data_ptr(), b._version, b.tolist()) for b in model.buffers()] == before
    assert [(b.data_ptr(), b._version, b.tolist()) for b in model.buffers()] == before


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("make", [LAYOUTS["contiguous"], LAYOUTS["columns"]])
def test_autograd_notices_what_changed(make, wide):
    p = nn.Parameter(make())
    optimizer = stepped([p], average_dtype=wide)
    message = "modified by an inplace operation"
    saved = p.square().sum()  # keeps p for its backward
    with optimizer.averaged_parameters():
        with pytest.raises(RuntimeError, match=message):
            saved.backward()
        p.square().sum().backward()
        within = p.square().sum()
    with pytest.raises(RuntimeError, match=message):
        within.backward()
    p.grad = None
    p.square().sum().backward()
    assert torch.equal(p.grad, 2 * p.detach())


@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("order", ["outside", "inside", "across"])
def test_under_the_modes_in_which_models_are_evaluated(mode, order, wide):
    model = model_with_batch_norm().eval()
    optimizer = trained(model, average_dtype=wide)
    before = facts(optimizer)
    x = torch.randn(5, 3)
    shipped = copy.deepcopy(model)
    optimizer.copy_averages_to(shipped.parameters())
    wanted = shipped(x).detach()
    if order == "outside":
        with mode(), optimizer.averaged_parameters():
            got = model(x)
    elif order == "inside":
        with optimizer.averaged_parameters(), mode():
            got = model(x)
    else:
        context, other = mode(), optimizer.averaged_parameters()
        context.__enter__()
        other.__enter__()
        got = model(x)
        context.__exit__(None, None, None)
        other.__exit__(None, None, None)
    assert torch.equal(got, wanted)
    assert facts(optimizer) == before
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    model(x).sum().backward()
    optimizer.step()


def test_a_checkpoint_taken_inside_comes_with_a_warning():
    """Once: with the model's state dict it has lost the iterate."""
    model = model_with_batch_norm()
    optimizer = trained(model)
    optimizer.state_dict()
    with optimizer.averaged_parameters():
        with pytest.warns(UserWarning, match="^state_dict: called inside .* has lost") as caught:
            optimizer.state_dict()
        assert [warning.filename for warning in caught] == [__file__]
        optimizer.state_dict()
        optimizer.averaged_state_dict(model)
    optimizer.state_dict()


def halved(model):
    """Each forward computes the weight from its parameter, once within `cached`."""

    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    parametrize.register_parametrization(model, "weight", Half())
    return model


KEPT = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "parametrize.cached": parametrize.cached,
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_forwards_read_the_params_where_torch_has_kept_copies(wide, name):
    """Inside and afterwards, and where the averages are copied into the model itself."""
    model = halved(nn.Linear(3, 4))
    optimizer = trained(model, average_dtype=wide)
    x = torch.randn(5, 3)
    with KEPT[name]():
        iterate = model(x)
    with optimizer.averaged_parameters(), KEPT[name]():
        average = model(x)
    assert not torch.equal(iterate, average)
    with KEPT[name]():
        assert torch.equal(model(x), iterate)
        with optimizer.averaged_parameters():
            assert torch.equal(model(x), average)
        assert torch.equal(model(x), iterate)
        optimizer.copy_averages_to(model)
        assert torch.equal(model(x), average)
