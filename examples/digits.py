"""Train a softmax classifier on 1,797 handwritten digits with NumPy and asgd_fast alone.

Batches of 4 images and a constant step make the iterates noisy; their average settles. The accuracy
of both on held-out images is printed and plotted over the epochs, for several seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from asgd_fast import ArrayASGD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

BATCH = 4
LR = 0.5
WEIGHT_DECAY = 1e-3
LABELS = ("last iterate", "average")


def gradients(
    images: Floats, labels: Labels, weights: Floats, bias: Floats
) -> tuple[Floats, Floats]:
    """Return the gradients of the mean cross-entropy for the weights and the bias."""
    logits = images @ weights + bias
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    probabilities[np.arange(len(labels)), labels] -= 1
    probabilities /= np.float32(len(labels))
    return images.T @ probabilities, probabilities.sum(axis=0)


def accuracy(images: Floats, labels: Labels, weights: Floats, bias: Floats) -> float:
    """Return the share of images whose largest logit is their label's."""
    return float(np.mean((images @ weights + bias).argmax(axis=1) == labels))


def train(seed: int, epochs: int, progress: tqdm[NoReturn]) -> list[tuple[float, float]]:
    """Train once; return the test accuracy of the last iterate and of the average per epoch."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.5, random_state=seed, stratify=labels
    )
    batches_per_epoch = -(-len(train_images) // BATCH)

    weights, bias = np.zeros((64, 10), np.float32), np.zeros(10, np.float32)
    optimizer = ArrayASGD(
        [weights, bias], lr=LR, lambd=0.0, t0=batches_per_epoch, weight_decay=WEIGHT_DECAY
    )
    rng = np.random.default_rng(seed)
    curve = []
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(train_images)), batches_per_epoch):
            optimizer.step(gradients(train_images[batch], train_labels[batch], weights, bias))
        last = average = accuracy(test_images, test_labels, weights, bias)
        if optimizer.is_averaging:
            average = accuracy(test_images, test_labels, *optimizer.averages)
        curve.append((last, average))
        progress.update()
    return curve


def draw(axes: Axes, curves: npt.NDArray[np.float64], title: str) -> None:
    """Draw both accuracies over the epochs: the mean over seeds, and their range as a band."""
    epochs = np.arange(1, curves.shape[1] + 1)
    for k, (label, color) in enumerate(zip(LABELS, ("tab:orange", "tab:blue"), strict=True)):
        percent = 100 * curves[:, :, k]
        axes.plot(epochs, percent.mean(axis=0), color=color, label=label)
        axes.fill_between(
            epochs, percent.min(axis=0), percent.max(axis=0), color=color, alpha=0.2, linewidth=0
        )
    axes.set(
        title=title,
        xlabel="epoch (averaging starts after the first)",
        ylabel="test accuracy (%)",
        xlim=(1, len(epochs)),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(title=f"mean and range of {len(curves)} seeds", loc="lower right")


def plot(curves: npt.NDArray[np.float64], path: Path, title: str) -> None:
    """Draw both accuracies into a file."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes, curves, title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train with each seed, print the accuracies and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: 5)")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of each (default: 30)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="of the plot (default: this one)"
    )
    arguments = parser.parse_args()
    path = arguments.folder / "digits.png"

    total = arguments.seeds * arguments.epochs
    with tqdm(total=total, desc="training", unit="epoch") as progress:
        curves = np.array(
            [train(seed, arguments.epochs, progress) for seed in range(arguments.seeds)]
        )

    print(f"test accuracy over {arguments.seeds} seeds, after {arguments.epochs} epochs:")
    for k, label in enumerate(LABELS):
        final = 100 * curves[:, -1, k]
        wander = 100 * curves[:, arguments.epochs // 2 :, k].std(axis=1).mean()
        print(
            f"  {label:<12}  mean {final.mean():.1f} %, from {final.min():.1f} to "
            f"{final.max():.1f} %; moves by {wander:.2f} points from epoch to epoch"
        )
    plot(curves, path, "Softmax on handwritten digits, constant step, batches of 4")
    print(f"plot: {path.resolve()}")


if __name__ == "__main__":
    main()
