"""Putting the kernels into models of other libraries, in place, with a way back.

Nothing is imported from those libraries: the modules of a model are known by the names of their classes.
"""

from fastjepa_kernels.integrations.swap import Patched
from fastjepa_kernels.integrations.timm import patch_timm
from fastjepa_kernels.integrations.transformers import patch_transformers

__all__ = ["Patched", "patch_timm", "patch_transformers"]
