"""What a snapshot shows besides features: what was predicted, what is near, where the encoder looks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.config import Config
from fastjepa.data.views import ImageSet, Views
from fastjepa.engine.learner import Encoders
from fastjepa.evaluation.attention import attended
from fastjepa.evaluation.bank import Bank, Reader, read_bank
from fastjepa.evaluation.painting import paint
from fastjepa.evaluation.retrieval import compare, neighbours, retrieve
from fastjepa.evaluation.showing import Painted, Showing
from fastjepa.masks import Masks
from fastjepa.models import MAEDecoder, Predictor, VisionTransformer
from fastjepa.objectives.mae import PIXEL_EPS

TARGET_EPS = 1e-5  # of the plain layer norm after the target encoder's own, as in the loss


@torch.no_grad()
def look(
    networks: Encoders,
    shown: ImageSet,
    views: Views,
    features: Tensor,
    masks: Masks,
    train: ImageSet,
    config: Config,
    should_stop: Callable[[], bool] = lambda: False,
) -> Showing:
    """Look at a few images through the networks of a run; nothing is drawn by chance, and nothing changes.

    Args:
        networks: on their device.
        shown: the set that the images shown are from.
        views: of those images.
        features: [n, N, D], their patch tokens from the judged encoder.
        masks: as sampled for them.
        train: the training images, which the bank is of.
        config: of the run.
        should_stop: whether the run has been told to.

    Raises:
        ValueError: the features are not finite, or no training image is left for the bank.
        NotWanted: while images were read, `should_stop` said so.
        TimeoutError: while images were read, a worker hung.
    """
    if not features.isfinite().all():
        raise ValueError("the features are not finite: the run has diverged")
    judged = networks.judged
    device, size, patch = features.device, judged.shape.image_size[0], judged.shape.patch_size
    is_jepa = networks.target is not None
    without = frozenset(views.image_index.tolist()) if shown is train else frozenset[int]()

    def encode(images: Tensor) -> Tensor:
        tokens = judged(images.to(device))[:, int(judged.shape.class_token) :]  # [b, N, D]
        return as_target(tokens) if is_jepa else tokens

    reader = Reader(config.speed.workers, config.speed.worker_timeout_s, should_stop)
    bank = read_bank(train, size, features.shape[1], encode, without, reader)
    labels = None if shown.labels is None else shown.labels[views.image_index]
    tokens = as_target(features) if is_jepa else features
    near = neighbours(views.pixels, tokens.float().mean(dim=1), labels, bank)
    looks = attended(judged, views.pixels.to(device))
    pixels, masks = views.pixels.to(device), masks.to(device)
    head = networks.head
    if isinstance(head, Predictor):
        prediction = predict(networks.context, head, pixels, masks)  # [M, n, P, D]
        return Showing(
            predictions=compare(prediction, tokens, masks.targets, bank.mean_tokens()),
            retrieved=retrieve(views.pixels, prediction, tokens, masks.targets, bank, patch),
            neighbours=near,
            attended=looks,
        )
    if head is None:
        return Showing(neighbours=near, attended=looks)
    painted = _paint(networks.context, head, views.pixels, masks, bank, config.objective.norm_pix_loss)
    return Showing(painted=painted, neighbours=near, attended=looks)


def as_target(tokens: Tensor) -> Tensor:
    """What a predictor is to say of tokens [..., D] that have been through the final norm: in fp32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=TARGET_EPS)


def predict(encoder: VisionTransformer, predictor: Predictor, images: Tensor, masks: Masks) -> Tensor:
    """What is said of the blocks of `masks`, [M, n, P, D]."""
    cut = masks.cu_seqlens, masks.longest
    context = encoder(images, masks.context, cut[0], longest=cut[1])  # [n, K, D] or [T, D]
    said: Tensor = predictor(context, masks.context, masks.targets, *cut)
    return said


def _paint(
    encoder: VisionTransformer,
    decoder: MAEDecoder,
    images: Tensor,
    masks: Masks,
    bank: Bank,
    is_normalised: bool,
) -> Painted:
    said = decoder(encoder(images.to(masks.context.device), masks.context), masks.context)  # [n, N, p p C]
    mean, std = torch.tensor(encoder.pixel_mean), torch.tensor(encoder.pixel_std)
    eps = PIXEL_EPS if is_normalised else None
    return paint(images, said, masks.targets[0], bank, encoder.shape.patch_size, mean, std, eps)
