"""The recurrence of eta and mu, for every face and engine. This module knows only numbers."""

from libc.math cimport expm1, floor, fmax, fmod, log, pow

cdef extern from *:
    """
    /* Volatile, since gcc 12 at -O3 drops the conversion of two neighbours to float and back. */
    static inline double asgd_fast_rounded(double x) {
        volatile float rounded = (float)x;
        return rounded;
    }
    """
    double _rounded "asgd_fast_rounded"(double x) noexcept nogil


cdef double rounded(double x) noexcept nogil:
    """A number as float32 has it."""
    return _rounded(x)


cdef Plan plan_of(
    double lr, double lambd, double alpha, double t0, double average_every, averaging, bint current,
) except *:
    """A plan of checked hyperparameters; it has no weight decay, no grad_scale and no rounding."""
    cdef Plan plan = Plan(
        lr=lr, lr_size=0, lambd=lambd, alpha=alpha, t0=t0, average_every=average_every,
        ema_decay=1.0, power=0.0, current=current, weight_decay=0.0, grad_scale=1.0,
        float_step=False, float_next=False)
    if not isinstance(averaging, str):
        kind, number = averaging
        if kind == "ema":
            plan.ema_decay = number
        else:
            plan.power = number
    return plan


cdef void fill(Step *step, const Scalars *now, const Plan *plan) noexcept nogil:
    """Compute one step of a param and its scalars afterwards, in torch's order of operations."""
    cdef double count = now.step + 1
    step.eta = eta_of(now.step, plan) if plan.current else now.eta
    step.mu = now.mu
    if plan.current and now.step <= plan.t0:
        step.decay = 1
    else:
        step.decay = 1.0 - plan.lambd * step.eta
    step.weight_decay = plan.weight_decay
    step.grad_scale = plan.grad_scale
    if plan.float_step:
        count = rounded(count)
    step.next.step = count
    step.next.eta = eta_of(count, plan)
    step.next.mu = mu_of(count, plan)
    if plan.float_step or plan.float_next and plan.lr_size == 0:
        step.next.eta = rounded(step.next.eta)
    if plan.float_next:
        step.next.mu = rounded(step.next.mu)


cdef bint averages(const Step *step) noexcept nogil:
    """Whether the step makes an iterate of the average: the first one, a copy, or a later one."""
    return step.mu != 1 or step.next.mu != 1


cdef double eta_of(double step, const Plan *plan) noexcept nogil:
    """eta after `step` steps."""
    if plan.current:
        step -= plan.t0
        if step <= 0:
            return plan.lr
    elif plan.lr_size == sizeof(float):
        return _eta_of_float(<float>plan.lr, <float>plan.lambd, plan.alpha, <float>step)
    elif plan.lr_size == sizeof(double):
        return plan.lr / _power(1.0 + plan.lambd * plan.lr * step, plan.alpha)
    return plan.lr / pow(1.0 + plan.lambd * plan.lr * step, plan.alpha)


cdef double _eta_of_float(float lr, float lambd, double alpha, float step) noexcept nogil:
    """eta as torch computes it of a float32 tensor: see `_power`."""
    cdef float base = <float>1 + lambd * lr * step
    if alpha == 2:
        return lr / (base * base)
    if alpha == 3:
        return lr / (base * base * base)
    return lr / <float>pow(base, alpha)


cdef double _power(double base, double alpha) noexcept nogil:
    """A power of a tensor of one element, some of which torch has ways of its own to."""
    if alpha == 2:
        return base * base
    if alpha == 3:
        return base * base * base
    return pow(base, alpha)


cdef double mu_of(double step, const Plan *plan) noexcept nogil:
    """mu after `step` steps: the weight of the next iterate, 0 where it is not averaged."""
    cdef double every = plan.average_every, m
    step -= plan.t0
    if every == 1 and plan.ema_decay == 1 and plan.power == 0:
        return 1.0 / fmax(1.0, step)
    step = floor(step - 1)  # how many iterates came after the first of the average
    if step <= 0:
        return 1.0
    if fmod(step, every) != 0:
        return 0.0
    m = step / every + 1
    if plan.ema_decay != 1:  # 1 - decay ** m, without the digits that the power shares with 1
        return (1.0 - plan.ema_decay) / -expm1(m * log(plan.ema_decay))
    return (1.0 + plan.power) / (m + plan.power)


def next_scalars(
    double step, double lr, double lambd, double alpha, double t0,
    double average_every=1, bint current=False, averaging="mean",
):
    """eta and mu for the step that follows `step` steps: at least 1, or at least 0 if `current`.

    The hyperparameters are those of the faces, checked; `current` is ``lr_schedule="current"``.
    """
    cdef Plan plan = plan_of(lr, lambd, alpha, t0, average_every, averaging, current)
    return eta_of(step, &plan), mu_of(step, &plan)
