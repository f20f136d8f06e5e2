"""How weights start."""

import math
from typing import Literal

import torch
from torch import nn

Init = Literal["published", "xavier", "mae"]


def initialise(model: nn.Module, scheme: Init, generator: torch.Generator) -> None:
    """Fill every weight of `model`, in the order of its modules, from one CPU generator.

    "published" (I-JEPA): every Linear and Conv2d weight N(0, 0.02).
    "xavier": Linear weights Xavier uniform, the patch embedding N(0, 1 / fan_in). With small patches
    and N(0, 0.02) the position table swamps the pixels: at 4 x 4 x 1 pixels a patch would come in with
    a twelfth of this amplitude, and the content of the image is lost.

    "mae" (published for MAE): Xavier uniform for both, the patch embedding taken as a Linear.

    Whichever it is, biases are 0, LayerNorm is 1 and 0, class and mask tokens are N(0, 0.02).
    """

    def normal_(tensor: torch.Tensor, std: float) -> None:
        tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            match module:
                case nn.LayerNorm():
                    module.weight.fill_(1.0)
                    module.bias.zero_()
                case nn.Linear() | nn.Conv2d():
                    fan_out, fan_in = module.weight.flatten(1).shape
                    if scheme == "published":
                        normal_(module.weight, 0.02)
                    elif scheme == "xavier" and isinstance(module, nn.Conv2d):
                        normal_(module.weight, fan_in**-0.5)
                    else:
                        bound = math.sqrt(6 / (fan_in + fan_out))
                        uniform = torch.empty(module.weight.shape)
                        module.weight.copy_(uniform.uniform_(-bound, bound, generator=generator))
                    if module.bias is not None:
                        module.bias.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_token", "mask_token")):
                normal_(parameter, 0.02)
