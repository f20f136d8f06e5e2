"""Images in memory or in files, and the loader that brings them to the step."""

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.data.folder import ImageFolder
from fastjepa.data.labelled import evaluation_batches
from fastjepa.data.loader import Batch, make_loader
from fastjepa.data.order import GlobalOrder
from fastjepa.data.transforms import Augmentation
from fastjepa.data.unreadable import TooManyUnreadable, UnreadableImage
from fastjepa.data.views import ImageSet, read_views

__all__ = [
    "Augmentation",
    "Batch",
    "FashionMNIST",
    "GlobalOrder",
    "ImageFolder",
    "ImageSet",
    "TooManyUnreadable",
    "UnreadableImage",
    "evaluation_batches",
    "make_loader",
    "read_views",
]
