"""The examples by their command lines, on tiny networks."""

import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import published
from examples.round_trip import latent_statistics
from images import photo
from scripts import ROOT, run


def run_example(name: str, *words: object, capsys) -> str:
    run(f"examples.{name}", *words)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def exported(good, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    run("save_vae_weights.py", "--repae-ckpt", good["joint_ckpt"], "--save-dir", root, "--format", "diffusers")
    return root / "e2e-vae"


def test_round_trip_in_diffusers_is_this_projects_and_says_how_good_it_is(exported, tmp_path, capsys):
    photo(1, width=50, height=42).save(tmp_path / "photo.png")
    printed = run_example("round_trip", exported, tmp_path / "photo.png", tmp_path / "both.png", capsys=capsys)
    both = np.asarray(Image.open(tmp_path / "both.png"))
    assert both.shape == (40, 96, 3)  # sides cut to multiples of 4
    original, recon = both[:, :48].astype(float), both[:, 48:].astype(float)
    assert np.array_equal(original, np.asarray(photo(1, width=50, height=42))[:40, :48])
    image = torch.from_numpy(original.transpose(2, 0, 1)[None]).float() / 127.5 - 1
    vae = published.fresh_vae()
    with torch.no_grad():
        z = vae.encode(image).mean
        expected = vae.decode(z).clamp(-1, 1)
    assert np.abs((expected[0].permute(1, 2, 0).numpy() + 1) * 127.5 - recon).max() < 0.51
    scale, bias = (value.reshape(1, 4, 1, 1) for value in published.STATISTICS.values())
    z_norm = (z - bias) * scale
    assert f"latents (4, 10, 12), normalised: mean {z_norm.mean():.3f}, std {z_norm.std():.3f}" in printed
    psnr = 10 * np.log10(255**2 / np.square(original - recon).mean())
    assert float(printed.split("PSNR ")[1].split(" dB")[0]) == pytest.approx(psnr, abs=0.02)


def test_round_trip_needs_nothing_of_this_project():
    tree = ast.parse((ROOT / "examples/round_trip.py").read_text(encoding="utf8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert modules == {"argparse", "numpy", "torch", "diffusers", "PIL"}


def test_scaling_factor_divides_the_standard_deviation():
    config = SimpleNamespace(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1, 2, 4], scaling_factor=0.25)
    mean, std = latent_statistics(config)
    torch.testing.assert_close(mean.flatten(), torch.tensor([0.1, -0.2, 0.3, 0.0]))
    torch.testing.assert_close(std.flatten(), torch.tensor([2.0, 4, 8, 16]))


def test_samples_are_those_of_generate(tmp_path, capsys):
    published.write_run(tmp_path / "joint", joint=True)
    flags = ("--classes", "0", "2", "--rows", "2", "--num-steps", "3")
    printed = run_example("sample", tmp_path / "joint", tmp_path / "grid.png", *flags, capsys=capsys)
    assert f"4 samples of joint after 400000 steps: {tmp_path / 'grid.png'}" in printed
    run(
        "generate.py",
        *("--exp-path", tmp_path / "joint", "--sample-dir", tmp_path / "samples", "--classes", "0,2", "--no-npz"),
        *("--num-fid-samples", 4, "--num-steps", 3, "--cfg-scale", 2.5, "--guidance-high", 0.75),
    )
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (70, 70, 3)  # two rows and columns of 32 px, 2 px between them
    for index, (top, left) in enumerate([(2, 2), (2, 36), (36, 2), (36, 36)]):
        (png,) = (tmp_path / "samples").glob(f"*/{index:06d}.png")
        difference = np.asarray(Image.open(png)).astype(int) - picture[top : top + 32, left : left + 32]
        assert np.abs(difference).max() <= 1
