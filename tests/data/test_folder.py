import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from fastjepa.data.folder import ImageFolder
from fastjepa.data.unreadable import UnreadableImage


def put(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 6), colour).save(path)
    return path


def test_one_sub_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("zebra/1.png", "ant/deep/er/2.jpg", "ant/1.png", "bee/1.PNG"):
        put(tmp_path / name)
    images = ImageFolder(tmp_path)
    paths = [os.path.relpath(images.path(i), tmp_path) for i in range(len(images))]
    assert paths == ["ant/1.png", "ant/deep/er/2.jpg", "bee/1.PNG", "zebra/1.png"]
    assert images.class_names == ("ant", "bee", "zebra")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "names", [["a/1.png", "b/1.png", "1.png"], ["1.png", "2.png"], ["all/1.png", "all/2.png"]]
)
def test_no_labels_where_the_folders_tell_nothing_apart(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        put(tmp_path / name)
    images = ImageFolder(tmp_path)
    assert len(images) == len(names)
    assert images.labels is None
    assert images.class_names is None


def test_only_images_are_taken(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpeg", "c.png", "d.webp", "e.bmp", "f.tif", "g.TIFF", "h.gif", "i.ppm"):
        (tmp_path / name).touch()
    for name in ("notes.txt", "._a.jpg", "jpg", "a.jpg.json", ".hidden/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(ImageFolder(tmp_path)) == 9


def test_a_folder_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "archive.tar").touch()
    with pytest.raises(ValueError, match=r"no images below .*looked for \.jpg, \.jpeg, \.png, .*\.ppm"):
        ImageFolder(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere")


def test_other_numbers_of_channels_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    with pytest.raises(ValueError, match="channels is 4"):
        ImageFolder(tmp_path, channels=4)


def test_read(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 70)
    (tmp_path / "b.png").touch()
    assert ImageFolder(tmp_path).read(0).getpixel((0, 0)) == (70, 70, 70)
    assert ImageFolder(tmp_path, channels=1).read(0).getpixel((0, 0)) == 70
    with pytest.raises(UnreadableImage, match=r"b\.png"):
        ImageFolder(tmp_path).read(1)


def test_links_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/x.png")
    root = tmp_path / "root"
    put(root / "a/1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a/up").symlink_to(root)
    images = ImageFolder(root)
    assert [os.path.relpath(images.path(i), root) for i in range(len(images))] == ["a/1.png", "b/x.png"]


def test_names_in_any_encoding(tmp_path: Path) -> None:
    names = [b"caf\xe9.png", "日本.png".encode()]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).touch()
    images = ImageFolder(tmp_path)
    assert [os.path.basename(os.fsencode(images.path(i))) for i in range(2)] == names


def test_a_root_given_relative_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a/1.png", 5)
    monkeypatch.chdir(tmp_path)
    assert ImageFolder("a").read(0).getpixel((0, 0)) == (5, 5, 5)


def test_it_pickles_into_little_more_than_its_names(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"image_{i:08}.jpg").touch()
    images = ImageFolder(tmp_path)
    data = pickle.dumps(images)
    assert len(data) < 300 * (len("image_00000000.jpg") + 8) + 4000
    copy = pickle.loads(data)
    assert [copy.path(i) for i in range(300)] == [images.path(i) for i in range(300)]


def test_links_to_themselves_are_images_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path / "good.png")
    for name in ("loop.png", "loop"):
        (tmp_path / name).symlink_to(name)
    images = ImageFolder(tmp_path)
    assert [os.path.basename(images.path(i)) for i in range(len(images))] == ["good.png", "loop.png"]
    with pytest.raises(UnreadableImage, match=r"loop\.png: OSError: .*symbolic links"):
        images.encoded(1)
