"""Work that several processes share: one computes and all get the answer, or each computes a share."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def is_distributed() -> bool:
    """Return whether this is one of several processes that torch.distributed connects."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def broadcast_from_main(function: Callable[[], object], errors: tuple[type[Exception], ...] = (OSError,)) -> object:
    """
    Call `function` on the main process, and return its result on all of them.

    Raises:
        Exception: on all processes, what it raised, if that is one of `errors`.
    """
    state = PartialState()
    result, raised = None, None
    if state.is_main_process:
        try:
            result = function()
        except errors as error:
            if state.num_processes == 1:
                raise
            raised = error
    if state.num_processes > 1:
        result, raised = broadcast_object_list([result, raised])
    if raised is not None:
        raise raised
    return result
