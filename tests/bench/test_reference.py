"""The references of the throughput benchmark: the engine's own maths, by the data flow that was published."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk
from bench.reference import IJEPATrainer, MAETrainer, ReferenceIJEPA, ReferenceMAE
from bench.reference.vit import compile_blocks
from fastjepa.models import SIZES, MAEDecoder, Predictor, VisionTransformer, ViTShape
from fastjepa.objectives import JEPA, MAE

PATCH, GRID, WIDTH, NARROW, DEPTH, HEADS = 4, (4, 6), 32, 16, 2, 2
LOGGED = 4 * DEPTH + 1  # norms of gradients of I-JEPA's encoder: of blocks, and of the patch embedding
BATCH, PATCHES, BLOCKS, KEPT, ASKED = 3, 24, 4, 9, 3
VISIBLE = 6  # a quarter of the patches, for MAE
LEARNING_RATE, DECAY, MOMENTUM = 1e-3, 0.1, 0.9

# How blocks are run: as published, by today's attention, and by that through the compiler, less its code.
WAYS = ["published", "modern", "compiled"]


@pytest.fixture(autouse=True)
def plain_ops() -> Any:
    """The engine's side by its references: Triton's interpreter takes no part here."""
    with fk.use("torch"):
        yield
    torch.compiler.reset()


def shape(class_token: bool) -> ViTShape:
    size = (GRID[0] * PATCH, GRID[1] * PATCH)
    return ViTShape(size, PATCH, WIDTH, DEPTH, HEADS, mlp_ratio=3.0, class_token=class_token)


def perturb(model: nn.Module, dtype: torch.dtype) -> None:
    """No bias 0, no norm 1: a reference that leaves one out is found."""
    with torch.no_grad():
        for parameter in model.to(dtype).parameters():
            parameter.add_(torch.randn_like(parameter) / 20)


def mae_pair(way: str, dtype: torch.dtype) -> tuple[MAE, ReferenceMAE]:
    torch.manual_seed(0)
    ours = MAE(VisionTransformer(shape(True)), MAEDecoder(shape(True), NARROW, DEPTH, HEADS))
    perturb(ours, dtype)
    theirs = ReferenceMAE(
        shape(True),
        decoder_width=NARROW,
        decoder_depth=DEPTH,
        decoder_heads=HEADS,
        modern=way != "published",
    ).to(dtype)
    assert ours.decoder is not None
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    theirs.decoder.load_state_dict(ours.decoder.state_dict())
    if way == "compiled":
        compile_blocks(theirs, "aot_eager", dynamic=None)
    return ours, theirs


def jepa_pair(way: str, dtype: torch.dtype) -> tuple[JEPA, ReferenceIJEPA]:
    """The target encoder's weights are not the encoder's."""
    torch.manual_seed(0)
    ours = JEPA(VisionTransformer(shape(False)), Predictor(GRID, WIDTH, NARROW, DEPTH, HEADS))
    perturb(ours, dtype)
    theirs = ReferenceIJEPA(shape(False), NARROW, DEPTH, HEADS, modern=way != "published").to(dtype)
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    theirs.predictor.load_state_dict(ours.predictor.state_dict())
    theirs.target_encoder.load_state_dict(ours.target_encoder.state_dict())
    if way == "compiled":
        compile_blocks(theirs, "aot_eager", dynamic=None)
    return ours, theirs


def mae_batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 3, GRID[0] * PATCH, GRID[1] * PATCH, dtype=dtype, generator=random)
    return images, torch.rand(BATCH, PATCHES, generator=random)


def jepa_batch(
    seed: int, dtype: torch.dtype = torch.float32, kept: int = KEPT
) -> tuple[Tensor, Tensor, Tensor]:
    images, noise = mae_batch(seed, dtype)
    order = noise.argsort(dim=1)
    random = torch.Generator().manual_seed(seed)
    places = torch.rand(BLOCKS, BATCH, PATCHES - KEPT, generator=random).argsort(dim=2)[..., :ASKED]
    targets = order[:, KEPT:].expand(BLOCKS, -1, -1).gather(2, places).sort(dim=2).values
    return images, order[:, :kept].sort(dim=1).values, targets


def without_key_bias(name: str, tensor: Tensor) -> Tensor:
    """Its gradient is rounding alone, which AdamW turns into full steps."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    wanted = {name: parameter.grad for name, parameter in ours.named_parameters()}
    found = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == wanted.keys()
    trained = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    for name, gradient in wanted.items():
        if name.startswith("target_encoder."):
            assert found[name] is None
            continue
        assert gradient is not None
        other = found[name]
        assert other is not None, name
        difference = without_key_bias(name, gradient) - without_key_bias(name, other)
        assert float(difference.abs().max()) < 1e-7, name
        assert float(without_key_bias(name, gradient).abs().max()) > 1e-6, f"{name} was not tested"


@pytest.mark.parametrize("way", WAYS)
def test_mae_is_the_engines(way: str) -> None:
    ours, theirs = mae_pair(way, torch.float64)
    images, noise = mae_batch(1, torch.float64)
    expected, loss = ours.loss(images, noise), theirs.loss(images, noise)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    expected.backward()
    loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_ijepa_is_the_engines(way: str) -> None:
    ours, theirs = jepa_pair(way, torch.float64)
    batch = jepa_batch(1, torch.float64)
    expected, loss = ours.loss(*batch), theirs.loss(*batch)
    assert float(expected.detach()) > 0.1
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    expected.backward()
    loss.backward()
    assert_same_gradients(ours, theirs)


def test_mae_hides_what_it_is_told_to() -> None:
    _, model = mae_pair("published", torch.float32)
    images, noise = mae_batch(1)
    ours = MAE(VisionTransformer(shape(True)), MAEDecoder(shape(True), NARROW, DEPTH, HEADS), mask_ratio=0.4)
    ours.load_state_dict(model.state_dict())
    model.mask_ratio = 0.4
    torch.testing.assert_close(model.loss(images, noise), ours.loss(images, noise))
    torch.manual_seed(3)
    drawn = model.loss(images)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, model.loss(images, torch.rand(BATCH, PATCHES)))


def plain_adamw(model: nn.Module, betas: tuple[float, float]) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=betas,
    )


def assert_trained_alike(start: dict[str, Tensor], ours: nn.Module, theirs: nn.Module) -> None:
    found = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected, other = (without_key_bias(name, p.detach()) for p in (parameter, found[name]))
        assert float((expected - other).abs().max()) < 1e-5, name
        moved = float((expected - without_key_bias(name, start[name])).abs().max())
        assert moved > 1e-4, f"{name} has hardly moved, so nothing was tested"


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("way", ["published", "modern"])
def test_mae_trains_as_a_plain_loop_does(way: str) -> None:
    ours, theirs = mae_pair(way, torch.float32)
    optimizer, start = plain_adamw(ours, (0.9, 0.95)), copied(ours)
    trainer = MAETrainer(
        theirs,
        precision="fp32",
        device="cpu",
        learning_rate=LEARNING_RATE,
        weight_decay=DECAY,
        backend="eager",
    )
    for step in range(5):
        images, noise = mae_batch(step)
        loss = ours.loss(images, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = trainer.step(images, noise)
        assert isinstance(found, float if way == "published" else Tensor)
        assert float(found) == pytest.approx(loss.item(), rel=1e-5)
        if way == "published":
            norms = torch.stack([p.grad.norm() for p in ours.parameters() if p.grad is not None])
            assert gradient_norms(trainer) == pytest.approx([float(norms.norm())], rel=1e-4)
    assert_trained_alike(start, ours, theirs)


@pytest.mark.parametrize("way", ["published", "modern"])
def test_ijepa_trains_as_a_plain_loop_does(way: str) -> None:
    ours, theirs = jepa_pair(way, torch.float32)
    optimizer, start = plain_adamw(ours, (0.9, 0.999)), copied(ours)
    trainer = IJEPATrainer(
        theirs,
        precision="fp32",
        device="cpu",
        learning_rate=LEARNING_RATE,
        weight_decay=DECAY,
        backend="eager",
    )
    for step in range(5):
        batch = jepa_batch(step, kept=KEPT - step % 2)  # shapes change, as they do in `truncate`
        loss = ours.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.update_target(MOMENTUM)
        found = trainer.step(*batch, MOMENTUM)
        assert isinstance(found, float if way == "published" else Tensor)
        assert float(found) == pytest.approx(loss.item(), rel=1e-5)
        if way == "published":
            assert len(trainer.grad_norms) == LOGGED
            weights = dict(ours.encoder.named_parameters())
            left_out = weights.keys() - trainer.grad_norms.keys()
            assert all(weights[name].ndim == 1 for name in left_out), "biases and norms alone"
            for name, norm in trainer.grad_norms.items():
                gradient = ours.encoder.get_parameter(name).grad
                assert gradient is not None
                assert norm == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert_trained_alike(start, ours, theirs)


def test_a_target_of_no_momentum_is_the_encoder() -> None:
    for way in ("published", "modern"):
        _, model = jepa_pair(way, torch.float32)
        model.update_target(0.0)
        for target, source in zip(model.target_encoder.parameters(), model.encoder.parameters(), strict=True):
            torch.testing.assert_close(target, source, rtol=0, atol=1e-7)


# A step of each on the batch of a seed.
def mae_step(way: str, precision: Any, seed: int = 1) -> tuple[MAETrainer, Callable[[], Tensor | float]]:
    trainer = MAETrainer(mae_pair(way, torch.float32)[1], precision=precision, device="cpu", backend="eager")
    return trainer, lambda: trainer.step(*mae_batch(seed))


def jepa_step(way: str, precision: Any, seed: int = 1) -> tuple[IJEPATrainer, Callable[[], Tensor | float]]:
    model = jepa_pair(way, torch.float32)[1]
    trainer = IJEPATrainer(model, precision=precision, device="cpu", backend="eager")
    return trainer, lambda: trainer.step(*jepa_batch(seed), MOMENTUM)


def gradient_norms(trainer: MAETrainer | IJEPATrainer) -> list[float]:
    """As the last published step logged them."""
    if isinstance(trainer, IJEPATrainer):
        return list(trainer.grad_norms.values())
    assert trainer.grad_norm is not None
    return [float(trainer.grad_norm)]


@pytest.mark.parametrize("way", ["published", "modern"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("of", [mae_step, jepa_step])
def test_half_precision_is_autocast_over_fp32_weights(of: Any, precision: str, way: str) -> None:
    trainer, step = of(way, precision)
    before, seen = copied(trainer.model), set()
    linear = trainer.model.encoder.blocks[0].mlp.fc1
    linear.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    exact, exact_step = of(way, "fp32")
    loss = float(exact_step())
    assert float(step()) == pytest.approx(loss, rel=0.02)
    if way == "published":  # its norms are of gradients that are no longer scaled
        assert gradient_norms(trainer) == pytest.approx(gradient_norms(exact), rel=0.05)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, before[name]), f"{name} was not trained"
    # Published I-JEPA scales its loss in bf16 too.
    assert trainer.scaler.is_enabled() == (precision == "fp16" or (of is jepa_step and way == "published"))


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor: on a GPU the host waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("of", "reads"), [(mae_step, 1), (jepa_step, 1 + LOGGED)])
def test_only_the_published_step_reads_from_the_device(of: Any, reads: int, precision: str) -> None:
    counted = {}
    for way in ("published", "modern"):
        trainer, step = of(way, precision)
        step()  # what starts lazily has started
        if way == "published":
            # Here, and not on a GPU, AdamW's loop reads its own counters.
            trainer.optimizer.step = lambda *arguments, **named: None
        with Reads() as seen:
            step()
        counted[way] = seen.count - (way == "published" and trainer.scaler.is_enabled())  # it asks once
    assert counted == {"published": reads, "modern": 0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_modern_step_never_waits_for_a_gpu(precision: Any) -> None:
    mae = MAETrainer(mae_pair("modern", torch.float32)[1], precision=precision, device="cuda")
    jepa = IJEPATrainer(jepa_pair("modern", torch.float32)[1], precision=precision, device="cuda")
    of_mae = [x.cuda() for x in mae_batch(1)]
    images, context_index, targets = (x.cuda() for x in jepa_batch(1))
    for mode in ("default", "error"):  # compiled by the first
        torch.cuda.set_sync_debug_mode(mode)
        try:
            losses = [mae.step(*of_mae), jepa.step(images, context_index, targets, MOMENTUM)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(float(loss) > 0 for loss in losses)


@pytest.mark.parametrize(("of", "error"), [(mae_step, FloatingPointError), (jepa_step, AssertionError)])
def test_only_the_published_step_stops_at_a_loss_that_is_no_number(of: Any, error: type[Exception]) -> None:
    for way in ("published", "modern"):
        trainer, step = of(way, "fp32")
        with torch.no_grad():
            trainer.model.encoder.norm.bias[0] = torch.nan
        if way == "published":
            with pytest.raises(error, match="the loss is"):
                step()
        else:
            assert torch.as_tensor(step()).isnan()


def test_each_kind_of_block_is_compiled_once() -> None:
    """Whatever the depth, and however K and P change: more would end at torch's limit, uncompiled."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    deep = ViTShape((24, 24), 4, WIDTH, depth=10, heads=2)
    jepa, mae = (
        ReferenceIJEPA(deep, NARROW, 10, 2, modern=True),
        ReferenceMAE(replace(deep, class_token=True), decoder_width=NARROW, decoder_heads=2, modern=True),
    )
    compile_blocks(jepa, backend, dynamic=None)
    for kept, asked in ((9, 3), (8, 4), (10, 2), (7, 5)):
        places = torch.rand(5, BATCH, 36).argsort(dim=2)
        jepa.loss(torch.randn(BATCH, 3, 24, 24), places[0, :, :kept], places[1:, :, :asked]).backward()
    assert len(graphs) == 3, "target encoder, context encoder, predictor"

    torch.compiler.reset()
    graphs.clear()
    compile_blocks(mae, backend, dynamic=False)
    for _ in range(2):
        mae.loss(torch.randn(BATCH, 3, 24, 24)).backward()
    assert len(graphs) == 2, "encoder, decoder"


def block_flops(length: int, width: int, hidden: int) -> int:
    """Of one sequence: qkv and projection, the MLP, scores and their product with the values."""
    return 2 * length * (4 * width**2 + 2 * width * hidden) + 4 * length**2 * width


def flops(work: Callable[[], object]) -> tuple[int, int]:
    """All that the counter sees, and those of convolutions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops(), counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)


EMBED = 2 * PATCHES * WIDTH * 3 * PATCH**2  # of every patch of an image


def test_mae_embeds_every_patch_and_paints_every_patch() -> None:
    forward = EMBED + DEPTH * block_flops(1 + VISIBLE, WIDTH, 3 * WIDTH)
    forward += 2 * (1 + VISIBLE) * WIDTH * NARROW + DEPTH * block_flops(1 + PATCHES, NARROW, 4 * NARROW)
    forward += 2 * (1 + PATCHES) * NARROW * 3 * PATCH**2
    for way in ("published", "modern"):
        _, model = mae_pair(way, torch.float32)
        total, convolved = flops(lambda: model.loss(*mae_batch(1)))  # noqa: B023
        assert convolved == BATCH * EMBED
        if way == "published":
            assert total == BATCH * forward


def test_ijepa_embeds_every_patch_twice_and_repeats_the_context() -> None:
    forward = 2 * EMBED
    forward += DEPTH * (block_flops(PATCHES, WIDTH, 3 * WIDTH) + block_flops(KEPT, WIDTH, 3 * WIDTH))
    forward += 2 * KEPT * WIDTH * NARROW  # once, not for each block
    forward += BLOCKS * DEPTH * block_flops(KEPT + ASKED, NARROW, 4 * NARROW)
    forward += BLOCKS * 2 * ASKED * NARROW * WIDTH
    for way in ("published", "modern"):
        _, model = jepa_pair(way, torch.float32)
        total, convolved = flops(lambda: model.loss(*jepa_batch(1)))  # noqa: B023
        assert convolved == 2 * BATCH * EMBED
        if way == "published":
            assert total == BATCH * forward


# GFLOP of useful work for an image, forward and backward, with the mean K and P of `truncate` at B = 128.
@pytest.mark.parametrize(
    ("size", "patch", "kept", "asked", "of_mae", "of_ijepa"),
    [("base", 16, 49.9, 33.3, 58.7, 84.1), ("huge", 14, 68.5, 44.2, 291.4, 655.9)],
)
def test_a_step_costs_what_the_published_models_do(
    size: str, patch: int, kept: float, asked: float, of_mae: float, of_ijepa: float
) -> None:
    named = SIZES[size]
    encoder = ViTShape((224, 224), patch, named.width, named.depth, named.heads)
    with torch.device("meta"):
        mae = ReferenceMAE(replace(encoder, class_token=True)).to("meta")
        jepa = ReferenceIJEPA(
            encoder, named.predictor_width, named.predictor_depth, named.predictor_heads
        ).to("meta")
        images = torch.empty(1, 3, 224, 224)
        context_index = torch.zeros(1, round(kept), dtype=torch.long)
        targets = torch.zeros(BLOCKS, 1, round(asked), dtype=torch.long)
    assert flops(lambda: mae.loss(images).backward())[0] / 1e9 == pytest.approx(of_mae, rel=0.01)
    total, _ = flops(lambda: jepa.loss(images, context_index, targets).backward())
    assert total / 1e9 == pytest.approx(of_ijepa, rel=0.01)


def test_the_class_token_is_maes_alone() -> None:
    with pytest.raises(ValueError, match="class_token=True"):
        ReferenceMAE(shape(False))
    with pytest.raises(ValueError, match="class_token=False"):
        ReferenceIJEPA(shape(True), NARROW, DEPTH, HEADS)
