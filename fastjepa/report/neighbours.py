"""The images that features find alike, beside those that pixels do."""

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from torch import Tensor

from fastjepa.evaluation.showing import Neighbours
from fastjepa.report.figures import BLUE, INK, RED
from fastjepa.report.load import Snapshot
from fastjepa.report.panels import panels, rows_of, show, under
from fastjepa.report.patches import rgb

_LONGEST = 13  # letters of a class name under a picture


def neighbour_pictures(snapshot: Snapshot, near: Neighbours) -> list[Figure]:
    """Two rows for each image: its nearest by features, and by pixels. Names in blue are the image's own."""
    images, k = rgb(snapshot.images), near.by_features.shape[1]
    is_labelled = has_labels(near)
    figures = []
    for chosen in rows_of(len(images)):
        titles = ("image", "nearest", *(f"{i}" for i in range(2, k + 1)))[: 1 + k]
        sheet = panels(
            2 * len(chosen), 1 + k, images.shape[1] / images.shape[2],
            titles=titles, left_in=0.22, has_text=is_labelled, wider_after=(0,),
        )  # fmt: skip
        for number, image in enumerate(chosen):
            label = int(near.labels[image])
            both = ((near.by_features, near.feature_labels), (near.by_pixels, near.pixel_labels))
            for row, ((pictures, labels), name) in enumerate(zip(both, ("features", "pixels"), strict=True)):
                cells = sheet.axes[2 * number + row]
                sheet.name_row(2 * number + row, name)
                if row == 0:
                    show(cells[0], images[image])
                    if is_labelled:
                        under(cells[0], name_of(label, snapshot.class_names), INK)
                found = zip(cells[1:], rgb(pictures[image]), labels[image].tolist(), strict=True)
                for axes, picture, other in found:
                    show(axes, picture)
                    if is_labelled:
                        colour = BLUE if other == label else RED
                        under(axes, name_of(other, snapshot.class_names), colour)
        figures.append(sheet.figure)
    return figures


def has_labels(near: Neighbours) -> bool:
    """Whether images shown and bank have labels."""
    return bool((near.labels >= 0).all() and (near.bank_labels >= 0).all())


def same_label(near: Neighbours) -> tuple[float, float, float]:
    """The fraction with the label of the image shown: by features, by pixels, and of the whole bank."""
    wanted = near.labels[:, None]  # [n, 1]

    def fraction(labels: Tensor) -> float:
        return float((labels == wanted).float().mean())

    return fraction(near.feature_labels), fraction(near.pixel_labels), fraction(near.bank_labels[None])


def name_of(label: int, names: tuple[str, ...]) -> str:
    """Of a class, cut to what has room under a picture; its number where it has none that can be written."""
    name = names[label] if 0 <= label < len(names) else ""
    font = get_font(findfont("DejaVu Sans"))  # comes with matplotlib, and lacks the letters of many languages
    if not name or not all(font.get_char_index(ord(letter)) for letter in name):
        return str(label)
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
