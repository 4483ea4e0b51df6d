"""Starting from a trained transformer: of other images' size, classes or encoders, published or ours."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import published
import train_repae
from errors import UserError
from images import make_data
from models.sit import SiT, SiT_models
from scripts import TINY, TINY_SIT, records, run
from weights.checkpoint_io import vae_files
from weights.trained_run import LABEL_TABLE, start_from_trained


def own_sit(**options) -> SiT:
    """A fresh transformer as a run makes it, that normalises as the published one does."""
    torch.manual_seed(7)
    options = {"input_size": 8, "num_classes": 3, "z_dims": (112,), "encoder_depth": 2} | options
    sit = SiT_models[options.pop("model", published.MODEL)](**options)
    sit.set_latent_statistics(*(value.reshape(1, -1, 1, 1) for value in published.STATISTICS.values()))
    return sit


def started(path: Path, sit: SiT, *flags: object) -> tuple[dict, list[str]]:
    """The state of `sit` after it started from a checkpoint, and what was logged."""
    args = train_repae.parse_args([*map(str, (*TINY, *TINY_SIT, "--exp-name", "x", "--sit-ckpt", path, *flags))])
    said = []
    start_from_trained(sit, args, Path("none"), said.append)
    return sit.state_dict(), said


@pytest.mark.parametrize("form", [*published.FORMS, "safetensors"])
def test_weights_as_others_publish_them(form, tmp_path, capsys):
    """The normaliser keeps the VAE's statistics; the log says what was taken, once all fits."""
    trained, path = published.fresh_sit(), tmp_path / "weights.pt"
    content = published.transformer_in("bare" if form == "safetensors" else form, trained)
    (save_file if form == "safetensors" else torch.save)(content, path)
    sit = own_sit()
    sit.set_latent_statistics(torch.full((1, 4, 1, 1), 3.0), torch.zeros(1, 4, 1, 1))
    before = sit.bn.running_var.clone()
    state, said = started(path, sit, "--path-type", "cosine" if form != "REPA" else "linear")
    parts = [key for key in content if key in ("ema", "model", "state_dict")]
    ours = {key for key in state if not key.startswith("bn.")}
    if form != "REPA":  # whose projector it is, only flags tell
        ours -= {key for key in ours if key.startswith("projectors.")}
    assert all(torch.equal(state[key], trained.state_dict()[key]) for key in ours)
    assert torch.equal(state["bn.running_var"], before)
    (line,) = said  # nothing is warned of that is not known
    whole = {"ema": "the average", "model": "model (no ema inside)", "state_dict": "state_dict (no ema inside)"}
    taken = whole["ema" if "ema" in parts else parts[0]] if parts else "a bare state dict"
    assert f"weights.pt: starting from {taken}{' of step 400000' if form == 'REPA' else ''}; " in line
    assert line.endswith("multiply SD-VAE's latents by 0.18215, as --vae-ckpt stabilityai/sd-vae-ft-ema does)")
    assert "classes" not in line and "null label" not in line


@pytest.mark.parametrize(
    ("trained", "options", "flags", "fresh"),
    [
        ({"num_classes": 5}, {}, {}, ["3 classes instead of 5"]),
        ({"num_classes": 5, "class_dropout_prob": 0.0}, {"num_classes": 5}, {"cfg_prob": 0.0}, ["null label"]),
        ({"num_classes": 1000}, {"num_classes": 1000}, {}, []),
        ({"num_classes": 7}, {"num_classes": 7}, {"num_classes": 1000}, []),
        ({"num_classes": 7}, {"num_classes": 7}, {"num_classes": None}, []),
    ],
)
def test_the_number_of_classes_is_that_of_the_label_table(trained, options, flags, fresh, tmp_path):
    torch.save({"ema": own_sit(**trained).state_dict(), "args": flags}, tmp_path / "sit.pt")
    sit = own_sit(**options)
    _, (line,) = started(tmp_path / "sit.pt", sit, "--num-classes", sit.num_classes)
    assert line.endswith(f"; fresh: {', '.join([*fresh, 'projector of efficientnet-lite0'])}")


@pytest.mark.parametrize("content", ["nothing", "other size"])
def test_weights_of_other_networks_are_refused(content, tmp_path):
    sit = published.fresh_sit()
    state = published.transformer_in("bare", sit)
    if content == "nothing":
        state = {"ema": {"weight": torch.ones(1)}}
    torch.save(state, tmp_path / "sit.pt")
    message = {
        "nothing": "sit.pt: no pos_embed inside; expected the weights of a SiT",
        "other size": r"x_embedder.proj.weight has shape \(64, 4, 2, 2\), expected \(192, 4, 2, 2\); another --model",
    }[content]
    with pytest.raises(UserError, match=message):
        started(tmp_path / "sit.pt", own_sit(model="SiT-XS/2"), "--model", "SiT-XS/2")


def test_positions_are_resampled_to_another_grid(good):
    state, said = started(good["joint_ckpt"], own_sit(input_size=16))
    trained = published.fresh_sit().pos_embed
    image = trained.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=(8, 8), mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(state["pos_embed"], expected.flatten(2).transpose(1, 2))
    assert torch.equal(state["blocks.3.mlp.fc1.weight"], published.fresh_sit().blocks[3].mlp.fc1.weight)
    assert said[0].endswith("; positions resampled from 4x4 to 8x8 tokens")


def test_labels_that_do_not_fit_start_fresh(good):
    trained = published.fresh_sit().y_embedder.embedding_table.weight
    fresh = own_sit(num_classes=5).state_dict()[LABEL_TABLE].clone()
    state, said = started(good["joint_ckpt"], own_sit(num_classes=5), "--num-classes", 5)
    assert torch.equal(state[LABEL_TABLE], torch.cat([fresh[:5], trained[3:]]))
    assert said[0].endswith("; fresh: 5 classes instead of 3")
    state, _ = started(good["joint_ckpt"], own_sit(class_dropout_prob=0.0), "--cfg-prob", 0)
    assert torch.equal(state[LABEL_TABLE], trained[:3])


def test_a_projector_goes_with_its_encoder(good):
    encoders = "dinov2-vit-s,efficientnet-lite0"
    state, said = started(good["joint_ckpt"], own_sit(z_dims=(384, 112)), "--enc-type", encoders)
    fresh, trained = own_sit(z_dims=(384, 112)), published.fresh_sit()
    assert torch.equal(state["projectors.0.4.weight"], fresh.projectors[0][4].weight)
    assert torch.equal(state["projectors.1.4.weight"], trained.projectors[0][4].weight)
    assert said[0].endswith("; fresh: projector of dinov2-vit-s")
    state, said = started(good["joint_ckpt"], own_sit(projector="conv"), "--projector", "conv")
    assert torch.equal(state["projectors.0.weight"], own_sit(projector="conv").projectors[0].weight)
    assert said[0].endswith("; fresh: projector of efficientnet-lite0")


def test_other_statistics_and_another_path_are_warned_of_and_the_normaliser_stays(good):
    sit = own_sit()
    sit.set_latent_statistics(torch.full((1, 4, 1, 1), 3.0), torch.zeros(1, 4, 1, 1))
    before = sit.bn.running_var.clone()
    state, said = started(good["joint_ckpt"], sit, "--path-type", "cosine")
    assert torch.equal(state["bn.running_var"], before)
    assert len(said) == 3
    assert "warning" in said[1] and "trained on latents of another VAE, or by other statistics" in said[1]
    assert said[2].endswith("trained with --path-type linear, not cosine")


@pytest.mark.slow
def test_a_published_run_is_tuned_to_another_size_and_sampled(good, tmp_path, vgg_weights, capsys):
    vae = published.write_vae(tmp_path / "vae")
    flags = (*TINY, *TINY_SIT, "--num-workers", 0, "--lpips-vgg-ckpt", vgg_weights, "--vae-ckpt", vae)
    flags += ("--disc-pretrained-ckpt", vae_files(vae).discriminator, "--output-dir", tmp_path, "--no-fused-attn")
    data = make_data(tmp_path / "data", per_class=2, resolution=64)
    tuning = (*flags, "--resolution", 64, "--data-dir", data, "--exp-name", "64", "--sit-ckpt", good["joint_ckpt"])
    run("train_repae.py", *tuning, "--max-train-steps", 1)
    gone = tmp_path / "gone.pt"  # a run that continues ignores the file
    run("train_repae.py", *tuning[:-1], gone, "--max-train-steps", 2)
    log = records(tmp_path / "64/metrics.jsonl")
    assert [record["step"] for record in log] == [1, 2]
    assert all(math.isfinite(value) for record in log for value in record.values())
    samples = ("--num-fid-samples", 2, "--num-steps", 2, "--sample-dir", tmp_path / "samples", "--no-png")
    run("generate.py", "--exp-path", tmp_path / "64", *samples)
    (path,) = (tmp_path / "samples").glob("64_*.npz")
    assert np.load(path)["arr_0"].shape == (2, 64, 64, 3)
    said = "".join(capsys.readouterr())
    assert "0400000.pt: starting from the average of step 400000; positions resampled from 4x4 to 8x8 tokens" in said
