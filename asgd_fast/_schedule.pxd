# The scalars of one param after a number of steps.

cdef struct Scalars:
    double step
    double eta
    double mu

# What they follow from.
cdef struct Plan:
    double lr
    double lambd
    double alpha
    double t0
    double average_every
    bint current  # whether lr acts at once, and the decay of eta begins with averaging

cdef Scalars scalars_after(double step, const Plan *plan) noexcept nogil
cdef double decay_of(double eta, double step, const Plan *plan) noexcept nogil
