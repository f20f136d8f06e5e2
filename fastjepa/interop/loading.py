"""How an export is loaded: lines of Python for its card, which a test runs as they stand.

Each turns a picture, `image.png`, into `features` [1, D], the mean of its patch tokens, and with a head into
`logits` [1, classes].
"""

import json

from fastjepa.interop.head import LinearHead
from fastjepa.interop.official import heads_of
from fastjepa.interop.timm_vit import recipe_of
from fastjepa.models import VisionTransformer
from fastjepa.objectives import JEPA, MAE


def _text(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _patches(encoder: VisionTransformer) -> str:
    return "[:, 1:]" if encoder.shape.class_token else ""  # after the class token


def _mode(encoder: VisionTransformer) -> str:
    return "L" if encoder.shape.channels == 1 else "RGB"


def _pixels(encoder: VisionTransformer) -> str:
    """As a run's probes see images: the centre of one is cropped for a square encoder."""
    height, width = encoder.shape.image_size
    size = f"({width}, {height}), Image.Resampling.BICUBIC"
    sized = f"ImageOps.fit(image, {size})" if height == width else f"image.resize({size})"
    return f"""\
image = Image.open("image.png").convert("{_mode(encoder)}")
image = {sized}
pixels = np.array(image).reshape(1, {height}, {width}, -1).transpose(0, 3, 1, 2)  # uint8 [1, C, H, W]
"""


def _pillow(encoder: VisionTransformer) -> str:
    height, width = encoder.shape.image_size
    return "from PIL import Image, ImageOps" if height == width else "from PIL import Image"


def load_with_fastjepa(encoder: VisionTransformer, model: JEPA | MAE, which: str, name: str) -> str:
    """Of a published file."""
    heads = "".join(f", {key}={value}" for key, value in heads_of(model).items())
    own = isinstance(model, JEPA) and which == "target"
    return f"""\
import numpy as np
import torch
{_pillow(encoder)}

from fastjepa.interop import load_official

encoder = load_official({_text(name)}{heads}).{"target_encoder" if own else "encoder"}.eval()
encoder.pixel_mean, encoder.pixel_std = {encoder.pixel_mean}, {encoder.pixel_std}  # not in the file
{_pixels(encoder)}\
with torch.no_grad():
    tokens = encoder(torch.from_numpy(pixels.copy()))  # [1, N, D]
features = tokens{_patches(encoder)}.mean(dim=1)
"""


def load_tensors(encoder: VisionTransformer, name: str) -> str:
    """Of a safetensors file."""
    return f"""\
import numpy as np
import torch
{_pillow(encoder)}

from fastjepa.interop import load_encoder

encoder = load_encoder({_text(name)})  # or safetensors.torch.load_file, for the tensors alone
{_pixels(encoder)}\
with torch.no_grad():
    tokens = encoder(torch.from_numpy(pixels.copy()))  # [1, N, D]
features = tokens{_patches(encoder)}.mean(dim=1)
"""


def load_in_transformers(encoder: VisionTransformer, head: LinearHead | None, name: str) -> str:
    without_pooler = ", add_pooling_layer=False" if encoder.shape.class_token else ""
    lines = f"""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel{", AutoModelForImageClassification" if head else ""}

processor = AutoImageProcessor.from_pretrained({_text(name)})
model = AutoModel.from_pretrained({_text(name)}{without_pooler}).eval()
inputs = processor(Image.open("image.png").convert("{_mode(encoder)}"), return_tensors="pt")
with torch.no_grad():
    features = model(**inputs).last_hidden_state{_patches(encoder)}.mean(dim=1)
"""
    if head is None:
        return lines
    return f"""\
{lines}
classifier = AutoModelForImageClassification.from_pretrained({_text(name)}).eval()
with torch.no_grad():
    logits = classifier(**inputs).logits
"""


def load_mae_in_transformers(encoder: VisionTransformer, name: str) -> str:
    return f"""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTMAEForPreTraining

processor = AutoImageProcessor.from_pretrained({_text(name)})
model = ViTMAEForPreTraining.from_pretrained({_text(name)}).eval()
inputs = processor(Image.open("image.png").convert("{_mode(encoder)}"), return_tensors="pt")
with torch.no_grad():
    found = model(**inputs)  # hides patches at random, or those with the most of noise=, [1, N]
pixels = model.unpatchify(found.logits)  # [1, C, H, W]; found.mask [1, N] is 1 where a patch was hidden
loss = found.loss

model.config.mask_ratio = 0.0  # for features nothing is hidden
with torch.no_grad():
    features = model.vit(**inputs).last_hidden_state[:, 1:].mean(dim=1)
"""


def load_in_timm(encoder: VisionTransformer, head: LinearHead | None, name: str) -> str:
    recipe = recipe_of(encoder, 0 if head is None else len(head.weight))
    lines = f"""\
import timm
import torch
from PIL import Image

model = timm.create_model({_text("local-dir:" + name)}, pretrained=True).eval()
# The same, told in full:
# {recipe.call()}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pixels = transform(Image.open("image.png").convert("{_mode(encoder)}"))[None]  # [1, C, H, W]
with torch.no_grad():
    tokens = model.forward_features(pixels)  # [1, N, D]
    features = model.forward_head(tokens, pre_logits=True)
"""
    return lines if head is None else f"{lines}    logits = model.forward_head(tokens)\n"


def load_in_onnxruntime(encoder: VisionTransformer, head: LinearHead | None, name: str) -> str:
    outputs = "tokens, features" + (", logits" if head is not None else "")
    return f"""\
import numpy as np
import onnxruntime
{_pillow(encoder)}

session = onnxruntime.InferenceSession({_text(name)})
{_pixels(encoder)}\
{outputs} = session.run(None, {{"images": pixels}})
"""


def load_program(encoder: VisionTransformer, head: LinearHead | None, name: str) -> str:
    outputs = "tokens, features" + (", logits" if head is not None else "")
    return f"""\
import numpy as np
import torch
{_pillow(encoder)}

encoder = torch.export.load({_text(name)}).module()
{_pixels(encoder)}\
with torch.no_grad():
    {outputs} = encoder(torch.from_numpy(pixels.copy()))
"""
