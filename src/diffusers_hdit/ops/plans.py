"""What depends on sizes only, remembered from call to call: indices and masks of attention, tables of positions."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


_MAX_PLANS = 8

_plans: OrderedDict = OrderedDict()
_plans_lock = threading.Lock()


def plan(build: Callable, like: Tensor, *key):
    """`build(*key)` for the sizes, dtype and device in `key`, remembered for the last few of them; `like` is any tensor of
    the computation that it is for."""
    # A traced graph computes the plan itself, once for all layers of one size: it may hold symbolic sizes, and a
    # stored tensor would tie the graph to this cache. Tensor subclasses (fake ones, say) must not leak into it, nor
    # what a CUDA graph that is being captured will only compute when it is replayed.
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return build(*key)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return build(*key)
    key = (build, *key)
    with _plans_lock:
        if key in _plans:
            _plans.move_to_end(key)
            return _plans[key]
    # Tensors made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        made = build(*key[1:])
    with _plans_lock:
        _plans[key] = made
        while len(_plans) > _MAX_PLANS:
            _plans.popitem(last=False)
    return made
