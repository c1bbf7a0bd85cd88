"""Batch normalization of the averages: its statistics inside averaged_parameters(), and outside."""

from __future__ import annotations

import copy

import pytest
import torch
from averaging import InsideError, asks_early, model_with_batch_norm, same_values, trained
from torch import nn
from torch.optim.swa_utils import update_bn

from asgd_fast import ASGD

pytestmark = pytest.mark.usefixtures("seeded")


def batches(n=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, generator=generator) for _ in range(n)]


def with_statistics_of_averages(optimizer, model):
    """The oracle: a copy of the model with the averages in it, and torch's pass over the data."""
    shipped = copy.deepcopy(model)
    shipped.load_state_dict(optimizer.averaged_state_dict(model))
    update_bn(batches(), shipped)
    return shipped


def same_state(model, wanted):
    ours = model.state_dict()
    assert list(ours) == list(wanted)
    for name, value in wanted.items():
        same_values(ours[name], value)


def facts(model):
    """The bits of a model, and what its modules are set to."""
    modules = [(module.training, vars(module).get("momentum")) for module in model.modules()]
    return copy.deepcopy(model.state_dict()), modules, [id(buffer) for buffer in model.buffers()]


def check_unchanged(model, before):
    same_state(model, before[0])
    assert facts(model)[1:] == before[1:]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("pair", [False, True], ids=["tensors", "pairs"])
@pytest.mark.parametrize("wide", [None, torch.float64], ids=str)
def test_statistics_are_those_of_the_averages_inside(wide, pair, training):
    model = model_with_batch_norm()
    optimizer = trained(model, average_dtype=wide)
    model.train(training)
    wanted = with_statistics_of_averages(optimizer, model)
    before = facts(model)
    assert not torch.equal(wanted[1].running_mean, model[1].running_mean)
    loader = [(x, x) for x in batches()] if pair else batches()
    with optimizer.averaged_parameters(model=model, update_bn=loader):
        same_state(model, wanted.state_dict())
        assert facts(model)[1] == before[1]
        same_state(copy.deepcopy(model), optimizer.averaged_state_dict(model))
        x = torch.randn(4, 3)
        same_values(model.eval()(x), wanted.eval()(x))
        model.train(training)
    check_unchanged(model, before)


def test_a_pass_of_ones_own_leaves_nothing_behind():
    model = model_with_batch_norm()
    optimizer = trained(model)
    wanted = with_statistics_of_averages(optimizer, model)
    before = facts(model)
    with optimizer.averaged_parameters(model=model):
        update_bn(batches(), model)
        same_state(model, wanted.state_dict())
    check_unchanged(model, before)


def fails(batches):
    yield from batches
    raise InsideError


@pytest.mark.parametrize(
    ("loader", "raises"),
    [(fails(batches(2)), False), (batches(), True), (None, True)],
    ids=["in the pass", "inside", "without a pass"],
)
def test_after_an_exception_everything_is_as_before(loader, raises):
    """The momentum too, which torch's update_bn loses."""
    model = model_with_batch_norm()
    optimizer = trained(model)
    model[0].eval()  # one that differs from the model
    before = facts(model)

    def evaluate():
        with optimizer.averaged_parameters(model=model, update_bn=loader):
            model(torch.randn(8, 3))
            if raises:
                raise InsideError

    with pytest.raises(InsideError):
        evaluate()
    check_unchanged(model, before)
    optimizer.zero_grad()
    model(torch.randn(8, 3)).sum().backward()
    optimizer.step()


def test_training_goes_on_as_without_evaluations():
    ours, theirs = model_with_batch_norm(), model_with_batch_norm()
    options = {"lr": 0.1, "t0": 1}
    optimizers = (
        ASGD(ours.parameters(), **options),
        torch.optim.ASGD(theirs.parameters(), foreach=False, **options),
    )
    for k in range(8):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(k)
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
        if optimizers[0].is_averaging:
            with optimizers[0].averaged_parameters(model=ours, update_bn=batches()):
                pass
    same_state(ours, theirs.state_dict())


class Replacing(nn.Module):
    """Puts a new tensor in the place of its buffer, shared by two names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.tensor([1.5, -0.0, float("nan")]))
        self.register_buffer("same", self.seen)
        self.register_buffer("none", None)

    def forward(self, x):
        self.seen = self.seen + 1
        self.same.add_(2)
        return x * self.weight


def test_buffers_of_any_kind_get_their_bits_and_places_back():
    model = Replacing()
    optimizer = trained(nn.Sequential(model))
    before, seen, shared = facts(model), model.seen, model.same
    with torch.inference_mode(), optimizer.averaged_parameters(model=model):
        model(torch.ones(3))
    check_unchanged(model, before)
    assert model.seen is seen
    assert model.same is shared


def inference_tensor():
    with torch.inference_mode():
        return torch.arange(3.0)


BUFFERS = {
    "expanded": lambda: torch.tensor([1.0, float("nan")]).expand(3, 2),
    "windows": lambda: torch.tensor([float("nan"), 1.0, 2.0, 3.0]).unfold(0, 3, 1),
    "inference": inference_tensor,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "no number": lambda: torch.zeros(0, 3),
}


@pytest.mark.parametrize("make", BUFFERS.values(), ids=BUFFERS)
def test_buffers_that_nobody_touches_may_be_of_any_kind(make):
    model = model_with_batch_norm()
    model[3].register_buffer("mask", make())
    optimizer = trained(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with optimizer.averaged_parameters(model=model, update_bn=batches()):
        pass
    mask = before.pop("3.mask")
    torch.testing.assert_close(model[3].mask, mask, rtol=0, atol=0, equal_nan=True)
    del model[3].mask
    same_state(model, before)


def delete(module):
    del module.seen


def resize(module):
    module.seen.resize_(5).fill_(7)


def convert(module):
    module.seen.data = module.seen.data.double() + 1


def write_expanded(module):
    module.expanded[0] = 7


def write_inference(module):
    with torch.inference_mode():
        module.made_in_inference.fill_(7)


@pytest.mark.parametrize("change", [delete, resize, convert, write_expanded, write_inference])
def test_whatever_becomes_of_buffers_inside_they_come_back(change):
    model = model_with_batch_norm()
    module = model[3]
    module.register_buffer("seen", torch.tensor([1.5, -0.0, float("nan")]), persistent=False)
    module.register_buffer("expanded", torch.arange(2.0).expand(3, 2))
    module.register_buffer("made_in_inference", inference_tensor())
    optimizer = trained(model)
    before, seen, shown = facts(model), module.seen, module.seen.clone()
    with optimizer.averaged_parameters(model=model, update_bn=batches()):
        change(module)
    assert module.seen is seen
    same_values(seen, shown)
    same_state(model, before[0])
    assert {name for name, _ in module.named_buffers()} > {"seen"}


def test_one_that_cannot_come_back_keeps_no_other_buffer_from_it():
    """Before and after the statistics of the model."""
    model = model_with_batch_norm()
    for module in (model[0], model[3]):
        module.register_buffer("seen", torch.zeros(3))
    optimizer = trained(model)
    statistics = copy.deepcopy(model[1].state_dict())
    iterate = model[0].weight.detach().clone()

    def evaluate():
        with optimizer.averaged_parameters(model=model, update_bn=batches()):
            for module in (model[0], model[3]):
                del module.seen
                module.seen = nn.Parameter(torch.ones(3))

    with pytest.raises(RuntimeError, match=r"^averaged_parameters: cannot put buffer 'seen' of a"):
        evaluate()
    same_state(model[1], statistics)
    same_values(model[0].weight, iterate)


@asks_early
def test_no_pass_is_made_before_averaging_begins():
    model = model_with_batch_norm()
    optimizer = ASGD(model.parameters())
    before = facts(model)
    with optimizer.averaged_parameters(model=model, update_bn=fails([])):
        check_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update_bn": []}, r"model: expected a torch.nn.Module with update_bn, got NoneType"),
        ({"model": [], "update_bn": []}, "model: expected a torch.nn.Module with .* got list"),
        ({"model": 3}, "model: expected a torch.nn.Module, or None, got int"),
    ],
)
def test_what_is_no_model_is_refused(arguments, message):
    model = model_with_batch_norm()
    optimizer = trained(model)
    before = facts(model)
    with pytest.raises(TypeError, match=f"^{message}"):
        optimizer.averaged_parameters(**arguments).__enter__()
    check_unchanged(model, before)
    with optimizer.averaged_parameters():
        pass
