"""The model card of a tuned VAE states what is known, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import published
import train_repae
from errors import UserError
from good import LITE0, good_flags
from scripts import run
from weights.checkpoint_io import read_checkpoint
from weights.model_card import vae_fingerprint, write_model_card

FLAGS = (
    *("--exp-name", "my run", "--data-dir", "/data/o'clock", "--vae", "f4d4-tiny", "--vae-ckpt", "sd/sd.pt"),
    *("--vae-align-proj-coeff", "0.75", "--no-fused-attn", "--gradient-checkpointing", "--learning-rate", "1e-6"),
    *("--enc-ckpt", "dinov2-vit-b=README.md", "--enc-ckpt", "mae-vit-l=pyproject.toml", "--mixed-precision", "no"),
)


@pytest.fixture
def source(tmp_path) -> tuple[Path, dict, Path]:
    """A folder with a VAE, the joint checkpoint of step 400000 it was taken from, and the checkpoint's path."""
    path = published.write_run(tmp_path / "sit-repae", joint=True)
    vae = published.write_vae(tmp_path / "e2e")
    return vae.parent, read_checkpoint(path), path


def card(source, metrics=()) -> str:
    folder, checkpoint, path = source
    write_model_card(folder, "sdvae", checkpoint, path, list(metrics))
    return (folder / "README.md").read_text()


def test_a_published_checkpoint_alone_gives_a_card_of_what_is_known_and_an_edited_one_stays(source):
    from huggingface_hub import ModelCard

    folder, checkpoint, path = source
    assert write_model_card(folder, "sdvae", checkpoint, path, []) == [folder / "README.md"]
    text = card(source)
    for known in (
        "`f4d4-tiny`: an AutoencoderKL with 293,159 parameters",
        "has latents (4,H/4,W/4)",
        "means range from\n-0.2 to 0.3, standard deviations from 0.25 to 2.",
        "400,000 steps.",
        "exp_name: sit-repae\n",
        f"- fingerprint of the VAE's weights: `{vae_fingerprint(checkpoint['vae'])}`",
        "**FILL IN.**",
        "--vae f4d4-tiny --vae-ckpt sdvae/sdvae.pt",
    ):
        assert known in text, known
    for absent in ("diffusers", "## Metrics", "## Pictures", "images seen", "- time", "- loss", "{{", "{%"):
        assert absent not in text, absent
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert (data.library_name, data.license) == ("pytorch", None) and "vae" in data.tags
    edited = text.replace("**FILL IN.**", "MIT.")
    (folder / "README.md").write_text(edited)
    assert card(source) == edited  # what was edited is not overwritten
    assert "**FILL IN.**" in (folder / "README.new.md").read_text()


def test_the_card_says_how_the_files_that_are_there_are_loaded(source, monkeypatch):
    from diffusers import AutoencoderKL

    folder = source[0]
    vae = AutoencoderKL(scaling_factor=1.0, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 4.0])
    vae.save_pretrained(folder)
    text = card(source)
    assert "library_name: diffusers\n" in text
    assert "`sdvae-latents-stats.pt` holds" in text and "config.json holds latents_mean" in text
    assert "--vae diffusers:sdvae --vae-ckpt sdvae " in text
    monkeypatch.chdir(folder.parent)
    names = {"image": torch.zeros(1, 3, 8, 8)}
    exec(text.split("```python\n")[1].split("```")[0].replace('"sdvae"', '"e2e"'), names)
    assert names["image"].shape == (1, 3, 8, 8)
    assert names["z_norm"].shape == (1, 4, 8, 8)
    for path in folder.glob("*.pt"):
        path.unlink()
    text = card(source)
    assert "--vae diffusers:sdvae --vae-ckpt sdvae " in text
    assert "sdvae-latents-stats.pt" not in text and "sdvae-discriminator-ckpt.pt" not in text


def test_a_card_of_our_own_checkpoint_repeats_the_run(source, tmp_path):
    folder, checkpoint, path = source
    args = vars(train_repae.parse_args(list(FLAGS)))
    identity = {"data": "data-hash", "encoders": {"dinov2-vit-b": "encoder-hash"}, "loss": {"kl_weight": 1e-6}}
    own = {**checkpoint, "args": {**args, "resume_step": 5}, "identity": identity, "time_convention": "t=0 data"}
    text = card((folder, own, path))
    for known in ("data-hash", "encoder-hash", "'kl_weight': 1e-06", "`t=0 data`", "400,000 steps, 102,400,000 images"):
        assert known in text, known
    config = tmp_path / "flags.yaml"
    config.write_text(text.split("```yaml\n")[1].split("```")[0])
    assert vars(train_repae.parse_args(["--config", str(config)])) == {**args, "resume_step": 0}


def test_pictures_are_the_latest_up_to_the_checkpoint(source):
    folder, checkpoint, path = source
    exp = path.parent.parent
    for kind, steps in {"reconstructions": (10, 399990, 400010), "samples": (390000,)}.items():
        (exp / kind).mkdir()
        for step in steps:
            Image.new("RGB", (2, 2), (step % 251, 0, 0)).save(exp / kind / f"{step:07d}.png")
    written = write_model_card(folder, "sdvae", checkpoint, path, [])
    assert written == [folder / name for name in ("README.md", "reconstructions.png", "samples.png")]
    assert (folder / "reconstructions.png").read_bytes() == (exp / "reconstructions/0399990.png").read_bytes()
    text = (folder / "README.md").read_text()
    assert "reconstructions, at step 399990](reconstructions.png)" in text
    assert "joint run, at step 390000](samples.png)" in text


@pytest.fixture
def results(source, good, tmp_path) -> dict[str, Path]:
    """What evaluate.py writes about the VAE and about samples of its run."""
    samples = tmp_path / "samples/sit-repae_0400000_cfg1.5-0.0-1.0"
    sampling = ("--exp-path", source[2].parent.parent, "--sample-dir", samples.parent, "--num-fid-samples", 4)
    run("generate.py", *sampling, "--num-steps", 2, "--no-png")
    run("evaluate.py", "--samples", f"{samples}.npz", "--reference", f"{samples}.npz", *LITE0)
    found = {"samples": Path(f"{samples}.metrics.json"), "reconstruction": source[0] / "sdvae.metrics.json"}
    flags = good_flags("reconstruction", {**good, "vae": source[0] / "sdvae.pt"}, tmp_path)
    run("evaluate.py", *flags, "--output", found["reconstruction"])
    return found


def test_results_of_evaluate_are_quoted_and_those_of_other_vaes_refused(source, results):
    text = card(source, results.values())
    values = {name: json.loads(file.read_text())["metrics"] for name, file in results.items()}
    assert f"- reconstruction of 18 images: psnr {values['reconstruction']['psnr']:.4g}, ssim " in text
    how = "of sit-repae at step 400000 (SiT-XXS/2; ode, 2 steps, guidance 1.5 for t from 0 to 1)"
    fd = values["samples"]["fd_efficientnet_lite0"]
    assert f"- 4 samples against sit-repae_0400000_cfg1.5-0.0-1.0.npz, {how}: fd_efficientnet_lite0 {fd:.4g}, " in text
    for file in results.values():
        good = file.read_text()
        file.write_text(good.replace(vae_fingerprint(source[1]["vae"]), "another"))
        with pytest.raises(UserError, match=f"{file.name}: measured another VAE than this one"):
            card(source, results.values())
        file.write_text(good)
