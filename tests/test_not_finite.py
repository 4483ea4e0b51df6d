"""Weights, values and images that are not finite stop sampling and measuring, in one line that names them."""

import shutil
from math import inf, nan

import numpy as np
import pytest
import torch

from good import good_flags
from models.autoencoder import AutoencoderKL
from published import STEP
from scripts import refusal
from test_generate import pixels_of, sample

LABELS = "_orig_mod.y_embedder.embedding_table.weight"


def spoiled(source, folder, part: str, change):
    """A copy of a published run whose `part` (ema, vae) has `change` applied to its state."""
    shutil.copytree(source, folder)
    path = folder / f"checkpoints/{STEP:07d}.pt"
    content = torch.load(path, weights_only=False)
    change(content[part])
    torch.save(content, path)
    return folder


def stopped(run, folder, *flags) -> str:
    """The one line by which generate.py refuses to sample a run."""
    more = ("--sample-dir", folder, "--num-fid-samples", 9, "--num-steps", 2, "--no-npz", *flags)
    return refusal("generate.py", "--exp-path", run, *more)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("ema", "_orig_mod.blocks.1.mlp.fc1.weight", nan),
        ("ema", "_orig_mod.bn.running_var", inf),
        ("vae", "module._orig_mod.decoder.conv_out.bias", -inf),
    ],
)
def test_a_network_that_is_not_finite_is_named(good, tmp_path, part, key, value):
    run = spoiled(good["joint"], tmp_path / "run", part, lambda state: state[key][-1:].fill_(value))
    line = stopped(run, tmp_path / "samples")
    assert f"{STEP:07d}.pt: {part}: {key.removeprefix('module.').removeprefix('_orig_mod.')} holds values that" in line
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("key", ["encoder.conv_in.weight", "decoder.conv_out.bias"])
def test_a_vae_that_is_not_finite_is_named_in_sampling_and_measuring(good, tmp_path, key):
    vae = shutil.copytree(good["vae"].parent, tmp_path / "vae") / "sdvae.pt"
    state = torch.load(vae, weights_only=True)
    state[f"module.{key}"][0] = nan
    torch.save(state, vae)
    sampling = stopped(good["frozen"], tmp_path / "samples", "--vae-ckpt", vae)
    measuring = refusal("evaluate.py", *good_flags("reconstruction", {**good, "vae": vae}, tmp_path))
    assert f"sdvae.pt: {key} holds values that are not finite" in sampling
    assert f"error: VAE {vae}: {key} holds values that are not finite; take another" in measuring
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("batch", "which", "good_samples"),
    [
        (2, "1 of the 2 samples of a batch (sample 5 of label 2)", 4),
        (9, "2 of the 9 samples of a batch (sample 5 of label 2, sample 8 of label 2)", 0),
    ],
)
def test_samples_that_are_not_finite_are_named_and_good_batches_stay(good, tmp_path, batch, which, good_samples):
    """Label 2 is spoiled: samples 5 and 8 of the first nine, whose labels are 0, 1, 0, 1, 0, 2, 0, 1, 2."""
    run = spoiled(good["joint"], tmp_path / "run", "ema", lambda state: state[LABELS][2].fill_(nan))
    flags = ("--classes", "0,1,0,1,0,2,0,1,2", "--pproc-batch-size", batch, "--cfg-scale", 1)
    said = f"error: the transformer gives values that are not finite for {which}, which is not written;"
    assert stopped(run, tmp_path / "samples", *flags).startswith(said)
    written = sorted(path.name for path in tmp_path.glob("samples/run*/*.png"))
    assert written == [f"{i:06d}.png" for i in range(good_samples)]
    others = ("--classes", "0,1", "--cfg-scale", 1)
    pixels = [pixels_of(sample(r, tmp_path / r.parent.name, *others, count=3)) for r in (run, good["joint"])]
    assert np.array_equal(*pixels)


def test_values_that_overflow_in_every_sample_or_in_the_decoder_are_named(good, tmp_path, monkeypatch):
    run = spoiled(good["joint"], tmp_path / "null", "ema", lambda state: state[LABELS][3].fill_(inf))
    assert "for 9 of the 9 samples" in stopped(run, tmp_path / "guided", "--cfg-scale", 2)  # by the null label
    real = AutoencoderKL.decode

    def overflow(self, z):
        image = real(self, z)
        image[len(z) // 2, 0, 3, 3] = inf
        return image

    monkeypatch.setattr(AutoencoderKL, "decode", overflow)
    line = stopped(good["joint"], tmp_path, "--pproc-batch-size", 3)
    assert "the VAE's decoder gives values that are not finite for 1 of the 3 samples of a batch (sample 1 of" in line
    assert not list(tmp_path.glob("joint*/*.png"))
