"""SiT's and REPA's published transformers, as generate.py samples them and training starts from them."""

import argparse
import json
import re
import shutil

import numpy as np
import pytest
import torch

from diffusion.samplers import Guidance, sample_ode, sample_sde
from errors import UserError
from golden_weights import assert_close, filled, golden
from models.autoencoder import VAE_CONFIGS
from models.sit import SiT_models, sincos_pos_embed
from scripts import refusal, run
from weights.trained_run import load_experiment, load_transformer_file, start_from_trained

FILES = ("sit_sigma", "sit_plain", "repa")


def published(name: str) -> dict[str, torch.Tensor]:
    """The state dict of a golden transformer, by its published names."""
    state = {}
    for text in golden("baselines")[f"{name}_keys"]:
        key, shape = re.fullmatch(r"(\S+) \((.*)\)", str(text)).groups()
        shape = tuple(int(size) for size in shape.split(",") if size.strip())
        state[key] = sincos_pos_embed(384, 4) if key == "pos_embed" else filled(key, shape)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files, and a VAE of SD-VAE's architecture with other weights."""
    folder = tmp_path_factory.mktemp("published")
    for name in FILES:
        state = published(name)
        torch.save({"ema": state, "steps": 5} if name == "repa" else state, folder / f"{name}.pt")
    torch.manual_seed(0)
    torch.save(VAE_CONFIGS["f8d4"].build().state_dict(), folder / "vae.pt")
    return folder


def loaded(folder, name: str):
    return load_transformer_file(folder / f"{name}.pt", "f8d4", str(folder / "vae.pt"), None, offline=True)


@pytest.mark.parametrize("name", FILES)
def test_golden_samples(folder, name):
    g, run = golden("baselines"), loaded(folder, name)
    x, y, t = (torch.from_numpy(g[key]) for key in ("x", "y", "t"))
    assert run.flags["model"] == "SiT-S/2" and run.flags["resolution"] == 64 and run.sit.num_classes == 1000

    def velocity(x, t, y):
        with torch.no_grad():
            return run.sit(x, t, y, project=False)[0]

    is_sit = name != "repa"
    assert_close(-velocity(x, 1 - t, y) if is_sit else velocity(x, t, y), g[f"{name}_velocity"])
    guidance = Guidance(2.5, 1000) if is_sit else Guidance(2.5, 1000, 0.2, 0.8)
    for kind, guided in (("plain", None), ("cfg", guidance)):
        assert_close(sample_ode(velocity, x, y, 8, guided), g[f"{name}_euler_{kind}"])
        if not is_sit:
            draws = torch.from_numpy(g["sde_noise"])
            found = sample_sde(velocity, x, y, 8, "linear", lambda i, draws=draws: draws[i], guided)
            assert_close(found, g[f"repa_sde_{kind}"])


def test_latents_are_normalised_as_sd_vaes_were(folder):
    scale, bias = loaded(folder, "sit_plain").sit.latent_statistics()
    assert torch.allclose(scale, torch.tensor(0.18215)) and not bias.any()


def test_a_runs_folder_is_normalised_as_the_file_is(folder, tmp_path):
    """Also where the VAE has measured statistics beside it, with which the transformer was not trained."""
    torch.save(
        {"latents_scale": torch.ones(1, 4, 1, 1), "latents_bias": torch.zeros(1, 4, 1, 1)},
        tmp_path / "vae-latents-stats.pt",
    )
    vae = shutil.copy(folder / "vae.pt", tmp_path)
    (tmp_path / "repa/checkpoints").mkdir(parents=True)
    shutil.copy(folder / "repa.pt", tmp_path / "repa/checkpoints/0000005.pt")
    (tmp_path / "repa/args.json").write_text(json.dumps({"model": "SiT-S/2", "vae": "f8d4", "resolution": 64}))
    with pytest.raises(UserError, match="its flags do not name the weights of its VAE; name them by --vae-ckpt FILE"):
        load_experiment(tmp_path / "repa", offline=True)
    run = load_experiment(tmp_path / "repa", None, vae, offline=True)
    for found, expected in zip(
        run.sit.latent_statistics(), loaded(folder, "repa").sit.latent_statistics(), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FILES)
def test_training_starts_with_the_loss_of_the_published_transformer(folder, name):
    g, said = golden("baselines"), []
    flags = {"sit_ckpt": folder / f"{name}.pt", "continue_train_exp_dir": None, "enc_type": "none"}
    sit = SiT_models["SiT-S/2"](input_size=8, in_channels=4, num_classes=1000, z_dims=())
    args = argparse.Namespace(**flags, vae_ckpt="vae.pt", path_type="linear")
    start_from_trained(sit.eval(), args, folder / "run", said.append)
    x, y, t = (torch.from_numpy(g[key]) for key in ("x", "y", "t"))
    is_sit = name != "repa"
    velocity = sit(x, 1 - t if is_sit else t, y)[0]
    assert_close(-velocity if is_sit else velocity, g[f"{name}_velocity"])
    assert ("in SiT's convention" in said[0]) == is_sit


def test_late_blocks_of_older_files_are_renumbered(folder):
    state = published("repa")
    old = {}
    for key, value in state.items():
        number = int(key.split(".")[1]) if key.startswith("blocks.") else 0
        old[re.sub(r"^blocks\.\d+", f"decoder_blocks.{number - 8}", key) if number >= 8 else key] = value
    torch.save({"ema": old, "steps": 5}, folder / "old.pt")
    new, found = (loaded(folder, name).sit.state_dict() for name in ("repa", "old"))
    assert all(torch.equal(value, found[key]) for key, value in new.items())


def test_generate_samples_a_file_and_says_what_it_assumed(folder, tmp_path):
    flags = ("--vae", "f8d4", "--vae-ckpt", folder / "vae.pt", "--num-fid-samples", 2, "--num-steps", 2)
    flags = (*flags, "--sample-dir", tmp_path, "--cfg-scale", 2, "--no-png")
    said = run("generate.py", "--sit-ckpt", folder / "sit_sigma.pt", *flags).stdout
    assert "SiT-S/2 for 64 px, a bare state dict in SiT's convention (t = 1 is data" in said
    name = "sit_sigma_cfg2.0-0.0-1.0"
    assert np.load(tmp_path / f"{name}.npz")["arr_0"].shape == (2, 64, 64, 3)
    assert "latents multiplied by 0.18215" in (tmp_path / f"{name}.json").read_text()
    torch.save({"ema": published("sit_plain"), "args": {"path_type": "GVP"}}, folder / "trained.pt")
    assert loaded(folder, "trained").flags["path_type"] == "cosine"  # SiT's own training checkpoint is converted, too
    assert "in SiT's convention" in loaded(folder, "trained").assumed
    torch.save({"ema": published("repa"), "vae": {}}, folder / "joint.pt")
    line = refusal("generate.py", "--sit-ckpt", folder / "joint.pt", "--vae", "f8d4", "--vae-ckpt", folder / "vae.pt")
    assert "holds the VAE that it was trained with; name the run's folder by --exp-path" in line
    line = refusal("generate.py", "--sit-ckpt", folder / "repa.pt", "--vae", "f16d32", "--vae-ckpt", folder / "vae.pt")
    assert "is for latents of 4 channels, but --vae f16d32 has 32" in line
    assert "belong together" in refusal("generate.py", "--sit-ckpt", folder / "repa.pt")
