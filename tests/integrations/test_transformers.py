"""TrainEvalASGD in transformers' Trainer, beside the same training with torch's ASGD."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twins import same

from asgd_fast.integrations.train_eval import TrainEvalASGD

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("seeded")

OPTIONS = {"lr": 0.1, "lambd": 1e-3, "t0": 1}
STEPS = 24


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x, labels):
        output = self.layers(x)
        return {"loss": (output - labels).square().mean(), "output": output}


def examples(n, seed):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1))
    return [{"x": row, "labels": (row.sum() + z)[None]} for row, z in zip(x, noise, strict=True)]


TRAINING, VALIDATION = examples(64, 1), examples(32, 3)


class Watch(transformers.TrainerCallback):
    """Notes each iterate, its average and what an evaluation has found."""

    def __init__(self, last_step=None):
        self.iterates, self.averages, self.losses = {}, {}, {}
        self.last_step = last_step

    def on_step_end(self, args, state, control, *, model, optimizer, **_):
        self.iterates[state.global_step] = copy.deepcopy(model.state_dict())
        average = copy.deepcopy(model)
        for p, q in zip(model.parameters(), average.parameters(), strict=True):
            q.detach().copy_(optimizer.state[p]["ax"])
        self.averages[state.global_step] = average.state_dict()
        control.should_training_stop |= state.global_step == self.last_step

    def on_evaluate(self, args, state, control, *, metrics, **_):
        self.losses[state.global_step] = metrics["eval_loss"]


def trained(make, folder, *, steps=STEPS, last_step=None, resume=None, **arguments):
    """A Trainer that has trained, with what it has seen."""
    model, watch = Regression(), Watch(last_step)
    optimizer = make(model.parameters(), **OPTIONS)
    options = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**{**options, **arguments}),
        train_dataset=TRAINING,
        eval_dataset=VALIDATION,
        optimizers=(optimizer, None),
        callbacks=[watch],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def loss_of(weights):
    model = Regression()
    model.load_state_dict(weights)
    x, labels = (torch.stack([row[name] for row in VALIDATION]) for name in ("x", "labels"))
    with torch.no_grad():
        return model(x, labels)["loss"].item()


def same_weights(ours, theirs):
    for name, value in theirs.items():
        same(ours[name].detach(), value)


def torchs(params, **options):
    return torch.optim.ASGD(params, foreach=False, **options)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return trained(torchs, tmp_path_factory.mktemp("theirs"))[1]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    return (*trained(TrainEvalASGD, folder), folder)


def test_training_has_the_bits_of_torch_and_evaluations_are_of_averages(ours, theirs):
    _, watch, _ = ours
    assert list(watch.iterates) == list(range(1, STEPS + 1))
    for step, weights in theirs.iterates.items():
        same_weights(watch.iterates[step], weights)
    assert list(watch.losses) == [5, 10, 15, 20, 24]
    for step, loss in watch.losses.items():
        assert loss == pytest.approx(loss_of(theirs.averages[step]), rel=1e-6)
    assert watch.losses[20] != pytest.approx(theirs.losses[20], rel=1e-2)


def test_a_checkpoint_after_an_evaluation_has_the_averages(ours, theirs):
    from safetensors.torch import load_file

    *_, folder = ours
    same_weights(load_file(folder / "checkpoint-10" / "model.safetensors"), theirs.averages[10])


@pytest.mark.parametrize("step", [10, 12], ids=["eval", "train"])
def test_a_run_resumed_from_a_checkpoint_goes_on_bit_for_bit(theirs, tmp_path, step):
    """From one that follows an evaluation, in eval mode, and from one that does not."""
    trained(TrainEvalASGD, tmp_path, steps=step + 1, save_steps=step)
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    _, watch = trained(TrainEvalASGD, tmp_path, resume=checkpoint)
    assert list(watch.iterates) == list(range(step + 1, STEPS + 1))
    for k, weights in watch.iterates.items():
        same_weights(weights, theirs.iterates[k])
        same_weights(watch.averages[k], theirs.averages[k])


@pytest.mark.parametrize("last_step", [20, 22], ids=["eval", "train"])
def test_the_best_weights_are_those_that_scored_best(theirs, tmp_path, last_step):
    """Whichever mode the training ended in, and in evaluations afterwards, too."""
    trainer, watch = trained(
        TrainEvalASGD,
        tmp_path,
        last_step=last_step,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # an early one is then the best
    )
    best = max(watch.losses, key=watch.losses.get)
    assert best < max(watch.losses) == 20
    same_weights(trainer.model.state_dict(), theirs.averages[best])
    if last_step == 20:
        metrics = trainer.evaluate()
    else:
        with pytest.warns(UserWarning, match="^eval: the params were written since the last step"):
            metrics = trainer.evaluate()
    assert metrics["eval_loss"] == watch.losses[best]
    same_weights(trainer.model.state_dict(), theirs.averages[best])


def test_the_averages_are_shipped_by_eval_and_save_model(theirs, tmp_path):
    from safetensors.torch import load_file

    trainer, _ = trained(TrainEvalASGD, tmp_path, eval_strategy="no", save_strategy="no")
    trainer.optimizer.eval()
    trainer.save_model(str(tmp_path / "shipped"))
    same_weights(load_file(tmp_path / "shipped" / "model.safetensors"), theirs.averages[STEPS])
