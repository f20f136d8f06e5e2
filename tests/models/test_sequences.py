import torch

from fastjepa.models import equal_sequences


def test_equal_sequences_serve_training_after_inference() -> None:
    with torch.inference_mode():
        sequences = equal_sequences(3, 7, torch.device("cpu"))
    assert sequences.cu_seqlens.tolist() == [0, 7, 14, 21]
    assert sequences.cu_seqlens.dtype == torch.int32
    assert (sequences.count, sequences.max_seqlen) == (3, 7)
    assert not equal_sequences(3, 7, torch.device("cpu")).cu_seqlens.is_inference()
