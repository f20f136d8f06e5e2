"""The published I-JEPA step (arXiv:2301.08243) and MAE loss (arXiv:2111.06377) as plain maths, beside ours.

What is below uses no module and no op of ours: weights are tensors by name, attention is softmax(Q K^T) V.
The gradient of a key's bias is zero in exact arithmetic, and rounding in ours, which AdamW turns into full
steps: after an update those biases differ, and nothing depends on them.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fastjepa.models import MAEDecoder, Predictor, VisionTransformer, ViTShape
from fastjepa.objectives import JEPA, MAE

Weights = dict[str, Tensor]
PATCH, SIDE, DEPTH, HEADS = 4, 4, 2, 2
BATCH, BLOCKS, KEPT, ASKED = 3, 4, 6, 3
LEARNING_RATE, DECAY, BETAS, EPS, MOMENTUM = 1e-3, 0.1, (0.9, 0.999), 1e-8, 0.996


def standardise(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[name + ".weight"].flatten(1).T + w[name + ".bias"]


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return standardise(x, 1e-6) * w[name + ".weight"] + w[name + ".bias"]


def block(x: Tensor, w: Weights, name: str) -> Tensor:
    """x [S, L, D]."""
    sequences, length, width = x.shape
    qkv = linear(norm(x, w, name + ".norm1"), w, name + ".attn.qkv")
    query, key, value = qkv.view(sequences, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # [S, H, L, d]
    scores = query @ key.transpose(-2, -1) / math.sqrt(width // HEADS)
    attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(sequences, length, width)
    x = x + linear(attended, w, name + ".attn.proj")
    hidden = linear(norm(x, w, name + ".norm2"), w, name + ".mlp.fc1")
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + linear(hidden, w, name + ".mlp.fc2")


def embed(images: Tensor, w: Weights) -> Tensor:
    """Every patch, before some are dropped: [B, N, D], without position."""
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [B, C, rows, columns, p, p]
    return linear(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), w, "patch_embed.proj")


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, K, D] of x [B, N, D]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def encode(images: Tensor, w: Weights, index: Tensor | None = None) -> Tensor:
    x = embed(images, w) + w["pos_embed"]
    if index is not None:
        x = take(x, index)
    for i in range(DEPTH):
        x = block(x, w, f"blocks.{i}")
    return norm(x, w, "norm")


def predict(context: Tensor, context_index: Tensor, targets: Tensor, w: Weights) -> Tensor:
    """context [B, K, D], targets [M, B, P] -> [M, B, P, D]."""
    blocks, batch, asked = targets.shape
    positions = w["predictor_pos_embed"].expand(batch, -1, -1)
    seen = linear(context, w, "predictor_embed") + take(positions, context_index)
    masked = torch.cat([w["mask_token"] + take(positions, index) for index in targets])  # [M B, P, d]
    x = torch.cat([seen.repeat(blocks, 1, 1), masked], dim=1)
    for i in range(DEPTH):
        x = block(x, w, f"predictor_blocks.{i}")
    x = norm(x, w, "predictor_norm")[:, -asked:]
    return linear(x, w, "predictor_proj").view(blocks, batch, asked, -1)


def smooth_l1(distance: Tensor) -> Tensor:
    distance = distance.abs()
    return torch.where(distance < 1, distance.square() / 2, distance - 0.5).mean()


@dataclass
class PlainLearner:
    """Student weights under ``encoder.`` and ``predictor.``, and the target encoder's."""

    student: Weights
    target: Weights
    frozen: Weights  # position tables
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    steps: int = 0

    def part(self, name: str) -> Weights:
        whole = self.student | self.frozen
        return {key.removeprefix(name): value for key, value in whole.items() if key.startswith(name)}

    def loss(self, images: Tensor, context_index: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            tables = {name.removeprefix("encoder."): table for name, table in self.frozen.items()}
            hidden = standardise(encode(images, self.target | tables), 1e-5)
            wanted = torch.stack([take(hidden, index) for index in targets])
        context = encode(images, self.part("encoder."), context_index)
        return smooth_l1(predict(context, context_index, targets, self.part("predictor.")) - wanted)

    def step(self, images: Tensor, context_index: Tensor, targets: Tensor) -> None:
        """AdamW, its decay apart from the gradient and not on biases and norms; then the target encoder."""
        loss = self.loss(images, context_index, targets)
        gradients = torch.autograd.grad(loss, list(self.student.values()))
        self.steps += 1
        with torch.no_grad():
            for (name, weight), gradient in zip(self.student.items(), gradients, strict=True):
                first, second = self.moments.get(name, (torch.zeros_like(weight), torch.zeros_like(weight)))
                first = BETAS[0] * first + (1 - BETAS[0]) * gradient
                second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
                self.moments[name] = first, second
                mean = first / (1 - BETAS[0] ** self.steps)
                root = (second / (1 - BETAS[1] ** self.steps)).sqrt()
                if weight.ndim > 1:
                    weight *= 1 - LEARNING_RATE * DECAY
                weight -= LEARNING_RATE * mean / (root + EPS)
            for name, average in self.target.items():
                average *= MOMENTUM
                average += (1 - MOMENTUM) * self.student["encoder." + name]


def models(predictor_width: int) -> tuple[JEPA, PlainLearner]:
    """The same fp64 weights twice. The encoder's head dim is 64; the target is not the encoder."""
    torch.manual_seed(0)
    shape = ViTShape((SIDE * PATCH,) * 2, PATCH, width=64 * HEADS, depth=DEPTH, heads=HEADS)
    jepa = JEPA(VisionTransformer(shape), Predictor(shape.grid, shape.width, predictor_width, DEPTH, HEADS))
    jepa = jepa.double()
    with torch.no_grad():
        for parameter in jepa.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    student = {
        f"{part}.{name}": parameter.detach().clone().requires_grad_()
        for part in ("encoder", "predictor")
        for name, parameter in jepa.get_submodule(part).named_parameters()
    }
    target = {name: parameter.clone() for name, parameter in jepa.target_encoder.named_parameters()}
    frozen = {
        "encoder.pos_embed": jepa.encoder.pos_embed,
        "predictor.predictor_pos_embed": jepa.predictor.predictor_pos_embed,
    }
    return jepa, PlainLearner(student, target, frozen)


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64, generator=random)
    order = torch.rand(BATCH, SIDE**2, generator=random).argsort(dim=1)
    hidden = torch.rand(BLOCKS, BATCH, SIDE**2 - KEPT, generator=random).argsort(dim=2)[..., :ASKED]
    targets = order[:, KEPT:].expand(BLOCKS, -1, -1).gather(2, hidden).sort(dim=2).values
    return images, order[:, :KEPT].sort(dim=1).values, targets


def packed(context_index: Tensor) -> tuple[Tensor, Tensor]:
    return context_index.flatten(), torch.arange(BATCH + 1, dtype=torch.int32) * context_index.shape[1]


def without_key_bias(name: str, tensor: Tensor) -> Tensor:
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize("predictor_head_dim", [32, 24])
@pytest.mark.parametrize("as_packed", [False, True])
def test_loss_and_gradients(predictor_head_dim: int, as_packed: bool) -> None:
    jepa, plain = models(predictor_head_dim * HEADS)
    images, context_index, targets = batch(1)
    expected = plain.loss(images, context_index, targets)
    gradients = torch.autograd.grad(expected, list(plain.student.values()))
    wanted = dict(zip(plain.student, gradients, strict=True))
    assert float(expected.detach()) > 0.1

    index, starts = packed(context_index) if as_packed else (context_index, None)
    loss = jepa.loss(images, index, targets, starts)
    assert abs(float((loss - expected).detach())) < 1e-9
    loss.backward()
    assert_same_gradients(dict(jepa.named_parameters()), wanted)


def assert_same_gradients(parameters: dict[str, torch.nn.Parameter], wanted: Weights) -> None:
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == wanted.keys()
    for name, expected in wanted.items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert float((gradient - expected).abs().max()) < 1e-7, name
        assert float(without_key_bias(name, expected).abs().max()) > 1e-6, f"{name} was not tested"


@pytest.mark.parametrize(("predictor_head_dim", "as_packed"), [(32, False), (24, False), (24, True)])
def test_five_optimizer_steps(predictor_head_dim: int, as_packed: bool) -> None:
    jepa, plain = models(predictor_head_dim * HEADS)
    parameters = list(jepa.trainable().parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
    )
    start = {name: parameter.detach().clone() for name, parameter in jepa.named_parameters()}
    for step in range(5):
        images, context_index, targets = batch(step)
        plain.step(images, context_index, targets)
        index, starts = packed(context_index) if as_packed else (context_index, None)
        optimizer.zero_grad()
        jepa.loss(images, index, targets, starts).backward()
        optimizer.step()
        jepa.update_target(MOMENTUM)

    expected = plain.student | {f"target_encoder.{name}": average for name, average in plain.target.items()}
    found = dict(jepa.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        ours, theirs = (without_key_bias(name, t.detach()) for t in (parameter, expected[name]))
        assert float((ours - theirs).abs().max()) < 1e-6, name
        moved = float((ours - without_key_bias(name, start[name])).abs().max())
        assert moved > 1e-5, f"{name} has hardly moved, so nothing was tested"


def test_bytes_and_what_the_model_normalises_are_one() -> None:
    jepa, _ = models(48)
    _, context_index, targets = batch(2)
    raw = torch.randint(256, (BATCH, 3, SIDE * PATCH, SIDE * PATCH), dtype=torch.uint8)
    mean, std = torch.tensor(jepa.encoder.pixel_mean), torch.tensor(jepa.encoder.pixel_std)
    normalised = (raw.double() / 255 - mean[:, None, None]) / std[:, None, None]
    ours = jepa.loss(raw, context_index, targets)
    torch.testing.assert_close(ours, jepa.loss(normalised, context_index, targets), rtol=1e-6, atol=0)


def mae_loss(images: Tensor, noise: Tensor, w: Weights, norm_pix_loss: bool) -> Tensor:
    """The quarter of patches with the least noise is seen; the loss is over the others."""
    batch, patches = noise.shape
    shuffle = noise.argsort(dim=1)
    seen = int(patches * 0.25)
    x = take(embed(images, w) + w["pos_embed"][:, 1:], shuffle[:, :seen])
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(batch, -1, -1), x], dim=1)
    for i in range(DEPTH):
        x = block(x, w, f"blocks.{i}")
    x = linear(norm(x, w, "norm"), w, "decoder_embed")
    masked = w["mask_token"].expand(batch, patches - seen, -1)
    restored = take(torch.cat([x[:, 1:], masked], dim=1), shuffle.argsort(dim=1))
    x = torch.cat([x[:, :1], restored], dim=1) + w["decoder_pos_embed"]
    for i in range(DEPTH):
        x = block(x, w, f"decoder_blocks.{i}")
    painted = linear(norm(x, w, "decoder_norm"), w, "decoder_pred")[:, 1:]

    rows = images.view(batch, 3, SIDE, PATCH, SIDE, PATCH)
    pixels = torch.einsum("nchpwq->nhwpqc", rows).reshape(batch, patches, -1)
    if norm_pix_loss:
        variance = pixels.var(dim=-1, keepdim=True)  # unbiased
        pixels = (pixels - pixels.mean(dim=-1, keepdim=True)) / (variance + 1e-6).sqrt()
    is_masked = (shuffle.argsort(dim=1) >= seen).double()
    return ((painted - pixels).square().mean(dim=-1) * is_masked).sum() / is_masked.sum()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mae_loss_and_gradients(norm_pix_loss: bool) -> None:
    torch.manual_seed(0)
    shape = ViTShape((SIDE * PATCH,) * 2, PATCH, 64 * HEADS, DEPTH, HEADS, class_token=True)
    mae = MAE(VisionTransformer(shape), MAEDecoder(shape, 32 * HEADS, DEPTH, HEADS)).double()
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    weights = {name.split(".", 1)[1]: tensor.detach().clone() for name, tensor in mae.state_dict().items()}
    names = {name.split(".", 1)[1]: name for name, _ in mae.named_parameters()}
    trainable = [weights[name].requires_grad_() for name in names]

    images, noise = batch(3)[0], torch.rand(BATCH, SIDE**2)
    expected = mae_loss(images, noise, weights, norm_pix_loss)
    wanted = dict(zip(names.values(), torch.autograd.grad(expected, trainable), strict=True))
    loss = mae.loss(images, noise, norm_pix_loss)
    assert abs(float((loss - expected).detach())) < 1e-9
    loss.backward()
    assert_same_gradients(dict(mae.named_parameters()), wanted)
