# The part of a DTensor on this rank.

cpdef bint is_dtensor(object tensor) except -1
cpdef bint has_sums(object tensor) except -1
cpdef bint are_alike(object tensor, object other) except -1
cpdef object part_of(object tensor, object like=*)
