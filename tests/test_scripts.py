"""The training scripts end to end: what they write, how they continue, what they say when something is wrong."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import train_repae
from forked import run_ranks
from images import make_data
from models.autoencoder import VAE_CONFIGS
from models.discriminator import PatchDiscriminator
from models.sit import SiT_models
from scripts import (
    ACCELERATE,
    LAST,
    TINY,
    assert_same_beginning,
    assert_same_run,
    equal,
    interrupt,
    records,
    refusal,
    run,
    run_process,
)
from storage.files import locked
from weights.checkpoint_io import load_weights, read_checkpoint, vae_files

pytestmark = pytest.mark.slow
JOINT_METRICS = (
    *("reconstruction_loss", "perceptual_loss", "kl_loss", "weighted_gan_loss", "vae_align_loss", "vae_loss", "psnr"),
    *("grad_norm_vae", "d_loss", "grad_norm_disc", "denoising_loss", "proj_loss", "grad_norm_sit"),
)


def test_train_vae_writes_the_three_files(tiny_vae):
    output, weights = tiny_vae
    files = vae_files(weights)
    load_weights(VAE_CONFIGS["f4d4-tiny"].build(), read_checkpoint(files.weights), "weights")
    load_weights(PatchDiscriminator(), read_checkpoint(files.discriminator), "discriminator")
    stats = read_checkpoint(files.statistics)
    shapes = {key: tuple(value.shape) for key, value in stats.items()}
    assert shapes == dict.fromkeys(("latents_scale", "latents_bias"), (1, 4, 1, 1))
    assert json.loads((output / "vae/args.json").read_text())["vae_learning_rate"] == 1e-4
    assert np.asarray(Image.open(output / "vae/reconstructions/0000005.png")).std() > 10
    assert len(records(output / "vae/metrics.jsonl")) == 5


def test_train_vae_on_two_processes_does_as_one(tmp_path, tiny_vae, tiny_data, vgg_weights):
    flags = ("--exp-name", "two", "--output-dir", tmp_path, "--data-dir", tiny_data, "--lpips-vgg-ckpt", vgg_weights)
    run_ranks(2, "train_vae.py", *TINY, *flags, "--max-train-steps", 2)
    assert len(records(tmp_path / "two/metrics.jsonl")) == 2
    one, two = tiny_vae[0] / "vae", tmp_path / "two"
    assert_same_beginning(one, two, steps=2, names=("reconstruction_loss", "perceptual_loss", "kl_loss", "d_loss"))
    # a fresh discriminator on smooth images has steep gradients, in which rounding shows after an update
    assert_same_beginning(one, two, steps=2, rel=2e-2, names=("grad_norm_vae", "grad_norm_disc"))
    assert vae_files(tmp_path / "two/two.pt").statistics.is_file()


def test_a_joint_run_writes_everything(whole_run):
    log = records(whole_run / "metrics.jsonl")
    assert [record["step"] for record in log] == list(range(1, LAST + 1))
    assert all(name in log[0] for name in JOINT_METRICS)
    for folder in ("samples", "reconstructions"):
        names = [path.name for path in sorted((whole_run / folder).iterdir())]
        assert names == [f"{step:07d}.png" for step in (LAST // 2, LAST)]
    checkpoint = torch.load(whole_run / f"checkpoints/{LAST:07d}.pt", weights_only=True)
    reference_keys = {"model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc", "args", "steps"}
    assert reference_keys < checkpoint.keys()
    assert checkpoint["steps"] == LAST
    assert checkpoint["args"] == json.loads((whole_run / "args.json").read_text())
    sit = SiT_models["SiT-XXS/2"](input_size=8, num_classes=3, z_dims=(112,), encoder_depth=2)
    sit.load_state_dict(checkpoint["ema"])
    assert int(checkpoint["model"]["bn.num_batches_tracked"]) == LAST
    last = [checkpoint[part]["final_layer.linear.weight"] for part in ("model", "ema")]
    assert not torch.equal(*last)


def test_interrupted_equals_uninterrupted(joint, whole_run):
    output, flags = joint
    arguments = (*flags, "--exp-name", "interrupted", "--max-train-steps", LAST, "--checkpointing-steps", 5)
    log = output / "interrupted/metrics.jsonl"
    assert interrupt("train_repae.py", *arguments, log=log, lines=3, kind=signal.SIGINT) == 75
    saved = max(int(path.stem) for path in (output / "interrupted/checkpoints").glob("*.pt"))
    assert 3 <= saved < LAST
    with open(log, "a") as file:  # as if it had gone on and crashed after its checkpoint
        file.write(json.dumps({"step": saved + 1, "d_loss": 9.0}) + '\n{"step": 9')
    done = run("train_repae.py", *arguments)
    assert f"continuing after step {saved}" in done.stdout + done.stderr
    assert_same_run(whole_run, output / "interrupted")


def test_resume_step_and_another_runs_folder(joint, whole_run, monkeypatch):
    output, flags = joint
    arguments = ("--exp-name", "branch", "--checkpointing-steps", 1, "--continue-train-exp-dir", whole_run)
    failed = run("train_repae.py", *flags, *arguments, "--resume-step", LAST - 1, code=2)
    assert f"{LAST - 1:07d}.pt: no such file" in failed.stderr
    done = run("train_repae.py", *flags, *arguments, "--resume-step", LAST, "--max-train-steps", LAST + 2)
    assert f"continuing after step {LAST} from {whole_run}" in done.stdout + done.stderr
    # the same command again does not fall back to the step it once started from
    done = run("train_repae.py", *flags, *arguments, "--resume-step", LAST, "--max-train-steps", LAST + 3)
    assert f"continuing after step {LAST + 2} from {output / 'branch'}" in done.stdout + done.stderr
    # an earlier step of the own run
    done = run("train_repae.py", *flags, *arguments, "--resume-step", LAST + 1, "--max-train-steps", LAST + 2)
    assert f"continuing after step {LAST + 1} from {output / 'branch'}" in done.stdout + done.stderr
    assert [record["step"] for record in records(output / "branch/metrics.jsonl")] == [LAST + 1, LAST + 2]
    # a signal in its next step
    monkeypatch.setattr(train_repae, "repae_step", signalled(train_repae.repae_step))
    more = ("--resume-step", LAST + 1, "--max-train-steps", LAST + 9)
    said = run("train_repae.py", *flags, *arguments, *more, code=75).stdout
    assert f"The same command with --resume-step {LAST + 2} continues from there" in said


def signalled(step):
    """`step`, during which SIGTERM arrives."""

    def run_step(*args):
        signal.raise_signal(signal.SIGTERM)
        return step(*args)

    return run_step


def test_a_run_with_scheduled_learning_rates_and_flips_resumes_exactly(joint, whole_run):
    output, flags = joint
    flags = (*flags, "--lr-warmup-steps", 2, "--lr-schedule", "cosine", "--random-flip", "--max-train-steps", 4)
    run("train_repae.py", *flags, "--exp-name", "scheduled", "--checkpointing-steps", 2)
    log = records(output / "scheduled/metrics.jsonl")
    assert [record["learning_rate_factor"] for record in log] == [0.5, 1.0, 1.0, 0.5]
    assert log[0]["reconstruction_loss"] != records(whole_run / "metrics.jsonl")[0]["reconstruction_loss"]
    start = ("--continue-train-exp-dir", output / "scheduled", "--resume-step", 2)
    run("train_repae.py", *flags, *start, "--exp-name", "scheduled-resumed")
    one, two = (
        read_checkpoint(output / name / "checkpoints/0000004.pt") for name in ("scheduled", "scheduled-resumed")
    )
    for part in ("model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc"):
        assert equal(one[part], two[part])
    assert [one[key]["param_groups"][0]["lr"] for key in ("opt", "opt_vae", "opt_disc")] == [0.5e-4] * 3


def test_accumulation_cosine_lognormal_qk_norm_without_encoder(joint):
    output, flags = joint
    options = ("--gradient-accumulation-steps", 2, "--path-type", "cosine", "--weighting", "lognormal", "--qk-norm")
    names = ("--exp-name", "options", "--enc-type", "none", "--max-train-steps", 2, "--report-to", "tensorboard")
    flags = (*flags, "--sampling-steps", 1)
    run("train_repae.py", *flags, *options, *names)
    log = records(output / "options/metrics.jsonl")
    assert [record["step"] for record in log] == [1, 2]
    assert "proj_loss" not in log[0]
    checkpoint = read_checkpoint(output / "options/checkpoints/0000002.pt")
    assert int(checkpoint["model"]["bn.num_batches_tracked"]) == 4  # a normalisation group is a micro-batch
    assert all(int(state["step"]) == 2 for state in checkpoint["opt"]["state"].values())
    assert any((output / "options/logs").rglob("events.out.tfevents*"))


def test_a_joint_run_continues_with_other_micro_batches_and_says_what_changes(joint, tiny_data, vgg_weights, tmp_path):
    output, flags = joint
    paths = ("--data-dir", tiny_data, "--output-dir", output, "--lpips-vgg-ckpt", vgg_weights)
    alone = ("train_vae.py", *TINY, *paths, "--exp-name", "micro-vae")
    for command in (("train_repae.py", *flags, "--exp-name", "micro"), alone):
        assert "warning: --gradient" not in run(*command, "--max-train-steps", 1).stdout
        said = run(*command, "--max-train-steps", 2, "--gradient-accumulation-steps", 2).stdout
        changed = "1 -> 2: batch statistics are over 2 images, before over 4"
        assert said.count(f"warning: --gradient-accumulation-steps {changed}") == said.count("warning") == 1
    model = read_checkpoint(output / "micro/checkpoints/0000002.pt")["model"]
    assert int(model["bn.num_batches_tracked"]) == 3


def test_other_data_and_a_second_process_are_refused(joint, whole_run, tiny_vae, tmp_path):
    _, flags = joint
    moved = shutil.copytree(tiny_vae[1].parent, tmp_path / "moved")  # the same files elsewhere are no other run
    run("train_repae.py", *flags, "--exp-name", "whole", "--max-train-steps", LAST, "--vae-ckpt", moved / "vae.pt")
    other = make_data(tmp_path, per_class=5)
    line = refusal("train_repae.py", *flags, "--exp-name", "whole", "--data-dir", other)
    assert "made with other images than --data-dir holds" in line
    with locked(whole_run):
        assert "another process is writing there" in refusal("train_repae.py", *flags, "--exp-name", "whole")


def test_settings_of_accelerate_launch_are_taken_or_said_to_be_unused(joint):
    output, flags = joint
    flags = [flag for flag in map(str, flags) if flag not in ("--mixed-precision", "no")]
    launcher = (*ACCELERATE, "--mixed_precision=bf16", "--dynamo_backend=inductor")
    names = ("--exp-name", "settings", "--max-train-steps", 1)
    done = run_process("train_repae.py", *flags, *names, launcher=launcher)
    assert "flags from accelerate launch: mixed_precision=bf16" in done.stdout
    said = done.stdout + done.stderr
    assert "accelerate's dynamo backend INDUCTOR is not used; --compile compiles the networks" in said
    assert "precision bf16" in said
    assert json.loads((output / "settings/args.json").read_text())["mixed_precision"] == "bf16"
    assert len(records(output / "settings/metrics.jsonl")) == 1


@pytest.mark.parametrize("script", ["preprocessing.py", "save_vae_weights.py", "dataset.py"])
def test_a_script_that_no_other_test_starts_as_a_process_starts(script):
    assert run_process(script, "--help").stdout.startswith(f"usage: {script}")
