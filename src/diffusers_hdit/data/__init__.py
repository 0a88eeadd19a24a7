"""From image files to batches of tensors: see [`load_images`] and [`make_loader`]; `sources.py` says how to add a source."""

from .bucketing import Buckets
from .dataset import ImageDataset, load_images
from .loader import make_loader
from .sources import ImageSource
from .streaming import StreamedImages
from .transforms import to_float


__all__ = ["Buckets", "ImageDataset", "ImageSource", "StreamedImages", "load_images", "make_loader", "to_float"]
