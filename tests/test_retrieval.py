"""Retrieval between two sets, held to loops that sort the gallery for each query."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr.config.encoder import EncoderConfig
from simclr.errors import UserError
from simclr.evaluation.retrieval import retrieval
from simclr.models.encoder import build_encoder
from simclr.weights.folder import save_encoder

EXAMPLES = Path(__file__).parents[1] / "examples"


def by_sorting(queries, query_keys, gallery, gallery_keys, k):
    """Top-k share and mean reciprocal rank, one query after another, in float64."""
    hits, reciprocal = [], []
    for query, key in zip(queries.astype(float), query_keys, strict=True):
        cosine = [query @ row / np.linalg.norm(query) / np.linalg.norm(row) for row in gallery.astype(float)]
        order = sorted(range(len(gallery)), key=lambda i: -cosine[i])
        ranked = [gallery_keys[i] for i in order]
        if key in ranked:
            hits.append(key in ranked[:k])
            reciprocal.append(1 / (1 + ranked.index(key)))
    return np.mean(hits), np.mean(reciprocal), len(hits)


@pytest.mark.parametrize("chunk", [1024, 7])
def test_equals_sorting_the_gallery(chunk):
    """Random features and keys; some queries have several matches in the gallery, some none."""
    generator = np.random.default_rng(0)
    gallery, gallery_keys = generator.normal(size=(90, 5)).astype(np.float32), generator.integers(0, 60, 90).tolist()
    query_keys = generator.integers(0, 60, 50).tolist()
    queries = generator.normal(size=(50, 5)).astype(np.float32)
    for i, key in enumerate(query_keys[:30]):  # most queries are not far from a match
        if key in gallery_keys:
            queries[i] = 3 * gallery[gallery_keys.index(key)] + 2 * generator.normal(size=5)
    found = retrieval(queries, query_keys, gallery, gallery_keys, ks=(1, 5, 20), chunk=chunk)
    for k in (1, 5, 20):
        share, reciprocal, took_part = by_sorting(queries, query_keys, gallery, gallery_keys, k)
        assert found[f"top{k}"] == pytest.approx(share)
        assert found["mrr"] == pytest.approx(reciprocal)
        assert found["queries"] == took_part < 50
    assert 0 < found["top1"] < found["top5"] < found["top20"] < 1


def test_match_says_what_of_a_key_counts():
    features = np.eye(3, dtype=np.float32)
    vendors = [[f"{vendor}-{code}.png" for code in ("1f600", "1f601", "1f602")] for vendor in ("google", "twitter")]
    found = retrieval(features, vendors[0], features[[1, 0, 2]], vendors[1], match=lambda key: key.split("-", 1)[1])
    # The first two queries meet each other's picture at cosine 1 and their own at 0, as the third: rank 3.
    assert found == pytest.approx({"top1": 1 / 3, "top5": 1.0, "mrr": (1 + 1 / 3 + 1 / 3) / 3, "queries": 3})
    with pytest.raises(UserError, match="None of 3 queries"):
        retrieval(features, vendors[0], features, vendors[1])


def test_features_that_are_all_equal_find_nothing():
    features = np.ones((10, 4), np.float32)
    found = retrieval(features, list(range(10)), features, list(range(10)))
    assert (found["top1"], found["top5"], found["mrr"]) == (0, 0, pytest.approx(0.1))


def test_scale_and_order_do_not_matter():
    generator = np.random.default_rng(1)
    queries, gallery = generator.normal(size=(2, 40, 6)).astype(np.float32)
    keys = np.arange(40)
    shuffle = generator.permutation(40)
    found = retrieval(queries, keys.tolist(), gallery, keys.tolist())
    assert retrieval(4 * queries, keys.tolist(), gallery[shuffle] / 8, keys[shuffle].tolist()) == found


def test_features_that_are_no_numbers_are_refused():
    features = np.eye(2, dtype=np.float32)
    broken = features.copy()
    broken[0, 1] = np.nan
    with pytest.raises(UserError, match="gallery features contain NaN"):
        retrieval(features, [0, 1], broken, [0, 1])


def test_the_emoji_example_pairs_files_by_name(tmp_path, monkeypatch, capsys):
    """Both vendors draw alike here, so that pixels find each partner; skin tones and emoji of one vendor drop out."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import emoji_retrieval

    generator = np.random.default_rng(0)
    both = ("google", "twitter")
    drawn_by = {"train/1f600": both, "train/1f601": both, "test/1f1e6-1f1f2": both, "train/1f44b-1f3fb": both}
    for place, vendors in {**drawn_by, "test/1f602": ("google",)}.items():
        side, code = place.split("/")
        picture = generator.integers(0, 256, (16, 16, 3))
        for vendor in vendors:
            drawn = np.clip(picture + generator.integers(-20, 20, picture.shape), 0, 255).astype(np.uint8)
            (tmp_path / "emoji" / side / "all").mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn).save(tmp_path / "emoji" / side / "all" / f"{vendor}-{code}.png")
    encoder = build_encoder(EncoderConfig("small", channels=3, size=8, width=0.5), seed=0)
    save_encoder(encoder, tmp_path / "run", preprocessing="google", origin={})
    monkeypatch.setattr(sys, "argv", ["emoji_retrieval.py", str(tmp_path / "run"), str(tmp_path / "emoji")])
    emoji_retrieval.main()
    table = capsys.readouterr().out
    assert table.split("\n")[1].split() == ["pixels", *6 * ["100.0"]]
    assert "\n3 pairs (all)" in table
