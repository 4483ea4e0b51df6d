"""Classes from data to samples: how many, their names, how many images each has, and which are drawn."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import generate
import published
from diffusion import previews
from diffusion.sampling import Sampling, labels_with_images, sample_labels
from errors import UserError
from good import cache_flags, good_flags
from images import photo
from models.sit import SiT
from scripts import TINY, refusal, run
from weights.checkpoint_io import read_checkpoint
from weights.trained_run import LABEL_TABLE, Experiment, load_experiment

COUNTS = {"cat": 7, "dog": 2, "grey owl": 3}


def cached(root: Path, tree: Path, name: str) -> tuple:
    """Preprocess `tree` and cache its latents by the VAE in `root`/vae; the flags of a run on them."""
    data, vae = root / name, root / "vae/sdvae.pt"
    run("preprocessing.py", "--imagenet-path", tree, "--output-path", data, "--resolution", 32, "--num-workers", 1)
    run("cache_latents.py", *cache_flags(data, vae))
    where = ("--data-dir", data, "--vae-latents-name", "latents", "--num-workers", 0, "--vae-ckpt", vae)
    sit = ("--model", "SiT-XXS/2", "--encoder-depth", 2, "--enc-type", "none", "--output-dir", root / "exps")
    return (*TINY, *where, *sit, "--sampling-steps", 10**6)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A VAE, and trees of three classes of unequal sizes, and of images with the labels 0 and 5."""
    root = tmp_path_factory.mktemp("classes")
    published.write_vae(root / "vae")
    for label, (name, count) in enumerate(COUNTS.items()):
        (root / "tree" / name).mkdir(parents=True)
        for i in range(count):
            photo(100 * label + i).save(root / "tree" / name / f"{i}.png")
    shutil.copytree(root / "tree/cat", root / "gap/all")
    labels = [[f"all/{i}.png", 5 * (i > 2)] for i in range(7)]
    (root / "gap/dataset.json").write_text(json.dumps({"labels": labels}))
    return root


@pytest.fixture(scope="module")
def flags(world) -> tuple:
    return cached(world, world / "tree", "data")


@pytest.fixture(scope="module")
def trained(world, flags) -> Path:
    run("train_ldm_only.py", *flags, "--exp-name", "follows", "--max-train-steps", 2)
    return world / "exps/follows"


def train(capsys, flags: tuple, name: str, steps: int, *more: object) -> tuple[dict, str]:
    """The checkpoint of a run after `steps` steps, and what was printed."""
    capsys.readouterr()
    done = run("train_ldm_only.py", *flags, "--exp-name", name, "--max-train-steps", steps, *more)
    folder = Path(flags[flags.index("--output-dir") + 1], name)
    return read_checkpoint(folder / f"checkpoints/{steps:07d}.pt"), done.stdout


def classes_of(checkpoint: dict) -> tuple[int, int]:
    """The number of classes by a checkpoint's flags, and the rows of its label table."""
    return checkpoint["args"]["num_classes"], len(checkpoint["ema"][LABEL_TABLE])


def test_the_number_of_classes_follows_the_data_and_the_checkpoint_knows_them(trained):
    checkpoint = read_checkpoint(trained / "checkpoints/0000002.pt")
    assert classes_of(checkpoint) == (3, 4)
    assert json.loads((trained / "args.json").read_text())["num_classes"] == 3
    assert checkpoint["classes"] == {"names": list(COUNTS), "counts": list(COUNTS.values())}
    run = load_experiment(trained)
    assert (list(run.class_names), list(run.class_counts)) == (list(COUNTS), [7, 2, 3])


def test_a_larger_number_is_announced_and_kept_when_the_run_goes_on(capsys, world, flags):
    checkpoint, said = train(capsys, flags, "larger", 1, "--num-classes", 9)
    assert classes_of(checkpoint) == (9, 10)
    assert said.count(f"--num-classes 9 is more than the 3 of {world / 'data/latents'}") == said.count("more than") == 1
    resumed, _ = train(capsys, flags, "larger", 2)
    assert classes_of(resumed) == (9, 10)
    assert resumed["classes"] == checkpoint["classes"]
    line = refusal("train_ldm_only.py", *flags, "--exp-name", "x", "--max-train-steps", 1, "--num-classes", 2)
    assert "has labels up to 2, but --num-classes is 2" in line
    assert "is more than" not in train(capsys, flags, "equal", 1, "--num-classes", 3)[1]


@pytest.mark.parametrize("stated", [True, False])
def test_a_published_run_goes_on_with_its_classes(capsys, world, flags, stated, monkeypatch):
    """1000 of them where its flags do not say how many, though the data has fewer."""
    number, name = (5, "five") if stated else (1000, "thousand")
    monkeypatch.setattr(published, "CLASSES", number)
    monkeypatch.setitem(published.FLAGS, "num_classes", number)
    if not stated:
        monkeypatch.delitem(published.FLAGS, "num_classes")
    published.write_run(world / name, joint=False, vae_ckpt=world / "vae/sdvae.pt")
    more = ("--continue-train-exp-dir", world / name, "--enc-type", "efficientnet-lite0", "--epochs", 10**6)
    checkpoint, said = train(capsys, flags, f"from-{name}", published.STEP + 1, *more)
    assert classes_of(checkpoint) == (number, number + 1)
    assert f"--num-classes {number} is more than the 3 of" in said
    # sampled as ever: the published run draws all its labels, the one that goes on those of its data
    assert (load_experiment(world / name).class_counts, checkpoint["classes"]["counts"]) == ((), [7, 2, 3])
    # a new run that only starts from its weights follows the data
    started, _ = train(capsys, flags, f"started-{name}", 1, "--sit-ckpt", world / f"{name}/checkpoints/0400000.pt")
    assert classes_of(started) == (3, 4)


@pytest.mark.slow
def test_labels_that_are_not_in_the_data_are_not_drawn(capsys, world, monkeypatch):
    """dataset.json has the labels 0 and 5 only."""
    flags, drawn = cached(world, world / "gap", "gap-data"), []
    forward = SiT.forward

    def watched(self, x, t, y, **options):
        drawn.extend(y.tolist() if not self.training else [])
        return forward(self, x, t, y, **options)

    monkeypatch.setattr(SiT, "forward", watched)
    monkeypatch.setattr(previews, "STEPS", 1)
    more = ("--sampling-steps", 1, "--num-classes", 8, "--cfg-prob", 0)
    evaluation = ("--eval-steps", 1, "--eval-samples", 12, "--eval-features", "efficientnet-lite0", "--ema-decay", 0.5)
    checkpoint, _ = train(capsys, flags, "gap", 1, *more, *evaluation)
    assert checkpoint["classes"] == {"names": None, "counts": [3, 0, 0, 0, 0, 4]}
    assert drawn[:64] == [0] * 32 + [5] * 32  # the picture; then the evaluation
    assert set(drawn[64:]) == {0, 5}
    for labels in ("random", "balanced", "data"):
        drawn.clear()
        folder = world / "gap-samples" / labels
        sample(world / "exps/gap", folder, "--labels", labels, "--cfg-scale", 1, count=20)
        assert set(drawn) == {0, 5}
        (manifest,) = folder.glob("*.json")
        assert json.loads(manifest.read_text())["samples"]["class_counts"] == [3, 0, 0, 0, 0, 4]


def sample(run_folder: Path, folder: Path, *flags: object, count: int = 6) -> str:
    flags = ("--exp-path", run_folder, "--sample-dir", folder, "--num-steps", 1, "--no-png", *flags)
    return run("generate.py", *flags, "--num-fid-samples", count).stdout


def test_draws_are_todays_where_all_labels_have_images():
    expected = [1, 2, 9, 1, 1, 1, 8, 1, 5, 7, 9, 9]  # of seed 0, by the code before classes were counted
    for counts in ((), [1] * 10, range(5, 15)):
        assert sample_labels(Sampling(class_counts=counts), 10, range(12)) == expected
        balanced = Sampling(class_counts=counts, labels="balanced")
        assert sample_labels(balanced, 10, range(12)) == [*range(10), 0, 1]
    assert sample_labels(Sampling(classes=(7, 2)), 10, range(4)) == [7, 2, 7, 2]


def test_labels_of_data_are_drawn_in_its_proportions_and_by_index(good, tmp_path):
    sampling = Sampling(labels="data", class_counts=[700, 0, 200, 100], seed=3)
    drawn = sample_labels(sampling, 9, range(4000))
    counts = Counter(drawn)
    for label, share in ((0, 0.7), (2, 0.2), (3, 0.1)):
        assert abs(counts[label] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5
    assert set(counts) == {0, 2, 3}
    assert sample_labels(sampling, 9, [17, 5]) == [drawn[17], drawn[5]]
    assert sample_labels(replace(sampling, seed=4), 9, range(50)) != drawn[:50]
    assert labels_with_images([0, 4, 0], 9) == [1]
    unknown = "--labels data: the checkpoint of joint does not say how many training images each class had; use"
    assert unknown in refusal("generate.py", *good_flags("generate.py", good, tmp_path), "--labels", "data")


def meant(word: str, names: tuple[str, ...], counts: tuple[int, ...] = (), classes: int = 3) -> tuple[int, list[str]]:
    """The label that a word of --classes means, and what was said."""
    said = []
    sit = SimpleNamespace(num_classes=classes)
    return generate.find_label(word, Experiment("run", 1, {}, sit, None, names, counts), said.append), said


def test_words_of_classes_are_labels_or_names():
    names = ("ape", "bee", "cat")
    assert [meant(word, names) for word in ("cat", "0", "1")] == [(2, []), (0, []), (1, [])]
    assert meant("2", ()) == (2, [])
    assert meant("e\u0301clair", ("cat", "\u00e9clair")) == (1, [])  # as macOS decomposes accents
    # names of digits: those of labels win if both are the same class, if there is no such label, or by their zeros
    digits = ("1", "10", "2")
    assert (meant("1", ("0", "1", "2")), meant("10", digits), meant("+1", digits)) == ((1, []),) * 3
    assert meant("01", ("01", "02", "03")) == (0, [])
    with pytest.raises(UserError, match=r"--classes 1: both a label and the name .* label 0; write \+1 .* or \+0 "):
        meant("1", digits)
    # a label without images is sampled only if it is asked for, and warned of
    warned = ["warning: --classes 2: label 2 had no training images"]
    assert meant("2", (), (4, 3)) == meant("2", ("a", "b", "c"), (4, 3, 0)) == (2, warned)
    assert meant("1", (), (4, 3)) == (1, [])


@pytest.mark.parametrize(
    ("word", "names", "more"),
    [
        ("dgo", ("cat", "dog"), "; did you mean 'dog', which is label 1?"),
        ("dog", (), "; its checkpoint does not know their names"),
        ("3", ("cat", "dog"), ""),
        ("-1", (), ""),
    ],
)
def test_words_that_are_no_class_are_refused(word, names, more):
    with pytest.raises(UserError) as error:
        meant(word, names)
    assert str(error.value) == f"--classes {word}: the run has classes 0 to 2{more}"
    with pytest.raises(UserError, match="'cat,' is not like 207,360 or cat,dog"):
        generate.parse_args(["--exp-path", "x", "--classes", "cat,"])


def test_names_of_classes_are_in_manifest_and_grid(trained, tmp_path):
    said = sample(trained, tmp_path, "--classes", "grey owl, 0,dog", "--grid")
    assert "classes: 2 (grey owl), 0 (cat), 1 (dog)" in said
    (path,) = tmp_path.glob("*.json")
    made = json.loads(path.read_text())["samples"]
    assert (made["labels"], made["class_names"]) == ([2, 0, 1], ["grey owl", "cat", "dog"])
    picture = np.asarray(Image.open(path.with_suffix(".png")))
    margin = picture.shape[1] - (2 * 34 + 2)
    assert (picture.shape[0], margin > 30) == (3 * 34 + 2, True)
    for row in range(3):  # a title beside each row, whose samples are those of the npz
        title = picture[2 + 34 * row : 34 * (row + 1), :margin]
        assert (title < 128).any() and (title[:, -2:] == 255).all()
        tile = picture[2 + 34 * row : 34 * (row + 1), margin + 2 : margin + 34]
        assert np.array_equal(tile, np.load(path.with_suffix(".npz"))["arr_0"][row])
