"""Tensors that depend on sizes only, kept from call to call: indices and masks of attention, tables of positions."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


_MAX_CACHED = 8

_cached: OrderedDict = OrderedDict()
_cache_lock = threading.Lock()


def cached_tensors(build: Callable, like: Tensor, *key):
    """
    Return `build(*key)`, kept for the last few `key`s of sizes, dtype and device.

    Args:
        like: any tensor of the computation that uses the result.
    """
    # A traced graph computes the tensors itself, once for all layers of one size: it may hold symbolic sizes, and a
    # stored tensor would tie the graph to this cache. Tensor subclasses (fake ones, say) must not leak into it, nor
    # what a CUDA graph that is being captured will only compute when it is replayed.
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return build(*key)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return build(*key)
    key = (build, *key)
    with _cache_lock:
        if key in _cached:
            _cached.move_to_end(key)
            return _cached[key]
    # Tensors made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        made = build(*key[1:])
    with _cache_lock:
        _cached[key] = made
        while len(_cached) > _MAX_CACHED:
            _cached.popitem(last=False)
    return made
