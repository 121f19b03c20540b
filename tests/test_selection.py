"""Images worth labelling: planted clusters are all covered, and typicality equals its formula."""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler, normalize

import simclr as package
from simclr import UserError
from simclr.config.encoder import EncoderConfig
from simclr.data.labels import read_label_list
from simclr.data.opening import open_data
from simclr.evaluation.selection import MIN_CLUSTER_SIZE, select_typical
from simclr.models.encoder import build_encoder
from simclr.weights.folder import save_encoder

SIZES = (120, 90, 60, 40, 30, 25)


@pytest.fixture(scope="module")
def planted():
    """Clusters of different sizes in different directions: features (n, 16), and the cluster of each row."""
    draw = np.random.default_rng(0)
    centres = 6 * np.linalg.qr(draw.normal(size=(16, 16)))[0][: len(SIZES)]
    members = draw.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    return (centres[members] + 0.3 * draw.normal(size=(len(members), 16))).astype(np.float32), members


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    shape = EncoderConfig("small", channels=1, size=8, width=0.5)
    save_encoder(build_encoder(shape, seed=3), folder, preprocessing="google", origin={})
    return folder


def test_every_planted_cluster_is_covered_and_the_largest_comes_first(planted):
    features, members = planted
    for seed in range(5):
        chosen = select_typical(features, len(SIZES), seed=seed)
        assert members[chosen.rows].tolist() == list(range(len(SIZES))), "one of each, in the order of their sizes"
        assert len(set(chosen.clusters.tolist())) == len(SIZES)


def test_the_chosen_one_is_the_most_typical_by_another_library(planted):
    features, members = planted
    chosen = select_typical(features, len(SIZES), seed=1)
    unit = normalize(StandardScaler().fit_transform(features.astype(np.float64)))
    for row, typicality in zip(chosen.rows, chosen.typicality, strict=True):
        (cluster,) = np.nonzero(members == members[row])
        k = min(20, len(cluster) // 2)
        distances = NearestNeighbors(n_neighbors=k).fit(unit[cluster]).kneighbors()[0]
        mean = distances.mean(1)  # kneighbors() leaves out the row itself
        assert row == cluster[mean.argmin()] and typicality == pytest.approx(1 / mean.min(), rel=1e-3)


def test_clusters_with_a_label_come_after_those_without(planted):
    features, members = planted
    labelled = np.array([np.flatnonzero(members == cluster)[0] for cluster in (0, 2)])
    chosen = select_typical(features, 4, labelled=labelled, seed=0)
    assert sorted(members[chosen.rows]) == [1, 3, 4, 5]


def test_equal_seeds_choose_equal_images_whatever_the_scale_of_a_feature(planted):
    features, _ = planted
    scaled = features * np.geomspace(0.1, 10, 16, dtype=np.float32) + 3
    constant = np.full((len(features), 1), 7, np.float32)
    first, *others = (
        select_typical(rows, 6, seed=2).rows.tolist()
        for rows in (features, features, scaled, np.concatenate([features, constant], axis=1))
    )
    assert all(rows == first for rows in others)


def test_outliers_come_last_and_copies_have_a_finite_typicality(planted):
    features, _ = planted
    outlier = np.full((MIN_CLUSTER_SIZE, 16), -20, np.float32)  # one image, several times
    both = np.concatenate([features, outlier])
    chosen = select_typical(both, len(SIZES) + 1, seed=0)
    assert chosen.rows[-1] >= len(features) and np.isfinite(chosen.typicality).all()
    assert (chosen.rows[:-1] < len(features)).all()


@pytest.mark.parametrize("count", [15, 16, 40])
def test_all_images_can_be_selected_once(count):
    """More images than clusters, clusters of a single image, and every image there is."""
    features = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    chosen = select_typical(features, count, labelled=np.arange(40 - count), seed=0)
    assert sorted(chosen.rows) == list(range(40 - count, 40))
    with pytest.raises(UserError, match=f"give 1 to {count}"):
        select_typical(features, count + 1, labelled=np.arange(40 - count))


def test_the_command_and_the_function_name_the_same_images(simclr, encoder, tmp_path):
    code, table, said = simclr("select", encoder, "digits", "--count", 7, "--cache", "off")
    assert code == 0 and "7 of 1,438 images" in said
    selected = package.select(encoder, "digits", count=7, cache="off")
    assert [line.split("\t")[0] for line in table.splitlines()[1:]] == [each.key for each in selected]
    keys = open_data("digits").keys
    assert all(each.key in keys for each in selected), "of the training part"

    for name in ("chosen.csv", "chosen.txt"):
        code, table, _ = simclr("select", encoder, "digits", "--count", 7, "--out", tmp_path / name, "--cache", "off")
        assert code == 0 and not table
    with open(tmp_path / "chosen.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [each.key for each in selected]
    assert [float(row["typicality"]) for row in rows] == pytest.approx([each.typicality for each in selected])
    assert (tmp_path / "chosen.txt").read_text().split() == [each.key for each in selected]

    more = package.select(encoder, "digits", count=7, labelled=tmp_path / "chosen.txt", cache="off")
    assert not {each.key for each in more} & {each.key for each in selected}
    rows = read_label_list(tmp_path / "chosen.txt", open_data("digits"))  # as --labels reads it
    assert [keys[row] for row in rows] == sorted((each.key for each in selected), key=keys.index)


def test_images_of_a_folder_that_have_a_label_are_not_selected(simclr, encoder, tmp_path):
    pixels = open_data("digits").read(np.arange(12), copy=False)
    for number, image in enumerate(pixels):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.asarray(image)[..., 0]).save(tmp_path / "photos" / f"{number:02}.png")
    labels = "".join(f"{number:02}.png,{'cat' if number < 9 else ''}\n" for number in range(12))
    (tmp_path / "labels.csv").write_text(labels)
    flags = ["--labels-file", tmp_path / "labels.csv", "--pack", "off", "--cache", "off"]
    code, table, said = simclr("select", encoder, tmp_path / "photos", "--count", 3, *flags)
    assert code == 0, said
    assert sorted(line.split("\t")[0] for line in table.splitlines()[1:]) == ["09.png", "10.png", "11.png"]
    code, _, said = simclr("select", encoder, tmp_path / "photos", "--count", 4, *flags)
    assert code == 2 and "photos has 3 images without a label, of 12" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ENCODER", "digits", "--count", "0"], "--count was 0"),
        (["ENCODER", "digits", "--count", "1439"], "digits has 1,438 images without a label, of 1,438"),
        (["ENCODER", "digits", "--out", "chosen.npz"], "must end in .csv or .txt"),
        (["ENCODER", "digits", "--labelled", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["hog", "digits"], "hog is no trained network"),
        (["hogg", "digits"], "There is no model 'hogg'"),
        (["no/such/run", "digits"], "holds no encoder"),
    ],
)
def test_a_mistake_is_one_sentence(simclr, encoder, arguments, sentence):
    code, out, said = simclr("select", *[encoder if each == "ENCODER" else each for each in arguments])
    assert code == 2 and sentence in said and not out and "Traceback" not in said
