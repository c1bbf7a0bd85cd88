# The scalars of one param, of which eta and mu are those of its next step.
cdef struct Scalars:
    double step
    double eta
    double mu

# The hyperparameters of a group, and how its scalars are rounded.
cdef struct Plan:
    double lr
    int lr_size          # bytes of an lr that is a tensor, in whose dtype eta is computed; else 0
    double lambd
    double alpha
    double t0
    double average_every
    double ema_decay     # of the weights with each averaged iterate; 1: none
    double power         # with which the weights grow; 0: they are equal
    bint current         # whether lr acts at once, and the decay of eta begins with averaging
    double weight_decay
    double grad_scale    # negative to maximize
    bint float_step      # whether step is kept in float32
    bint float_next      # whether the next eta and mu are, eta not if it is computed of a tensor

# What one step does to a param, all in double. Params with the same scalars share it.
cdef struct Step:
    double eta
    double mu            # 1: the average is the param itself
    double decay         # of the param
    double weight_decay
    double grad_scale
    Scalars next         # the scalars after the step

cdef double rounded(double x) noexcept nogil
cdef Plan plan_of(
    double lr, double lambd, double alpha, double t0, double average_every, averaging, bint current,
) except *
cdef void fill(Step *step, const Scalars *now, const Plan *plan) noexcept nogil
cdef bint averages(const Step *step) noexcept nogil
cdef double eta_of(double step, const Plan *plan) noexcept nogil
cdef double mu_of(double step, const Plan *plan) noexcept nogil
