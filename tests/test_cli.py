"""The commands as a user types them: results on standard output, one sentence and exit code 2 for a mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from simclr import SimCLR
from simclr.cli.commands import COMMANDS
from simclr.cli.main import main
from simclr.config.finetune import FINETUNE_RECIPES, FINETUNE_SUMMARIES
from simclr.evaluation.results import KEY_FIELDS, name_of, read_results
from simclr.tasks import recipes as recipes_task

FAST = ["--recipe", "digits", "--epochs", "1", "--batch-size", "64", "--width", "0.5", "--workers", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty small colour photographs, so to speak, in two classes, and three files that are no images."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, tint in (("cats", (60, 0, 0)), ("dogs", (0, 0, 60))):
        (root / name).mkdir()
        for i in range(15):
            pixels = generator.integers(0, 190, (20 + i, 24, 3)) + np.array(tint)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    (root / "cats" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut short")
    (root / "cats" / "empty.png").write_bytes(b"")
    (root / "notes.txt").write_text("no image")
    return root


def key_of(record):
    """What a record of `simclr evaluate --json` is kept under."""
    return {name: record[name] for name in KEY_FIELDS}


def picture_width(path):
    with Image.open(path) as picture:
        return picture.size[0]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["simclr", "pretrain", "digits", "--out", str(out), *FAST])
        main()
    return out


def test_help_is_quick_and_torch_stays_out():
    code = "import sys, simclr\nfrom simclr.cli.main import main\nsys.argv = ['simclr', 'pretrain', '--help']\n"
    code += "try: main()\n"
    code += "except SystemExit: pass\nprint('torch' in sys.modules or 'numpy' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--temperature" in done.stdout and done.stderr.strip() == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="OMP_DISPLAY_ENV speaks of GNU's OpenMP here, torch's on Linux")
@pytest.mark.parametrize("given, taken", [(None, "1000"), ("2000", "2000")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, taken, tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({"GOMP_SPINCOUNT": given} if given else {})
    command = [sys.executable, "-m", "simclr", "pretrain", str(tmp_path / "none")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{taken}'" in done.stderr


def test_libraries_of_models_are_imported_only_where_an_encoder_is_theirs():
    """They take as long to import as torch."""
    code = "import sys, simclr.tasks.pretrain, simclr.tasks.evaluate\nprint({'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_overview_and_version(simclr):
    code, out, _ = simclr("--help")
    assert code == 0 and all(f"simclr {name}" in out for name in COMMANDS)
    assert simclr("--version")[1].startswith("simclr 0.")


def test_a_folder_from_pretraining_to_features(simclr, folder, tmp_path):
    out = tmp_path / "run"
    code, _, said = simclr(
        "pretrain", folder, "--out", out, "--encoder", "small", "--size", 16, "--epochs", 2, "--batch-size", 10,
        "--seed", 3, "--recipe", "cpu", "--width", 0.5,
    )  # fmt: skip
    assert code == 0
    assert "2 of 32 files left out" in said and "broken.jpg" in said and "empty.png" in said and ".txt" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == 30 and summary["images_left_out"] == 2
    config = json.loads((out / "config.json").read_text())
    assert (config["size"], config["epochs"], config["batch_size"], config["seed"]) == (16, 2, 10, 3)

    code, table, said = simclr("evaluate", out, folder, "--json", tmp_path / "r.json", "--picture", tmp_path / "r.png")
    assert code == 0 and "encoder" in table and "80/20 by class, seed 0" in said and "saw these test images" in said
    results = json.loads((tmp_path / "r.json").read_text())
    for name in ("encoder", "random", "pixels"):
        assert 0 <= results[name]["knn"] <= 1 and 0 <= results[name]["linear"] <= 1
    assert picture_width(tmp_path / "r.png") > 800

    code, _, _ = simclr("embed", out, folder, "--out", tmp_path / "features.npz")
    assert code == 0
    with np.load(tmp_path / "features.npz") as embedded:
        grids = 8 * 4**2 + 16 * 4**2 + 32 * 2**2 + 64  # maps of 8, 4, 2 and 1 cells a side, on at most 4 x 4
        assert embedded["features"].shape == (30, grids) and np.isfinite(embedded["features"]).all()
        assert embedded["keys"][0] == "cats/0.png" and embedded["labels"].tolist() == [0] * 15 + [1] * 15

    code, _, _ = simclr("views", folder, "--out", tmp_path / "views.png", "--size", 48, "--images", 3, "--columns", 4)
    assert code == 0 and picture_width(tmp_path / "views.png") > 300


def test_every_protocol_and_a_second_call(simclr, folder, tmp_path, monkeypatch):
    """On thirty labelled pictures of two classes, with three steps of training on labels."""
    quick = replace(FINETUNE_RECIPES["small-supervised"], epochs=0, min_steps=3, batch_size=8)
    monkeypatch.setitem(FINETUNE_RECIPES, "small-supervised", quick)
    monkeypatch.setitem(FINETUNE_RECIPES, "small", quick)
    out = tmp_path / "run"
    code, _, _ = simclr(
        "pretrain", folder, "--out", out, "--recipe", "cpu", "--size", 16, "--epochs", 1, "--batch-size", 10,
        "--width", 0.5, "--flip", 0,
    )  # fmt: skip
    assert code == 0
    command = [
        "evaluate", out, folder, "--seeds", 2, "--compare", "pixels", "--counts", 2, 5, "--finetune.lr", 0.02,
        "--protocol", "knn,linear,logistic,finetune,supervised,curve,probe,label-free,transfer",
        "--json", tmp_path / "all.json", "--cache", tmp_path / "cache",
    ]  # fmt: skip
    code, table, said = simclr(*command)
    assert code == 0, said
    found = json.loads((tmp_path / "all.json").read_text())
    assert set(found["encoder"]) == {"knn", "linear", "logistic", "finetune"}
    assert set(found["pixels"]) == {"knn", "linear", "logistic"} and set(found["supervised"]) == {"supervised"}
    assert {(one["protocol"], one["seed"]) for one in found["results"]} >= {("finetune", 0), ("finetune", 1)}
    assert set(found["reports"]) == {"curve", "probe", "label-free", "transfer"}
    stored, others = read_results(out / "evaluation" / "results.jsonl")
    assert others == 0
    assert {name_of(result.key) for result in stored} == {name_of(key_of(record)) for record in found["records"]}
    assert {r["protocol"] for r in found["records"]} >= {"knn", "curve", "probe", "label-free", "linear transfer"}
    assert "±" in table
    assert "supervised" in table and "effective rank" in table and "p = " in table and "ahead" in table
    for picture in ("curve", "neighbours", "worst-clustered"):
        assert picture_width(out / "evaluation" / f"{picture}.png") > 200
    assert list((tmp_path / "cache").glob("*.features"))

    lines = (out / "evaluation" / "results.jsonl").read_text()
    code, again, said = simclr(*command)
    assert code == 0 and again == table and "Taken from" in said
    assert (out / "evaluation" / "results.jsonl").read_text() == lines


def test_results_that_cannot_be_kept_are_printed_all_the_same(simclr, run_folder, tmp_path):
    """As in a run that is another user's, on a full disk or in a container without a home."""
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "evaluation").write_bytes(b"")
    (tmp_path / "cache").write_bytes(b"")
    code, table, said = simclr(
        "evaluate", tmp_path / "run", "digits", "--protocol", "knn,finetune", "--labels", "2/class", "--compare",
        "--finetune.epochs", 1, "--cache", tmp_path / "cache", "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "encoder" in table and "fine-tuned" in table
    assert said.count("no results are stored") == 1 and said.count("Features cannot be kept") == 1


def test_recipes_are_printed_complete(simclr):
    code, out, _ = simclr("recipes")
    assert code == 0 and all(word in out for word in ("digits:", "cpu:", "imagenet-v1:", "temperature=0.1", "cost"))
    assert FINETUNE_SUMMARIES.keys() == FINETUNE_RECIPES.keys()
    assert all(f"\n{name}: {summary}\n" in out for name, summary in FINETUNE_SUMMARIES.items())
    code, one, _ = simclr("recipes", "v2-10%")
    assert code == 0 and one.startswith("v2-10%: SimCLR v2") and "head_layer=1" in one and one in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrian"], "There is no command 'pretrian'.*Perhaps you meant `simclr pretrain`"),
        (["pretrain", "fashionmnist"], "fashion-mnist"),
        (["pretrain", "/no/such/folder"], "/no/such/folder"),
        (["pretrain", "digits", "--batch-size", "5000"], "--batch-size was 5000, more than the 1438 images"),
        (["pretrain", "digits", "--epochs", "0"], "--epochs was 0"),
        (["pretrain", "digits", "--encoder", "resnet19"], "resnet19.*resnet18"),
        (["pretrain", "digits", "--recipe", "imagenet"], "no recipe 'imagenet'"),
        (["pretrain", "digits", "--temprature", "1"], "--temperature"),
        (["pretrain", "digits", "--precision", "bf16", "--device", "cpu"], "--precision was bf16 on a CPU"),
        (["pretrain", "digits", "--strength", "2"], "strength"),
        (["resume", "/no/such/run"], "holds no run"),
        (["views", "digits", "--images", "0"], "--images was 0"),
        (["pretrain", "PHOTOS", "--out", "INSIDE"], "would lie inside the images' folder"),
        (["pretrain", "ONE"], "contrast needs at least two"),
        (["evaluate", "RUN", "digits", "--seed", "-1"], "--seed was -1"),
        (["evaluate", "RUN", "UNLABELLED"], "no labels.*an .npz file with y"),
        (["evaluate", "/no/such/run", "digits"], "holds no encoder"),
        (["embed", "/no/such/run", "digits", "--out", "x.npz"], "holds no encoder"),
        (["evaluate", "RUN", "digits", "--labels", "half"], "'half' is no share of the labels and no file"),
        (["evaluate", "RUN", "digits", "--labels", "1%", "--protocol", "knn,curve"], "has no effect on curve"),
        (["evaluate", "RUN", "digits", "--finetune.epochs", "3"], "about the protocol finetune"),
        (["evaluate", "RUN", "digits", "--picture", "x.jpg"], "ends in .png"),
        (["evaluate", "RUN", "digits", "--out", "one.npz"], "one.npz/results.jsonl cannot be written"),
        (["evaluate", "pixels", "digits", "--protocol", "finetune"], "pixels has none to train"),
        (["evaluate", "hog", "digits", "--protocol", "finetune", "--compare"], "hog has none to train"),
        (["evaluate", "RUN", "digits", "--compare", "hogg"], "no model 'hogg' .did you mean hog"),
        (["evaluate", "RUN", "digits", "--compare", "pixels,hpg"], "no model 'hpg'"),
        (["evaluate", "hog", "TINY"], "hog needs images of at least 8 x 8 pixels"),
        (["evaluate", "RUN", "digits", "--protocol", "knn,liner"], "--protocol was 'knn,liner'.*logistic"),
        (["evaluate", "RUN", "digits", "fashion-mnist"], "2 data sets were given.*--protocol transfer"),
        (["evaluate", "RUN", "digits", "--seeds", "0"], "--seeds was 0"),
        (["evaluate", "RUN", "digits", "--finetune-recipe", "v9"], "no fine-tuning recipe 'v9'.*v1-1%"),
        (["evaluate", "torchvision/alexnt", "digits"], "did you mean torchvision/alexnet"),
        (["evaluate", "pixels", "digits", "--protocol", "probe", "--compare"], "pixels has none"),
        (["evaluate", "RUN", "flowers102:/no/such", "--protocol", "transfer"], "/no/such"),
        (["evaluate", "RUN", "PHOTOS"], "expects 1-channel images"),
        (["evaluate", "RUN", "digits", "--json", "/proc/none/x.json"], "/proc/none/x.json cannot be written"),
        (["finetune", "RUN", "/no/such", "--out", "x", "--encoder", "resnet50"], "RUN is .*a model already"),
        (["finetune", "random", "/no/such", "--out", "x", "--encoder", "resnet5"], "resnet5"),
        (["evaluate", "random", "/no/such", "--width", "2"], "--width is about the network that --encoder names"),
        (["pretrain", "/no/such", "--head", "none", "--head-dim", "32"], "--head-dim was 32, and --head is none"),
        (["plan", "/no/such", "--head", "linear", "--head-layers", "3"], "--head-layers was 3, and --head is linear"),
        (["pretrain", "digits", "--out", "RUN"], "already holds a run.*simclr resume"),
        (["pretrain", "digits", "--out", "PHOTOS"], "exists and is no run"),
        (["resume", "RUN", "--lr", "5", "--seed", "9"], "--lr from 0.002 to 5.0, --seed from 0 to 9"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(simclr, run_folder, folder, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    pixels = np.zeros((9, 8, 8), np.uint8)
    np.savez("one.npz", x=pixels[:1])
    np.savez("unlabelled.npz", x=pixels)
    places = {"RUN": run_folder, "PHOTOS": folder, "INSIDE": folder / "runs" / "x", "ONE": "one.npz"}
    places["UNLABELLED"] = "unlabelled.npz"
    np.savez("tiny.npz", x=np.zeros((20, 6, 6), np.uint8), y=np.arange(20) % 2)
    places["TINY"] = "tiny.npz"
    before = sorted(run_folder.rglob("*"))
    code, out, err = simclr(*(places.get(a, a) for a in arguments))
    text = " ".join((out + err).replace("│", " ").split())
    assert code == 2
    assert "Traceback" not in text

    assert re.search(expected, text), text
    assert sorted(run_folder.rglob("*")) == before
    assert not list(tmp_path.glob("runs/*"))


def test_a_protocol_that_fails_leaves_the_others_and_code_2(simclr, run_folder, tmp_path):
    place = tmp_path / "found.json"
    code, out, err = simclr(
        "evaluate", run_folder, "digits", "--labels", "1/class", "--protocol", "logistic,knn", "--compare", "pixels",
        "pixels", "--json", place, "--out", tmp_path / "kept",
    )  # fmt: skip
    found = json.loads(place.read_text())
    assert code == 2 and "2 of the results above are missing" in err and "knn of pixels" in out
    assert [(one["features"], one["protocol"]) for one in found["results"]] == [("encoder", "knn"), ("pixels", "knn")]
    assert found["spread"]["pixels"] == {"knn": None}  # one seed, though pixels are named twice


def test_strict_stops_at_a_broken_file(simclr, folder, tmp_path):
    code, _, err = simclr("pretrain", folder, "--out", tmp_path / "run", "--strict")
    assert code == 2 and "broken.jpg" in err and not (tmp_path / "run").exists()


def test_other_data_on_resume_is_refused(simclr, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x=pixels)
    code, _, _ = simclr("pretrain", tmp_path / "data.npz", "--out", tmp_path / "run", *FAST, "--batch-size", 16)
    assert code == 0
    (tmp_path / "run" / "summary.json").unlink()
    np.savez(tmp_path / "data.npz", x=pixels[::-1])
    code, _, err = simclr("resume", tmp_path / "run")
    assert code == 2 and "no longer holds the images" in err


def test_a_finished_run_says_so(simclr, run_folder):
    code, _, err = simclr("resume", run_folder)
    assert code == 0 and "already reached its end" in err


def test_a_run_goes_on_from_another_folder_and_after_its_images_moved(simclr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    assert simclr("pretrain", "data.npz", *FAST, "--batch-size", 16)[0] == 0
    run = tmp_path / "runs" / "data"
    (run / "summary.json").unlink()
    monkeypatch.chdir("/")
    assert simclr("resume", run)[0] == 0
    (run / "summary.json").unlink()
    (tmp_path / "data.npz").rename(tmp_path / "moved.npz")
    code, _, err = simclr("resume", run)
    assert code == 2 and "no longer there; name its new place with --data" in err
    assert simclr("resume", run, "--data", tmp_path / "moved.npz")[0] == 0


def test_a_signal_ends_with_its_number(simclr, tmp_path, monkeypatch):
    from simclr.tasks import pretrain_images as pretraining

    real = pretraining.make_views

    def views(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(pretraining, "make_views", views)
    code, _, err = simclr("pretrain", "digits", "--out", tmp_path / "run", *FAST)
    assert code == 130 and "Stopped at step 1, saved" in err and "Traceback" not in err


def test_a_damaged_record_of_the_run_is_said(simclr, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    code, _, err = simclr("resume", tmp_path / "run")
    assert code == 2 and "run.json is damaged" in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/full/file"), "no space left on device (/full/file)"),
        (PermissionError(13, "Permission denied"), "permission denied; check"),
        (MemoryError(), "Out of memory"),
        (RecursionError("maximum recursion depth"), "nested too deeply"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_refuses_is_a_sentence_and_code_2(simclr, monkeypatch, error, said):
    def refuse(_args):
        raise error

    monkeypatch.setattr(recipes_task, "recipes", refuse)
    code, out, err = simclr("recipes")
    assert code == 2 and not out and said in err and err.count("\n") == 1, err


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "digits"],
        ["finetune", "random", "digits"],
        ["distill", "x", "digits"],
        ["evaluate", "random", "digits"],
    ],
    ids=lambda command: command[0],
)
def test_a_seed_that_the_random_numbers_cannot_take_is_refused(simclr, tmp_path, command, seed):
    code, _, err = simclr(*command, "--out", tmp_path / "out", "--seed", seed)
    assert code == 2 and "from 0 to 18446744073709551615" in err, err
    assert not (tmp_path / "out").exists()


def test_the_last_seed_leaves_none_to_follow(simclr, tmp_path):
    code, _, err = simclr("evaluate", "random", "digits", "--seed", 2**64 - 2, "--seeds", 3)
    assert code == 2 and "less the 2 that follow it" in err
    with pytest.raises(ValueError, match=r"random_state was -3; .* from 0 to"):
        SimCLR(random_state=-3).fit(np.zeros((4, 8, 8), np.uint8))


def test_a_picture_of_hardly_anything(simclr, run_folder, tmp_path):
    """Two classes of two images leave one to test: the picture is drawn all the same."""
    np.savez(
        tmp_path / "few.npz", x=np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8), y=[0, 0, 1, 1]
    )
    code, out, _ = simclr("evaluate", run_folder, tmp_path / "few.npz", "--picture", tmp_path / "few.png")
    assert code == 0 and "Test images: 1" in out and picture_width(tmp_path / "few.png") > 800
