"""Cached encoder tokens: what is stored of them, what training makes of them, and what it refuses."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import preprocessing
import published
from dataset import LatentsWithTokens, TokenDataset, kind_of, open_images, open_latents, open_tokens
from errors import UserError
from images import make_data
from models.encoders import ENCODERS, Encoder
from scripts import TINY, TINY_SIT, call, records, run, torchrun
from shards import open_shard
from test_generate import flip_a_bit
from training.cached_tokens import pack_tokens, unpack_tokens
from training.checkpoint import read_checkpoint
from training.encoder_weights import encoder_fingerprints, load_encoders

ENCODER = "efficientnet-lite0"
CPU = torch.device("cpu")
STEPS = 6


def cache(data: Path, name: str, *flags: object, code: int = 0, script: str = "cache_tokens.py") -> str:
    """Run a script that caches in this process, check its exit code and give back what it said on stderr."""
    own = {
        "cache_tokens.py": ("--enc-type", ENCODER, "--tokens-name", name, "--token-grid", 4),
        "cache_latents.py": (
            *("--vae-arch", published.VAE, "--vae-latents-name", name),
            *("--vae-ckpt-path", data.parent / "vae/sdvae.pt"),
        ),
    }[script]
    paths = ("--data-dir", data, "--output-dir", data, "--num-workers", 0, "--pproc-batch-size", 3)
    found, stderr = call(script, *own, *paths, *flags)
    assert found == code, stderr
    return stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eighteen images in five shards, and what is cached of them."""
    root = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "SHARD_IMAGES", 4)
        folder = make_data(root, per_class=6)
    published.write_vae(root / "vae")
    cache(folder, "latents", script="cache_latents.py")
    cache(folder, "both-latents", "--mirrored", script="cache_latents.py")
    cache(folder, "half")
    cache(folder, "byte", "--dtype", "int8")
    cache(folder, "both", "--dtype", "int8", "--mirrored")
    return folder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    args = Namespace(enc_type=ENCODER, enc_ckpt=[], resolution=32, resample_tokens=False, offline=True)
    return load_encoders(args, 4, CPU)[0]


def live(encoder: Encoder, data: Path) -> torch.Tensor:
    """The encoder's tokens of all images, then of all mirrored ones."""
    images = open_images(data)
    pixels = torch.stack([images[i][0] for i in range(18)])
    return torch.cat([encoder(pixels), encoder(pixels.flip(-1))])


def cached(data: Path, name: str) -> torch.Tensor:
    """All tokens of a folder, widened."""
    tokens = TokenDataset(data, name)
    return torch.stack([unpack_tokens(*tokens[i]) for i in range(len(tokens))])


def train(data: Path, name: str, *flags: object, code: int = 0) -> str:
    """Run train_ldm_only.py in this process; what it said on stderr."""
    paths = ("--data-dir", data, "--output-dir", data.parent / "exps", "--vae-ckpt", data.parent / "vae/sdvae.pt")
    length = ("--max-train-steps", STEPS, "--vae-latents-name", "latents", "--exp-name", name)
    found, stderr = call("train_ldm_only.py", *TINY, *TINY_SIT, *paths, *length, *flags)
    assert found == code, stderr
    return stderr


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_a_number_in_int8_is_at_most_half_a_step_away(scale):
    tokens = scale * torch.randn(2, 9, 33, generator=torch.Generator().manual_seed(0))
    tokens[0, 3] = 0
    packed, scales = pack_tokens(tokens, "int8")
    assert (packed.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(packed.abs().amax(-1) == 127, scales > 0)
    step = tokens.abs().amax(-1, keepdim=True) / 127
    restored = unpack_tokens(packed, scales)
    assert ((restored - tokens).abs() <= 0.5001 * step).all()
    assert not restored[0, 3].any()


def test_what_does_not_fit_is_not_finite():
    tokens = torch.full((1, 4, 3), 65504.0)
    assert torch.equal(pack_tokens(tokens, "float16")[0].float(), tokens)
    assert pack_tokens(tokens + 60, "float16")[0].isinf().all()
    torch.testing.assert_close(unpack_tokens(*pack_tokens(tokens + 60, "int8")), tokens + 60)
    for value in (np.inf, np.nan):
        assert not any(pack_tokens(tokens * value, dtype)[-1].isfinite().any() for dtype in ("float16", "int8"))


def test_a_shard_whose_tokens_do_not_fit_is_named(data, monkeypatch):
    monkeypatch.setattr(Encoder, "forward", lambda self, pixels: torch.full((len(pixels), 16, 112), 1e5))
    line = cache(data, "overflowing", code=2)
    wrong = "tokens are not finite, or too large for float16; use --mixed-precision no, or --dtype int8"
    assert line.splitlines()[-1] == f"error: {data}/overflowing/00000.safetensors: {wrong}"
    assert not list((data / "overflowing").glob("*.safetensors"))


def test_rows_are_the_encoders_tokens_of_the_same_images(data, encoder):
    expected = live(encoder, data)
    torch.testing.assert_close(cached(data, "half").float(), expected[:18], rtol=1e-3, atol=1e-4)
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert cached(data, "half").dtype == torch.float16
    assert ((cached(data, "byte") - expected[:18]).abs() <= 0.51 * step[:18]).all()
    assert ((cached(data, "both") - expected).abs() <= 0.51 * step).all()
    assert torch.nn.functional.cosine_similarity(cached(data, "both"), expected, dim=-1).min() > 0.999


def test_shards_mirror_the_images_and_are_as_large_as_is_said(data):
    for name, row in (("half", 16 * 112 * 2), ("byte", 16 * (112 + 4)), ("both", 2 * 16 * (112 + 4))):
        for i in range(5):
            images, tokens = (open_shard(data / folder / f"{i:05d}.safetensors") for folder in ("images", name))
            assert np.array_equal(images.get_tensor("labels"), tokens.get_tensor("labels"))
        rows = min(4, 18 - 4 * i)
        size = (data / name / f"{i:05d}.safetensors").stat().st_size
        assert rows * row < size < rows * row + 2000
    index = json.loads((data / "byte/index.json").read_text())
    assert (index["format"], index["shape"], index["encoder"]) == ("repae-tokens/1", [16, 112], ENCODER)


def test_the_index_knows_the_weights(data, encoder):
    args = Namespace(enc_type=ENCODER)
    assert TokenDataset(data, "half").encoder_fingerprint == encoder_fingerprints(args, [encoder])[ENCODER]


def test_caching_again_makes_what_is_missing_to_the_byte(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    for name in ("00001", "00004"):
        (copy / f"both/{name}.safetensors").unlink()
    (copy / "both/index.json").unlink()
    cut = copy / "both/00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    kept = (copy / "both/00000.safetensors").stat().st_mtime_ns
    cache(copy, "both", "--dtype", "int8", "--mirrored")
    assert (copy / "both/00000.safetensors").stat().st_mtime_ns == kept
    for path in (data / "both").glob("[!.]*"):
        assert path.read_bytes() == (copy / "both" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_caching_on_two_processes_gives_the_same_bytes(data):
    paths = ("--data-dir", data, "--output-dir", data, "--num-workers", 1, "--pproc-batch-size", 3)
    flags = ("--enc-type", ENCODER, "--tokens-name", "by-two", "--token-grid", 4)
    done = run("cache_tokens.py", *paths, *flags, launcher=torchrun(2))
    assert "tokens of 18 images, float16 (16, 112)" in done.stdout
    for path in (data / "half").glob("[!.]*"):
        assert path.read_bytes() == (data / "by-two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "flags", [("--dtype", "int8"), ("--mirrored",), ("--token-grid", "2"), ("--mixed-precision", "bf16")], ids=" ".join
)
def test_tokens_of_another_form_in_the_same_folder_are_refused(data, flags):
    assert "holds shards of another encoder or grid" in cache(data, "half", *flags, code=2)


@pytest.fixture(scope="module")
def runs(data) -> dict[str, list[dict]]:
    """Logs of a run with live tokens and of runs with cached ones, which see no images."""
    train(data, "live", "--enc-type", ENCODER)
    shutil.move(data / "images", data.parent / "put-aside")
    try:
        for name in ("half", "byte", "both"):
            train(data, name, "--cached-tokens", name)
        train(data, "mirrored", "--cached-tokens", "both", "--vae-latents-name", "both-latents", "--spatial-norm")
    finally:
        shutil.move(data.parent / "put-aside", data / "images")
    train(data, "mirrored-live", "--vae-latents-name", "both-latents", "--spatial-norm")
    return {path.name: records(path / "metrics.jsonl") for path in (data.parent / "exps").iterdir()}


@pytest.mark.parametrize(
    ("name", "other", "bound"),
    [("half", "live", 1e-4), ("byte", "live", 2e-3), ("both", "live", 2e-3), ("mirrored", "mirrored-live", 5e-3)],
)
def test_training_on_cached_tokens_without_images_has_the_losses_of_live_ones(runs, name, other, bound):
    assert [record["step"] for record in runs[name]] == list(range(1, STEPS + 1))
    for one, two in zip(runs[name], runs[other], strict=True):
        for loss in ("denoising_loss", "proj_loss"):
            assert one[loss] == pytest.approx(two[loss], rel=bound, abs=bound)
    assert runs[name] != runs[other]  # the rounding shows


def test_a_run_goes_on_with_its_own_tokens_only(data, runs):
    identity = read_checkpoint(data.parent / f"exps/half/checkpoints/{STEPS:07d}.pt")["identity"]
    live_identity = read_checkpoint(data.parent / f"exps/live/checkpoints/{STEPS:07d}.pt")["identity"]
    assert identity["encoders"] == live_identity["encoders"]
    assert identity["tokens"] == [TokenDataset(data, "half").fingerprint]
    more = ("--max-train-steps", STEPS + 1, "--epochs", 9)
    assert "(--cached-tokens None -> half)" in train(data, "live", *more, "--cached-tokens", "half", code=2)
    assert "(--cached-tokens half -> None)" in train(data, "half", *more, code=2)
    (data / "half").rename(data / "aside")
    (data / "byte").rename(data / "half")
    try:
        line = train(data, "half", *more, "--cached-tokens", "half", code=2)
        assert "was made with other tokens than --cached-tokens holds" in line
    finally:
        (data / "half").rename(data / "byte")
        (data / "aside").rename(data / "half")
    train(data, "half", *more, "--cached-tokens", "half")
    source = ("--continue-train-exp-dir", data.parent / "exps/live")
    train(data, "another", *more, *source, "--cached-tokens", "byte")
    assert [len(records(data.parent / f"exps/{name}/metrics.jsonl")) for name in ("half", "another")] == [7, 1]


def test_workers_give_the_tokens_of_several_encoders_beside_the_rows_of_latents(data):
    latents = open_latents(data, "latents")
    rows = LatentsWithTokens(latents, [TokenDataset(data, name) for name in ("half", "both")])
    assert len(rows) == 18
    *_, moments, packed = next(iter(DataLoader(rows, 18, num_workers=1)))
    half, both = (unpack_tokens(*parts) for parts in packed)
    assert torch.equal(moments[7], latents[7][2])
    assert torch.equal(half, cached(data, "half"))
    assert torch.equal(both, cached(data, "both")[:18])


def test_tokens_of_another_width_are_refused(data, monkeypatch):
    wide = {ENCODER: replace(ENCODERS[ENCODER], embed_dim=64)}
    monkeypatch.setattr("training.cached_tokens.encoder_specs", lambda names: wide)
    line = train(data, "width", "--cached-tokens", "half", code=2)
    assert "holds 16 tokens of width 112, but the transformer has 4x4 and efficientnet-lite0 64" in line


def test_latents_that_do_not_say_which_images_they_are_of_are_refused(data):
    latents = Namespace(source="e2e.h5", image_fingerprint=None)
    with pytest.raises(UserError, match="e2e.h5 does not say which images it is of"):
        open_tokens(data, "half", latents)


def test_verify_covers_tokens(data, tmp_path):
    copy = shutil.copytree(data / "both", tmp_path / "both")
    assert call("dataset.py", "--verify", copy)[0] == 0
    flip_a_bit(copy / "00003.safetensors")
    code, stderr = call("dataset.py", "--verify", copy)
    assert (code, "1 of 5 shards are damaged" in stderr) == (2, True)
    (copy / "index.json").unlink()  # its shards still say what they are of
    assert kind_of(copy).remedy(copy) == "run cache_tokens.py with --tokens-name both to the end"


def test_a_flipped_bit_stops_training(data):
    copy = shutil.copytree(data / "byte", data / "flipped")
    for path in copy.glob("*.safetensors"):
        flip_a_bit(path)
    line = train(data, "flipped", "--cached-tokens", "flipped", code=2)
    assert "damaged (checksum differs); delete the file and run cache_tokens.py with --tokens-name flipped" in line
