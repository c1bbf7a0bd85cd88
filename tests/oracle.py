"""What the right result is, written independently of the library under test.

`Reference` is the algorithm as the paper and torch's first listing have it, in torch operations.
`averaged` is its last line alone, on averages of any dtype. `exact_step` follows the numerics
contract in rational arithmetic, with one rounding a line, and does without torch. `weights_of` has
the weights of iterates in an average in closed form, as fractions.
"""

from __future__ import annotations

import math
from contextlib import suppress
from fractions import Fraction

import numpy as np

with suppress(ModuleNotFoundError):
    import torch


class Reference:
    """ASGD of one tensor with scalars in double, operation by operation."""

    def __init__(self, param, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0):
        self.param = param
        self.ax = torch.zeros_like(param)
        self.lr, self.lambd, self.alpha, self.t0 = lr, lambd, alpha, t0
        self.weight_decay = weight_decay
        self.step_count, self.eta, self.mu = 0, lr, 1

    def step(self, grad):
        self.step_count += 1
        if self.weight_decay != 0:
            grad = grad.add(self.param, alpha=self.weight_decay)
        self.param.mul_(1 - self.lambd * self.eta)
        self.param.add_(grad, alpha=-self.eta)
        if self.mu != 1:
            self.ax.add_(self.param.sub(self.ax).mul(self.mu))
        else:
            self.ax.copy_(self.param)
        self.eta = self.lr / math.pow(1 + self.lambd * self.lr * self.step_count, self.alpha)
        self.mu = 1 / max(1, self.step_count - self.t0)


def rounded(value: Fraction, dtype) -> Fraction:
    """Round to the nearest normal number of a float dtype, ties to even."""
    if value == 0:
        return value
    digits = np.finfo(dtype).nmant + 1
    numerator, denominator = abs(value).as_integer_ratio()
    exponent = numerator.bit_length() - denominator.bit_length() - digits
    unit = Fraction(2) ** exponent
    if abs(value) / unit >= 2**digits:
        unit *= 2
    return round(value / unit) * unit


def exact_step(p, g, ax, dtype, *, eta, mu, lambd, weight_decay, maximize, grad_scale):
    """One step of scalars of `dtype`; returns the new p and ax, of that dtype."""

    def scalar(x):
        return rounded(Fraction(x), dtype)

    def fma(x, y, z):
        return rounded(x * y + z, dtype)

    p, g, ax = Fraction(float(p)), Fraction(float(g)), Fraction(float(ax))
    decay = scalar(1 - lambd * eta)
    if grad_scale is not None:
        g = rounded(g * scalar(grad_scale), dtype)
    if maximize:
        g = -g
    if weight_decay != 0:
        g = fma(scalar(weight_decay), p, g)
    p = fma(-scalar(eta), g, rounded(p * decay, dtype))
    moved = rounded(rounded(p - ax, dtype) * scalar(mu), dtype)
    ax = p if mu == 1 else rounded(ax + moved, dtype)
    return dtype(float(p)), dtype(float(ax))


def weights_of(averaging, n):
    """The exact weights of n iterates in their average, which add up to 1.

    Polynomial weights are those of Shamir and Zhang (2013): their recurrence leads to rising
    factorials, i (i + 1) ... (i + power - 1) for the i-th iterate.
    """
    kind, number = ("polynomial", 0) if averaging == "mean" else averaging
    raised = [Fraction(1)]
    for i in range(1, n):
        raised.append(raised[-1] * (i + Fraction(number)) / i)
    decayed = [Fraction(number) ** (n - 1 - i) for i in range(n)]
    weights = decayed if kind == "ema" else raised
    return [weight / sum(weights) for weight in weights]


def reals(tensor):
    """A tensor, or the pairs of reals that a complex one is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def averaged(ax, p, mu):
    """The last lines of torch's step, in place on an average of any dtype."""
    with torch.no_grad():
        if mu == 1:
            ax.copy_(p)
        else:
            reals(ax).add_(reals(p.to(ax.dtype)).sub(reals(ax)).mul_(mu))


def mu_of(step, t0):
    """The weight of the iterate of a step, as torch rounds it."""
    return torch.tensor(1 / max(1, step - 1 - t0))
