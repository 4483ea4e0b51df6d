"""VAEs whose networks are diffusers' own: FLUX.2, Qwen-Image, Wan, deterministic ones, in tiny sizes."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from errors import UserError
from forked import run_ranks
from models.autoencoder import Posterior
from models.diffusers_vae import DiffusersConfig
from scripts import TINY, TINY_SIT, equal, records, refusal, run
from weights.checkpoint_io import fingerprint, read_checkpoint, write_new
from weights.diffusers_layout import from_diffusers_config, statistics_inside, with_statistics
from weights.vae import diffusers_files, known_statistics, load_vae, open_vae

CAUSAL = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, False],
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [0.5, 1.0, 2.0, 4.0],
}
CLASSES = {
    "AutoencoderKLFlux2": {
        "block_out_channels": (16,) * 3,
        "decoder_block_out_channels": (8,) * 3,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 4,
    },
    "AutoencoderKLQwenImage": CAUSAL,
    "AutoencoderKLWan": CAUSAL,
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 8,
        "scaling_factor": 0.5,
        **{f"{part}_block_out_channels": (8, 16, 16) for part in ("encoder", "decoder")},
        **{f"{part}_layers_per_block": (1, 1, 1) for part in ("encoder", "decoder")},
        **{f"{part}_qkv_multiscales": ((), (), (5,)) for part in ("encoder", "decoder")},
        "encoder_block_types": ("ResBlock",) * 2 + ("EfficientViTBlock",),
        "decoder_block_types": ("ResBlock",) * 2 + ("EfficientViTBlock",),
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),  # as in most of those that are published
    },
}
VIDEO = ("AutoencoderKLQwenImage", "AutoencoderKLWan")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each class, written by diffusers with random weights."""
    root = tmp_path_factory.mktemp("classes")
    for name, settings in CLASSES.items():
        torch.manual_seed(0)
        network = getattr(diffusers, name)(**settings)
        if name == "AutoencoderKLFlux2":
            network.bn.running_mean.normal_()
            network.bn.running_var.uniform_(0.5, 2)
        network.save_pretrained(root / name)
    return {name: root / name for name in CLASSES}


def published(folder: Path):
    return open_vae(f"diffusers:{folder}", str(folder), offline=True)


@pytest.mark.parametrize("name", CLASSES)
def test_weights_and_outputs_are_those_of_diffusers(name, folders, tmp_path):
    """There and back: the weights to the bit, codes and pictures to rounding."""
    source = published(folders[name])
    vae, theirs = load_vae(source).eval(), getattr(diffusers, name).from_pretrained(folders[name]).eval()
    assert (source.config.z_channels, source.config.downsampling) == (4, 4)
    assert equal(DiffusersConfig(**source.config.described()), source.config)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    frames = image[:, :, None] if name in VIDEO else image
    with torch.no_grad():
        posterior, output = vae.encode(image), theirs.encode(frames)
        expected = output.latent if name == "AutoencoderDC" else output.latent_dist.mean
        torch.testing.assert_close(posterior.mean, expected.reshape(2, 4, 8, 8), rtol=1e-5, atol=1e-5)
        if name != "AutoencoderDC":
            std = output.latent_dist.std.reshape(2, 4, 8, 8)
            torch.testing.assert_close(posterior.std, std, rtol=1e-5, atol=1e-5)
        pictures = theirs.decode(expected).sample.reshape(image.shape)
        torch.testing.assert_close(vae.decode(posterior.mean), pictures, rtol=1e-5, atol=1e-5)
    scale, bias = known_statistics(source)
    statistics = {"latents_scale": scale, "latents_bias": bias}
    write_new(diffusers_files(tmp_path, vae.state_dict(), source.config, statistics, 32))
    back = getattr(diffusers, name).from_pretrained(tmp_path)
    assert equal(dict(back.state_dict()), dict(theirs.state_dict()))
    again = published(tmp_path)
    assert again.config == source.config
    for found, wanted in zip(known_statistics(again), (scale, bias), strict=True):
        torch.testing.assert_close(found, wanted)


def test_statistics_of_each_class(folders):
    scales = {name: known_statistics(published(folder))[0].flatten().tolist() for name, folder in folders.items()}
    assert scales["AutoencoderKLQwenImage"] == scales["AutoencoderKLWan"] == [2, 1, 0.5, 0.25]
    assert scales["AutoencoderDC"] == [0.5] * 4
    assert len(set(scales["AutoencoderKLFlux2"])) == 4


def test_statistics_inside_of_weights():
    """A batch norm over 2x2 patches of latents, as FLUX.2's pipeline makes them, or LTX-Video's buffers."""
    torch.manual_seed(0)
    z = torch.randn(64, 3, 8, 8) * torch.tensor([0.5, 1, 2])[:, None, None] + torch.tensor([1.0, 0, -1])[:, None, None]
    patches = z.view(64, 3, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(64, 12, 4, 4)
    norm = nn.BatchNorm2d(12, affine=False, momentum=None)
    norm(patches)
    state = {f"bn.{key}": value for key, value in norm.state_dict().items()}
    scale, bias = statistics_inside(state, 3)
    torch.testing.assert_close(bias.flatten(), z.mean((0, 2, 3)))
    torch.testing.assert_close(scale.flatten() ** -2, z.var((0, 2, 3)), rtol=2e-3, atol=0)
    assert with_statistics(state, scale, bias) is state
    for before in (state, {"latents_mean": torch.zeros(3), "latents_std": torch.ones(3)}):
        after = with_statistics(before, 2 * scale, bias - 1)
        assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
        for found, wanted in zip(statistics_inside(after, 3), (2 * scale, bias - 1), strict=True):
            torch.testing.assert_close(found, wanted)
    assert statistics_inside({"encoder.weight": torch.ones(3)}, 3) is None


def test_a_deterministic_posterior():
    mean, noise = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    posterior = Posterior(mean)
    assert torch.equal(posterior.sample(noise), mean)
    assert posterior.std.abs().max() == 0
    assert posterior.kl().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "some: _class_name UNet2DModel in config.json: no autoencoder of diffusers 0"),
        ({"_class_name": "AutoencoderOfTomorrow"}, "AutoencoderOfTomorrow in config.json: no autoencoder of diffusers"),
        ({"_class_name": "AutoencoderOobleck"}, r"reconstructs neither an image \(.*\) nor a video of one frame \("),
        ({"_class_name": "AutoencoderTiny", "in_channels": 1}, "reconstructs neither an image"),
        ({"_class_name": "AutoencoderKLWan", "dim_mult": 3}, r"TypeError: .* nor a video of one frame \(TypeError"),
    ],
)
def test_classes_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        from_diffusers_config(settings, "some")


@pytest.mark.parametrize("name", ["AutoencoderKLTemporalDecoder", "AutoencoderKLMagvit", "AutoencoderKLCosmos"])
def test_other_classes(name):
    """That decode a number of frames, refuse images in ways of their own, or hide what they encode."""
    assert from_diffusers_config({"_class_name": name}, "some").z_channels in (4, 16)


def test_settings_of_another_version_of_diffusers_are_completed():
    """A setting that was added since, by its default; one that was dropped is left out."""
    settings = {**CLASSES["AutoencoderKLWan"], "_class_name": "AutoencoderKLWan", "_diffusers_version": "0.1"}
    now = from_diffusers_config({**settings, "dropout": 0.0, "force_upcast": True}, "some")
    assert now == from_diffusers_config(settings, "some")
    assert "dropout" not in now.described()["settings"] and now.to_json()["dropout"] == 0
    assert "force_upcast" not in now.to_json()


def training_flags(data: Path, output: Path) -> tuple:
    paths = ("--data-dir", data, "--output-dir", output, "--num-workers", 0)
    return (*TINY, *TINY_SIT, *paths, "--checkpointing-steps", 1, "--max-train-steps", 2)


def test_recomputation_where_the_class_supports_it(folders, tiny_data, vgg_weights, tmp_path):
    lpips = ("--lpips-vgg-ckpt", vgg_weights)
    flags = (*training_flags(tiny_data, tmp_path), *lpips, "--max-train-steps", 1)
    flux = ("--vae", f"diffusers:{folders['AutoencoderKLFlux2']}")
    for name, more in (("plain", ()), ("recomputed", ("--gradient-checkpointing",))):
        run("train_repae.py", *flags, *flux, *more, "--exp-name", name)
    (plain,), (recomputed,) = (records(tmp_path / name / "metrics.jsonl") for name in ("plain", "recomputed"))
    assert plain == pytest.approx(recomputed, rel=1e-5)
    wan = ("--vae", f"diffusers:{folders['AutoencoderKLWan']}", "--gradient-checkpointing", "--exp-name", "wan")
    line = refusal("train_repae.py", *flags, *wan)
    assert "--recompute-levels: AutoencoderKLWan does not support" in line and line.endswith("; leave them out")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_script(name, folders, tiny_data, vgg_weights, tmp_path):
    """Statistics, joint tuning on two processes, samples, extraction, caching, frozen training, reconstructions."""
    flags, given = training_flags(tiny_data, tmp_path), ("--vae", f"diffusers:{folders[name]}")
    flags = (*flags, "--mixed-precision", "fp16" if name == "AutoencoderDC" else "bf16")
    lpips = ("--lpips-vgg-ckpt", vgg_weights)
    run("train_vae.py", *flags_of_a_vae(flags), *given, *lpips, "--exp-name", "measured", "--stats-only")
    start = (*given, "--vae-ckpt", tmp_path / "measured/measured.pt")
    run_ranks(2, "train_repae.py", *flags, *start, *lpips, "--exp-name", "joint")
    step = records(tmp_path / "joint/metrics.jsonl")[-1]
    assert step["step"] == 2 and step["bn_std_drift"] >= 0
    assert 0 < step["grad_norm_vae"] < float("inf")
    assert (step["kl_loss"] == 0) == (name == "AutoencoderDC")
    checkpoint = read_checkpoint(tmp_path / "joint/checkpoints/0000002.pt")
    assert checkpoint["identity"]["architecture"]["settings"]["_class_name"] == name
    samples = ("--num-fid-samples", 4, "--num-steps", 2, "--sample-dir", tmp_path / "samples", "--no-png")
    run("generate.py", "--exp-path", tmp_path / "joint", *samples)

    extraction = ("--repae-ckpt", tmp_path / "joint/checkpoints/0000002.pt", "--save-dir", tmp_path)
    for form in ("diffusers", "pt"):
        run("save_vae_weights.py", *extraction, "--vae-name", form, "--format", form)
    theirs, before = (getattr(diffusers, name).from_pretrained(f) for f in (tmp_path / "diffusers", folders[name]))
    tuned = load_vae(published(tmp_path / "diffusers"))
    assert unchanged(theirs, before) == set(tuned.config.probe.unused)  # nothing else stayed
    statistics = read_checkpoint(tmp_path / "pt/pt-latents-stats.pt")
    for found, wanted in zip(known_statistics(published(tmp_path / "diffusers")), statistics.values(), strict=True):
        torch.testing.assert_close(found, wanted)
    if name == "AutoencoderKLFlux2":  # what its pipeline normalises by, which is no weight
        torch.testing.assert_close(statistics_inside(dict(theirs.state_dict()), 4)[0], statistics["latents_scale"])
    assert fingerprint(tuned.state_dict()) == fingerprint(checkpoint["vae"])
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    frames = image[:, :, None] if name in VIDEO else image
    with torch.no_grad():
        output = theirs.encode(frames)
        mean = output.latent if name == "AutoencoderDC" else output.latent_dist.mean
        torch.testing.assert_close(tuned.encode(image).mean, mean.reshape(1, 4, 8, 8), rtol=1e-5, atol=1e-5)

    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    arch = ("--vae-arch", f"diffusers:{folders[name]}")
    cached = ("--vae-ckpt-path", tmp_path / "pt/pt.pt", "--vae-latents-name", "tuned", "--data-dir", data)
    run("cache_latents.py", *arch, *cached, "--output-dir", data, "--num-workers", 0)
    index = json.loads((data / "tuned/index.json").read_text())
    assert index["shape"] == [4, 8, 8] and index["vae_fingerprint"]
    frozen = (*given, "--vae-ckpt", tmp_path / "pt/pt.pt", "--data-dir", data)
    run("train_ldm_only.py", *flags, *frozen, "--vae-latents-name", "tuned", "--exp-name", "frozen")
    run("generate.py", "--exp-path", tmp_path / "frozen", *samples)
    made = [np.load(path)["arr_0"] for path in (tmp_path / "samples").glob("*.npz")]
    assert [images.shape for images in made] == [(4, 32, 32, 3)] * 2
    features = ("--features", "efficientnet-lite0", *lpips, "--num-workers", 0)
    results = tmp_path / "results.json"
    run("evaluate.py", "--vae", tmp_path / "pt/pt.pt", *arch, "--data-dir", tiny_data, *features, "--output", results)
    assert json.loads(results.read_text())["metrics"]["psnr"] > 0


def flags_of_a_vae(flags: tuple) -> tuple:
    """Without those of a transformer."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return tuple(word for pair in pairs if pair[0] not in TINY_SIT for word in pair)


def unchanged(network: nn.Module, before: nn.Module) -> set[str]:
    """Names of parameters that are still the same."""
    return {name for name, value in network.named_parameters() if torch.equal(value, before.get_parameter(name))}
