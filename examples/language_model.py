"""Train a small language model on Python's own documentation by SGD, ASGD and NT-ASGD.

In the manner of AWD-LSTM (Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language
Models", 2017): an LSTM predicts each word from those before it, its embedding is the softmax layer
too, dropout keeps its mask over time, and the learning rate is large and constant, so that the
iterates keep moving about a minimum. The text is that of `help()`, which comes with Python and
differs a little between its versions, and so do the perplexities.

ASGD averages from the start, NT-ASGD from when the validation loss stalls. Averaging does not
change the iterates, so "SGD" is not trained apart: it is the last iterate of the training whose
average is "ASGD from the start".
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, NoReturn

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from tqdm import tqdm

from asgd_fast import ASGD, NonMonotonicTrigger

if TYPE_CHECKING:
    from torch.optim import Optimizer

Floats = npt.NDArray[np.float64]

VOCABULARY = 1000
WIDTH = 96
BATCH = 20  # columns of text that are read side by side
WINDOW = 35  # words through which gradients flow back
# Tuned on the validation text: with less dropout or decay, the model overfits before SGD stalls.
LR = 20.0
CLIP = 0.25
WEIGHT_DECAY = 4e-5
DROPOUT = 0.4
PATIENCE = 5

LABELS = ("SGD", "ASGD from the start", "NT-ASGD")
COLORS = ("tab:orange", "tab:green", "tab:blue")


def texts() -> list[Tensor]:
    """Return the texts for training, validation and test: numbers of words, (length, BATCH)."""
    names = sorted(topics)
    random.Random(0).shuffle(names)
    # Some topics are chapters of others: each paragraph once, lest the test repeat the training.
    paragraphs = list(
        dict.fromkeys(
            tuple(re.findall(r"\w+|[^\w\s]+", paragraph.lower()))
            for name in names
            for paragraph in topics[name].split("\n\n")
        )
    )
    ends = (len(paragraphs) * tenths // 10 for tenths in (0, 8, 9, 10))
    parts = [
        [word for paragraph in paragraphs[start:end] for word in paragraph]
        for start, end in pairwise(ends)
    ]
    unknown = VOCABULARY - 1
    frequent = Counter(parts[0]).most_common(unknown)
    numbers = {word: i for i, (word, _) in enumerate(frequent)}
    rows = [torch.tensor([numbers.get(word, unknown) for word in part]) for part in parts]
    return [x[: len(x) // BATCH * BATCH].view(BATCH, -1).T.contiguous() for x in rows]


class LanguageModel(nn.Module):
    """An LSTM over word embeddings, which are the weights of the softmax layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.softmax = nn.Linear(WIDTH, VOCABULARY)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.softmax.weight = self.embedding.weight

    def drop(self, x: Tensor) -> Tensor:
        """Drop the same features of all words of a column."""
        return x * nn.functional.dropout(torch.ones_like(x[:1]), DROPOUT, self.training)

    def forward(
        self, words: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the logits of each next word, and what the LSTM remembers."""
        x, state = self.lstm(self.drop(self.embedding(words)), state)
        return self.softmax(self.drop(x)), state


def read(model: nn.Module, text: Tensor, optimizer: Optimizer | None = None) -> float:
    """Read a text, and learn from it if there is an optimizer; return the loss of a word."""
    model.train(optimizer is not None)
    state = None
    total = 0.0
    for start in range(0, len(text) - 1, WINDOW):
        words = text[start : start + WINDOW + 1]
        with torch.set_grad_enabled(optimizer is not None):
            logits, state = model(words[:-1], state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), words[1:].flatten())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        state = state[0].detach(), state[1].detach()
        total += loss.item() * (len(words) - 1)
    return total / (len(text) - 1)


def losses(model: LanguageModel, optimizer: ASGD, text: Tensor) -> tuple[float, float]:
    """Return the loss of the last iterate, and of the average; before averaging, they are equal."""
    last = read(model, text)
    if not optimizer.is_averaging:
        return last, last
    with optimizer.averaged_parameters():
        return last, read(model, text)


def train(
    seed: int, epochs: int, progress: tqdm[NoReturn], *, at_once: bool
) -> tuple[Floats, int | None]:
    """Train once, averaging at once or when triggered.

    Return the perplexities of the last iterate and the average, (epochs + 1, 2), on the validation
    text after each epoch and on the test text at the end; and the epoch when the trigger fired.
    """
    torch.manual_seed(seed)
    training, validation, test = texts()
    model = LanguageModel()
    optimizer = ASGD(
        model.parameters(),
        lr=LR,
        lambd=0.0,
        t0=0 if at_once else 1e6,  # more steps than there will be: the trigger is to begin
        weight_decay=WEIGHT_DECAY,
    )
    trigger = NonMonotonicTrigger(optimizer, patience=PATIENCE)
    curve = []
    fired = None
    for epoch in range(1, epochs + 1):
        read(model, training, optimizer)
        curve.append(losses(model, optimizer, validation))
        if not at_once and trigger.step(curve[-1][1]):
            fired = epoch
        progress.update()
    return np.exp([*curve, losses(model, optimizer, test)]), fired


def plot(curves: Floats, fired: list[int], path: Path) -> None:
    """Draw validation perplexities, (seeds, epochs, 3): their mean, and their range as a band."""
    epochs = np.arange(1, curves.shape[1] + 1)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for k, (label, color) in enumerate(zip(LABELS, COLORS, strict=True)):
        curve = curves[:, :, k]
        axes.plot(epochs, curve.mean(axis=0), color=color, label=label)
        axes.fill_between(
            epochs, curve.min(axis=0), curve.max(axis=0), color=color, alpha=0.2, linewidth=0
        )
    for epoch in fired:
        axes.axvline(epoch, color=COLORS[-1], linestyle=":", linewidth=1)
    axes.set(
        title="A small LSTM language model on Python's documentation",
        xlabel="epoch (dotted: NT-ASGD, until then SGD, begins to average; a line for each seed)",
        ylabel="validation perplexity",
        xlim=(1, len(epochs)),
        ylim=(0.95 * curves.min(), 2 * curves.min()),  # the first epochs would flatten the others
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(title=f"mean and range of {len(curves)} seeds", loc="upper right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train with each seed, print the test perplexities and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (default: 3)")
    parser.add_argument("--epochs", type=int, default=32, help="epochs of each (default: 32)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="of the plot (default: this one)"
    )
    arguments = parser.parse_args()
    path = arguments.folder / "language_model.png"
    torch.set_num_threads(1)  # the matrices are so small that a second thread slows them down

    runs, fired = [], []
    total = 2 * arguments.seeds * arguments.epochs
    with tqdm(total=total, desc="training", unit="epoch") as progress:
        for seed in range(arguments.seeds):
            asgd, _ = train(seed, arguments.epochs, progress, at_once=True)
            nt_asgd, epoch = train(seed, arguments.epochs, progress, at_once=False)
            runs.append(np.column_stack([asgd, nt_asgd[:, 1]]))
            fired.append(epoch)
    perplexities = np.array(runs)

    print(f"test perplexity over {arguments.seeds} seeds, after {arguments.epochs} epochs:")
    for label, final in zip(LABELS, perplexities[:, -1].T, strict=True):
        print(
            f"  {label:<19}  mean {final.mean():.1f}, from {final.min():.1f} to {final.max():.1f}"
        )
    print("NT-ASGD began to average after epoch " + ", ".join(str(x or "(never)") for x in fired))
    plot(perplexities[:, :-1], [epoch for epoch in fired if epoch], path)
    print(f"plot: {path.resolve()}")


if __name__ == "__main__":
    main()
