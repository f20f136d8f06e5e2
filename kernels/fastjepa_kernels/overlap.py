"""Which bytes tensors occupy: an op that writes in place must not be handed the same bytes twice.

It runs at every step for hundreds of tensors, so what is common is cheap: where each tensor fills a block of
memory and the blocks are apart, two sorts show it. Everything else is looked at run by run, and exactly.
"""

from collections.abc import Sequence
from operator import le

import torch
from torch import Tensor

_NOWHERE = 2**63 - 1


def find_shared(written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[int, int] | None:
    """A byte that occurs twice in `written`, or in `written` and `read`.

    Returns:
        The two tensors that have it, by their places in `[*written, *read]`, the same place twice for one
        that overlaps itself; or None.
    """
    if _are_apart(written, read):
        return None
    start, end, owner = _runs(written, 0)
    met = (end[:-1] > start[1:]).nonzero()
    if len(met):
        return int(owner[met[0]]), int(owner[met[0] + 1])
    if len(start) == 0:
        return None
    read_start, read_end, reader = _runs(read, len(written))
    # Those written are apart and in order, so only the first that ends after a start can meet it.
    nearest = torch.searchsorted(end, read_start, right=True)
    met = (read_end > torch.cat([start, start.new_tensor([_NOWHERE])])[nearest]).nonzero()
    return (int(owner[nearest[met[0]]]), int(reader[met[0]])) if len(met) else None


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a block of memory, each byte once, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _are_apart(written: Sequence[Tensor], read: Sequence[Tensor]) -> bool:
    """True if all are dense and none written has a byte of another; False is not yet an answer."""
    tensors = [*written, *read]
    if not all(map(Tensor.is_contiguous, tensors)) and not all(map(is_dense, tensors)):
        return False
    if _blocks_are_apart(tensors):
        return True
    once = {(tensor.data_ptr(), tensor.nbytes): tensor for tensor in read}  # tied weights are read twice
    return len(once) < len(read) and _blocks_are_apart([*written, *once.values()])


def _blocks_are_apart(tensors: Sequence[Tensor]) -> bool:
    """Of dense tensors, which occupy `nbytes` bytes from `data_ptr` on."""
    starts = list(map(Tensor.data_ptr, tensors))
    ends = sorted([start + tensor.nbytes for start, tensor in zip(starts, tensors, strict=True)])
    starts.sort()
    # If the i-th end of all never comes after the (i+1)-th start, no two blocks are open at once.
    return all(map(le, ends, starts[1:]))


def _runs(tensors: Sequence[Tensor], number: int) -> tuple[Tensor, Tensor, Tensor]:
    """int64, in order of the starts: where each run of consecutive bytes starts and ends, and whose it is.

    The tensors are numbered from `number` on.
    """
    # On the CPU, whatever torch.set_default_device says.
    starts = [torch.empty(0, dtype=torch.int64, device="cpu")]
    ends, owners = list(starts), list(starts)
    for owner, tensor in enumerate(tensors, number):
        if tensor.numel() == 0:
            continue
        first = torch.tensor([tensor.data_ptr()], device="cpu")
        length = 1  # elements of a run
        for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if stride == length:
                length *= count
            else:
                steps = torch.arange(count, device="cpu") * (stride * tensor.itemsize)
                first = (first[:, None] + steps).flatten()
        starts.append(first)
        ends.append(first + length * tensor.itemsize)
        owners.append(torch.full_like(first, owner))
    start, order = torch.cat(starts).sort()
    return start, torch.cat(ends)[order], torch.cat(owners)[order]
