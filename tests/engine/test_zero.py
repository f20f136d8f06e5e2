"""Engines of DeepSpeed: what they load, and that torch is left as it was."""

import inspect
import re
import sys

import pytest
import torch

from fastjepa.engine.zero import UncompiledAdamW, _without_compiler
from tests.conftest import Trainer


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_does_not_load_the_compiler(train: Trainer, stage: int) -> None:
    importing = (sys.executable, "-X", "importtime")
    finished = train(f"speed.zero_stage={stage}", "optim.steps=4", launcher=importing).check()
    imported = re.findall(r"^import time: .*\| +(\S+)$", finished.err, re.MULTILINE)
    assert "deepspeed" in imported
    assert "torch._dynamo" not in imported
    assert "torch._inductor" not in imported
    assert "untested" not in finished.out + finished.err


def test_decorators_of_torch_are_back_after_a_failure() -> None:
    before = torch.compile, torch.compiler.disable, torch._disable_dynamo
    with pytest.raises(ZeroDivisionError), _without_compiler():
        1 // int(torch.compile(len) is not torch.compiler.disable()(len))
    assert (torch.compile, torch.compiler.disable, torch._disable_dynamo) == before


def test_steps_are_those_of_torch_bit_by_bit() -> None:
    weights = []
    for kind in (torch.optim.AdamW, UncompiledAdamW):
        torch.manual_seed(0)
        weight = torch.randn(33, requires_grad=True)
        optimizer = kind([weight], lr=0.1, weight_decay=0.3, fused=True)
        for _ in range(3):
            (weight**3).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert weight.grad is None
        weights.append(weight.detach())
    assert torch.equal(*weights)
    # Were a method renamed in torch, the wrapped one would come back unseen.
    for name in ("add_param_group", "zero_grad", "step"):
        assert inspect.unwrap(getattr(torch.optim.AdamW, name)) is not getattr(torch.optim.AdamW, name)
