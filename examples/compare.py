"""Compare averages of iterates with last iterates, and ways to average with each other.

Three models, the softmax and the network of the digits and the language model, are trained by SGD
with a learning rate that is constant or falls, stepwise or linearly, and by schedule-free SGD.
Averaging does not change the iterates, so all averages of a training are taken at once: those of
`ASGD`, and those of `torch.optim.swa_utils.AveragedModel`. Each contender has the learning rate
that is best for it on the validation part; its test error is shown.

Every training is kept in compare.json as soon as it is done, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import language_model
import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from digits_torch import BATCH, network
from schedulefree import SGDScheduleFree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asgd_fast import ASGD, NonMonotonicTrigger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from torch.optim import Optimizer

Floats = npt.NDArray[np.float64]


class Score(NamedTuple):
    """The error of a model on two parts of the data; less is better."""

    validation: float
    test: float


class Problem(ABC):
    """A model that can be trained and scored; each instance starts from its seed."""

    model: nn.Module
    steps_per_epoch: int

    @abstractmethod
    def train(self, optimizer: Optimizer) -> None:
        """Make the steps of an epoch."""

    @abstractmethod
    def score(self, model: nn.Module) -> Score:
        """Return the errors of a model of the kind of this one."""


@cache
def images(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return half of the digits for training, and a quarter each for validation and test."""
    x, labels = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, rest_x, train_y, rest_y = train_test_split(
        x, labels, test_size=0.5, random_state=seed, stratify=labels
    )
    parts = train_test_split(rest_x, rest_y, test_size=0.5, random_state=seed, stratify=rest_y)
    val_x, test_x, val_y, test_y = parts
    pairs = {"train": (train_x, train_y), "validation": (val_x, val_y), "test": (test_x, test_y)}
    return {name: (torch.tensor(x), torch.tensor(y)) for name, (x, y) in pairs.items()}


class Digits(Problem):
    """Handwritten digits in batches of 4; the error is the share of images that are taken wrong."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.parts = images(seed)
        self.steps_per_epoch = -(-len(self.parts["train"][0]) // BATCH)
        self.model = self.make()

    def make(self) -> nn.Module:
        """Return a softmax classifier."""
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def train(self, optimizer: Optimizer) -> None:
        """Make the steps of an epoch."""
        x, labels = self.parts["train"]
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x[batch]), labels[batch]).backward()
            optimizer.step()

    @torch.no_grad()
    def score(self, model: nn.Module) -> Score:
        """Return the per cent of images that a model takes for another digit."""
        parts = (self.parts["validation"], self.parts["test"])
        return Score(*(100 * float((model(x).argmax(1) != y).double().mean()) for x, y in parts))


class Network(Digits):
    """The same with the convolutional network of digits_torch.py."""

    def make(self) -> nn.Module:
        """Return a network of two convolutions."""
        return network()


class Language(Problem):
    """The language model of language_model.py; the error is the perplexity."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.training, *self.held_out = language_model.texts()
        self.steps_per_epoch = -(-(len(self.training) - 1) // language_model.WINDOW)
        self.model = language_model.LanguageModel()

    def train(self, optimizer: Optimizer) -> None:
        """Make the steps of an epoch."""
        language_model.read(self.model, self.training, optimizer)

    def score(self, model: nn.Module) -> Score:
        """Return the perplexities of a model."""
        losses = (language_model.read(model, text) for text in self.held_out)
        # Not a number where the model has diverged, which would be refused as a loss.
        return Score(*(math.exp(loss) if loss < 100 else math.inf for loss in losses))


@dataclass(frozen=True)
class Task:
    """How a problem is compared: learning rates are chosen with some seeds, scored with all."""

    title: str
    error: str
    problem: Callable[[int], Problem]
    schedules: tuple[str, ...]
    rates: tuple[float, ...]
    weight_decay: float
    epochs: int
    patience: int
    seeds: int
    choosing: int


FREE = "schedule-free"

TASKS = {
    "softmax": Task(
        "digits, softmax",
        "test error (%)",
        Digits,
        schedules=("constant", "steps", "linear", FREE),
        rates=(0.03, 0.1, 0.3, 1.0, 3.0),
        weight_decay=1e-3,
        epochs=20,
        patience=5,
        seeds=5,
        choosing=2,
    ),
    "network": Task(
        "digits, convolutions",
        "test error (%)",
        Network,
        schedules=("constant", "steps", "linear", FREE),
        rates=(0.05, 0.1, 0.2, 0.4),
        weight_decay=1e-4,
        epochs=12,
        patience=5,
        seeds=3,
        choosing=1,
    ),
    "language": Task(
        "language model",
        "test perplexity",
        Language,
        schedules=("constant", "steps", FREE),
        rates=(10.0, 20.0, 40.0),
        weight_decay=language_model.WEIGHT_DECAY,
        epochs=12,
        patience=2,
        seeds=3,
        choosing=1,
    ),
}


def step_decay(progress: float) -> float:
    """Return the share of lr that is left: a tenth after half of the steps, then a hundredth."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "steps": step_decay,
    "linear": lambda progress: 1.0 - progress,
}
EMA_DECAYS = (0.99, 0.999)
EMA = "EMA of swa_utils, decay"

# What the plot shows against lr.
COLORS = {
    "constant: SGD": "tab:orange",
    "constant: ASGD after half of the steps": "tab:blue",
    f"constant: {EMA} 0.99": "tab:purple",
    "steps: SGD": "tab:green",
    "linear: SGD": "tab:red",
    "schedule-free SGD": "tab:gray",
}

Record = dict[str, Any]


def train_by_sgd(task: Task, schedule: str, lr: float, seed: int) -> Record:
    """Train by SGD; return the scores of the last iterate and of all averages.

    ``starts[e]`` is the score of the average of all iterates after epoch e. It comes from sums in
    float64, and is what `ASGD` with that t0 has but for its rounding: one `ASGD` cannot begin at
    all of them. "ema" are those of torch's EMA function, begun with the untrained model; an
    `AveragedModel` begins with the first iterate, and gives it as much weight. That is not so with
    `ASGD(averaging=("ema", decay))`, which normalizes its weights.
    """
    problem = task.problem(seed)
    model = problem.model
    optimizer = ASGD(
        model.parameters(),
        lr=lr,
        lambd=0.0,
        weight_decay=task.weight_decay,
        lr_schedule="current",  # the iterates are those of torch.optim.SGD
    )
    trigger = NonMonotonicTrigger(optimizer, task.patience)
    swa = AveragedModel(model)
    first = parameters_to_vector(model.parameters()).detach().double()
    total = torch.zeros_like(first)
    emas = {decay: first.clone() for decay in EMA_DECAYS}
    n_steps = 0

    @torch.no_grad()
    def after_step(*_: object) -> None:
        nonlocal n_steps
        n_steps += 1
        progress = n_steps / (task.epochs * problem.steps_per_epoch)
        optimizer.param_groups[0]["lr"] = lr * SCHEDULES[schedule](progress)
        iterate = parameters_to_vector(model.parameters()).double()
        total.add_(iterate)
        for decay, ema in emas.items():
            get_ema_multi_avg_fn(decay)([ema], [iterate], n_steps)

    optimizer.register_step_post_hook(after_step)
    totals = []  # before each epoch
    fired = None
    for epoch in range(1, task.epochs + 1):
        totals.append(total.clone())
        problem.train(optimizer)
        if epoch > task.epochs // 2:
            swa.update_parameters(model)
        if trigger.step(problem.score(model).validation):
            fired = epoch

    record: Record = {"fired": fired, "last": problem.score(model)}
    with optimizer.averaged_parameters() if optimizer.is_averaging else nullcontext():
        record["nt"] = problem.score(model)
    record["swa"] = problem.score(swa.module)

    def score(average: Tensor) -> Score:
        vector_to_parameters(average.float(), model.parameters())
        return problem.score(model)

    record |= {f"ema {decay}": score(ema) for decay, ema in emas.items()}
    record["starts"] = [
        score((total - before) / ((task.epochs - epoch) * problem.steps_per_epoch))
        for epoch, before in enumerate(totals)
    ]
    return record


def train_schedule_free(task: Task, lr: float, seed: int) -> Record:
    """Train by schedule-free SGD, with a warm-up of a twentieth of the steps."""
    problem = task.problem(seed)
    optimizer = SGDScheduleFree(
        problem.model.parameters(),
        lr=lr,
        weight_decay=task.weight_decay,
        warmup_steps=task.epochs * problem.steps_per_epoch // 20,
    )
    optimizer.train()
    for _ in range(task.epochs):
        problem.train(optimizer)
    optimizer.eval()
    return {"last": problem.score(problem.model)}


class Contender(NamedTuple):
    """What is trained, and which of its scores counts: a name, or that of averages after epochs."""

    label: str
    schedule: str
    key: str | int

    def score(self, record: Record) -> Score:
        """Return the contender's score in a training."""
        if self.key == "half":
            return Score(*record["starts"][len(record["starts"]) // 2])
        if isinstance(self.key, int):
            return Score(*record["starts"][self.key])
        return Score(*record[self.key])


CONTENDERS = (
    Contender("constant: SGD", "constant", "last"),
    Contender("constant: ASGD from the start", "constant", 0),
    Contender("constant: ASGD after one epoch", "constant", 1),
    Contender("constant: ASGD after half of the steps", "constant", "half"),
    Contender("constant: NT-ASGD", "constant", "nt"),
    Contender("constant: SWA, once an epoch, after half", "constant", "swa"),
    *(Contender(f"constant: {EMA} {x}", "constant", f"ema {x}") for x in EMA_DECAYS),
    Contender("steps: SGD", "steps", "last"),
    Contender("steps: ASGD after half of the steps", "steps", "half"),
    Contender("steps: SWA, once an epoch, after half", "steps", "swa"),
    *(Contender(f"steps: {EMA} {x}", "steps", f"ema {x}") for x in EMA_DECAYS),
    Contender("linear: SGD", "linear", "last"),
    Contender("linear: ASGD after half of the steps", "linear", "half"),
    Contender("schedule-free SGD", FREE, "last"),
)


class Runs:
    """The trainings that are done, by task, schedule, learning rate and seed, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, schedule: str, lr: float, seed: int) -> Record:
        """Return a training's scores; train if that is yet to be done."""
        key = f"{name}, {schedule}, lr {lr:g}, seed {seed}"
        if key not in self.records:
            print(key, flush=True)
            task = TASKS[name]
            if schedule == FREE:
                self.records[key] = train_schedule_free(task, lr, seed)
            else:
                self.records[key] = train_by_sgd(task, schedule, lr, seed)
            self.path.write_text(json.dumps(self.records, indent=0))
        return self.records[key]

    def choose(self, name: str, contender: Contender) -> float:
        """Return the learning rate with the least mean error on the validation part."""
        task = TASKS[name]

        def error(lr: float) -> float:
            return float(self.mean(name, contender, lr, task.choosing)[0])

        return min(task.rates, key=error)

    def scores(self, name: str, contender: Contender, lr: float, seeds: int) -> Floats:
        """Return validation and test errors, (seeds, 2)."""
        return np.array(
            [contender.score(self.get(name, contender.schedule, lr, x)) for x in range(seeds)]
        )

    def mean(self, name: str, contender: Contender, lr: float, seeds: int) -> Floats:
        """Return the mean validation and test error."""
        mean: Floats = self.scores(name, contender, lr, seeds).mean(axis=0)
        return mean


def table(runs: Runs, names: Sequence[str]) -> str:
    """Return the test errors of all contenders as Markdown: mean, range over seeds, and lr."""
    tasks = [TASKS[name] for name in names]
    heads = [f"{x.title}: {x.error} | lr |" for x in tasks]
    lines = [" ".join(["| |", *heads])]
    lines.append("| --- |" + " --- |" * (2 * len(tasks)))
    for contender in CONTENDERS:
        line = f"| {contender.label} |"
        for name in names:
            if contender.schedule not in TASKS[name].schedules:
                line += " | |"
                continue
            lr = runs.choose(name, contender)
            test = runs.scores(name, contender, lr, TASKS[name].seeds)[:, 1]
            line += f" {test.mean():.3g} ({test.min():.3g} to {test.max():.3g}) | {lr:g} |"
        lines.append(line)
    return "\n".join(lines)


def draw_rates(axes: Axes, runs: Runs, name: str) -> None:
    """Draw the errors of some contenders against lr."""
    task = TASKS[name]
    bests = []
    for contender in CONTENDERS:
        if contender.label in COLORS and contender.schedule in task.schedules:
            errors = [runs.mean(name, contender, lr, task.choosing)[1] for lr in task.rates]
            color = COLORS[contender.label]
            axes.plot(task.rates, errors, marker="o", color=color, label=contender.label)
            bests.append(min(errors))
    axes.set(xscale="log", xlabel="lr", title=task.title)
    axes.set(ylim=(0.9 * min(bests), 1.6 * max(bests)))
    axes.set_xticks(task.rates, [f"{lr:g}" for lr in task.rates])
    axes.minorticks_off()


def draw_starts(axes: Axes, runs: Runs, name: str) -> None:
    """Draw the errors of averages against the epoch in which they begin."""
    task = TASKS[name]
    for schedule, color in (("constant", "tab:blue"), ("steps", "tab:green")):
        lr = runs.choose(name, Contender("", schedule, "half"))
        keys = [*range(task.epochs), "last"]
        contenders = [Contender("", schedule, key) for key in keys]
        *errors, last = [runs.mean(name, x, lr, task.seeds)[1] for x in contenders]
        label = f"{schedule}, lr {lr:g}"
        axes.plot(range(task.epochs), errors, color=color, label=f"average: {label}")
        axes.axhline(last, color=color, linestyle=":", label=f"last iterate: {label}")
    axes.set(xlabel="averaging begins after epoch")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.4 * (top - bottom))  # room for the legend
    axes.legend(fontsize="x-small", loc="upper right")


def plot(runs: Runs, names: Sequence[str], path: Path) -> None:
    """Draw the errors against lr, and against the epoch in which averaging begins."""
    figure, rows = plt.subplots(
        2, len(names), figsize=(4.2 * len(names), 7), layout="constrained", squeeze=False
    )
    for name, upper, lower in zip(names, *rows, strict=True):
        draw_rates(upper, runs, name)
        draw_starts(lower, runs, name)
        for axes in (upper, lower):
            axes.set(ylabel=TASKS[name].error)
            axes.grid(alpha=0.3)
    lines = {x.get_label(): x for upper in rows[0] for x in upper.get_lines()}
    figure.legend(handles=[*lines.values()], loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Train what is yet to be trained, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tasks", nargs="*", default=[*TASKS], help=f"of {', '.join(TASKS)}")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="of compare.json and plot (default: this one)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the models are so small that a second thread slows them down
    runs = Runs(arguments.folder / "compare.json")
    print(table(runs, arguments.tasks))
    plot(runs, arguments.tasks, arguments.folder / "compare.png")


if __name__ == "__main__":
    main()
