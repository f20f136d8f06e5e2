"""The optional extension fastjepa_kernels._C, where somebody has built it; nothing is compiled here."""

import importlib
import warnings

import torch

try:
    importlib.import_module("fastjepa_kernels._C")  # registers torch.ops.fastjepa_native
except ModuleNotFoundError:  # not built, which is usual
    HAS_CPP = False
except ImportError as error:  # built for another torch
    HAS_CPP = False
    warnings.warn(
        f"fastjepa_kernels._C is there but does not load, so the ops run without it: {error}. "
        "Build it again with this torch: make ext",
        stacklevel=2,
    )
else:
    HAS_CPP = True

HAS_CUDA = HAS_CPP and hasattr(torch.ops.fastjepa_native, "ema_update_cuda_")
