"""`python dataset.py --verify DIR` names every damaged file, and what it names can be made again."""

import json
import shutil
from pathlib import Path

import pytest

import dataset
import preprocessing
from errors import UserError
from good import cache_flags
from images import make_data
from scripts import run
from storage.shards import read_header
from test_bad_input import flip_a_bit


def make(good: dict[str, Path], data: Path) -> None:
    preprocessing.preprocess(good["tree"], data, 32, 1, None)
    run("cache_latents.py", *cache_flags(data, good["vae"]), "--mirrored")


@pytest.fixture
def copied(good, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(preprocessing, "SHARD_IMAGES", 4)
    data = shutil.copytree(good["data"], tmp_path / "data")
    make(good, data)
    return data


def verified(directory: Path, code: int = 0) -> tuple[list[str], str]:
    """Run dataset.py --verify; the lines it prints, and its last line on stderr."""
    done = run("dataset.py", "--verify", directory, code=code)
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()[-1]


def test_verify_says_what_it_checked(copied, monkeypatch):
    lines = [f"{copied / name}: all shards are as index.json says" for name in ("images", "latents")]
    assert verified(copied)[0] == lines
    assert verified(copied / "latents")[0] == lines[1:]
    monkeypatch.chdir(copied / "images")
    assert verified(Path("."))[0] == lines[:1]
    assert "no shards below it" in verified(copied.parent / "nothing", code=2)[1]


def test_verify_names_all_that_is_damaged_and_what_it_names_can_be_made_again(good, copied):
    before = {name: json.loads((copied / name / "index.json").read_text()) for name in ("images", "latents")}
    images, latents = copied / "images", copied / "latents"
    flip_a_bit(images / "00000.safetensors")
    (images / "00001.safetensors").unlink()
    (images / "00002.safetensors").write_bytes((images / "00002.safetensors").read_bytes()[:-1])
    shutil.copyfile(images / "00003.safetensors", images / "00004.safetensors")
    flip_a_bit(latents / "00001.safetensors")
    lines, last = verified(copied, code=2)
    flipped = "damaged (its digest is not that of index.json); delete the file and run"
    expected = {
        images / "00000.safetensors": f"{flipped} preprocessing.py",
        images / "00001.safetensors": "no such file, but index.json lists it; run preprocessing.py",
        images / "00002.safetensors": "damaged; run preprocessing.py",
        images / "00004.safetensors": "holds labels of I64 (4,), but index.json says I64 (2,); delete it and run",
        latents / "00001.safetensors": f"{flipped} cache_latents.py",
    }
    assert len(lines) == len(expected)
    for line, (path, words) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{path}: ")
        assert words in line
    assert last == f"error: {copied}: 5 damaged or missing files; what to do is said above"
    for path in expected:
        path.unlink(missing_ok=True)
    make(good, copied)
    assert len(verified(copied)[0]) == 2
    assert before == {name: json.loads((copied / name / "index.json").read_text()) for name in before}


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("images", {"fingerprint": "0"}, "damaged (its fingerprint is not that of its content)"),
        ("latents", {"image_fingerprint": "0"}, "damaged (its fingerprint is not that of its content)"),
        ("latents", {"format": "other"}, "not an index of repae-latents/2"),
    ],
)
def test_verify_names_an_index_that_is_not_its_shards(good, copied, name, edit, words):
    path = copied / name / "index.json"
    whole = path.read_bytes()
    path.write_text(json.dumps({**json.loads(whole), **edit}))
    lines, last = verified(copied, code=2)
    assert sum(line.startswith(f"{path}: {words}") for line in lines) == 1
    assert "1 damaged or missing files" in last
    path.unlink()
    make(good, copied)
    assert json.loads(path.read_text()) == json.loads(whole)
    verified(copied)


def test_verify_notices_any_bit_that_flips(tmp_path):
    data = make_data(tmp_path, per_class=1, resolution=8)
    path = data / "images/00000.safetensors"
    whole = path.read_bytes()
    for i in range(read_header(path).start, len(whole), 3):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        with pytest.raises(UserError):
            dataset.verify(data)
    path.write_bytes(whole)
    verified(data)
