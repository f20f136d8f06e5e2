"""Two steps of real models with and without the patch, what keeps its own path, and the way back."""

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.layers.attention import Attention
from torch import Tensor, nn

import fastjepa_kernels as fk

PackedCalls = Callable[[], AbstractContextManager[list[tuple[int, ...]]]]

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
}


def timm_vit(**options: Any) -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 2, "depth": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **(size | options))


class Hidden(nn.Module):
    """A transformers model that returns the tensor, so that it trains as a timm model does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).last_hidden_state


def of_transformers(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**(SMALL | options))
    return Hidden(getattr(transformers, f"{name}Model")(config))


@dataclass(frozen=True)
class Library:
    """How to build a small model with the given options, and how to patch it."""

    build: Callable[..., nn.Module]
    patch: Callable[[nn.Module], fk.integrations.Patched]


def transformers_family(name: str) -> Library:
    def build(**options: Any) -> nn.Module:
        return of_transformers(name, **options)

    return Library(build, fk.integrations.patch_transformers)


TIMM = Library(timm_vit, fk.integrations.patch_timm)
IJEPA = transformers_family("IJepa")
LIBRARIES = {
    "timm": TIMM,
    "vit": transformers_family("ViT"),
    "ijepa": IJEPA,
    "dinov2": transformers_family("Dinov2"),
    "dinov2_registers": transformers_family("Dinov2WithRegisters"),
}
each_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES.keys())
both_ways = pytest.mark.parametrize("library", [TIMM, IJEPA], ids=["timm", "transformers"])


def random_images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, 32, 32, dtype=dtype)


def train_two_steps(model: nn.Module, images: Tensor) -> list[float]:
    # The loss does not depend on the biases of keys, whose gradient is rounding noise; with a smaller eps
    # AdamW would make whole steps of it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_library
def test_two_steps_of_training_agree(packed_calls: PackedCalls, library: Library, dtype: torch.dtype) -> None:
    torch.manual_seed(0)  # of some draws a gradient is so near 0 that AdamW makes a step of its rounding
    plain = library.build().to(dtype).train()
    patched = copy.deepcopy(plain)
    library.patch(patched)
    images = random_images(dtype)
    losses = train_two_steps(plain, images)
    with packed_calls() as calls:
        losses_patched = train_two_steps(patched, images)
    assert len(calls) == 2 * 2  # layers and steps
    error = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses_patched, losses, rtol=error, atol=error)
    torch.testing.assert_close(patched.state_dict(), plain.state_dict(), rtol=error, atol=error)


@each_library
def test_it_is_in_place_and_can_be_undone(packed_calls: PackedCalls, library: Library) -> None:
    model = library.build().eval()
    images = random_images()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    keys, drawn = list(model.state_dict()), model(images)
    patched = library.patch(model)
    assert len(patched.names) == 2
    assert patched.kept == {}
    for name in patched.names:
        identity, original = before[name]
        module = model.get_submodule(name)
        assert id(module) == identity
        assert isinstance(module, original)
        assert type(module) is not original
    assert list(model.state_dict()) == keys

    again = library.patch(model)
    assert again.names == ()
    again.undo()  # of nothing: the first patch stands
    with packed_calls() as calls:
        torch.testing.assert_close(model(images), drawn)
    assert len(calls) == 2

    patched.undo()
    patched.undo()
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    with packed_calls() as calls:
        assert torch.equal(model(images), drawn)
        with library.patch(model) as patched:
            assert len(patched.names) == 2
        model(images)
    assert not calls


@both_ways
def test_copies_and_files_stay_patched(packed_calls: PackedCalls, library: Library) -> None:
    model = library.build().eval()
    images = random_images()
    patched = library.patch(model)
    expected = model(images)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    patched.undo()  # a copy is a model of its own
    for other in copies:
        with packed_calls() as calls:
            assert torch.equal(other(images), expected)
        assert len(calls) == 2
        plain = library.build().eval()
        plain.load_state_dict(other.state_dict())
        torch.testing.assert_close(plain(images), expected)


@both_ways
def test_wrapped_models_are_patched(packed_calls: PackedCalls, library: Library) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(library.build())
        patched = library.patch(wrapped)
        assert len(patched.names) == 2
        with packed_calls() as calls:
            wrapped(random_images()).sum().backward()
        assert len(calls) == 2
    finally:
        torch.distributed.destroy_process_group()


@both_ways
def test_under_autocast_attention_is_in_its_dtype(library: Library) -> None:
    model = library.build().eval()
    images = random_images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        library.patch(model)
        out = model(images)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.05)


@both_ways
def test_it_compiles_without_a_break(library: Library) -> None:
    model = library.build().train()
    images = random_images()
    library.patch(model)
    expected = model(images)
    expected.sum().backward()
    by_hand = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    compiled = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(compiled, by_hand)


@both_ways
def test_gradient_checkpointing_recomputes_the_packed_path(
    packed_calls: PackedCalls, library: Library
) -> None:
    model = library.build().train()
    images = random_images()
    library.patch(model)
    model(images).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    if library is TIMM:
        model.set_grad_checkpointing()  # type: ignore[operator]
    else:
        model.model.gradient_checkpointing_enable()  # type: ignore[union-attr, operator]
    with packed_calls() as calls:
        model(images).sum().backward()
    assert len(calls) == 4
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected)


@pytest.mark.parametrize(
    ("library", "options"),
    [(TIMM, {"attn_drop_rate": 0.5}), (IJEPA, {"attention_probs_dropout_prob": 0.5})],
    ids=["timm", "transformers"],
)
def test_dropout_in_training_takes_the_original_path(
    packed_calls: PackedCalls, library: Library, options: dict[str, Any]
) -> None:
    plain = library.build(**options).train()
    model = copy.deepcopy(plain)
    assert len(library.patch(model).names) == 2
    images = random_images()
    with packed_calls() as calls:
        torch.manual_seed(3)
        drawn = model(images)
        torch.manual_seed(3)
        assert torch.equal(plain(images), drawn)
        assert not calls
        torch.testing.assert_close(model.eval()(images), plain.eval()(images))
        assert len(calls) == 2


@pytest.mark.parametrize(
    ("library", "options", "reason"),
    [
        (TIMM, {"embed_dim": 40}, "head dim 20"),
        (TIMM, {"embed_dim": 272}, "head dim 136"),
        (TIMM, {"qk_norm": True}, "normalises queries and keys"),
        (IJEPA, {"hidden_size": 40}, "head dim 20"),
        (IJEPA, {"hidden_size": 272}, "head dim 136"),
        (IJEPA, {"attn_implementation": "eager"}, "implementation is 'eager'"),
    ],
)
def test_modules_that_cannot_be_packed_are_kept(
    packed_calls: PackedCalls, library: Library, options: dict[str, Any], reason: str
) -> None:
    model = library.build(**options).eval()
    images = random_images()
    expected = model(images)
    with pytest.warns(UserWarning, match=f"keeps its own attention everywhere; .*{reason}"):
        patched = library.patch(model)
    assert patched.names == ()
    assert len(patched.kept) == 2
    assert all(reason in said for said in patched.kept.values())
    with packed_calls() as calls:
        assert torch.equal(model(images), expected)
    assert not calls


@both_ways
def test_some_modules_can_be_kept(library: Library, recwarn: pytest.WarningsRecorder) -> None:
    model = library.build()
    attention = [m for m in model.modules() if "Attention" in type(m).__name__]
    attention[0].forward = attention[0].forward  # as tools do that wrap it
    patched = library.patch(model)
    assert len(patched.names) == 1
    assert list(patched.kept.values()) == ["its forward was replaced by another tool"]
    assert not [warning for warning in recwarn if "attention everywhere" in str(warning.message)]


def test_another_attention_of_the_same_name_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, x: Tensor, sinks: Tensor | None = None) -> Tensor:
        return x

    model = timm_vit()
    model.blocks[0].attn.sinks = nn.Linear(1, 1)  # type: ignore[index, union-attr]
    assert list(TIMM.patch(model).kept.values()) == ["it has modules that are not known: sinks"]
    monkeypatch.setattr(Attention, "forward", forward)
    with pytest.warns(UserWarning, match="another version of the library"):
        TIMM.patch(timm_vit())


@pytest.mark.parametrize(
    ("library", "model", "said"),
    [
        (TIMM, nn.Linear(2, 2), "looked for timm.layers.attention.Attention; .*nothing by that name"),
        (TIMM, of_transformers("ViT"), "it has .*modeling_vit.ViTAttention"),
        (IJEPA, timm_vit(), "IJepaAttention, .*it has timm.layers.attention.Attention"),
        (IJEPA, "google/vit", "model must be a torch.nn.Module, got str"),
    ],
)
def test_a_model_without_such_attention_is_refused(library: Library, model: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        library.patch(model)
