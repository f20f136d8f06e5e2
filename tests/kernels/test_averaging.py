import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastjepa_kernels as fk


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=5
    )


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, 2))


class Tied(nn.Module):
    """Two names of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def change(model: nn.Module) -> None:
    """As a step of training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)


def averages_of(ema: fk.EMA) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value.clone() for name, value in ema.state_dict().items()}


@pytest.mark.parametrize("make", [vit, convolutions, Tied])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_it_is_the_loop_that_it_replaces(make: type[nn.Module], as_tensor: bool) -> None:
    student = make()
    teacher = copy.deepcopy(student)
    ema = fk.EMA(student, torch.tensor(0.9) if as_tensor else 0.9)
    for step in range(4):
        change(student)
        if make is convolutions:
            student(torch.randn(2, 3, 32, 32))  # moves the running statistics
        momentum = 0.9 + step / 100
        ema.update(student, momentum if step else None)
        with torch.no_grad():
            for average, new in zip(teacher.parameters(), student.parameters(), strict=True):
                average.mul_(momentum).add_((1 - momentum) * new)
            for own, given in zip(teacher.buffers(), student.buffers(), strict=True):
                own.copy_(given)
    for name, value in averages_of(ema).items():
        torch.testing.assert_close(value, teacher.state_dict()[name])
    if make is convolutions:
        assert ema.model.get_buffer("1.num_batches_tracked") == 4


def test_it_is_a_teacher() -> None:
    student = vit().train()
    student(torch.randn(1, 3, 32, 32)).sum().backward()
    ema = fk.EMA(student, 0.99)
    assert not any(module.training for module in ema.model.modules())
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.grad is None for parameter in ema.parameters())
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    images = torch.randn(2, 3, 32, 32)
    out = ema(images)
    assert torch.equal(out, student.eval()(images))
    assert not out.requires_grad
    change(student)
    assert torch.equal(ema(images), out)
    ema.train()
    assert ema.model.training


@pytest.mark.parametrize("working_dtype", [None, torch.bfloat16])
def test_the_average_stays_in_fp32_beside_a_working_copy_in_bf16(working_dtype: torch.dtype | None) -> None:
    # Each step is far below what bf16 resolves.
    student = nn.Linear(4, 3).to(torch.bfloat16 if working_dtype is None else torch.float32)
    with torch.no_grad():
        student.weight.fill_(1)
    ema = fk.EMA(student, 0.999, working_dtype=working_dtype)
    with torch.no_grad():
        student.weight.fill_(1.0625)
    for _ in range(200):
        ema.update(student)
    average = ema.state_dict()["model.weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((3, 4), 1 + 0.0625 * (1 - 0.999**200)), rtol=1e-5, atol=0)
    assert ema.model.get_parameter("weight").dtype == torch.bfloat16
    assert torch.equal(ema.model.get_parameter("weight"), average.bfloat16())
    assert ema(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


def test_models_of_several_dtypes() -> None:
    student = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4), nn.Linear(4, 2).double())
    ema = fk.EMA(student, 0.5)
    before = averages_of(ema)
    change(student)
    ema.update(student)
    after = averages_of(ema)
    assert [after[f"{i}.weight"].dtype for i in range(3)] == [torch.float32, torch.float32, torch.float64]
    for name, parameter in student.named_parameters():
        expected = torch.lerp(before[name], parameter.detach().to(before[name].dtype), 0.5)
        torch.testing.assert_close(after[name], expected)
    assert [p.dtype for p in ema.parameters()] == [p.dtype for p in student.parameters()]


@pytest.mark.parametrize("make", [vit, convolutions, Tied])
@pytest.mark.parametrize("working_dtype", [None, torch.bfloat16])
def test_a_state_dict_is_that_of_the_model_in_fp32(
    make: type[nn.Module], working_dtype: torch.dtype | None
) -> None:
    student = make()
    ema = fk.EMA(student, 0.9, working_dtype=working_dtype)
    change(student)
    ema.update(student)
    state = ema.state_dict()
    assert state.keys() == {f"model.{name}" for name in student.state_dict()}
    plain = make()
    plain.load_state_dict(averages_of(ema))  # strict

    # Whatever it was saved from, into whatever computes.
    for other_dtype in (None, torch.bfloat16):
        other = fk.EMA(make(), 0.9, working_dtype=other_dtype)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        for name, value in other.state_dict().items():
            exact = value.dtype == torch.float32 and not (working_dtype and name.endswith(("mean", "var")))
            expected = state[name] if exact else state[name].to(value.dtype)
            assert torch.equal(value, expected)
        other.update(student)
        reference = averages_of(ema)
        for name, parameter in student.named_parameters():
            reference[name].lerp_(parameter.detach(), 1 - 0.9)
            torch.testing.assert_close(averages_of(other)[name], reference[name])
            copied = dict(other.model.named_parameters())[name]
            assert torch.equal(copied, averages_of(other)[name].to(copied.dtype))


def test_loading_is_strict_about_names_and_shapes() -> None:
    ema = fk.EMA(vit(), 0.9, working_dtype=torch.bfloat16)
    state = ema.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key.*"model.cls_token"'):
        ema.load_state_dict({name: value for name, value in state.items() if name != "model.cls_token"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"model.more"'):
        ema.load_state_dict(state | {"model.more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for model.cls_token"):
        ema.load_state_dict(state | {"model.cls_token": torch.zeros(1)})
    # The model's own state dict sets the average too.
    weights = {name: torch.randn_like(value) for name, value in averages_of(ema).items()}
    ema.model.load_state_dict(weights)
    assert all(torch.equal(value, weights[name]) for name, value in averages_of(ema).items())


@pytest.mark.parametrize("working_dtype", [None, torch.bfloat16])
def test_loaded_tensors_are_not_assigned(working_dtype: torch.dtype | None) -> None:
    ema = fk.EMA(vit(), 0.9, working_dtype=working_dtype)
    before, other = averages_of(ema), vit().half().state_dict()
    with pytest.raises(ValueError, match="load_state_dict of an average must not assign"):
        ema.model.load_state_dict(other, assign=True)
    with pytest.raises(ValueError, match="must not assign"):
        ema.load_state_dict({f"model.{name}": value for name, value in other.items()}, assign=True)
    assert all(torch.equal(value, before[name]) for name, value in averages_of(ema).items())
    assert {parameter.dtype for parameter in ema.parameters()} == {working_dtype or torch.float32}
    with pytest.raises(ValueError, match=r"dict\(state_dict\) has none"):
        ema.model.load_state_dict(other)
    ema.model.load_state_dict(dict(other))
    assert all(torch.equal(value, other[name].float()) for name, value in averages_of(ema).items())


def test_casts_are_of_the_working_copy_alone() -> None:
    student = vit()
    ema = fk.EMA(student, torch.tensor(0.9, dtype=torch.float64))
    change(student)
    ema.update(student)
    before = averages_of(ema)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ema.to(dtype)
        assert {parameter.dtype for parameter in ema.parameters()} == {dtype}
        assert ema(torch.randn(1, 3, 32, 32, dtype=dtype)).dtype == dtype
        after = averages_of(ema)
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert isinstance(ema.momentum, Tensor)
    assert ema.momentum.dtype == torch.float64
    assert not ema._shadow


def test_it_moves_between_devices() -> None:
    student = vit().bfloat16()
    ema = fk.EMA(student, torch.tensor(0.9))
    state = averages_of(ema)
    ema.to("meta")
    assert {value.device.type for value in ema.state_dict().values()} == {"meta"}
    with pytest.raises(ValueError, match=r"cls_token of model must be .* on the device of its average"):
        ema.update(student)
    ema.to_empty(device="cpu")
    ema.model.load_state_dict(state)
    assert {value.dtype for value in averages_of(ema).values()} == {torch.float32}
    change(student)
    ema.update(student)
    for name, parameter in student.named_parameters():
        expected = torch.lerp(state[name], parameter.detach().float(), 1 - 0.9)
        torch.testing.assert_close(averages_of(ema)[name], expected)


@pytest.mark.parametrize("method", [nn.Module.bfloat16, nn.Module.half])
def test_a_cast_of_the_model_alone_is_refused(method: Callable[[nn.Module], nn.Module]) -> None:
    student = vit()
    ema = fk.EMA(student, 0.9)
    method(ema.model)
    before = averages_of(ema)
    change(student)
    with pytest.raises(ValueError, match=r"cls_token cannot be averaged in .*float16 on cpu .* by EMA\.to"):
        ema.update(student)
    assert all(torch.equal(value, before[name]) for name, value in averages_of(ema).items())
    ema.to(ema.model.get_parameter("cls_token").dtype)  # as the message says
    ema.update(student, 0.0)
    assert torch.equal(averages_of(ema)["head.weight"], student.get_parameter("head.weight"))


def test_a_move_of_the_model_alone_is_refused() -> None:
    student = vit()
    ema = fk.EMA(student, 0.9, working_dtype=torch.bfloat16)
    ema.model.to("meta")
    with pytest.raises(ValueError, match=r"float32 on cpu beside .* bfloat16 on meta: .* by EMA\.to"):
        ema.update(student)


class Rotary(nn.Linear):
    """With a cache that the first forward pass makes, and a constant; of neither is there a state dict."""

    cache: Tensor | None

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("scale", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.cache = torch.arange(len(x)).float()
        return super().forward(x)


def test_caches_of_a_forward_pass_may_differ() -> None:
    student = nn.Sequential(Rotary())
    ema = fk.EMA(student, 0.9)
    inner: Any = ema.model.get_submodule("0")
    outer: Any = student.get_submodule("0")
    student(torch.zeros(3, 2))
    student.get_buffer("0.scale").fill_(5)
    ema.update(student)
    assert inner.cache is None
    assert ema.model.get_buffer("0.scale").tolist() == [5, 5]
    ema(torch.zeros(4, 2))
    ema.update(student)
    assert inner.get_buffer("cache").tolist() == [0, 1, 2, 3]
    student(torch.zeros(4, 2))
    outer.get_buffer("cache").mul_(2)
    ema.update(student)
    assert inner.get_buffer("cache").tolist() == [0, 2, 4, 6]
    outer.cache = None
    ema.update(student)
    assert inner.get_buffer("cache").tolist() == [0, 2, 4, 6]


def test_copies_are_their_own() -> None:
    student = vit()
    ema = fk.EMA(student, 0.9, working_dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save(ema, file)
    file.seek(0)
    before = averages_of(ema)
    for other in (copy.deepcopy(ema), torch.load(file, weights_only=False)):
        change(student)
        other.update(student)
        assert not torch.equal(averages_of(other)["head.weight"], before["head.weight"])
        assert all(torch.equal(value, before[name]) for name, value in averages_of(ema).items())
        other.load_state_dict({f"model.{name}": value for name, value in before.items()})
        assert all(torch.equal(value, before[name]) for name, value in averages_of(other).items())
        other.update(student, 0.0)
        assert torch.equal(averages_of(other)["head.weight"], student.get_parameter("head.weight"))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Wrapper(nn.Module):
    """Somebody's own, such as an engine."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.usefixtures("one_process")
def test_wrapped_models_are_averaged_by_what_is_inside() -> None:
    student = vit()
    ema = fk.EMA(student, 0.9)
    compiled: nn.Module = torch.compile(student)  # type: ignore[assignment]
    distributed = DistributedDataParallel(student)
    both: nn.Module = torch.compile(distributed)  # type: ignore[assignment]
    for wrapped in (compiled, distributed, both):
        made = fk.EMA(wrapped, 0.9)
        assert type(made.model) is type(student)
        assert averages_of(made).keys() == student.state_dict().keys()
    reference = fk.EMA(student, 0.9)
    for wrapped in (compiled, distributed, both, Wrapper(student), Wrapper(distributed)):
        change(student)
        ema.update(wrapped)
        reference.update(student)
        assert all(torch.equal(v, averages_of(reference)[name]) for name, v in averages_of(ema).items())
    student.set_submodule("blocks.0", torch.compile(student.get_submodule("blocks.0")))  # type: ignore[arg-type]
    change(student)
    ema.update(student)
    reference.update(student)
    assert all(torch.equal(v, averages_of(reference)[name]) for name, v in averages_of(ema).items())


def test_other_models_are_refused_by_the_names_of_their_parameters() -> None:
    student = convolutions()
    ema = fk.EMA(student, 0.9)
    before = averages_of(ema)
    change(student)

    def refused(model: nn.Module, message: str, momentum: float | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            ema.update(model, momentum)
        assert all(torch.equal(value, before[name]) for name, value in averages_of(ema).items())

    more, fewer, other = (copy.deepcopy(student) for _ in range(3))
    more.register_parameter("scale", nn.Parameter(torch.ones(1)))
    refused(more, "parameters that the average was made of: it has scale besides")
    fewer.get_submodule("0").register_parameter("bias", None)
    refused(fewer, "it has no 0.bias")
    other.set_submodule("3", nn.Linear(2, 2))
    refused(other, r"3.weight of model must be .* got \[2, 2\] float32 on cpu and \[2, 3600\]")
    other = copy.deepcopy(student)
    other.register_buffer("count", torch.zeros(1))
    refused(other, "buffers that the average was made of: it has count besides")
    refused(student, r"momentum must lie in \[0, 1\], got 1.5", 1.5)
    refused(ema.model, "must not share memory")


def test_parameters_of_whole_numbers_are_copied() -> None:
    student = nn.Linear(2, 2)
    student.register_parameter("order", nn.Parameter(torch.tensor([3, 1]), requires_grad=False))
    ema = fk.EMA(student, 0.9)
    student.get_parameter("order").data = torch.tensor([5, 7])
    ema.update(student)
    assert ema.model.get_parameter("order").tolist() == [5, 7]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got -1"):
        fk.EMA(vit(), -1)
    with pytest.raises(ValueError, match=r"working_dtype must be floating point, got torch.int8"):
        fk.EMA(vit(), 0.9, working_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"weight must be floating point, got \[2, 2\] complex64"):
        fk.EMA(nn.Linear(2, 2, dtype=torch.complex64), 0.9)
