"""Large tables in huge pages: rows looked up anywhere in many gigabytes otherwise miss the CPU's cache of addresses."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

_HUGE = 2 * 2**20
_ADVICE = ("MADV_DONTNEED", "MADV_HUGEPAGE")


def zero_in_huge_pages(tensor: Tensor) -> bool:
    """Make a contiguous tensor zero, on CPU in huge pages where the system has some; whether it will try.

    The tensor's memory must be its own, no file's. What was written to before keeps its small pages. So those are given
    back, and come anew, as zeros and huge, when they are next used.
    """
    storage = tensor.untyped_storage()
    begin = -(-tensor.data_ptr() // _HUGE) * _HUGE
    size = (tensor.data_ptr() + tensor.nbytes - begin) // _HUGE * _HUGE
    known = all(hasattr(mmap, name) for name in _ADVICE)
    if tensor.device.type != "cpu" or storage.is_shared() or not known or size <= 0:
        tensor.zero_()
        return False
    flat = tensor.view(-1)
    first = begin - tensor.data_ptr()
    flat[: -(-first // tensor.itemsize)].zero_()
    flat[(first + size) // tensor.itemsize :].zero_()
    madvise = ctypes.CDLL(None).madvise
    given_back, huge = (
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), getattr(mmap, name)) == 0 for name in _ADVICE
    )
    if not given_back:
        tensor.zero_()
    return bool(huge)
