"""Train a small convolutional network on handwritten digits with torch, twice at once.

One of two equal networks is stepped by asgd_fast.ASGD, the other by torch.optim.ASGD. In the end
their parameters are compared bit by bit, and the time that each optimizer took for its steps. The
accuracy of the last iterate and of the average on held-out images is printed and plotted, beside
both times.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import NoReturn

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from digits import LABELS, draw
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from asgd_fast import ASGD

BATCH = 4
OPTIMIZERS: tuple[type[torch.optim.ASGD], ...] = (ASGD, torch.optim.ASGD)


def network() -> nn.Sequential:
    """Return an untrained network for images of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


class Training:
    """A network, its optimizer, and the seconds that the optimizer has taken."""

    def __init__(self, seed: int, optimizer_type: type[torch.optim.ASGD], t0: int) -> None:
        torch.manual_seed(seed)
        self.model = network()
        self.optimizer = optimizer_type(
            self.model.parameters(), lr=0.2, lambd=0.0, t0=t0, weight_decay=1e-4
        )
        self.seconds = 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Learn from one batch."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(images), labels).backward()
        start = perf_counter()
        self.optimizer.step()
        self.seconds += perf_counter() - start

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images that the model gets right."""
        return float((self.model(images).argmax(dim=1) == labels).double().mean())

    def accuracies(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Return the accuracy of the last iterate, and of the average."""
        assert isinstance(self.optimizer, ASGD)  # torch's has no averaged_parameters
        last = self.accuracy(images, labels)
        if not self.optimizer.is_averaging:
            return last, last
        with self.optimizer.averaged_parameters():
            return last, self.accuracy(images, labels)

    def tensors(self) -> list[Tensor]:
        """Return all that was learnt: the parameters and their averages."""
        params = list(self.model.parameters())
        return [*params, *(self.optimizer.state[param]["ax"] for param in params)]


def train(
    seed: int, epochs: int, progress: tqdm[NoReturn]
) -> tuple[list[tuple[float, float]], list[Training]]:
    """Train both networks; return ours' accuracies after each epoch, and both."""
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = (
        torch.tensor(x)
        for x in train_test_split(
            (images / 16).astype(np.float32).reshape(-1, 1, 8, 8),
            labels,
            test_size=0.5,
            random_state=seed,
            stratify=labels,
        )
    )
    batches_per_epoch = -(-len(train_images) // BATCH)
    both = [Training(seed, optimizer, t0=batches_per_epoch) for optimizer in OPTIMIZERS]
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for _ in range(epochs):
        for batch in torch.randperm(len(train_images), generator=generator).split(BATCH):
            for training in both:
                training.step(train_images[batch], train_labels[batch])
        curve.append(both[0].accuracies(test_images, test_labels))
        progress.update()
    return curve, both


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two float32 tensors are equal bit by bit."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def plot(curves: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64], path: Path) -> None:
    """Draw the accuracies of ours, and the time that both optimizers took."""
    figure, (left, right) = plt.subplots(
        ncols=2, figsize=(9, 4.2), width_ratios=(3, 1), layout="constrained"
    )
    draw(left, curves, "A small convolutional network on handwritten digits")
    settled = 100 * curves[:, curves.shape[1] // 3 :]  # the first epochs would flatten the others
    left.set_ylim(settled.min() - 0.3, settled.max() + 0.3)
    bars = right.bar(["asgd_fast", "torch"], seconds, color=("tab:blue", "tab:gray"))
    right.bar_label(bars, [f"{x:.2f} s" for x in seconds])
    right.set(title="The same bits", ylabel="time in optimizer.step() (s)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train with each seed, compare the optimizers, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: 5)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each (default: 12)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="of the plot (default: this one)"
    )
    arguments = parser.parse_args()
    path = arguments.folder / "digits_torch.png"

    curves, equal, seconds = [], True, np.zeros(2)
    with tqdm(total=arguments.seeds * arguments.epochs, desc="training", unit="epoch") as progress:
        for seed in range(arguments.seeds):
            curve, (ours, theirs) = train(seed, arguments.epochs, progress)
            curves.append(curve)
            seconds += ours.seconds, theirs.seconds
            equal &= all(map(same_bits, ours.tensors(), theirs.tensors()))

    print(f"final parameters and averages of both optimizers equal, bit by bit: {equal}")
    print(
        f"time in optimizer.step: asgd_fast {seconds[0]:.2f} s, torch {seconds[1]:.2f} s, "
        f"{seconds[1] / seconds[0]:.1f} times as much"
    )
    print(f"test accuracy over {arguments.seeds} seeds, after {arguments.epochs} epochs:")
    percent = 100 * np.array(curves)
    for k, label in enumerate(LABELS):
        final = percent[:, -1, k]
        print(
            f"  {label:<12}  mean {final.mean():.1f} %, "
            f"from {final.min():.1f} to {final.max():.1f} %"
        )
    plot(percent / 100, seconds, path)
    print(f"plot: {path.resolve()}")
    if not equal:
        raise SystemExit("the optimizers differ")


if __name__ == "__main__":
    main()
