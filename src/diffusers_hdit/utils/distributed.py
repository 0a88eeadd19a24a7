"""Work that several processes share: one computes and all get the answer, or each computes a share."""

from collections.abc import Callable, Iterator

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather
from torch import Tensor


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


def distributed_map(
    function: Callable[[range], tuple[Tensor, ...]], count: int, batch_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """
    Yield `function` of each batch of the indices 0 to count - 1, in order, on every process.

    One process computes a batch and the others receive it, so the result does not depend on their number. `function` is
    called equally often on all of them, since sharded networks gather their weights together: at the end a process may
    compute a batch again that is not used.

    Args:
        function: returns tensors `(len(indices), ...)` on the process's device.
    """
    state = PartialState()
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    for start in range(0, len(batches), state.num_processes):
        own = function(batches[min(start + state.process_index, len(batches) - 1)])
        if state.num_processes == 1:
            yield own
            continue
        gathered = []
        for value in own:
            padded = value.new_zeros(batch_size, *value.shape[1:])  # the last batch may be a smaller one
            padded[: len(value)] = value
            gathered.append(gather(padded).unflatten(0, (state.num_processes, batch_size)))
        for i, indices in enumerate(batches[start : start + state.num_processes]):
            yield tuple(value[i, : len(indices)] for value in gathered)
