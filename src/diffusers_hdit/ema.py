"""Exponential moving averages of the weights: what is shown, saved as a pipeline and shared is always the average."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import nn


def make_ema(model: nn.Module, decay: float) -> EMAModel:
    """
    An average that starts short and lengthens: after n steps the decay is min(decay, 1 - (1 + n)^-0.75), as in the
    reference implementation (k-diffusion), so that a short run is not averaged with its random beginning.
    """
    return EMAModel(model.parameters(), decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True)


@contextmanager
def ema_weights(model: nn.Module, ema: EMAModel) -> Iterator[nn.Module]:
    """The model with its averaged weights inside the block; the trained ones come back at its end, errors included."""
    ema.store(model.parameters())
    try:
        ema.copy_to(model.parameters())
        yield model
    finally:
        ema.restore(model.parameters())
