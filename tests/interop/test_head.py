"""Linear classifiers as files."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from fastjepa.evaluation.features import standardise
from fastjepa.evaluation.linear import fit_linear
from fastjepa.interop import LinearHead, load_head, save_head
from fastjepa.interop.head import of_plain_features


@given(st.integers(1, 5), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_a_head_comes_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, classes: int, width: int, named: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = tuple(f"class, {number} é" for number in range(classes)) if named else ()
    weight = torch.randn(classes, width, generator=generator)
    head = LinearHead(weight, torch.randn(classes, generator=generator), names)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_head(head, path)
    found = load_head(path, width)
    assert torch.equal(found.weight, head.weight)
    assert torch.equal(found.bias, head.bias)
    assert found.class_names == names
    assert len(found.names) == classes
    assert load_file(path).keys() == {"weight", "bias"}
    assert [entry.name for entry in path.parent.iterdir()] == ["head.safetensors"]


def test_a_probe_of_standardised_features_becomes_one_of_plain_ones() -> None:
    """On real digits, one column of which is constant and must not count."""
    pixels, labels = load_digits(return_X_y=True)
    features, targets = torch.tensor(pixels).float(), torch.tensor(labels)
    standardised, _ = standardise(features, features)
    deviation, mean = torch.std_mean(features, dim=0)
    scale = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.inf)
    assert scale.isinf().any()
    fitted = fit_linear(standardised, targets, 1e-3, 10)
    probe = LinearHead(fitted.weight, fitted.bias)
    plain = of_plain_features(probe, mean, scale)
    torch.testing.assert_close(plain.logits(features), probe.logits(standardised), rtol=1e-4, atol=1e-4)
    assert (plain.logits(features).argmax(dim=1) == targets).float().mean() > 0.95


def test_what_is_no_head(tmp_path: Path) -> None:
    weight, bias = torch.zeros(3, 8), torch.zeros(3)
    for tensors, metadata, said in (
        ({"w": weight}, None, "it holds w, not weight and bias"),
        (
            {f"w{i}": torch.zeros(1) for i in range(9)},
            None,
            "holds w0, w1, w2, w3 and 5 more, not weight and",
        ),
        ({"weight": weight, "bias": torch.zeros(2)}, None, r"got \[3, 8\] and \[2\]"),
        ({"weight": weight, "bias": bias}, {"class_names": '["a"]'}, "1 class names for 3 classes"),
        ({"weight": weight, "bias": bias}, {"class_names": '{"a": 1}'}, "no JSON list of names"),
        ({"weight": weight / 0, "bias": bias}, None, "not finite"),
        ({"weight": weight, "bias": bias}, None, "of width 8, and the encoder's are 16 wide"),
    ):
        path = tmp_path / "head.safetensors"
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=f"head.safetensors .*{said}"):
            load_head(path, 16)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="is not used as a head: it is no safetensors file"):
        load_head(path)
    with pytest.raises(ValueError, match="is not used as a head"):
        load_head(tmp_path / "nowhere")
