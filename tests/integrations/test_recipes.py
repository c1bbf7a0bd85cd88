"""The examples of docs/frameworks.md in their frameworks, beside torch's ASGD in a plain loop."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext
from functools import partial

import pytest
import torch
from integrations.recipes import (
    BATCH,
    BATCHES,
    EPOCHS,
    Module,
    evaluate,
    loader,
    loss_function,
    model,
    pairs,
    run_recipe,
    same_params,
    torchs,
    train,
    validation_loader,
)
from ranks import on_ranks
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from asgd_fast import ASGD, NonMonotonicTrigger

asks_early = pytest.mark.filterwarnings("ignore::asgd_fast.AveragingNotBegunWarning")

# What the frameworks say of themselves and of each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def expected(lr=0.1, lambd=0.0, t0=BATCHES):
    """What validations of averages find in each epoch, and the model at the end."""
    losses, averaged = [], None
    for _, averaged in torchs(lr=lr, lambd=lambd, t0=t0):
        losses.append(evaluate(averaged))
    return losses, averaged


@asks_early
def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    found = []
    names = run_recipe(
        "accelerate",
        {
            "accelerator": accelerate.Accelerator(cpu=True),
            "model": model(),
            "loader": loader(),
            "steps_per_epoch": BATCHES,
            "epochs": EPOCHS,
            "train": train,
            "evaluate": lambda own: found.append(evaluate(own)),
            "folder": tmp_path,
        },
    )
    losses, averaged = expected()
    assert found == pytest.approx(losses, rel=1e-6)
    same_params(names["model"], averaged)
    own, optimizer, accelerator = (names[x] for x in ("model", "optimizer", "accelerator"))
    (theirs, _), *_ = list(torchs(EPOCHS + 1, lr=0.1, lambd=0.0, t0=BATCHES))[::-1]
    accelerator.load_state(tmp_path)
    optimizer.train()
    train(own, optimizer)
    same_params(own, theirs)


def test_skorch():
    skorch = pytest.importorskip("skorch")
    from skorch.helper import predefined_split

    x, y = pairs(BATCHES * BATCH, 1)
    validation = skorch.dataset.Dataset(*validation_loader().dataset.tensors)

    class Net(skorch.NeuralNetRegressor):
        """With what the test prescribes."""

        def __init__(self, *args, **kwargs):
            options = {
                "batch_size": BATCH,
                "max_epochs": EPOCHS,
                "train_split": predefined_split(validation),
                "verbose": 0,
                **kwargs,
            }
            super().__init__(*args, **options)

    names = {
        "NeuralNetRegressor": Net,
        "Module": Module,
        "ASGD": ASGD,
        "nullcontext": nullcontext,
        "x": x.numpy(),
        "y": y.numpy(),
    }
    torch.manual_seed(0)
    net = run_recipe("skorch", names)["net"]
    losses, averaged = expected(t0=20)
    assert net.history[:, "valid_loss"] == pytest.approx(losses, rel=1e-6)
    same_params(net.module_, averaged)
    prediction = torch.tensor(net.predict(x.numpy()))
    torch.testing.assert_close(prediction, averaged(x).detach())


def learner(own):
    """The learner of the example, which it has fitted."""
    basics = pytest.importorskip("fastai.basics")
    dls = basics.DataLoaders(loader(), validation_loader(), device="cpu")
    names = {
        "Callback": basics.Callback,
        "Learner": partial(basics.Learner, train_bn=False),
        "OptimWrapper": basics.OptimWrapper,
        "ASGD": ASGD,
        "ExitStack": ExitStack,
        "partial": partial,
        "dls": dls,
        "model": own,
        "loss_func": loss_function,
    }
    return run_recipe("fastai", names)["learn"]


def test_fastai():
    own = model()
    learn = learner(own)
    losses, averaged = expected()
    assert [row[1] for row in learn.recorder.values] == pytest.approx(losses, rel=1e-6)
    same_params(own, averaged)
    assert learn.validate()[0] == pytest.approx(losses[-1], rel=1e-6)


def test_fastai_goes_on_after_a_validation_that_was_interrupted():
    own = model()
    learn = learner(own)
    basics = pytest.importorskip("fastai.basics")
    iterate = []

    class Interrupts(basics.Callback):
        def after_train(self):
            iterate.append(copy.deepcopy(own))

        def before_batch(self):
            if not self.training:
                raise KeyboardInterrupt

    class Looks(basics.Callback):
        def before_train(self):
            same_params(own, iterate.pop())

    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, lr=0.1, cbs=Interrupts())
    learn.fit(1, lr=0.1, cbs=Looks())
    assert iterate == []
    learn.validate()


def test_ignite(tmp_path):
    pytest.importorskip("ignite")
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Loss

    own, found = model(), []

    def evaluator_that_notes(*args):
        evaluator = create_supervised_evaluator(*args)
        note = lambda engine: found.append(engine.state.metrics["loss"])  # noqa: E731
        evaluator.add_event_handler(Events.COMPLETED, note)
        return evaluator

    names = {
        "Events": Events,
        "Loss": Loss,
        "create_supervised_trainer": create_supervised_trainer,
        "create_supervised_evaluator": evaluator_that_notes,
        "loss_function": loss_function,
        "model": own,
        "optimizer": ASGD(own.parameters(), lr=0.1, lambd=0.0, t0=BATCHES),
        "nullcontext": nullcontext,
        "loader": loader(),
        "validation_loader": validation_loader(),
        "torch": torch,
        "path": tmp_path / "shipped",
    }
    run_recipe("ignite", names)
    losses, averaged = expected()
    assert found == pytest.approx(losses, rel=1e-6)
    shipped = model()
    shipped.load_state_dict(torch.load(names["path"]))
    same_params(shipped, averaged)


def check_recipe_of_ranks(path):
    """Both ranks have the same data; the chosen losses stall after the fourth epoch by mean."""
    torch.set_num_threads(1)
    rank = distributed.get_rank()
    losses = [[1.0] * 9, [9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 11.0, 1.0, 1.0]][rank]
    own = model()
    names = {
        "DistributedDataParallel": DistributedDataParallel,
        "distributed": distributed,
        "ASGD": ASGD,
        "NonMonotonicTrigger": NonMonotonicTrigger,
        "nullcontext": nullcontext,
        "torch": torch,
        "module": own,
        "train": train,
        "evaluate": lambda _: losses.pop(0),
        "epochs": 9,
        "path": path,
    }
    run_recipe("DistributedDataParallel", names)
    start = 7 * BATCHES  # after the seventh evaluation
    *_, (iterate, averaged) = torchs(9, lr=0.1, lambd=0.0, t0=start - 1)
    same_params(own, iterate)
    distributed.barrier()
    shipped = model()
    shipped.load_state_dict(torch.load(path))
    same_params(shipped, averaged)


@pytest.mark.heavy
def test_distributed_data_parallel(tmp_path):
    on_ranks(2, tmp_path, partial(check_recipe_of_ranks, tmp_path / "shipped"))


def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Regression(LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.found = model(), []

        def training_step(self, batch, _):
            return loss_function(self.model(batch[0]), batch[1])

        def validation_step(self, batch, _):
            loss = loss_function(self.model(batch[0]), batch[1])
            self.log("val_loss", loss)
            self.found.append(loss.item())

        test_step = validation_step

        def configure_optimizers(self):
            return ASGD(self.parameters(), lr=0.1, lambd=0.0, t0=BATCHES)

    def trainer(max_epochs, **options):
        return Trainer(
            max_epochs=EPOCHS,
            num_sanity_val_steps=0,
            accelerator="cpu",
            logger=False,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            **options,
        )

    module = Regression()
    names = {
        "Trainer": trainer,
        "ModelCheckpoint": ModelCheckpoint,
        "module": module,
        "loader": loader(),
        "validation_loader": validation_loader(),
        "test_loader": validation_loader(),
    }
    run_recipe("Lightning", names)
    losses, averaged = expected()
    assert module.found == pytest.approx([*losses, losses[-1]], rel=1e-6)
    same_params(module, averaged)


@asks_early
def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    class Regression(Module):
        def forward(self, x, labels):
            return {"loss": loss_function(self.layers(x), labels)}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return None

    def rows(own):
        return [{"x": x, "labels": y} for x, y in own.dataset]

    own = Regression()
    names = {
        "Trainer": InOrder,
        "TrainingArguments": partial(
            transformers.TrainingArguments,
            max_steps=EPOCHS * BATCHES,
            per_device_train_batch_size=BATCH,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        "model": own,
        "data": rows(loader()),
        "validation_data": rows(validation_loader()),
        "steps_per_epoch": BATCHES,
        "folder": str(tmp_path),
    }
    log = run_recipe("transformers", names)["trainer"].state.log_history
    losses, averaged = expected()
    found = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert found == pytest.approx(losses, rel=1e-5)
    shipped = copy.deepcopy(own)
    shipped.load_state_dict(load_file(tmp_path / "model.safetensors"))
    same_params(shipped, averaged)
