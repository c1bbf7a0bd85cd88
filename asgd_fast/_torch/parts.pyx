"""The part of a DTensor on this rank, found as fast as that of a step of many params must be.

This module knows DTensors by what is the same on all ranks; see distributed.py for the rest.
"""

import sys

from asgd_fast._torch.memory cimport is_ordinary

from asgd_fast._torch.internals import local_tensor, spec_of

cdef object _dtensor = None  # the class, once somebody has imported it

# Placements that were found to have no sums, by identity or equality: to ask each of them takes ten
# times as long, and most params of a model have the same. They cannot change.
cdef object _without_sums = None


cpdef bint is_dtensor(object tensor) except -1:
    """Whether it is a DTensor, and no subclass; without importing what makes them."""
    global _dtensor
    if _dtensor is None:
        _dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return type(tensor) is _dtensor


cpdef bint has_sums(object tensor) except -1:
    """Whether the elements of a DTensor are sums over the ranks."""
    global _without_sums
    placements = spec_of(tensor).placements
    if placements is _without_sums or placements == _without_sums:
        return False
    for each in placements:
        if each.is_partial():
            return True
    _without_sums = placements
    return False


cpdef bint are_alike(object tensor, object other) except -1:
    """Whether elements stand in the same places of two DTensors."""
    one, two = spec_of(tensor), spec_of(other)
    if one is two:
        return True
    return (
        one.placements == two.placements
        and (one.mesh is two.mesh or one.mesh == two.mesh)
        and one.tensor_meta.shape == two.tensor_meta.shape
    )


cpdef object part_of(object tensor, object like=None):
    """Return the ordinary tensor that a DTensor has on this rank; else None.

    Parameters
    ----------
    tensor : object
    like : DTensor, optional
        None is returned, too, if elements stand in other places of it.
    """
    if not is_dtensor(tensor):
        return None
    if has_sums(tensor) if like is None else not are_alike(tensor, like):
        return None
    part = local_tensor(tensor)
    return part if is_ordinary(part) else None
