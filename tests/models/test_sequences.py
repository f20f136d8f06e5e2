import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastjepa.models import equal_sequences
from fastjepa.models.layout import dense_layout


def test_equal_sequences_serve_training_after_inference() -> None:
    with torch.inference_mode():
        sequences = equal_sequences(3, 7, torch.device("cpu"))
    assert sequences.cu_seqlens.tolist() == [0, 7, 14, 21]
    assert sequences.cu_seqlens.dtype == torch.int32
    assert (sequences.count, sequences.max_seqlen) == (3, 7)
    assert not equal_sequences(3, 7, torch.device("cpu")).cu_seqlens.is_inference()


def test_fake_tensors_are_not_kept_nor_given_kept_ones() -> None:
    here = torch.device("cpu")
    for first_is_fake in (True, False):
        length = 11 + first_is_fake
        if not first_is_fake:
            equal_sequences(5, length, here)
            dense_layout(2, 5, 3, length, here)
        with FakeTensorMode():
            assert isinstance(equal_sequences(5, length, here).cu_seqlens, FakeTensor)
            assert isinstance(dense_layout(2, 5, 3, length, here).asked_rows, FakeTensor)
        assert type(equal_sequences(5, length, here).cu_seqlens) is torch.Tensor
        assert type(dense_layout(2, 5, 3, length, here).asked_rows) is torch.Tensor
