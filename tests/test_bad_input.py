"""The table of docs/troubleshooting.md, row by row: each mistake gives its one line and exit 2, and spoils nothing."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import published
from good import cache_flags, good_flags, write_good_files
from images import make_data
from models.autoencoder import VAE_CONFIGS
from scripts import ROOT, files_limited_to, refusal, run
from storage import files
from weights.checkpoint_io import vae_files
from weights.diffusers_layout import to_diffusers_config

TABLE = {
    row[0]: (row[1], row[3].strip("`"))
    for row in (
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf8").splitlines()
        if line.startswith("| ") and not line.startswith("| case")
    )
}

# case -> the flags that make the mistake, after good ones; {places} are those of the fixture
CASES = {
    "tree-missing": "--imagenet-path nowhere",
    "tree-empty": "--imagenet-path {empty}",
    "tree-archive": "--imagenet-path {images}",
    "tree-others": "--imagenet-path {missing}",
    "tree-labels-elsewhere": "--imagenet-path {labelled}",
    "preprocessing-space": "--resolution 300000 --output-path {new}",
    "other-resolution-there": "--resolution 16 --output-path {data}",
    "flag-missing": "",
    "flag-unknown": "--lerning-rate 1",
    "flag-value": "--learning-rate -1",
    "config-missing": "--config nowhere.yaml",
    "config-unreadable": "--config {configs}/unreadable.yaml",
    "config-key": "--config {configs}/key.yaml",
    "model-unknown": "--model SiT-XL/3",
    "vae-unknown": "--vae f16d23",
    "encoder-unknown": "--enc-type dinov2-vit-c",
    "data-missing": "--data-dir nowhere",
    "data-other-size": "--resolution 64",
    "shard-missing": "--data-dir {missing}",
    "shard-truncated": "--data-dir {truncated}",
    "shard-rows-disagree": "--data-dir {swapped}",
    "index-damaged": "--data-dir {damaged}",
    "index-malformed": "--data-dir {malformed}",
    "labels-too-many": "--num-classes 2",
    "batch-indivisible": "--batch-size 5 --gradient-accumulation-steps 2",
    "batch-too-large": "--batch-size 64",
    "depth-too-deep": "--encoder-depth 9",
    "encoder-timm-unknown": "--enc-type timm:resnet5",
    "encoder-file-missing": "--enc-type mae-vit-l --enc-ckpt mae-vit-l=nowhere.pth",
    "encoder-file-other": "--enc-type dinov2-vit-s --resample-tokens --enc-ckpt dinov2-vit-s={vae}",
    "encoder-offline": "--enc-type dinov2-vit-s --resample-tokens --offline",
    "encoder-unpublished": "--enc-type mocov3-vit-l --resample-tokens",
    "grid-mismatch": "--model SiT-XXS/1 --enc-type dinov2-vit-s",
    "weights-missing": "--vae-ckpt {vae_folder}/nowhere.pt",
    "weights-truncated": "--vae-ckpt {cut}",
    "weights-other": "--vae f4d4-small",
    "weights-checkpoint": "--vae-ckpt {joint_ckpt}",
    "statistics-missing": "--vae-ckpt {alone}",
    "vae-folder-empty": "--vae-ckpt {vae_folder}",
    "vae-architecture": "--vae f4d4-tiny --vae-ckpt {other_architecture}",
    "vae-not-diffusers": "--vae diffusers:{vae}",
    "vae-hub-offline": "--vae-ckpt some/vae --offline",
    "stats-untrained": "",
    "stats-taken": "--vae-ckpt {vae} --output-dir {taken} --exp-name sdvae",
    "discriminator-other": "--disc-pretrained-ckpt README.md",
    "sit-ckpt-no-ema": "--sit-ckpt {vae}",
    "sit-ckpt-model": "--sit-ckpt {joint_ckpt} --model SiT-XS/2",
    "loss-missing": "--loss-cfg-path nowhere.yaml",
    "lpips-missing": "--lpips-vgg-ckpt nowhere.pt",
    "lpips-other": "--lpips-vgg-ckpt {vae}",
    "output-is-a-file": "--output-dir README.md --exp-name bad",
    "latents-missing": "--vae-latents-name nothing",
    "latents-other-size": "--vae f8d4-small",
    "latents-other-vae": "--vae-ckpt {other_vae}",
    "latents-other-images": "--vae-latents-name other-images",
    "latents-truncated": "--vae-latents-name truncated",
    "latents-batch": "--batch-size 64",
    "cache-arch-unknown": "--vae-arch f16d33",
    "cache-weights-unnamed": "",
    "cache-weights-missing": "--vae-ckpt-path nowhere.pt",
    "cache-weights-other": "--vae-arch f4d4-small",
    "cache-statistics-missing": "--vae-ckpt-path {alone}",
    "cache-name-taken": "--vae-latents-name images",
    "cache-space": "--vae-latents-name more",
    "cache-other-there": "--dtype float16",
    "extract-nothing": "",
    "card-metrics": "--metrics README.md --save-dir {new}",
    "extract-missing": "--repae-ckpt nowhere/0400000.pt",
    "extract-truncated": "--repae-ckpt {cut}",
    "extract-frozen": "--repae-ckpt {frozen_ckpt}",
    "extract-taken": "--save-dir {taken} --vae-name sdvae",
    "run-missing": "--exp-path nowhere",
    "run-empty": "--exp-path {empty}",
    "step-missing": "--train-steps 5",
    "run-model-unknown": "--exp-path {unknown_model}",
    "vae-moved": "--exp-path {moved}",
    "vae-other": "--exp-path {frozen} --vae-ckpt {other_statistics}",
    "vae-needless": "--vae-ckpt {vae}",
    "interval-empty": "--guidance-low 0.7 --guidance-high 0.5",
    "scale-below-1": "--cfg-scale 0.9",
    "heun-sde": "--heun --mode sde",
    "classes-wrong": "--classes 0,3",
    "labels-data": "--labels data",
    "classes-unknown": "--classes 0,cat",
    "path-other": "--path-type cosine",
    "nothing-to-write": "--no-png --no-npz",
    "samples-space": "--num-fid-samples 1000000000 --sample-dir {new}",
    "samples-other-there": "--num-fid-samples 3",
    "evaluate-no-reference": "",
    "evaluate-missing": "--samples nowhere.npz",
    "evaluate-no-npz": "--samples README.md",
    "evaluate-no-array": "--samples {sets}/other-array.npz",
    "evaluate-dtype": "--samples {sets}/float.npz",
    "evaluate-size": "--samples {sets}/size.npz",
    "evaluate-damaged": "--samples {sets}/damaged",
    "evaluate-empty": "--samples {empty}",
    "evaluate-no-statistics": "--reference {sets}/stats.npz",
    "evaluate-output": "--output nowhere/result.json",
    "evaluate-few": "--samples {sets}/two.npz",
    "evaluate-metric": "--metrics fdi",
    "evaluate-features": "--features incepton",
    "evaluate-weights": "--features inception",
    "evaluate-vae-data": "--vae {vae}",
    "verify": "--verify {flipped}",
    "verify-index": "--verify {malformed}/images",
    "verify-nothing": "--verify {empty}",
}

# case -> the flags, with their values, that are missing
LEFT_OUT = {
    "flag-missing": ["--exp-name"],
    "cache-weights-unnamed": ["--vae-ckpt-path"],
    "extract-nothing": ["--repae-ckpt"],
    "evaluate-no-reference": ["--reference"],
    "evaluate-vae-data": ["--samples", "--reference"],
}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_runs(root: Path, places: dict) -> None:
    """Runs in the published layout with wrong flags."""
    places["moved"], places["unknown_model"] = root / "moved", root / "unknown_model"
    published.write_run(places["moved"], joint=False, vae_ckpt="nowhere.pt")
    path = published.write_run(places["unknown_model"], joint=True)
    content = torch.load(path, weights_only=False)
    content["args"].model = "SiT-XXL/2"
    torch.save(content, path)


def write_vaes(root: Path, places: dict) -> None:
    """Another VAE, one without statistics, one with others, one cut short, one beside a config of another."""
    places["vae_folder"], places["other_vae"] = places["vae"].parent, published.write_vae(root / "other", seed=5)
    published.write_vae(root / "taken/sdvae", seed=5)
    places["taken"], places["other_statistics"] = root / "taken", published.write_vae(root / "other-statistics")
    statistics = {"latents_scale": torch.ones(1, 4, 1, 1), "latents_bias": torch.zeros(1, 4, 1, 1)}
    torch.save(statistics, vae_files(places["other_statistics"]).statistics)
    places["alone"], places["cut"] = shutil.copyfile(places["vae"], root / "alone.pt"), root / "cut.pt"
    places["cut"].write_bytes(places["vae"].read_bytes()[:5000])
    places["other_architecture"] = root / "other_architecture"
    places["other_architecture"].mkdir()
    config = to_diffusers_config(VAE_CONFIGS["f8d4"], *statistics.values(), 32)
    (places["other_architecture"] / "config.json").write_text(json.dumps(config))
    shutil.copyfile(places["vae"], places["other_architecture"] / "diffusion_pytorch_model.safetensors")


def write_sets(root: Path, places: dict) -> None:
    """Sets of images for evaluate.py that are spoilt."""
    sets = places["sets"] = root / "sets"
    good, big = np.load(places["images"])["arr_0"], np.full((5, 48, 48, 3), 9, np.uint8)
    (sets / "damaged").mkdir(parents=True)
    spoilt = {"float": good.astype(np.float32), "size": big, "two": good[:2]}
    for name, array in spoilt.items():
        np.savez(sets / f"{name}.npz", arr_0=array)
    np.savez(sets / "other-array.npz", images=good)
    np.savez(sets / "stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    Image.fromarray(good[0]).save(path := sets / "damaged/0.png")
    path.write_bytes(path.read_bytes()[:60])


def write_configs(root: Path, places: dict) -> None:
    """Files of flags, each with one mistake."""
    places["configs"] = root / "configs"
    places["configs"].mkdir()
    (places["configs"] / "unreadable.yaml").write_text("batch_size: [")
    (places["configs"] / "key.yaml").write_text("batch_size: 4\nlerning-rate: 1")


def write_data(root: Path, places: dict) -> None:
    """Copies of images in five shards that lack something."""
    for name in ("missing", "truncated", "damaged", "flipped", "swapped", "malformed"):
        places[name] = shutil.copytree(places["data"], root / name)
    for path in (places["flipped"] / "images").glob("*.safetensors"):
        flip_a_bit(path)
    shutil.copyfile(places["data"] / "images/00000.safetensors", places["swapped"] / "images/00004.safetensors")
    path = places["malformed"] / "images/index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "other"}))
    (places["missing"] / "images/00001.safetensors").unlink()
    for path in (places["truncated"] / "images/00001.safetensors", places["damaged"] / "images/index.json"):
        path.write_bytes(path.read_bytes()[:150])
    places["labelled"] = shutil.copytree(places["tree"], root / "labelled")
    (places["labelled"] / "dataset.json").write_text('{"labels": [["elsewhere/0.png", 0]]}')


@pytest.fixture(scope="module")
def places(tmp_path_factory, vgg_weights) -> dict:
    """Good files and spoilt ones, by name; scripts write to `out`."""
    root = tmp_path_factory.mktemp("bad input")
    found = {**write_good_files(root), "vgg": vgg_weights, "new": root / "new"}
    for name in ("empty", "out"):
        found[name] = root / name
        found[name].mkdir()
    for write in (write_data, write_sets, write_configs, write_vaes, write_runs):
        write(root, found)
    run("cache_latents.py", *cache_flags(found["data"], found["vae"]))
    other = make_data(root / "others", per_class=4)
    run("cache_latents.py", *cache_flags(other, found["vae"], found["data"], "other-images"))
    path = shutil.copytree(found["data"] / "latents", found["data"] / "truncated") / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    run("generate.py", *good_flags("generate.py", found, found["out"]))
    return found


def contents(root: Path) -> dict[Path, int]:
    """Every file below `root` but locks, with its time of change."""
    paths = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.stat().st_mtime_ns for path in paths}


def test_the_table_has_a_case_for_every_row_and_no_other():
    assert TABLE.keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line(places, case, monkeypatch):
    script, message = TABLE[case]
    if case == "cache-space":
        full = shutil.disk_usage(places["root"])._replace(free=1000)
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(places["empty"]))
    monkeypatch.setenv("TORCH_HOME", str(places["empty"]))
    good = good_flags(script, places, places["data" if script == "cache_latents.py" else "out"])
    good += ["--stats-only"] if script == "train_vae.py" else []
    for flag in LEFT_OUT.get(case, ()):
        at = good.index(flag)
        del good[at : at + 2]
    before = contents(places["root"])
    line = refusal(script, *good, *(word.format(**places) for word in CASES[case].split()))
    assert re.search(".*".join(re.escape(part) for part in message.split("…")), line), line
    after = contents(places["root"])
    assert all(after.get(path) == time for path, time in before.items()), "something was changed"


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_training_with_one_line_and_keeps_the_last_checkpoint(places):
    flags = (*good_flags("train_repae.py", places, places["out"]), "--exp-name", "full", "--max-train-steps")
    run("train_repae.py", *flags, 1)
    checkpoint = places["out"] / "exps/full/checkpoints/0000001.pt"
    before = checkpoint.read_bytes()
    assert len(before) > 20_000_000
    with files_limited_to(20_000_000):
        line = refusal("train_repae.py", *flags, 2)
    assert line.startswith("error: [Errno 27] File too large: ")
    assert line.endswith("0000002.pt'; free some space and run the same again (REPAE_DEBUG=1 shows where)")
    assert checkpoint.read_bytes() == before
    assert os.listdir(checkpoint.parent) == [checkpoint.name]
