"""Files that are damaged, and disks that are full or read-only: one clear line, nothing lost, and the way back."""

import contextlib
import io
import os
import shutil
import signal
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import preprocessing
import published
from dataset import open_images
from errors import UserError
from good import cache_flags, good_flags, write_good_files
from images import make_tree
from scripts import TINY, TINY_SIT, files_limited_to, records, refusal, run
from storage.files import locked
from storage.image_sets import map_member
from weights.checkpoint_io import vae_files

NOBODY = 65534
OUT = "out"  # below the places of `work`, what scripts write to


def bomb_png(side: int) -> bytes:
    """A PNG of a few bytes whose header announces side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def work() -> Iterator[dict[str, Path]]:
    """Good files, by name, where any user can read them."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    yield write_good_files(root)
    shutil.rmtree(root)


def flags_of(script: str, work: dict[str, Path]) -> list:
    more = {"preprocessing.py": ["--resolution", 32], "generate.py": ["--num-fid-samples", 4]}
    return good_flags(script, work, work["root"] / OUT) + more.get(script, [])


# script -> the file of its output that is large, and what it removes before it writes
OUTPUTS = {
    "preprocessing.py": ("images/00002.safetensors", {"images/index.json"}),
    "cache_latents.py": ("latents/00002.safetensors", set()),
    "generate.py": ("joint_0400000_cfg1.5-0.0-1.0.npz", set()),
    "evaluate.py": ("result.json", set()),
    "save_vae_weights.py": ("e2e/e2e-discriminator-ckpt.pt", set()),
}


@pytest.fixture
def out(work, monkeypatch) -> Iterator[Path]:
    monkeypatch.setattr(preprocessing, "SHARD_IMAGES", 4)
    folder = work["root"] / OUT
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("script", OUTPUTS)
def test_a_full_disk_is_one_line_and_the_same_command_completes(work, out, script):
    flags, (large, removed) = flags_of(script, work), OUTPUTS[script]
    run(script, *flags)
    whole = contents(out)
    (out / large).unlink()
    before = contents(out)
    with files_limited_to(len(whole[large]) // 2):
        line = refusal(script, *flags)
    assert line.startswith("error: [Errno 27] File too large")
    assert line.endswith("; free some space and run the same again (REPAE_DEBUG=1 shows where)")
    after = contents(out)
    assert after.keys() >= before.keys() - removed
    assert all(whole[name] == content for name, content in after.items()), "half a file, or another one"
    run(script, *flags)
    assert contents(out) == whole


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Within, this process cannot write everywhere, as root can."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("script", OUTPUTS)
def test_a_read_only_folder_is_one_line_and_the_same_command_completes(work, out, script):
    flags, (large, _) = flags_of(script, work), OUTPUTS[script]
    run(script, *flags)
    whole = contents(out)
    (out / large).unlink()
    (out / large).parent.chmod(0o555)
    left = contents(out)
    with another_user():
        line = refusal(script, *flags)
    assert str(out) in line
    assert any(words in line for words in ("cannot be written to", "not to be written to", "Permission denied"))
    assert contents(out) == left
    (out / large).parent.chmod(0o755)
    run(script, *flags)
    assert contents(out) == whole


def test_a_folder_that_another_process_writes_to_is_left_alone(work, out):
    folders = {"preprocessing.py": "images", "cache_latents.py": "latents"}
    folders["generate.py"] = "joint_0400000_cfg1.5-0.0-1.0.parts"
    for script, name in folders.items():
        left = out / name / ".half.1.tmp"
        with locked(out / name):
            left.write_bytes(b"the other process's")
            assert "another process is writing there; wait for it" in refusal(script, *flags_of(script, work))
            assert left.exists()
        run(script, *flags_of(script, work))
        assert not left.exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_that_claims_more_than_its_file_holds_is_one_line(tmp_path, compression):
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**9, 3)}
    np.lib.format.write_array_header_1_0(header := io.BytesIO(), claim)
    with zipfile.ZipFile(tmp_path / "claim.npz", "w", compression) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    with pytest.raises(UserError, match=r"claim.npz: not a readable npz \(arr_0.npy says uint8 .* are not\)"):
        map_member(tmp_path / "claim.npz", "arr_0.npy")


@pytest.mark.slow
def test_everything_works_behind_links_and_under_names_with_spaces_and_other_letters(tmp_path, vgg_weights):
    root = tmp_path / "Größe und Ruß 数据"
    for name in ("wirklich/data", "wirklich/exps"):
        (root / name).mkdir(parents=True)
    data, exps = root / "Daten 图", root / "Läufe"
    data.symlink_to(root / "wirklich/data")
    exps.symlink_to(root / "wirklich/exps", target_is_directory=True)
    lpips, vae = root / "Maß.pt", published.write_vae(root / "Kodierer ä")
    lpips.symlink_to(vgg_weights)
    make_tree(root / "Bilder ß", per_class=6)
    train = (*TINY, *TINY_SIT, "--data-dir", data, "--output-dir", exps, "--max-train-steps", 1)
    disc = vae_files(vae).discriminator
    tuned, latents = exps / "Ä ö/Ä ö.pt", "Maße 四"
    checkpoint = exps / "Übung 一/checkpoints/0000001.pt"
    for script, *flags in (
        ("preprocessing.py", "--imagenet-path", root / "Bilder ß", "--resolution", 32, "--output-path", data),
        (
            *("train_repae.py", *train, "--lpips-vgg-ckpt", lpips, "--vae-ckpt", vae),
            *("--disc-pretrained-ckpt", disc, "--exp-name", "Übung 一"),
        ),
        ("save_vae_weights.py", "--repae-ckpt", checkpoint, "--vae-name", "Ä ö", "--save-dir", exps),
        ("cache_latents.py", *cache_flags(data, tuned, name=latents)),
        ("train_ldm_only.py", *train, "--vae-latents-name", latents, "--vae-ckpt", tuned, "--exp-name", "Eis é"),
    ):
        run(script, *flags)
    few = ("--num-fid-samples", 2, "--num-steps", 1)
    for name in ("Übung 一", "Eis é"):
        assert [record["step"] for record in records(exps / name / "metrics.jsonl")] == [1]
        flags = ("--exp-path", exps / name, "--sample-dir", root / "Proben 样", *few)
        run("generate.py", *flags)
        pixels = np.load(root / f"Proben 样/{name}_0000001_cfg1.5-0.0-1.0.npz")["arr_0"]
        assert pixels.shape == (2, 32, 32, 3)
    assert data.is_symlink()
    assert exps.is_symlink()
    assert len(open_images(root / "wirklich/data")) == 18
    lines = run("dataset.py", "--verify", data).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{data}/Maße 四", f"{data}/images"]
    assert {path.name for path in root.iterdir()} == {
        *("wirklich", "Daten 图", "Läufe", "Maß.pt", "Kodierer ä", "Bilder ß", "Proben 样")
    }


def test_a_forked_worker_does_not_keep_the_lock_of_its_parent(tmp_path):
    """A worker that outlives a killed process must not block the folder."""
    ready, end = os.pipe(), os.pipe()
    parent = os.fork()
    if parent == 0:
        with locked(tmp_path):
            if os.fork() == 0:
                os.read(end[0], 1)
                os._exit(0)
            os.write(ready[1], b"x")
            os.read(end[0], 1)
    os.read(ready[0], 1)
    with pytest.raises(UserError, match="another process is writing there"), locked(tmp_path):
        pass
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with locked(tmp_path):
        pass
    os.write(end[1], b"x")
