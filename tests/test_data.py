"""Cached latents and the reference's HDF5 data, as training reads them."""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cache_latents
import preprocessing
import published
from dataset import ImageDataset, open_images, open_latents
from errors import UserError
from images import make_data, make_tree
from models.autoencoder import pixels_to_image
from scripts import call
from storage.shards import Shards, read_into, shard_name, write_shard
from test_files import bomb_png, shard_arrays, without_checksums
from train_ldm_only import check_vae
from weights.checkpoint_io import fingerprint


def cache(data, vae, *flags, name="latents", code=0) -> str:
    """Run cache_latents.py in this process, check its exit code and give back what it said on stderr."""
    paths = ("--data-dir", data, "--output-dir", data, "--vae-ckpt-path", vae, "--vae-latents-name", name)
    options = ("--vae-arch", published.VAE, "--num-workers", "0", "--pproc-batch-size", "3")
    found, stderr = call("cache_latents.py", *options, *paths, *flags)
    assert found == code, stderr
    return stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eighteen images in five shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "SHARD_IMAGES", 4)
        return make_data(tmp_path_factory.mktemp("sharded"), per_class=6)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return published.write_vae(tmp_path_factory.mktemp("vae"))


@torch.no_grad()
def moments_of(pixels: torch.Tensor) -> torch.Tensor:
    posterior = published.fresh_vae().encode(pixels_to_image(pixels[None]))
    return torch.cat([posterior.mean, posterior.std], dim=1)[0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_are_the_images_moments_and_then_the_mirrored_ones(data, vae, dtype):
    cache(data, vae, "--dtype", dtype, "--mirrored", name=dtype)
    images = open_images(data)
    latents = open_latents(data, dtype, images)
    assert (len(latents), latents.shape) == (36, (4, 8, 8))
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == "float16" else {"atol": 1e-5, "rtol": 1e-5}
    for i in (0, 5, 17):
        pixels, label, moments = latents[i]
        assert torch.equal(pixels, images[i][0])
        assert label == images[i][1]
        assert moments.dtype == torch.float32
        torch.testing.assert_close(moments, moments_of(pixels), **tolerance)
        mirrored, label_again, moments = latents[18 + i]
        assert torch.equal(mirrored, pixels.flip(-1))
        assert label_again == label
        torch.testing.assert_close(moments, moments_of(mirrored), **tolerance)
    stored = (data / dtype / "00001.safetensors").stat().st_size
    rows = 4 * 2 * 8 * 8 * 8 * (2 if dtype == "float16" else 4)
    assert rows < stored < rows + 1500


def test_the_index_holds_the_vaes_fingerprint_and_statistics(data, vae):
    cache(data, vae, name="indexed")
    index = json.loads((data / "indexed/index.json").read_text())
    assert index["vae_fingerprint"] == fingerprint(published.fresh_vae().state_dict())
    for key, value in published.STATISTICS.items():
        assert index["statistics"][key] == pytest.approx(value.tolist())
    assert index["shards"] == [{"file": f"{i:05d}.safetensors", "images": min(4, 18 - 4 * i)} for i in range(5)]
    assert torch.equal(open_latents(data, "indexed")[3][0], torch.empty(0, dtype=torch.uint8))


def test_caching_again_makes_only_what_is_missing_or_cut_short(data, vae):
    cache(data, vae, name="again")
    folder = data / "again"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    kept = [torch.stack([open_latents(data, "again")[i][2] for i in range(18)])]
    (folder / "00001.safetensors").unlink()
    cut = (folder / "00003.safetensors").read_bytes()
    (folder / "00003.safetensors").write_bytes(cut[: len(cut) // 2])
    cache(data, vae, name="again")
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert {name for name in after if after[name] != before[name]} == {"00001.safetensors", "00003.safetensors"}
    assert torch.equal(kept[0], torch.stack([open_latents(data, "again")[i][2] for i in range(18)]))


def test_another_vae_images_or_form_in_the_same_folder_are_refused(data, vae, tmp_path):
    cache(data, vae, name="taken")
    other = published.write_vae(tmp_path / "other", seed=5)
    for flags in (("--vae-ckpt-path", other), ("--dtype", "float16"), ("--mirrored",)):
        assert "holds shards of another VAE" in cache(data, vae, *flags, name="taken", code=2)
    assert len(open_latents(data, "taken")) == 18


class Printer:
    def print(self, text: str) -> None:
        self.text = text


def test_latents_of_another_vae_or_other_images_are_refused_at_training(data, vae, tmp_path):
    from argparse import Namespace

    cache(data, vae, name="checked")
    latents, args = open_latents(data, "checked"), Namespace(vae_ckpt="vae.pt")
    good = fingerprint(published.fresh_vae().state_dict())
    statistics = tuple(value.reshape(1, -1, 1, 1) for value in published.STATISTICS.values())
    check_vae(latents, good, statistics, args, Printer())
    with pytest.raises(UserError, match="other VAE weights than those of --vae-ckpt vae.pt"):
        check_vae(latents, fingerprint(published.fresh_vae(5).state_dict()), statistics, args, Printer())
    with pytest.raises(UserError, match=r"other statistics \(latents_bias\)"):
        check_vae(latents, good, (statistics[0], statistics[1] + 1e-3), args, Printer())
    other = make_data(tmp_path, per_class=2)
    with pytest.raises(UserError, match="latents of other images"):
        open_latents(data, "checked", ImageDataset(other))


def test_fingerprint_sees_every_value_and_no_prefix():
    state = published.fresh_vae().state_dict()
    shuffled = dict(reversed(published.prefixed(state, "module._orig_mod.").items()))
    before = fingerprint(state)
    assert before == fingerprint(shuffled)
    state["decoder.conv_out.bias"][0] += 1e-6
    assert before != fingerprint(state)


@pytest.fixture(scope="module")
def hdf5(data, tmp_path_factory):
    """The images of `data` and their moments in the reference's HDF5 layout."""
    images = open_images(data)
    pixels, labels = zip(*(images[i] for i in range(len(images))), strict=True)
    folder = tmp_path_factory.mktemp("hdf5")
    published.write_hdf5(folder, list(pixels), list(labels), "e2e-vavae", [moments_of(image) for image in pixels])
    return folder


def test_the_references_hdf5_is_read_as_it_is(data, hdf5):
    from torch.utils.data import DataLoader

    shards, images = open_images(data), open_images(hdf5, 32)
    latents = open_latents(hdf5, "e2e-vavae", images)
    assert (len(images), images.num_classes, images.resolution) == (18, 3, 32)
    assert (latents.shape, latents.vae_fingerprint) == ((4, 8, 8), None)
    latents[0]  # what is open here must not be used by the workers that fork from here
    batches = DataLoader(latents, 5, num_workers=2)
    rows = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    for i in range(18):
        assert torch.equal(rows[0][i], shards[i][0])
        assert rows[1][i] == shards[i][1]
        torch.testing.assert_close(rows[2][i], moments_of(shards[i][0]))


def test_latents_can_be_cached_from_hdf5_images(data, hdf5, vae):
    cache(hdf5, vae, name="from-h5")
    cache(data, vae, name="from-shards")
    one, two = open_latents(hdf5, "from-h5", open_images(hdf5)), open_latents(data, "from-shards")
    for i in range(18):
        torch.testing.assert_close(one[i][2], two[i][2])


@pytest.mark.parametrize(
    "damage", ["no list", "bad list", "nested list", "no label", "negative label", "cut", "missing", "other labels"]
)
def test_unusable_hdf5_is_one_clear_line(hdf5, tmp_path, damage):
    folder = shutil.copytree(hdf5, tmp_path / "copy")
    listing = folder / "images_h5.json"
    names = json.loads(listing.read_text())
    if damage == "no list":
        listing.unlink()
    elif damage == "bad list":
        listing.write_text("{")
    elif damage == "nested list":
        listing.write_text("[" * 100_000)
    elif damage == "negative label":
        import h5py

        labels = json.dumps({"labels": [[name, -1] for name in names]}).encode()
        with h5py.File(folder / "images.h5", "a") as file:
            del file["dataset.json"]
            file.create_dataset("dataset.json", data=np.frombuffer(labels, np.uint8))
    elif damage == "no label":
        listing.write_text(json.dumps([*names, "00000/more.png"]))
    elif damage == "cut":
        content = (folder / "images.h5").read_bytes()
        (folder / "images.h5").write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        import h5py

        with h5py.File(folder / "images.h5", "a") as file:
            del file[names[0]]
    else:
        listing.write_text(json.dumps(names[1:]))
    with pytest.raises(UserError) as error:
        open_latents(folder, "e2e-vavae", open_images(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_forked_process_opens_its_own_hdf5_handle(hdf5):
    images = open_images(hdf5)
    mine = images.file.handle
    assert images.file.handle is mine
    child = os.fork()
    if child == 0:
        fresh = images.file.handle is not mine and not mine  # closed, or HDF5 would go on sharing it
        os._exit(0 if fresh else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("damage", ["no image", "bomb", "huge", "a group", "other size", "other moments"])
def test_hdf5_content_that_differs_is_one_clear_line(hdf5, vae, tmp_path, damage):
    import h5py

    folder = shutil.copytree(hdf5, tmp_path / "copy")
    name = "e2e-vavae" if damage == "other moments" else "images"
    entry = json.loads((folder / f"{name}_h5.json").read_text())[4]
    Image.new("RGB", (16, 16)).save(small := io.BytesIO(), "png")
    content = {
        "no image": np.frombuffer(b"nothing", np.uint8),
        "bomb": np.frombuffer(bomb_png(100_000), np.uint8),
        "huge": None,
        "a group": None,
        "other size": np.frombuffer(small.getvalue(), np.uint8),
        "other moments": np.zeros((8, 4, 4), np.float32),
    }[damage]
    with h5py.File(folder / f"{name}.h5", "a") as file:
        del file[entry]
        if damage == "a group":
            file.create_group(entry)
        elif damage == "huge":
            file.create_dataset(entry, (10**15,), np.uint8, chunks=(1000,))
        else:
            file.create_dataset(entry, data=content)
    if damage == "other moments":
        with pytest.raises(UserError, match=f"{entry} has shape"):
            open_latents(folder, "e2e-vavae")[4]
        return
    workers = "1" if damage == "no image" else "0"
    stderr = cache(folder, vae, "--num-workers", workers, name="broken", code=2)
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert entry in line
    words = {"bomb": "more than 89478485 pixels", "huge": "claims 1000000.0 GB", "a group": "holds no"}
    assert words.get(damage, "") in line
    assert "Traceback" not in stderr


def flip(path, row: int, name: str) -> None:
    """Flip a bit in a row of one of a shard's tensors."""
    arrays, _ = shard_arrays(path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    offset = json.loads(path.read_bytes()[8 : 8 + size])[name]["data_offsets"][0]
    with open(path, "rb+") as file:
        file.seek(8 + size + offset + row * arrays[name][0].nbytes + arrays[name][0].nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


def test_every_row_has_the_crc32_of_its_bytes_and_its_label(data, vae):
    cache(data, vae, "--dtype", "float16", "--mirrored", name="summed")
    for path, names in (("images", ["pixels"]), ("summed", ["mirrored", "moments"])):
        arrays, metadata = shard_arrays(data / path / "00001.safetensors")
        assert arrays.keys() == {"labels", *names, *(f"{name}.crc" for name in names)}
        digest = hashlib.sha256()
        for name in names:
            rows = zip(arrays[name], arrays["labels"], strict=True)
            expected = [zlib.crc32(row.tobytes() + label.tobytes()) for row, label in rows]
            assert arrays[f"{name}.crc"].tolist() == expected
            digest.update(arrays[name].tobytes())
        digest.update(arrays["labels"].tobytes())
        assert metadata["digest"] == digest.hexdigest()


@pytest.mark.parametrize("name", ["pixels", "labels", "pixels.crc"])
def test_a_flipped_bit_is_noticed_when_its_row_is_read(data, tmp_path, name):
    copy = shutil.copytree(data, tmp_path / "copy")
    flip(copy / "images/00001.safetensors", 2, name)
    images = open_images(copy)
    for i in set(range(18)) - {6}:
        images[i]
    with pytest.raises(UserError) as error:
        images[6]
    expected = (
        f"{copy}/images/00001.safetensors: row 2 damaged (checksum differs); delete the file and run preprocessing.py "
        f"with --output-path {copy} to the end"
    )
    assert str(error.value) == expected


def test_mirrored_latents_have_checksums_of_their_own(data, vae, tmp_path):
    cache(data, vae, "--mirrored", name="both")
    copy = shutil.copytree(data, tmp_path / "copy")
    flip(copy / "both/00002.safetensors", 1, "mirrored")
    latents = open_latents(copy, "both")
    assert torch.equal(latents[9][2], open_latents(data, "both")[9][2])
    with pytest.raises(UserError, match="00002.safetensors: row 1 damaged .*run cache_latents.py"):
        latents[18 + 9]


def test_shards_from_before_checksums_are_read_and_continued(data, vae, tmp_path, monkeypatch):
    cache(data, vae, name="older")
    copy = shutil.copytree(data, tmp_path / "copy")
    for path in (*(copy / "images").glob("*.safetensors"), *(copy / "older").glob("*.safetensors")):
        without_checksums(path)
    before = [(copy / name / "00002.safetensors").read_bytes() for name in ("images", "older")]
    latents, whole = open_latents(copy, "older", open_images(copy)), open_latents(data, "older", open_images(data))
    for i in range(18):
        assert all(map(torch.equal, map(torch.as_tensor, latents[i]), map(torch.as_tensor, whole[i])))
    monkeypatch.setattr(preprocessing, "SHARD_IMAGES", 4)
    preprocessing.preprocess(data.parent / "tree", copy, 32, 1, None)
    cache(copy, vae, name="older")
    assert before == [(copy / name / "00002.safetensors").read_bytes() for name in ("images", "older")]


MISFITS = {
    "shards": {"shards": None},
    "no-shard-list": {"shards": {"file": "00000.safetensors", "images": 4}},
    "no-size": {"shards": [{"file": "00000.safetensors"}]},
    "negative": {"shards": [{"file": "00000.safetensors", "images": -4}]},
    "truth": {"shards": [{"file": "00000.safetensors", "images": True}]},
    "twice": {"shards": [{"file": "00000.safetensors", "images": 4}] * 2},
    "absolute": {"shards": [{"file": "/etc/passwd", "images": 4}]},
    "above": {"shards": [{"file": "../00000.safetensors", "images": 4}]},
    "parent": {"shards": [{"file": "..", "images": 4}]},
    "below": {"shards": [{"file": "a/00000.safetensors", "images": 4}]},
    "empty": {"shards": [{"file": "", "images": 4}]},
    "lines": {"shards": [{"file": "a\nb", "images": 4}]},
    "number": {"shards": [{"file": 7, "images": 4}]},
    "resolution": {"resolution": "32"},
    "resolution-other": {"resolution": 16},
    "classes": {"num_classes": 2.5},
    "fingerprint": {"fingerprint": None},
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_index_that_holds_what_it_should_not_is_one_clear_line(data, tmp_path, case):
    copy = shutil.copytree(data, tmp_path / "copy")
    path = copy / "images/index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, **MISFITS[case]}))
    with pytest.raises(UserError) as error:
        open_images(copy)
    assert str(error.value).startswith(f"{copy}/images/")
    assert "run preprocessing.py" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["shape", "dtype", "mirrored", "statistics", "num_classes", "vae_fingerprint"])
def test_a_latent_index_that_lacks_or_misstates_something_is_one_clear_line(data, vae, tmp_path, key):
    cache(data, vae, name="stated")
    copy = shutil.copytree(data / "stated", tmp_path / "stated")
    index = json.loads((copy / "index.json").read_text())
    for changed in ({**index, key: [1, 2]}, {name: value for name, value in index.items() if name != key}):
        (copy / "index.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=rf"stated/index.json: damaged \(.*{key}.*\); run cache_latents.py"):
            open_latents(tmp_path, "stated")
    (copy / "index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        open_latents(tmp_path, "stated")


def test_labels_that_the_index_knows_nothing_of_are_one_clear_line(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    path = copy / "images/index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_classes": 2}))
    images = open_images(copy)
    assert images[0][1] == 0
    with pytest.raises(UserError, match="row 1 has label 2, but index.json says 2 classes"):
        images[17]


def test_shards_may_lie_elsewhere_behind_links(data, tmp_path):
    (tmp_path / "linked/images").mkdir(parents=True)
    for path in (data / "images").iterdir():
        (tmp_path / "linked/images" / path.name).symlink_to(path)
    assert torch.equal(open_images(tmp_path / "linked")[17][0], open_images(data)[17][0])


def test_a_shard_without_images_is_cached_as_one(tmp_path, vae, monkeypatch):
    monkeypatch.setattr(preprocessing, "SHARD_IMAGES", 3)
    tree = make_tree(tmp_path / "tree", per_class=3)
    for path in (tree / "bee").iterdir():
        path.write_bytes(b"no image")
    preprocessing.preprocess(tree, tmp_path / "data", 32, 1, None)
    cache(tmp_path / "data", vae)
    images = open_images(tmp_path / "data")
    assert images.sizes == [3, 0, 3]
    latents = open_latents(tmp_path / "data", "latents", images)
    assert [latents[i][1] for i in range(6)] == [0, 0, 0, 2, 2, 2]


def test_latents_that_are_not_finite_are_not_written(tmp_path, vae, monkeypatch):
    preprocessing.preprocess(make_tree(tmp_path / "tree", per_class=1), tmp_path / "data", 32, 1, None)
    encode = cache_latents.encode
    monkeypatch.setattr(cache_latents, "encode", lambda *args: encode(*args) * 1e9)
    said = cache(tmp_path / "data", vae, "--dtype", "float16", code=2)
    assert "00000.safetensors: moments are not finite, or too large for float16; use --dtype float32" in said
    assert not list((tmp_path / "data" / "latents").glob("*.safetensors"))


def test_rows_of_several_tensors_take_one_opening(tmp_path, monkeypatch):
    arrays = {"a": np.arange(12, dtype=np.int8).reshape(2, 6), "b": np.ones((2, 3), np.float32)}
    write_shard(tmp_path / "s", {**arrays, "labels": np.array([0, 1])}, {"plan": ""})
    layout = {"a": ("I8", (6,)), "b": ("F32", (3,))}
    found = Shards(tmp_path, {"num_classes": 2, "shards": [{"file": "s", "images": 2}]}, layout, "help")
    opened = []
    monkeypatch.setattr(
        "storage.shards.read_into", lambda path, targets: opened.append(path) or read_into(path, targets)
    )
    b, a, label = found.row(1, "b", "a")
    assert (b.tolist(), a.tolist(), label, len(opened)) == ([1, 1, 1], [6, 7, 8, 9, 10, 11], 1, 1)
    with open(tmp_path / "s", "r+b") as file:
        content = file.read()
        file.seek(content.index(bytes(range(6, 12))))
        file.write(b"x")
    with pytest.raises(UserError, match="row 1 damaged"):
        found.row(1, "b", "a")
    assert found.row(1, "b")[1] == 1


def test_many_shards_are_read_without_keeping_any_open_or_in_memory(tmp_path):
    count = 300
    for i in range(count):
        pixels = np.full((2, 3, 4, 4), i % 256, np.uint8)
        write_shard(tmp_path / shard_name(i), {"pixels": pixels, "labels": np.array([0, 1])}, {"plan": ""})
    index = {"num_classes": 2, "shards": [{"file": shard_name(i), "images": 2} for i in range(count)]}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 50, limits[1]))
    try:
        shards = Shards(tmp_path, index, {"pixels": ("U8", (3, 4, 4))}, "")
        rows = [shards.row(i, "pixels") for i in range(2 * count)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all((pixels == i // 2 % 256).all() and label == i % 2 for i, (pixels, label) in enumerate(rows))
    assert len(os.listdir("/proc/self/fd")) <= in_use + 1
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert len(pickle.dumps(shards)) < 100 * count


@pytest.mark.parametrize("change", ["removed", "cut short"])
def test_a_shard_that_changes_while_it_is_used_is_one_clear_line(data, tmp_path, change):
    copy = shutil.copytree(data, tmp_path / "copy")
    images = open_images(copy)
    assert torch.equal(images[4][0], open_images(data)[4][0])
    path = copy / "images/00001.safetensors"
    if change == "removed":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError) as error:
        images[7]
    assert str(error.value) == (
        f"{path}: was changed or removed meanwhile; run preprocessing.py with --output-path {copy} to the end"
    )


ROWS = {"dtype": "U8", "shape": [1, 3, 2, 2], "data_offsets": [8, 20]}
LABELS = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
HEADERS = {
    "gap": {"labels": LABELS, "pixels": {**ROWS, "data_offsets": [9, 21]}},
    "overlap": {"labels": LABELS, "pixels": {**ROWS, "data_offsets": [0, 12]}},
    "before the file": {"labels": LABELS, "pixels": {**ROWS, "data_offsets": [-4, 8]}},
    "too large": {"labels": LABELS, "pixels": {**ROWS, "shape": [1, 3, 2, 3]}},
    "half a pixel": {"labels": LABELS, "pixels": {**ROWS, "shape": [1, 3, 2.0, 2]}},
    "unknown numbers": {"labels": LABELS, "pixels": {**ROWS, "dtype": "BOOL"}},
    "no shape": {"labels": LABELS, "pixels": {"dtype": "U8", "data_offsets": [8, 20]}},
    "list": [LABELS, ROWS],
    "list inside": {"labels": LABELS, "pixels": [1]},
    "text": "labels",
}


def test_a_pipe_in_place_of_a_shard_is_damage_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(UserError, match="no such file, but index.json lists it; help"):
        Shards(
            tmp_path, {"num_classes": 1, "shards": [{"file": "a", "images": 1}]}, {"pixels": ("U8", (3, 2, 2))}, "help"
        )


@pytest.mark.parametrize("case", ["good", "metadata", *HEADERS, "deep", "no text", "longer than the file", "short"])
def test_headers_of_shards_are_not_trusted(tmp_path, case):
    good = {"labels": LABELS, "pixels": ROWS}
    header = {**good, "__metadata__": {"a": "b" * 10_000}} if case == "metadata" else HEADERS.get(case, good)
    text = {"deep": b"[" * 100_000, "no text": b"\xff" * 20}.get(case, json.dumps(header).encode())
    length = len(text) + (100 if case == "longer than the file" else 0)
    content = length.to_bytes(8, "little") + text + (0).to_bytes(8, "little") + bytes(range(12))
    (tmp_path / "a").write_bytes(content[:5] if case == "short" else content)
    index = {"num_classes": 1, "shards": [{"file": "a", "images": 1}]}
    if case in ("good", "metadata"):
        shards = Shards(tmp_path, index, {"pixels": ("U8", (3, 2, 2))}, "help")
        assert shards.row(0, "pixels")[0].flatten().tolist() == list(range(12))
    else:
        with pytest.raises(UserError, match=f"^{tmp_path}/a: damaged; help$"):
            Shards(tmp_path, index, {"pixels": ("U8", (3, 2, 2))}, "help")
