"""From a joint checkpoint to samples, by one process and by several, from our own and from published files."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import published
from dataset import open_latents
from forked import run_ranks
from good import cache_flags
from images import make_data
from models.autoencoder import VAE_CONFIGS
from models.sit import SiT_models
from scripts import (
    TINY,
    TINY_SIT,
    assert_same_beginning,
    assert_same_run,
    interrupt,
    records,
    run,
    run_process,
    torchrun,
)
from weights.checkpoint_io import load_weights, read_checkpoint
from weights.vae import read_latent_statistics

pytestmark = pytest.mark.slow
STEPS = 16  # of the frozen run that others are compared to


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A published joint run, its VAE extracted by the script, and images in five shards with its latents."""
    root = tmp_path_factory.mktemp("pipeline")
    data = make_data(root, per_class=6, shard_images=4)
    checkpoint = published.write_run(root / "published", joint=True)
    run("save_vae_weights.py", "--repae-ckpt", checkpoint, "--vae-name", "e2e", "--save-dir", root / "vaes")
    run("cache_latents.py", *cache_flags(data, root / "vaes/e2e/e2e.pt", name="one"), "--pproc-batch-size", 3)
    return root


def joint_flags(root: Path, name: str) -> tuple:
    """Flags of a tiny run with the extracted VAE but for its length."""
    paths = ("--data-dir", root / "data", "--output-dir", root / "exps", "--vae-ckpt", root / "vaes/e2e/e2e.pt")
    return (*TINY, *TINY_SIT, *paths, "--exp-name", name)


def frozen_flags(root: Path, name: str) -> tuple:
    """The same on the cached latents."""
    return (*joint_flags(root, name), "--vae-latents-name", "one")


@pytest.fixture(scope="module")
def frozen(world) -> Path:
    run("train_ldm_only.py", *frozen_flags(world, "whole"), "--max-train-steps", STEPS, "--sampling-steps", STEPS)
    return world / "exps/whole"


def test_caching_gives_the_same_rows_on_any_number_of_processes(world):
    flags = (*cache_flags(world / "data", world / "vaes/e2e/e2e.pt", name="several"), "--pproc-batch-size", 3)
    assert "by 3 processes" in run_ranks(3, "cache_latents.py", *flags)
    for shard in ("00001", "00004"):  # what three processes miss, another number of them makes
        (world / f"data/several/{shard}.safetensors").unlink()
    assert "by 1 processes" in run("cache_latents.py", *flags).stdout
    one, several = open_latents(world / "data", "one"), open_latents(world / "data", "several")
    assert len(several) == 18
    for i in range(18):
        assert several[i][1] == one[i][1]
        assert torch.equal(several[i][2], one[i][2])
    indices = [json.loads((world / "data" / folder / "index.json").read_text()) for folder in ("one", "several")]
    assert indices[0] == indices[1]


def test_a_frozen_run_writes_what_the_references_does(frozen):
    checkpoint = torch.load(frozen / f"checkpoints/{STEPS:07d}.pt", weights_only=True)
    assert {"model", "ema", "opt", "args", "steps"} < checkpoint.keys()
    assert not {"vae", "discriminator"} & checkpoint.keys()
    assert checkpoint["args"] == json.loads((frozen / "args.json").read_text())
    assert checkpoint["args"]["vae_latents_name"] == "one"
    sit = SiT_models[published.MODEL](input_size=8, num_classes=3, z_dims=(112,), encoder_depth=2)
    for part in ("model", "ema"):
        sit.load_state_dict(checkpoint[part])
        torch.testing.assert_close(sit.latent_statistics()[0].flatten(), published.STATISTICS["latents_scale"])
        torch.testing.assert_close(sit.latent_statistics()[1].flatten(), published.STATISTICS["latents_bias"])
    log = records(frozen / "metrics.jsonl")
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    assert {"denoising_loss", "proj_loss", "grad_norm_sit"} < log[0].keys()
    assert [path.name for path in (frozen / "samples").iterdir()] == [f"{STEPS:07d}.png"]


def test_an_interrupted_frozen_run_equals_an_uninterrupted_one(world, frozen):
    flags = (*frozen_flags(world, "interrupted"), "--max-train-steps", STEPS, "--checkpointing-steps", 3)
    log = world / "exps/interrupted/metrics.jsonl"
    assert interrupt("train_ldm_only.py", *flags, log=log, lines=3, kind=signal.SIGTERM) == 75
    run("train_ldm_only.py", *flags)
    assert_same_run(frozen, world / "exps/interrupted", STEPS)


def test_a_frozen_run_continues_on_other_processes_and_micro_batches(world, frozen):
    for steps, processes, micro in ((2, 2, 1), (4, 1, 4)):
        flags = ("--max-train-steps", steps, "--gradient-accumulation-steps", micro)
        said = run_ranks(processes, "train_ldm_only.py", *frozen_flags(world, "several"), *flags)
        assert "warning" not in said
        parts = f"{processes} processes x {micro} accumulation steps x {4 // (processes * micro)}"
        assert f"4 images a step = {parts}" in said
    log = records(world / "exps/several/metrics.jsonl")
    assert [record["step"] for record in log] == list(range(1, 5))
    assert_same_beginning(frozen, world / "exps/several", steps=4, abs=0)


def test_without_an_encoder_no_images_are_needed(world, tmp_path):
    shutil.copytree(world / "data/one", tmp_path / "one")
    flags = ("--data-dir", tmp_path, "--enc-type", "none", "--max-train-steps", 1)
    run("train_ldm_only.py", *frozen_flags(world, "no-encoder"), *flags)
    assert "proj_loss" not in records(world / "exps/no-encoder/metrics.jsonl")[0]


def test_two_processes_sample_as_one_does(world, frozen, tmp_path):
    flags = ("--exp-path", frozen, "--num-fid-samples", 7, "--mode", "sde", "--num-steps", 4, "--cfg-scale", 2)
    arrays = []
    for processes, batch in ((1, 7), (2, 2)):
        folder = tmp_path / str(processes)
        options = ("--sample-dir", folder, "--pproc-batch-size", batch)
        said = run_ranks(processes, "generate.py", *flags, *options)
        assert said.count("7 samples of 32 px: ") == 1
        (path,) = folder.glob("*.npz")
        manifest = json.loads(path.with_suffix(".json").read_text())
        assert manifest["made_with"]["processes"] == processes
        arrays.append(np.load(path)["arr_0"])
        assert len(list(path.with_suffix("").glob("*.png"))) == 7
    assert np.abs(arrays[0].astype(int) - arrays[1]).max() <= 1
    assert arrays[0].std() > 10


def test_training_goes_on_from_published_checkpoints(world, vgg_weights):
    """Joint and frozen-VAE runs of the reference: Namespace inside, prefixes, flags that did not exist."""
    published.write_run(world / "published-frozen", joint=False, vae_ckpt=world / "vaes/e2e/e2e.pt")
    joint = (*joint_flags(world, "published"), "--lpips-vgg-ckpt", vgg_weights)
    frozen = frozen_flags(world, "published-frozen")
    for script, name, flags in (
        ("train_repae.py", "published", joint),
        ("train_ldm_only.py", "published-frozen", frozen),
    ):
        length = ("--max-train-steps", published.STEP + 1, "--epochs", 10**6)
        done = run(script, *flags, "--continue-train-exp-dir", world / name, *length)
        assert f"continuing after step {published.STEP} from {world / name}" in done.stdout + done.stderr
        saved = read_checkpoint(world / f"exps/{name}/checkpoints/{published.STEP + 1:07d}.pt")
        before = published.fresh_sit().state_dict()
        moved = saved["model"]["final_layer.linear.weight"] - before["final_layer.linear.weight"]
        assert 0 < float(moved.abs().max()) < 3e-4  # one step of AdamW at 1e-4 from the published weights


def test_a_checkpoint_of_another_vae_is_not_continued(world, frozen):
    path = published.write_run(world / "other-vae", joint=False)
    content = torch.load(path, weights_only=False)
    for part, prefix in (("model", "module."), ("ema", "_orig_mod.")):
        content[part][f"{prefix}bn.running_mean"] += 0.1
    torch.save(content, path)
    flags = ("--continue-train-exp-dir", world / "other-vae", "--max-train-steps", published.STEP + 1)
    done = run("train_ldm_only.py", *frozen_flags(world, "wrong"), *flags, "--epochs", 10**6, code=2)
    assert "was trained on another VAE" in done.stderr
    assert not (world / "exps/wrong/args.json").exists()


def test_a_frozen_run_may_start_from_a_joint_one_and_takes_the_vaes_statistics(world):
    path = published.write_run(world / "joint-source", joint=True)
    content = torch.load(path, weights_only=False)
    key = "module.bn.running_mean"  # a joint run's transformer is ahead of its average
    content["model"][key] = content["model"][key] + 0.1
    content["identity"] = {"loss": {"kl_weight": 1e-6}}
    torch.save(content, path)
    flags = ("--continue-train-exp-dir", world / "joint-source", "--max-train-steps", published.STEP + 1)
    run("train_ldm_only.py", *frozen_flags(world, "from-joint"), *flags, "--epochs", 10**6)
    model = read_checkpoint(world / f"exps/from-joint/checkpoints/{published.STEP + 1:07d}.pt")["model"]
    torch.testing.assert_close(model["bn.running_mean"], published.STATISTICS["latents_bias"])


def test_of_an_error_that_all_processes_find_one_speaks(world, frozen, tmp_path):
    flags = ("--exp-path", frozen, "--sample-dir", tmp_path, "--classes", 99)
    done = run_process("generate.py", *flags, launcher=torchrun(2), code=1)
    assert done.stderr.count("error: --classes 99: the run has classes 0 to 2") == 1


def test_our_own_joint_run_goes_the_same_way(whole_run, tmp_path):
    checkpoint = max((whole_run / "checkpoints").glob("*.pt"))
    run("save_vae_weights.py", "--repae-ckpt", checkpoint, "--vae-name", "own", "--save-dir", tmp_path)
    saved = read_checkpoint(checkpoint)
    vae = VAE_CONFIGS[published.VAE].build()
    load_weights(vae, read_checkpoint(tmp_path / "own/own.pt"), "own")
    assert all(torch.equal(vae.state_dict()[key], value) for key, value in saved["vae"].items())
    scale, bias = read_latent_statistics(tmp_path / "own/own.pt", 4)
    torch.testing.assert_close(scale.flatten(), saved["ema"]["bn.running_var"].rsqrt())
    torch.testing.assert_close(bias.flatten(), saved["ema"]["bn.running_mean"])
    flags = ("--exp-path", whole_run, "--sample-dir", tmp_path, "--num-fid-samples", 2, "--num-steps", 2, "--no-png")
    run("generate.py", *flags)
    assert len(list(tmp_path.glob("*.npz"))) == 1
