"""Lists of labelled images, one file name a line, as the authors published them for ImageNet."""

from dataclasses import replace

import numpy as np
import pytest

from simclr import UserError
from simclr.data.images import array_images
from simclr.data.labels import read_label_list

KEYS = [
    "train/n01440764/n01440764_10026.JPEG",
    "train/n01440764/n01440764_1002.JPEG",
    "train/n01443537/n01443537_10007.JPEG",
    "train/n01443537/n01443537_2.JPEG",
    "train/cats/001.png",
    "train/dogs/001.png",
]


@pytest.fixture
def images():
    labels = np.array([0, 0, 1, -1, 2, 3])
    pixels = np.zeros((6, 4, 4), np.uint8)
    images = array_images(
        pixels, labels, name="photos", split="train", has_own_split=True, classes=None, channels="auto"
    )
    return replace(images, keys=KEYS)


def listed(tmp_path, text, images):
    file = tmp_path / "1percent.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_label_list(file, images).tolist()


def test_file_names_find_their_images_in_the_order_of_the_data(tmp_path, images):
    names = "n01443537_10007.JPEG\nn01440764_10026.JPEG\n"
    assert listed(tmp_path, names, images) == [0, 2]
    assert listed(tmp_path, names.replace("\n", "\r\n") + "\r\n", images) == [0, 2]
    assert listed(tmp_path, b"\xef\xbb\xbf" + names.rstrip().encode(), images) == [0, 2]


def test_the_end_of_a_path_decides_between_equal_names(tmp_path, images):
    assert listed(tmp_path, "dogs/001.png\n./n01440764_1002.JPEG", images) == [1, 5]
    assert listed(tmp_path, "train\\cats\\001.png", images) == [4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n01440764_10026.JPEG\nn99_1.JPEG\nn99_2.JPEG", "its 3 names 2 are no image's name (n99_1.JPEG, n99_2.JPEG)."),
        ("0026.JPEG", "its 1 names 1 are no image's name (0026.JPEG)"),  # an end of a name is no name
        ("ogs/001.png", "1 are no image's name (ogs/001.png)"),
        ("001.png", "1 fit several images (001.png)"),
        ("n01440764_10026.JPEG\nn01440764/n01440764_10026.JPEG", "1 are there more than once"),
        ("n01443537_2.JPEG", "1 have no label (train/n01443537/n01443537_2.JPEG)"),
        ("001.png\nx\ny\nz\nw", "4 are no image's name (x, y, z and 1 more); 1 fit several images (001.png)"),
        ("\n \n", "is empty"),
        (b"\xff\xd8\xff\xe0", "cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_counts(tmp_path, images, text, said):
    with pytest.raises(UserError) as caught:
        listed(tmp_path, text, images)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_list_and_data_without_labels(tmp_path, images):
    with pytest.raises(UserError, match=r"nowhere\.txt cannot be read"):
        read_label_list(tmp_path / "nowhere.txt", images)
    with pytest.raises(UserError, match="1 have no label"):
        listed(tmp_path, "n01440764_10026.JPEG", replace(images, labels=None))
