"""What an index says that lies outside: never a fault, no byte elsewhere read or written.

`make sanitize` runs these under compute-sanitizer, which sees every address.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastjepa_kernels as fk

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = [-1, 7, 2**31 - 1, -(2**31)]  # of 0..6
WRONG_STARTS = [[0, 9, 40], [0, 30, 12], [5, 12, 24], [-3, 12, 24]]  # of two sequences, 24 tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_gather_tokens_takes_zeros_for_what_is_not_there(dtype: torch.dtype, packed: bool) -> None:
    x = torch.randn(2, 7, 24, dtype=dtype, device="cuda", requires_grad=True)
    pos = torch.randn(7, 24, dtype=dtype, device="cuda", requires_grad=True)
    index = torch.tensor([[0, *OUTSIDE, 6], [*OUTSIDE, 3, 3]], device="cuda")
    present = (index >= 0) & (index < 7)
    starts = torch.tensor([0, 6, 12], dtype=torch.int32, device="cuda") if packed else None
    with fk.use("triton", strict=True):
        out = fk.gather_tokens(x, index.flatten() if packed else index, pos, starts).view(2, 6, 24)
        out.sum().backward()
    image = torch.arange(2, device="cuda")[:, None]
    kept = index.clamp(0, 6)
    expected = torch.where(present[..., None], (x[image, kept].float() + pos[kept].float()).to(dtype), 0)
    assert torch.equal(out, expected)
    assert x.grad is not None
    assert x.grad[:, :, 0].tolist() == [[1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 2, 0, 0, 0]]
    assert pos.grad is not None
    assert pos.grad[:, 0].tolist() == [1, 0, 0, 2, 0, 0, 1]


def test_patchify_gather_leaves_the_other_patches_right() -> None:
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, device="cuda")
    index = torch.tensor([[0, 16, -1, 5], [2**31 - 1, 3, 15, -(2**31)]], device="cuda")
    present = (index >= 0) & (index < 16)
    with fk.use("triton", strict=True):
        out = fk.patchify_gather(images, index, 4)
        expected = fk.patchify_gather(images, index.clamp(0, 15), 4)
    assert torch.equal(out[present], expected[present])


def test_jepa_loss_does_not_fault() -> None:
    prediction = torch.randn(1, 2, 6, 24, device="cuda", requires_grad=True)
    hidden = torch.randn(2, 7, 24, device="cuda")
    index = torch.tensor([[[0, *OUTSIDE, 6], [*OUTSIDE, 3, 3]]], device="cuda")
    with fk.use("triton", strict=True):
        fk.jepa_loss(prediction, hidden, index, None, None).backward()
    torch.cuda.synchronize()
    assert prediction.grad is not None
    present = (index >= 0) & (index < 7)
    assert bool(torch.isfinite(prediction.grad[present]).all())


@pytest.mark.parametrize("starts", WRONG_STARTS)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_packed_attention_stays_within_its_tensors(starts: list[int], head_dim: int) -> None:
    # Tensors right before and after it, in one buffer, must keep their bytes.
    buffer = torch.randn(3, 24, 3, 2, head_dim, device="cuda", dtype=torch.float16)
    before = buffer.clone()
    qkv = buffer[1].requires_grad_()
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device="cuda")
    with fk.use("triton", strict=True):
        out = fk.packed_attention(qkv, cu_seqlens, 24)
        torch.autograd.grad(out.float().sum(), qkv)
    torch.cuda.synchronize()
    assert torch.equal(buffer.detach(), before)


@pytest.mark.parametrize(
    "call",
    [
        "fk.gather_tokens(torch.zeros(2, 7, 8, device='cuda'), wrong)",
        "fk.patchify_gather(torch.zeros(2, 3, 8, 8, device='cuda'), wrong, 4)",
        "fk.jepa_loss(torch.zeros(1, 2, 3, 8, device='cuda'), torch.zeros(2, 7, 8, device='cuda'), "
        "wrong[None], None, None)",
        "fk.packed_attention(torch.zeros(9, 3, 1, 8, device='cuda'), wrong[0].int(), 9)",
    ],
)
def test_debugging_names_the_value(call: str) -> None:
    code = f"import torch, fastjepa_kernels as fk\nwrong = torch.tensor([[0, 1, 90]] * 2).cuda()\n{call}"
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"FASTJEPA_DEBUG": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert "90" in done.stderr
