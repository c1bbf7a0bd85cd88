# The scalars of one param after a number of steps.

cdef struct Scalars:
    double step
    double eta
    double mu

cdef Scalars scalars_after(
    double step, double lr, double lambd, double alpha, double t0) noexcept nogil
