"""The recurrence of eta and mu, for every face and engine. This module knows only numbers."""

from libc.math cimport floor, fmax, fmod, pow


cdef Scalars scalars_after(double step, const Plan *plan) noexcept nogil:
    """The scalars after `step` steps, in the order of operations of torch.optim.ASGD."""
    cdef Scalars scalars
    scalars.step = step
    scalars.eta = _eta(step - plan.t0 if plan.current else step, plan)
    scalars.mu = _mu(step - plan.t0, plan.average_every)
    return scalars


cdef double decay_of(double eta, double step, const Plan *plan) noexcept nogil:
    """What the param is multiplied by in the step of that eta, which follows `step` steps."""
    if plan.current and step - plan.t0 <= 0:
        return 1
    return 1.0 - plan.lambd * eta


cdef inline double _eta(double step, const Plan *plan) noexcept nogil:
    if plan.current and step <= 0:
        return plan.lr
    return plan.lr / pow(1.0 + plan.lambd * plan.lr * step, plan.alpha)


cdef inline double _mu(double step, double every) noexcept nogil:
    """The weight of the next iterate; 0 where it is not averaged."""
    if every == 1 or step <= 1:
        return 1.0 / fmax(1.0, step)
    step = floor(step - 1)  # how many iterates came after the first of the average
    return 1.0 / (step / every + 1) if fmod(step, every) == 0 else 0.0


def next_scalars(
    double step, double lr, double lambd, double alpha, double t0,
    double average_every=1, bint current=False,
):
    """eta and mu for the step that follows `step` steps.

    Parameters
    ----------
    step : float
        The number of steps made, at least 1, or at least 0 if `current`.
    lr, lambd, alpha, t0 : float
    average_every : float
        A whole number of steps, at least 1.
    current : bool
        As ``lr_schedule="current"`` has it.

    Returns
    -------
    eta, mu : float
    """
    cdef Plan plan = Plan(lr, lambd, alpha, t0, average_every, current)
    cdef Scalars scalars = scalars_after(step, &plan)
    return scalars.eta, scalars.mu
