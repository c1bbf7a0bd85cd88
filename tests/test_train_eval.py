"""TrainEvalASGD: averages in the params from eval() to train(), and checkpoints of both modes."""

from __future__ import annotations

import copy
import gc
import pickle
import typing

import pytest
import torch
from averaging import BEGUN, LAYOUTS, OPTIONS, STEPS, asks_early, same_values, step, stepped
from runs import saved_and_loaded
from test_wrappers import wrappers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from twins import parameters, same, twin

from asgd_fast import ASGD, AveragingNotBegunWarning
from asgd_fast.integrations.train_eval import TrainEvalASGD

pytestmark = pytest.mark.usefixtures("seeded")

wide_or_not = pytest.mark.parametrize("wide", [None, torch.float64], ids=str)


class Sides:
    """Our optimizer and torch's over copies of the same params; the k-th step is the same."""

    def __init__(self, *params, steps=STEPS, wide=None):
        self.params = list(params)
        self.theirs_params = [twin(p) for p in params]
        self.ours = TrainEvalASGD(self.params, average_dtype=wide, **OPTIONS)
        self.theirs = torch.optim.ASGD(self.theirs_params, foreach=False, **OPTIONS)
        self.k = 0
        self.step(steps)

    def step(self, steps=1):
        for _ in range(steps):
            step(self.ours, self.params, self.k)
            step(self.theirs, self.theirs_params, self.k)
            self.k += 1

    def averages(self):
        """Torch's, or where ours are wider, theirs rounded."""
        if self.ours.average_dtype is not None:
            return [ax.to(p.dtype) for ax, p in zip(self.ours.averages, self.params, strict=True)]
        return [self.theirs.state[p]["ax"] for p in self.theirs_params]

    def check(self, *, averaged):
        """Assert that the params are the averages, or torch's iterates."""
        wanted = self.averages() if averaged else self.theirs_params
        for ours, theirs in zip(self.params, wanted, strict=True):
            same_values(ours, theirs)


@wide_or_not
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_averages_in_eval_mode_and_the_bits_of_torch_in_train_mode(make, wide):
    sides = Sides(nn.Parameter(make()), *parameters((3,)), wide=wide)
    for _ in range(3):
        for _ in range(2):
            sides.ours.eval()
            sides.check(averaged=True)
        for _ in range(2):
            sides.ours.train()
            sides.check(averaged=False)
        sides.step()
        sides.check(averaged=False)
    assert any(not torch.equal(*pair) for pair in zip(sides.averages(), sides.params, strict=True))


@asks_early
def test_nothing_happens_before_averaging_begins():
    sides = Sides(*parameters((3,)), steps=0)
    for _ in range(BEGUN - 1):
        sides.ours.eval()
        sides.check(averaged=False)
        sides.step()  # needs no train()
    sides.check(averaged=False)


def test_a_step_in_eval_mode_is_refused():
    sides = Sides(*parameters((3,), (4, 5)))
    sides.ours.eval()
    called = []
    with pytest.raises(RuntimeError, match=r"^step: .* call train\(\)"):
        sides.ours.step(lambda: called.append(1))
    assert not called
    sides.check(averaged=True)
    sides.ours.train()
    sides.step()
    sides.check(averaged=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_made_in_train_mode(copied):
    sides = Sides(*parameters((3,)))
    sides.ours.eval()
    with pytest.raises(RuntimeError, match=r"^copying the optimizer: .* call train\(\)"):
        copied(sides.ours)
    sides.ours.train()
    other = copy.deepcopy(sides.ours)
    assert type(other) is TrainEvalASGD
    other.eval()
    same_values(other.param_groups[0]["params"][0], sides.averages()[0])
    sides.check(averaged=False)


def test_the_params_stay_averages_when_the_optimizer_goes():
    sides = Sides(*parameters((3,)))
    averages = [ax.clone() for ax in sides.averages()]
    sides.ours.eval()
    del sides.ours
    gc.collect()
    same(sides.params[0].detach(), averages[0])


def resumed(sides, order, wide, way):
    """A new model and optimizer from the checkpoints of both, loaded in some order."""
    model, optimizer = way([p.detach() for p in sides.params]), way(sides.ours.state_dict())
    params = [nn.Parameter(torch.randn_like(p)) for p in sides.params]
    other = copy.copy(sides)
    other.params, other.ours = params, TrainEvalASGD(params, average_dtype=wide, **OPTIONS)
    for what in order:
        if what == "optimizer":
            other.ours.load_state_dict(optimizer)
        else:
            with torch.no_grad():
                for p, saved in zip(params, model, strict=True):
                    p.copy_(saved)
    return other


@wide_or_not
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")])
def test_a_run_resumed_from_either_mode_goes_on_bit_for_bit(order, mode, wide):
    sides = Sides(*parameters((3,), (4, 5)), wide=wide)
    getattr(sides.ours, mode)()
    other = resumed(sides, order, wide, saved_and_loaded)
    other.check(averaged=mode == "eval")
    other.ours.train()
    other.check(averaged=False)
    other.step(3)
    other.check(averaged=False)
    other.ours.eval()
    other.check(averaged=True)


@wide_or_not
def test_loading_ends_the_mode_of_before(wide):
    """Whoever loads a checkpoint of train mode loads the iterates into the params, too."""
    sides = Sides(*parameters((3,)), wide=wide)
    saved, theirs = (copy.deepcopy(side.state_dict()) for side in (sides.ours, sides.theirs))
    k, iterates = sides.k, [p.detach().clone() for p in sides.params]
    sides.step(2)
    sides.ours.eval()
    sides.k = k
    with torch.no_grad():
        sides.params[0].copy_(iterates[0])
        sides.theirs_params[0].copy_(iterates[0])
    sides.theirs.load_state_dict(theirs)
    sides.ours.load_state_dict(saved)
    sides.ours.train()
    sides.check(averaged=False)
    sides.step()
    sides.check(averaged=False)
    sides.ours.eval()
    sides.check(averaged=True)


@wide_or_not
def test_modes_inside_averaged_parameters(wide):
    """In either order nothing is lost."""
    sides = Sides(*parameters((3,), (4, 5)), wide=wide)
    with sides.ours.averaged_parameters():
        sides.ours.eval()
        sides.check(averaged=True)
        sides.ours.train()
        sides.check(averaged=True)
    sides.check(averaged=False)
    sides.ours.eval()
    with sides.ours.averaged_parameters():
        sides.check(averaged=True)
        with pytest.raises(RuntimeError, match=r"^train: is not possible inside"):
            sides.ours.train()
        sides.ours.averaged_state_dict(nn.ParameterList(sides.params))
    sides.check(averaged=True)
    sides.ours.train()
    sides.check(averaged=False)
    sides.step()
    sides.check(averaged=False)
    assert {*sides.ours.state_dict()["state"][0]} == {"step", "eta", "mu", "ax"}


def test_evaluations_of_either_kind_follow_each_other():
    """An evaluation inside averaged_parameters() is nobody's writing into the params."""
    sides = Sides(*parameters((3,)))
    for _ in range(2):
        with sides.ours.averaged_parameters():
            sides.check(averaged=True)
        sides.ours.averaged_state_dict(nn.ParameterList(sides.params))
        sides.ours.eval()
        sides.check(averaged=True)
        sides.ours.train()
        sides.step()
        sides.check(averaged=False)
    with torch.no_grad():
        sides.params[0].copy_(torch.ones(3))  # as a trainer loads weights
    with sides.ours.averaged_parameters():
        pass
    with pytest.warns(UserWarning, match="^eval: the params were written"):
        sides.ours.eval()
    assert torch.equal(sides.params[0], torch.ones(3))


def test_a_checkpoint_has_torchs_keys_but_for_the_iterates():
    sides = Sides(*parameters((3,), (4, 5)))
    assert {*sides.ours.state_dict()["state"][0]} == {"step", "eta", "mu", "ax"}
    sides.ours.eval()
    state = sides.ours.state_dict()["state"]
    for i, theirs in sides.theirs.state_dict()["state"].items():
        assert {*state[i]} == {"step", "eta", "mu", "ax", "iterate", "iterate_step"}
        same(state[i]["iterate"], sides.theirs_params[i].detach())
        same(state[i]["ax"], theirs["ax"])


@pytest.mark.parametrize("make", [ASGD, torch.optim.ASGD])
def test_checkpoints_of_other_optimizers_are_loaded(make):
    params = parameters((3,))
    other = make(params, **OPTIONS)
    for k in range(STEPS):
        step(other, params, k)
    own = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = TrainEvalASGD(own, **OPTIONS)
    optimizer.load_state_dict(other.state_dict())
    optimizer.eval()
    same_values(own[0], other.state[params[0]]["ax"])


@pytest.mark.parametrize(
    ("iterate", "error", "message"),
    [
        (torch.zeros(4), ValueError, r"state\[0\]\['iterate'\]: shape \(4,\) does not match"),
        (3.0, TypeError, r"state\[0\]\['iterate'\]: expected a tensor, got float"),
        (torch.zeros(3, device="meta"), TypeError, r"state\[0\]\['iterate'\]: .* on meta"),
        (torch.zeros(3).to_sparse(), TypeError, r"state\[0\]\['iterate'\]: .*torch.sparse_coo"),
        (torch.ones(3) * 1j, TypeError, r"state\[0\]\['iterate'\]: expected real numbers, got"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_iterate_that_fits_no_param_is_refused(iterate, error, message, mode):
    sides = Sides(*parameters((3,)))
    getattr(sides.ours, mode)()
    saved = copy.deepcopy(sides.ours.state_dict())
    saved["state"][0]["iterate"] = iterate
    saved["state"][0]["step"].fill_(99)
    with pytest.raises(error, match=f"^{message}"):
        sides.ours.load_state_dict(saved)
    sides.check(averaged=mode == "eval")
    assert sides.ours.state_dict()["state"][0]["step"] == STEPS
    sides.ours.train()
    sides.step()
    sides.check(averaged=False)


def test_an_average_that_is_put_into_its_param_has_its_shape():
    sides = Sides(*parameters((3,)))
    sides.ours.eval()
    saved = copy.deepcopy(sides.ours.state_dict())
    saved["state"][0]["ax"] = saved["state"][0]["ax"][None]  # which a step would broadcast
    with pytest.raises(ValueError, match=r"^state\[0\]\['ax'\]: expected the shape of its param"):
        sides.ours.load_state_dict(saved)
    sides.check(averaged=True)
    sides.ours.train()
    sides.step()
    sides.check(averaged=False)


@pytest.mark.parametrize("make", [ASGD, torch.optim.ASGD])
def test_an_iterate_that_another_optimizer_has_left_behind_is_ignored(make):
    """One goes on from the averages, and saves the entries that it does not know as they were."""
    sides = Sides(*parameters((3,), (4, 5)))
    sides.ours.eval()
    other = make(sides.params, **OPTIONS)
    other.load_state_dict(copy.deepcopy(sides.ours.state_dict()))
    step(other, sides.params, 0)
    made = [p.detach().clone() for p in sides.params]
    later = TrainEvalASGD(sides.params, **OPTIONS)
    later.load_state_dict(other.state_dict())
    later.train()
    for p, wanted in zip(sides.params, made, strict=True):
        same(p.detach(), wanted)
    assert {*later.state_dict()["state"][0]} == {"step", "eta", "mu", "ax"}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_torchs_checkpoints_of_shards_are_made_in_train_mode(flat, full):
    """They would lose the iterates where the optimizer that loads them has none."""
    model = nn.Linear(3, 2)
    sides = Sides(*model.parameters())
    options = StateDictOptions(flatten_optimizer_state_dict=flat, full_state_dict=full)
    sides.ours.eval()
    with pytest.raises(RuntimeError, match=r"^state_dict: .*distributed.* call train\(\)"):
        get_optimizer_state_dict(model, sides.ours, options=options)
    sides.check(averaged=True)
    sides.ours.train()
    assert get_optimizer_state_dict(model, sides.ours, options=options)
    sides.check(averaged=False)


def test_params_may_be_added_between_steps():
    sides = Sides(*parameters((3,)))
    sides.ours.add_param_group({"params": parameters((2,))})
    with sides.ours.averaged_parameters():
        sides.check(averaged=True)
    with torch.no_grad():
        sides.ours.param_groups[1]["params"][0].zero_()  # as the params of a new layer are made
    sides.ours.eval()
    sides.check(averaged=True)
    sides.ours.train()
    sides.check(averaged=False)


def test_averages_that_are_copied_into_the_model_stay_there():
    """In eval mode, too; those copied elsewhere end no mode."""
    sides = Sides(*parameters((3,), (4, 5)))
    model = nn.ParameterList(sides.params)
    sides.ours.eval()
    sides.ours.copy_averages_to(copy.deepcopy(model))
    sides.ours.train()
    sides.check(averaged=False)
    sides.ours.eval()
    sides.ours.copy_averages_to(model)
    sides.ours.train()
    sides.check(averaged=True)
    step(sides.ours, sides.params)


def test_a_part_of_the_averages_may_stay_in_the_model():
    sides = Sides(*parameters((3,), (4, 5)))
    targets = [sides.params[0], torch.zeros(4, 5)]
    sides.ours.eval()
    sides.ours.copy_averages_to(iter(targets))
    sides.ours.train()
    same_values(sides.params[0], sides.averages()[0])
    same_values(targets[1], sides.averages()[1])
    same_values(sides.params[1], sides.theirs_params[1])


@asks_early
def test_the_warning_before_averaging_begins_is_of_the_callers_line():
    sides = Sides(*parameters((3,)), steps=1)
    with pytest.warns(AveragingNotBegunWarning) as warned:
        sides.ours.copy_averages_to(nn.ParameterList(sides.params))
    assert warned[0].filename == __file__


def test_the_warning_of_a_checkpoint_with_averages_is_of_the_callers_line():
    sides = Sides(*parameters((3,)))
    with (
        sides.ours.averaged_parameters(),
        pytest.warns(UserWarning, match="^state_dict: called inside") as warned,
    ):
        sides.ours.state_dict()
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize("name", ["eval", "train", "averaged_parameters", "load_state_dict"])
def test_type_hints_can_be_resolved(name):
    assert "return" in typing.get_type_hints(getattr(TrainEvalASGD, name))


def test_weights_that_somebody_has_loaded_stay():
    sides = Sides(*parameters((3,)))
    best = torch.tensor([1.0, 2.0, 3.0])
    with torch.no_grad():
        sides.params[0].copy_(best)
    with pytest.warns(UserWarning, match="^eval: the params were written since the last step"):
        sides.ours.eval()
    same(sides.params[0].detach(), best)
    sides.ours.train()
    same(sides.params[0].detach(), best)


def test_averaging_may_begin_in_eval_mode():
    """As a trigger begins it after an evaluation."""
    sides = Sides(*parameters((3,)))
    sides.ours.eval()
    sides.ours.start_averaging()
    sides.ours.train()
    sides.check(averaged=False)
    sides.step()
    first = sides.params[0].detach().clone()
    sides.ours.eval()
    same(sides.params[0].detach(), first)


@wrappers
@pytest.mark.parametrize("through", ["wrapper", "optimizer"])
def test_a_wrapper_has_the_modes_of_its_optimizer(wrapped, through):
    sides = Sides(*parameters((3,)))
    wrapper = wrapped(sides.ours)
    (wrapper if through == "wrapper" else sides.ours).eval()
    sides.check(averaged=True)
    for own in (wrapper, sides.ours):
        with pytest.raises(RuntimeError, match=r"^step: "):
            own.step()
    (sides.ours if through == "wrapper" else wrapper).train()
    sides.check(averaged=False)


def test_without_the_modes_there_is_nothing_to_call():
    """A framework may not put averages into a model of who has changed an import only."""
    optimizer = stepped(parameters((3,)))
    assert not hasattr(optimizer, "eval")
    assert not hasattr(optimizer, "train")
