"""The recurrence of eta and mu, for every face and engine. This module knows only numbers."""

from libc.math cimport fmax, pow


cdef Scalars scalars_after(
    double step, double lr, double lambd, double alpha, double t0,
) noexcept nogil:
    """The scalars after `step` steps, in the order of operations of torch.optim.ASGD."""
    cdef Scalars scalars
    scalars.step = step
    scalars.eta = lr / pow(1.0 + lambd * lr * step, alpha)
    scalars.mu = 1.0 / fmax(1.0, step - t0)
    return scalars


def next_scalars(double step, double lr, double lambd, double alpha, double t0):
    """eta and mu for the step that follows `step` steps.

    Parameters
    ----------
    step : float
        The number of steps made, at least 1.
    lr, lambd, alpha, t0 : float

    Returns
    -------
    eta, mu : float
    """
    cdef Scalars scalars = scalars_after(step, lr, lambd, alpha, t0)
    return scalars.eta, scalars.mu
