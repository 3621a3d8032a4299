"""Large tables in huge pages: rows looked up anywhere in many gigabytes otherwise miss the CPU's cache of addresses."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

_HUGE = 2 * 2**20


def prefer_huge_pages(tensor: Tensor) -> bool:
    """Ask the system to hold the memory of a CPU tensor in huge pages as it is first used; whether it will try.

    Best before anything is written there. Without effect where the system has none, and on small tensors.
    """
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // _HUGE) * _HUGE
    size = (storage.data_ptr() + storage.nbytes() - begin) // _HUGE * _HUGE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if tensor.device.type != "cpu" or advice is None or size <= 0:
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    return bool(madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice) == 0)
