"""The paper's transfer sets, read from stand-ins in torchvision's layout and held to torchvision's own loaders."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from helpers import known
from simclr.data.opening import open_data
from simclr.data.presets import HELD_OUT, PRESETS, TransferSet, open_transfer_set
from simclr.data.readers.layouts import CALTECH_MARK, LAYOUTS, VOC_CLASSES
from simclr.data.readers.store import Reading
from simclr.errors import UserError


class Painter:
    """Writes small images, each different from all others."""

    def __init__(self, root: Path) -> None:
        self.root, self.random = root, np.random.default_rng(0)

    def image(self, path: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(file)

    def text(self, path: str, content: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def matlab(self, path: str, **arrays: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        savemat(file, arrays)


def food101(to: Painter) -> None:
    lists = {
        "train": {"waffles": [1, 2, 3, 4, 5, 6], "apple_pie": [1, 2, 3, 4, 5]},
        "test": {"waffles": [7, 8], "apple_pie": [9]},
    }
    for part, of_class in lists.items():
        images = {name: [f"{name}/{i}" for i in numbers] for name, numbers in of_class.items()}
        to.text(f"food-101/meta/{part}.json", json.dumps(images))
        for image in (name for names in images.values() for name in names):
            to.image(f"food-101/images/{image}.jpg")


def sun397(to: Painter) -> None:
    to.text("SUN397/ClassName.txt", "/a/abbey\n/c/church/indoor\n/c/church/outdoor\n")
    lists = {
        "Training_01.txt": [
            "/a/abbey/sun_aa.jpg", "/a/abbey/sun_ab.jpg", "/c/church/indoor/sun_b.jpg", "/c/church/outdoor/sun_c.jpg",
        ],
        "Testing_01.txt": ["/c/church/outdoor/sun_d.jpg", "/a/abbey/sun_e.jpg"],
        "Testing_02.txt": ["/a/abbey/sun_other.jpg"],
    }  # fmt: skip
    for file, images in lists.items():
        to.text(f"SUN397/{file}", "\n".join(images) + "\n")
        for image in images:
            to.image(f"SUN397{image}")


def cars(to: Painter) -> None:
    kind = [("class", "O"), ("fname", "O")]
    for file, part, labels in (
        ("devkit/cars_train_annos", "train", [2, 1, 2, 3, 1]),
        ("cars_test_annos_withlabels", "test", [3, 1]),
    ):
        names = [f"{i:05d}.jpg" for i in range(1, len(labels) + 1)]
        to.matlab(
            f"stanford_cars/{file}.mat", annotations=np.array([list(zip(labels, names, strict=True))], dtype=kind)
        )
        for name in names:
            to.image(f"stanford_cars/cars_{part}/{name}")
    to.matlab(
        "stanford_cars/devkit/cars_meta.mat",
        class_names=np.array(["AM General Hummer", "Acura RL", "BMW M3"], dtype=object),
    )


def aircraft(to: Painter) -> None:
    data = "fgvc-aircraft-2013b/data"
    to.text(f"{data}/variants.txt", "707-320\nA300B4\nDH-82 Tiger\n")
    lists = {
        "train": "1 DH-82 Tiger\n2 707-320\n7 A300B4\n",
        "val": "3 A300B4\n4 707-320\n",
        "test": "5 707-320\n6 DH-82 Tiger\n",
    }
    for word, lines in lists.items():
        to.text(f"{data}/images_variant_{word}.txt", lines)
        for line in lines.splitlines():
            to.image(f"{data}/images/{line.split()[0]}.jpg")
    to.text(f"{data}/images_variant_trainval.txt", lists["train"] + lists["val"])


VOC_SHOWN = {  # name: objects as (class, difficult)
    "000001": [("dog", 0), ("person", 1), ("dog", 1)],
    "000002": [("car", 1), ("car", 0)],
    "000003": [("car", 1)],
    "000004": [("tvmonitor", 0), ("dog", 0)],
    "000005": [("aeroplane", 1), ("dog", 0)],
}


def voc2007(to: Painter) -> None:
    root = "VOCdevkit/VOC2007"
    for word, names in {
        "train": ["000001", "000004"],
        "val": ["000002"],
        "trainval": ["000001", "000002", "000004"],
        "test": ["000005", "000003"],
    }.items():
        to.text(f"{root}/ImageSets/Main/{word}.txt", "\n".join(names) + "\n")
    for name, shown in VOC_SHOWN.items():
        to.image(f"{root}/JPEGImages/{name}.jpg")
        objects = "".join(
            f"<object><name>{label}</name><difficult>{hard}</difficult></object>" for label, hard in shown
        )
        to.text(f"{root}/Annotations/{name}.xml", f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>")


def dtd(to: Painter) -> None:
    lists = {
        "train1": ["banded/b_1.jpg", "zigzagged/z_1.jpg"],
        "val1": ["zigzagged/z_2.jpg", "banded/b_2.jpg"],
        "test1": ["banded/b_3.jpg", "zigzagged/z_3.jpg"],
        "test2": ["banded/b_1.jpg"],
    }
    for word, images in lists.items():
        to.text(f"dtd/dtd/labels/{word}.txt", "\n".join(images) + "\n")
        for image in images:
            to.image(f"dtd/dtd/images/{image}")


def pets(to: Painter) -> None:
    lists = {
        "trainval": ["Abyssinian_1 1 1 1", "saint_bernard_1 2 2 1", "Abyssinian_2 1 1 1", "saint_bernard_7 2 2 1"],
        "test": ["saint_bernard_2 2 2 1", "Abyssinian_9 1 1 1"],
    }  # fmt: skip
    for word, lines in lists.items():
        to.text(f"oxford-iiit-pet/annotations/{word}.txt", "\n".join(lines) + "\n")
        for line in lines:
            to.image(f"oxford-iiit-pet/images/{line.split()[0]}.jpg")


def caltech101(to: Painter) -> None:
    for label, count in {CALTECH_MARK: 31, "accordion": 33, "yin_yang": 36}.items():
        for i in range(1, count + 1):
            to.image(f"caltech101/101_ObjectCategories/{label}/image_{i:04d}.jpg")


def flowers102(to: Painter) -> None:
    to.matlab("flowers-102/imagelabels.mat", labels=np.array([[77, 77, 1, 1, 102, 77, 1]]))
    to.matlab("flowers-102/setid.mat", trnid=[[1, 3, 5]], valid=[[2, 4]], tstid=[[7, 6]])
    for i in range(1, 8):
        to.image(f"flowers-102/jpg/image_{i:05d}.jpg")


def birdsnap(to: Painter) -> None:
    for part, counts in {"train": [3, 2], "test": [1, 2]}.items():
        for label, count in zip(("Acadian_Flycatcher", "Acorn_Woodpecker"), counts, strict=True):
            for i in range(count):
                to.image(f"{part}/{label}/{i}.jpg")


MAKERS: list[Callable[[Painter], None]] = [
    food101, birdsnap, sun397, cars, aircraft, voc2007, dtd, pets, caltech101, flowers102,
]  # fmt: skip

BOTH = {"train": "train", "test": "test"}
THREE = {"train": "train", "validation": "val", "test": "test"}
TORCHVISION = {  # loader, and its word for each part; without the sets that it does not know or does not split
    "food101": (datasets.Food101, BOTH),
    "cars": (datasets.StanfordCars, BOTH),
    "aircraft": (datasets.FGVCAircraft, THREE),
    "dtd": (datasets.DTD, THREE),
    "pets": (datasets.OxfordIIITPet, {"train": "trainval", "test": "test"}),
    "flowers102": (datasets.Flowers102, THREE),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each set, named as it is."""
    root = tmp_path_factory.mktemp("sets")
    for make in MAKERS:
        make(Painter(root / make.__name__))
    return root


def opened(stand_ins: Path, name: str) -> TransferSet:
    return open_transfer_set(f"{name}:{stand_ins / name}", reading=Reading(workers=0))


def shown(images, by_name: bool = True) -> Iterator[tuple[bytes, str]]:
    for i, label in enumerate(images.labels):
        yield images.read([i])[0].tobytes(), images.classes[label] if by_name else str(label)


@pytest.mark.parametrize("name", TORCHVISION)
def test_parts_are_those_of_torchvision(stand_ins, monkeypatch, name):
    monkeypatch.setattr(datasets.flowers102, "check_integrity", lambda *_: True)  # its checksums are of the real lists
    parts = opened(stand_ins, name)
    loader, words = TORCHVISION[name]
    for part, word in words.items():
        theirs = loader(stand_ins / name, split=word)
        images = parts.learn if part == "train" and "validation" not in words else getattr(parts, part)
        expected = {(np.asarray(image).tobytes(), label) for image, label in theirs}
        assert {(pixels, int(label)) for pixels, label in shown(images, by_name=False)} == expected
        assert len(images) == len(theirs) > 0
        if name != "pets":  # torchvision writes them in title case
            assert images.classes == list(theirs.classes)


def test_sun397_takes_the_first_split(stand_ins):
    parts = opened(stand_ins, "sun397")
    assert sorted(key for key in parts.learn.keys) == [
        "a/abbey/sun_aa.jpg", "a/abbey/sun_ab.jpg", "c/church/indoor/sun_b.jpg", "c/church/outdoor/sun_c.jpg",
    ]  # fmt: skip
    assert list(parts.test.keys) == ["c/church/outdoor/sun_d.jpg", "a/abbey/sun_e.jpg"]
    theirs = datasets.SUN397(stand_ins / "sun397")
    labels = {np.asarray(image).tobytes(): theirs.classes[label] for image, label in theirs}
    for images in (parts.learn, parts.test):
        assert all(labels[pixels] == label for pixels, label in shown(images))


def test_sun397_without_its_split_is_refused(tmp_path):
    to = Painter(tmp_path)
    sun397(to)
    (tmp_path / "SUN397/Training_01.txt").unlink()
    with pytest.raises(UserError, match="put Training_01"):
        open_transfer_set(f"sun397:{tmp_path}")


def test_voc2007_has_several_classes_an_image(stand_ins):
    parts = opened(stand_ins, "voc2007")
    assert parts.metric == "11-point mAP" and parts.train.labels is None and parts.train.classes == list(VOC_CLASSES)
    expected = {  # columns of 1 and of -1, by hand from VOC_SHOWN
        "000001": ({"dog"}, {"person"}), "000002": ({"car"}, set()), "000003": (set(), {"car"}),
        "000004": ({"tvmonitor", "dog"}, set()), "000005": ({"dog"}, {"aeroplane"}),
    }  # fmt: skip
    for images in (parts.learn, parts.test):
        for key, row in zip(images.keys, known(images.targets), strict=True):
            found = tuple({VOC_CLASSES[k] for k in np.flatnonzero(row == value)} for value in (1, -1))
            assert found == expected[Path(key).stem]
            assert row.dtype == np.int8 and row.shape == (20,)
    assert [Path(key).stem for key in parts.train.keys] == ["000001", "000004"]
    theirs = [
        {item["name"] for item in target["annotation"]["object"] if item["difficult"] == "0"}
        for _, target in datasets.VOCDetection(str(stand_ins / "voc2007"), "2007", "test")
    ]
    assert theirs == [{VOC_CLASSES[k] for k in np.flatnonzero(row == 1)} for row in known(parts.test.targets)]


def test_caltech101_trains_on_thirty_of_each_class(stand_ins):
    parts = opened(stand_ins, "caltech101")
    assert np.bincount(known(parts.learn.labels)).tolist() == [30, 30, 30]
    assert np.bincount(known(parts.test.labels)).tolist() == [1, 3, 6]
    assert np.bincount(known(parts.train.labels)).tolist() == [24, 24, 24]
    assert not set(parts.learn.keys) & set(parts.test.keys)
    assert parts.test.keys == opened(stand_ins, "caltech101").test.keys


def test_birdsnap_is_read_from_class_folders(stand_ins):
    parts = opened(stand_ins, "birdsnap")
    assert parts.test.classes == ["Acadian_Flycatcher", "Acorn_Woodpecker"]
    assert [(key, label) for key, label in zip(parts.test.keys, known(parts.test.labels), strict=True)] == [
        ("test/Acadian_Flycatcher/0.jpg", 0), ("test/Acorn_Woodpecker/0.jpg", 1), ("test/Acorn_Woodpecker/1.jpg", 1),
    ]  # fmt: skip
    assert len(parts.learn) == 5


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_are_disjoint_and_open_data_agrees(stand_ins, name):
    parts = opened(stand_ins, name)
    assert parts.validation is not None
    keys = [key for part in (parts.train, known(parts.validation), parts.test) for key in part.keys]
    assert len(set(keys)) == len(keys)
    assert (parts.train.split, parts.test.split) == ("train", "test")
    for split, images in (("train", parts.learn), ("test", parts.test)):
        alone = open_data(f"{name}:{stand_ins / name}", split=split, workers=0)
        assert sorted(alone.keys) == sorted(images.keys) and alone.has_own_split
        order = [list(alone.keys).index(key) for key in images.keys]
        ours, theirs = (one.labels if one.targets is None else one.targets for one in (images, alone.subset(order)))
        assert np.array_equal(known(ours), known(theirs))
        assert all(
            np.array_equal(a, b) for a, b in zip(images.read(range(len(images))), alone.read(order), strict=True)
        )


def test_presets_are_the_papers_twelve():
    """Metrics as in Table 8 of SimCLR; sizes as in Table 1 of Kornblith et al."""
    assert list(PRESETS) == [
        "food101", "cifar10", "cifar100", "birdsnap", "sun397", "cars", "aircraft", "voc2007", "dtd", "pets",
        "caltech101", "flowers102",
    ]  # fmt: skip
    by_metric = {
        metric: {n for n, p in PRESETS.items() if p.metric == metric} for metric in ("mean per class", "11-point mAP")
    }
    assert by_metric["mean per class"] == {"aircraft", "pets", "caltech101", "flowers102"}
    assert by_metric["11-point mAP"] == {"voc2007"}
    assert (
        sum(preset.num_classes for preset in PRESETS.values())
        == 101 + 10 + 100 + 500 + 397 + 196 + 100 + 20 + 47 + 37 + 102 + 102
    )


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("aircraft", (3, 2)), ("dtd", (2, 2)), ("flowers102", (3, 2)), ("voc2007", (2, 1)), ("food101", (9, 2))],
)
def test_validation_is_official_or_held_out(stand_ins, name, sizes):
    parts = opened(stand_ins, name)
    assert (len(parts.train), len(known(parts.validation))) == sizes
    assert ("official" in parts.how) == (name != "food101")


def test_images_that_cannot_be_read_are_left_out_with_their_labels(tmp_path):
    aircraft(Painter(tmp_path))
    images = tmp_path / "fgvc-aircraft-2013b/data/images"
    (images / "2.jpg").write_bytes(b"no image")
    (images / "7.jpg").unlink()
    parts = open_transfer_set(f"aircraft:{tmp_path}")
    labels = known(parts.learn.labels)
    assert [(Path(key).stem, int(label)) for key, label in zip(parts.learn.keys, labels, strict=True)] == [
        ("1", 2), ("3", 1), ("4", 0),
    ]  # fmt: skip
    assert any("2 of 7 files left out" in note for note in parts.train.notes)
    with pytest.raises(UserError, match="2 of 7 files"):
        open_transfer_set(f"aircraft:{tmp_path}", reading=Reading(strict=True))


def test_a_set_that_is_not_whole_says_so(stand_ins):
    assert (
        "aircraft has 100 classes, and 3 of them are among the training images here."
        in opened(stand_ins, "aircraft").train.notes
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_wrong_folders_are_refused_in_a_sentence(tmp_path, name):
    with pytest.raises(UserError, match=f"write {name}:FOLDER"):
        open_transfer_set(name)
    with pytest.raises(UserError, match=f"does not hold {name}: there is no "):
        open_transfer_set(f"{name}:{tmp_path}")
    with pytest.raises(UserError, match="There is no folder"):
        open_data(f"{name}:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("make", "file", "content"),
    [
        (food101, "food-101/meta/test.json", b'{"waffles": ["waff'),
        (food101, "food-101/meta/train.json", b"[1, 2]"),
        (cars, "stanford_cars/cars_test_annos_withlabels.mat", b"MATLAB 5.0 but no more"),
        (flowers102, "flowers-102/setid.mat", b""),
        (voc2007, "VOCdevkit/VOC2007/Annotations/000003.xml", b"<annotation><object>"),
        (voc2007, "VOCdevkit/VOC2007/Annotations/000003.xml", b"<a><object><name>unicorn</name></object></a>"),
        (aircraft, "fgvc-aircraft-2013b/data/images_variant_val.txt", b"1\n"),
        (pets, "oxford-iiit-pet/annotations/test.txt", b"\xff\xfe\x00 1 1 1\n"),
        (sun397, "SUN397/Testing_01.txt", b"/x/unknown/sun_1.jpg\n"),
        (dtd, "dtd/dtd/labels/test1.txt", b""),
    ],
)  # fmt: skip
def test_damaged_lists_are_refused_in_a_sentence(tmp_path, make, file, content):
    make(Painter(tmp_path))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=make.__name__) as refusal:
        open_transfer_set(f"{make.__name__}:{tmp_path}")
    assert "\n" not in str(refusal.value)


def test_other_data_keeps_its_own_split_or_gets_one():
    parts = open_transfer_set("digits", seed=3)
    own = open_data("digits", split="test")
    assert parts.metric == "top-1" and np.array_equal(parts.test.keys, own.keys)
    assert len(known(parts.validation)) == round(HELD_OUT * len(parts.learn))
    assert np.array_equal(parts.learn.read([0, len(parts.train)])[1], known(parts.validation).read([0])[0])
    assert sorted(parts.learn.keys, key=int) == sorted(open_data("digits").keys, key=int)


def test_an_array_without_a_split_is_divided(tmp_path):
    labels = np.repeat([0, 1, -1], [20, 30, 5])
    np.savez(tmp_path / "set.npz", x=np.random.default_rng(0).integers(0, 256, (55, 8, 8), dtype=np.uint8), y=labels)
    parts = open_transfer_set(tmp_path / "set.npz")
    assert (len(parts.train), len(known(parts.validation)), len(parts.test)) == (32, 8, 10)
    assert np.bincount(known(parts.test.labels)).tolist() == [4, 6]
    keys = [int(key) for part in (parts.train, known(parts.validation), parts.test) for key in part.keys]
    assert sorted(keys) == list(range(50))


def test_data_that_cannot_be_transferred_to_is_refused(tmp_path):
    pixels = np.zeros((6, 8, 8), np.uint8)
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    np.savez(one, x=pixels, y=np.zeros(6, int))
    with pytest.raises(UserError, match="single class"):
        open_transfer_set(one)
    np.savez(one, x=pixels)
    with pytest.raises(UserError, match="has no labels"):
        open_transfer_set(one)
    np.savez(other, x_train=pixels, y_train=[0, 0, 0, 1, 1, 1], x_test=pixels, y_test=[0, 0, 0, 1, 1, 2])
    with pytest.raises(UserError, match="other has test images of 1 classes of which none"):
        open_transfer_set(other)
    with pytest.raises(UserError, match="did you mean flowers102"):
        open_transfer_set("flower102")
