"""A module for Lightning with either optimizer, and a callback that notes all that it sees.

Imported by its name, as the processes of ddp do.
"""

from __future__ import annotations

import copy

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from asgd_fast import ASGD

OPTIONS = {"lr": 0.2, "lambd": 1e-3}
BATCHES = 8  # an epoch


def pairs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    return x, x.sum(1, keepdim=True) + torch.randn(n, 1, generator=generator)


def data(n, seed):
    return TensorDataset(*pairs(n, seed))


def training_loader(**options):
    return DataLoader(data(4 * BATCHES, 1), batch_size=4, **options)


def validation_loader():
    return DataLoader(data(16, 2), batch_size=8)


class Regression(LightningModule):
    def __init__(self, optimizer="ours", normalizes=False, dropout=0.2, options=()):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        # In this order: the statistics do not depend on random numbers.
        middle = [nn.BatchNorm1d(8), nn.Dropout(dropout)] if normalizes else []
        self.layers = nn.Sequential(nn.Linear(3, 8), *middle, nn.Tanh(), nn.Linear(8, 1))
        self.options = {**OPTIONS, **dict(options)}

    def forward(self, x):
        return self.layers(x)

    def loss(self, batch):
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, *_):
        """With data of its own, so that a resumed run has the same, whatever its loader does."""
        return self.loss(pairs(4, 100 + 2 * self.global_step + self.global_rank))

    def validation_step(self, batch, _):
        self.log("loss", self.loss(batch), sync_dist=False)

    def test_step(self, batch, _):  # noqa: PT019
        self.log("test", self.loss(batch))

    def predict_step(self, batch, _):
        return self(batch[0])

    def configure_optimizers(self):
        if self.hparams.optimizer == "ours":
            return ASGD(self.parameters(), **self.options)
        return torch.optim.ASGD(self.parameters(), foreach=False, **self.options)


def copied(module):
    return copy.deepcopy(module.state_dict())


class Watch(Callback):
    """Notes iterates and averages after each step, and what stands in the module in validations."""

    def __init__(self):
        self.iterates, self.averages = {}, {}
        self.validated, self.after, self.losses, self.stages = {}, {}, {}, []

    def on_train_batch_end(self, trainer, module, *_):
        step, (optimizer,) = trainer.global_step, trainer.optimizers
        self.iterates[step] = copied(module)
        state = optimizer.state_dict()["state"]
        averages = {
            name: state[i]["ax"].clone() for i, (name, _) in enumerate(module.named_parameters())
        }
        self.averages[step] = {**self.iterates[step], **averages}

    def on_validation_epoch_end(self, trainer, module):
        self.stages.append(str(trainer.state.stage))
        if not trainer.sanity_checking:
            self.validated[trainer.global_step] = copied(module)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.after[trainer.global_step] = copied(module)
            self.losses[trainer.global_step] = trainer.callback_metrics["loss"].item()


def fit(module, *callbacks, folder, epochs=3, resume=None, loader=None, **arguments):
    """A trainer that has fitted a module, with what it has seen."""
    watch = Watch()
    seed_everything(1, verbose=False)
    options = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    trainer = Trainer(callbacks=[*callbacks, watch], **{**options, **arguments})
    trainer.fit(module, loader or training_loader(), validation_loader(), ckpt_path=resume)
    return trainer, watch


class Losses(Callback):
    """Logs losses that were chosen for each rank, and notes where averaging has begun."""

    def __init__(self, *losses):
        self.losses, self.is_averaging = losses, {}

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            module.log("chosen", self.losses[trainer.global_rank].pop(0))

    def on_train_batch_end(self, trainer, *_):
        self.is_averaging[trainer.global_step] = trainer.optimizers[0].is_averaging


class Leave(Callback):
    """Leaves what each rank has seen in a file."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, module):
        watch = next(x for x in trainer.callbacks if isinstance(x, Watch))
        seen = {
            "iterates": watch.iterates,
            "averages": watch.averages,
            "validated": watch.validated,
            "left": copied(module),
        }
        torch.save(seen, self.folder / str(trainer.global_rank))
