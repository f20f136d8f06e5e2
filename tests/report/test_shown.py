"""Pictures of what a snapshot shows besides features, from odd but possible ones."""

import warnings

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from fastjepa.evaluation.showing import Attended, Neighbours, Painted, Predictions, Retrieved, Showing
from fastjepa.report import shown
from fastjepa.report.attention import attention_pictures
from fastjepa.report.figures import to_png
from fastjepa.report.load import Snapshot
from fastjepa.report.neighbours import name_of, neighbour_pictures
from fastjepa.report.painting import painting_pictures
from fastjepa.report.predictions import example_picture, prediction_pictures, retrieval_pictures

TARGETS = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])  # [M, n, P]


def snapshot(showing: Showing, class_names: tuple[str, ...] = ()) -> Snapshot:
    images = torch.arange(2 * 12 * 12).view(2, 1, 12, 12).to(torch.uint8)
    context = [torch.tensor([8]), torch.tensor([8])]
    return Snapshot(10, (3, 3), images, torch.randn(2, 9, 4).half(), context, TARGETS, showing, class_names)


def predictions(centred: Tensor) -> Predictions:
    return Predictions(cosine=centred, of_mean=centred, centred=centred, of_others=centred)


@pytest.mark.parametrize("bad", [1, 8])
def test_a_predictor_that_diverged_before_the_target_has_its_picture(bad: int) -> None:
    centred = torch.full((2, 2, 2), 0.5).half()
    centred.view(-1)[:bad] = torch.nan
    last = snapshot(Showing(predictions=predictions(centred)))
    (picture,) = shown.pictures(last, last)
    assert picture.title == "What the predictor predicts"
    assert len(picture.pngs) == 1
    assert "nan" not in picture.caption + picture.alt


@pytest.mark.parametrize("high", [0.5, 2.04, 2.56, 17.0, float("nan")])
def test_the_scale_of_attention_names_its_end(high: float) -> None:
    shares = torch.full((2, 2, 9), high).half()
    view = Attended(shares, shares, torch.zeros(2, 0, 9).half(), torch.tensor(4))
    last = snapshot(Showing(attended=view))
    for figure in attention_pictures(last, view):
        figure.draw_without_rendering()
        bar = figure.axes[-1]
        low, end = bar.get_xlim()
        shown = [float(label.get_text()) for label in bar.get_xticklabels()]
        assert (shown[0], shown[-1]) == (low, end)
        assert not high > end


def written(figure: Figure) -> list[Text]:
    words: list[Text] = []
    for axes in figure.axes:
        words += [*axes.texts, axes.title]
        if axes.axison:
            words += [axes.xaxis.label, *axes.get_xticklabels()]
    return [text for text in words if text.get_text()]


def test_letters_of_pictures_are_read_on_a_phone_and_whole() -> None:
    """A picture is 333 pixels wide where the page is 375. Names of classes may be smaller, to have room."""
    share = torch.full((2, 2, 9), 1.5).half()
    half = torch.full((2, 2, 2), 0.5).half()
    filled = torch.zeros(2, 1, 12, 12, dtype=torch.uint8)
    retrieved = Retrieved(
        filled, filled, filled,
        example_image=torch.tensor([0, 1]), example_block=torch.tensor([0, 1]),
        example_place=torch.tensor([0, 6]), examples=torch.zeros(2, 7, 1, 12, 12, dtype=torch.uint8),
    )  # fmt: skip
    painted = Painted(filled, filled, torch.tensor(True), half[0], half[0])
    attended = Attended(share, share, share, torch.tensor(4))
    last = snapshot(Showing())
    drawn = [
        *prediction_pictures(last, predictions(half), TARGETS),
        *retrieval_pictures(last, retrieved, TARGETS),
        example_picture(retrieved),
        *painting_pictures(last, painted, TARGETS[0]),
        *attention_pictures(last, attended),
    ]
    for figure in drawn:
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        pixels_per_point = 333 / figure.get_figwidth() / 72
        for text in written(figure):
            assert float(text.get_fontsize()) * pixels_per_point >= 12
            box, page = text.get_window_extent(), figure.bbox
            assert box.x0 >= page.x0 - 1, text
            assert box.x1 <= page.x1 + 1, text
            assert box.y0 >= page.y0 - 1, text
            assert box.y1 <= page.y1 + 1, text


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_any_name_of_a_class_is_written_as_it_stands() -> None:
    names = (
        "$x_{$",
        "a$b$c",
        "\N{CJK UNIFIED IDEOGRAPH-978B}",
        "two\nlines",
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
    )
    near = Neighbours(
        by_features=torch.zeros(2, 4, 1, 4, 4, dtype=torch.uint8),
        by_pixels=torch.zeros(2, 4, 1, 4, 4, dtype=torch.uint8),
        feature_labels=torch.tensor([[0, 1, 2, 3]] * 2),
        pixel_labels=torch.tensor([[4, 0, 1, 2]] * 2),
        labels=torch.tensor([0, 1]),
        bank_labels=torch.arange(5),
    )
    (figure,) = neighbour_pictures(snapshot(Showing(neighbours=near), names), near)
    with warnings.catch_warnings(action="error"):
        assert to_png(figure)
    assert {"$x_{$", "a$b$c", "2", "3", names[4]} <= set(texts(figure))


def test_a_class_without_a_name_has_its_number() -> None:
    assert name_of(3, ("shoe",)) == "3"
    assert name_of(0, ("shoe",)) == "shoe"
    assert name_of(0, ("a very long name indeed",)) == "a very long \N{HORIZONTAL ELLIPSIS}"
