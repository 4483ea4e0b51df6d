"""evaluate.py as a user runs it, its input and output, and evaluation during training."""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import published
from dataset import open_images
from forked import run_ranks
from good import LITE0, cache_flags, good_flags
from images import photos
from metrics.features import Features, Inception, dinov2_positions, extract_features
from models.autoencoder import image_to_pixels, pixels_to_image
from originals import original, tiny_spec
from scripts import TINY, TINY_SIT, equal, records, refusal, run
from training.evaluation import Evaluation
from weights.checkpoint_io import read_checkpoint
from weights.features import load_encoder, load_inception, load_lpips

FD = "fd_efficientnet_lite0"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A folder with two sets of 40 images: npz and PNGs of the first, npz of the second."""
    root = tmp_path_factory.mktemp("sets of images")
    for name, seed in (("a", 1), ("b", 2)):
        np.savez(root / f"{name}.npz", arr_0=photos(40, first=1000 * seed))
    (root / "a-png/deep").mkdir(parents=True)
    for i, image in enumerate(photos(40, first=1000)):
        Image.fromarray(image).save(root / ("a-png/deep" if i >= 20 else "a-png") / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module", autouse=True)
def networks_loaded_once():
    """Inception takes seconds to build."""
    real, loaded = evaluate.load_feature_networks, {}

    def load(names: list[str], args: argparse.Namespace, *rest: object) -> list:
        key = (*names, args.inception_weights, args.mixed_precision)
        loaded[key] = loaded.get(key) or real(names, args, *rest)
        return loaded[key]

    with mock.patch.object(evaluate, "load_feature_networks", load):
        yield


def evaluated(*flags: object) -> str:
    return run("evaluate.py", *flags).stderr


def metrics_of(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())["metrics"]


@pytest.fixture(scope="module")
def first(sets) -> dict[str, float]:
    evaluated("--samples", sets / "a.npz", "--reference", sets / "b.npz", *LITE0, "--output", sets / "first.json")
    return metrics_of(sets / "first.json")


def test_metrics_are_named_for_their_network_and_mean_something(sets, first):
    assert list(first) == [FD, "precision_efficientnet_lite0", "recall_efficientnet_lite0", "kd_efficientnet_lite0"]
    assert 0 <= first["precision_efficientnet_lite0"] <= 1
    flags = ("--samples", sets / "a.npz", "--reference", sets / "a-png", *LITE0, "--output", sets / "self.json")
    few = "--samples holds 40 images, no more than features (112 of efficientnet-lite0): Fréchet distances are biased"
    assert few in evaluated(*flags)
    same = metrics_of(sets / "self.json")
    assert same[FD] == pytest.approx(0, abs=1e-3 * first[FD])
    assert same["precision_efficientnet_lite0"] == same["recall_efficientnet_lite0"] == 1
    assert "warning" not in evaluated(*flags, "--metrics", "kid")  # which no number of images biases
    noise = np.random.RandomState(0).randint(0, 256, (40, 32, 32, 3)).astype(np.uint8)
    np.savez(sets / "noise.npz", arr_0=noise)
    evaluated("--samples", sets / "noise.npz", "--reference", sets / "b.npz", *LITE0)
    assert metrics_of(sets / "noise.metrics.json")[FD] > 2 * first[FD]


def test_features_in_half_precision_are_nearly_the_same(sets, first):
    flags = ("--samples", sets / "a.npz", "--reference", sets / "b.npz", *LITE0, "--mixed-precision", "bf16")
    evaluated(*flags, "--output", sets / "half.json")
    half = metrics_of(sets / "half.json")
    assert half[FD] == pytest.approx(first[FD], rel=0.02)
    assert half[FD] != first[FD]
    assert json.loads((sets / "half.json").read_text())["mixed_precision"] == "bf16"


def test_batches_order_of_files_and_processes_do_not_matter(sets, first):
    order = np.random.RandomState(3).permutation(40)
    np.savez(sets / "shuffled.npz", arr_0=photos(40, first=1000)[order])
    np.savez_compressed(sets / "compressed.npz", arr_0=photos(40, first=1000))
    for samples in ("a-png", "shuffled.npz", "compressed.npz"):
        flags = ("--samples", sets / samples, "--reference", sets / "b.npz", *LITE0, "--batch-size", 7)
        evaluated(*flags, "--output", sets / "other.json")
        assert metrics_of(sets / "other.json") == pytest.approx(first, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(sets, first):
    flags = ("--samples", sets / "a-png", "--reference", sets / "b.npz", *LITE0[:2], "--num-workers", 1)
    run_ranks(2, "evaluate.py", *flags, "--output", sets / "two.json", "--batch-size", 3)
    assert metrics_of(sets / "two.json") == pytest.approx(first, rel=1e-4, abs=1e-6)
    assert json.loads((sets / "two.json").read_text())["processes"] == 2


def test_the_result_says_what_it_depends_on(sets):
    (sets / "a.json").write_text('{"format": "repae-samples/1", "samples": {"seed": 5}}')
    flags = ("--samples", sets / "a.npz", "--reference", sets / "b.npz", *LITE0, "--metrics", "fid")
    printed = run("evaluate.py", *flags, "--markdown").stdout
    result = json.loads((sets / "a.metrics.json").read_text())
    assert list(result["metrics"]) == [FD]
    assert result["manifest"]["samples"] == {"seed": 5}
    assert result["samples"] == {"path": str(sets / "a.npz"), "count": 40}
    assert result["reference"]["path"] == str(sets / "b.npz")
    assert len(result["features"]["efficientnet-lite0"]["sha256"]) == 64
    assert result["versions"]["torch"] == version("torch")
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert rows == [f"|  | {FD} |", "| --- | --- |", f"| a | {result['metrics'][FD]:.4g} |"]


def test_statistics_are_kept_and_used(sets, first):
    stats = sets / "stats.npz"
    evaluated("--reference", sets / "b.npz", *LITE0, "--save-stats", stats)
    said = evaluated("--samples", sets / "a.npz", "--reference", stats, *LITE0)
    assert "has no images: no kid, precision, recall" in said
    assert metrics_of(sets / "a.metrics.json") == pytest.approx({FD: first[FD]}, rel=1e-6)
    evaluated("--reference", sets / "b.npz", *LITE0, "--metrics", "kid", "--save-stats", sets / "features.npz")
    evaluated("--samples", sets / "a.npz", "--reference", sets / "features.npz", *LITE0)
    assert metrics_of(sets / "a.metrics.json") == pytest.approx(first, rel=1e-6)
    # images beside statistics: distances come from the statistics, the rest from the images, as with ADM's references
    with np.load(stats) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    content["efficientnet-lite0/mu"] = content["efficientnet-lite0/mu"] + 1
    np.savez(sets / "both.npz", arr_0=photos(40, first=2000), **content)
    evaluated("--samples", sets / "a.npz", "--reference", sets / "both.npz", *LITE0)
    both = metrics_of(sets / "a.metrics.json")
    assert both[FD] != pytest.approx(first[FD], rel=1e-3)
    assert {k: v for k, v in both.items() if k != FD} == pytest.approx({k: v for k, v in first.items() if k != FD})
    about = json.loads(str(content["about"]))
    about["weights"]["efficientnet-lite0"] = "other"
    np.savez(sets / "foreign.npz", **{**content, "about": np.array(json.dumps(about))})
    flags = ("--samples", sets / "a.npz", "--reference", sets / "foreign.npz", *LITE0)
    assert "are of other weights of efficientnet-lite0" in refusal("evaluate.py", *flags)


def test_statistics_of_pool_alone_give_fid_without_sfid(sets, inception_weights, monkeypatch):
    # the commonest files of statistics have mu and sigma only
    monkeypatch.setattr("metrics.statistics.frechet_distance", lambda *moments: 1.0)  # slow at 2048
    flags = ("--reference", sets / "pool.npz", "--num-workers", 0, "--inception-weights", inception_weights)
    np.savez(sets / "two.npz", arr_0=photos(2))
    np.savez(sets / "pool.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    said = evaluated("--samples", sets / "two.npz", *flags, "--output", sets / "pool.json")
    assert "has no images: no kid, precision, recall, sfid" in said
    assert list(metrics_of(sets / "pool.json")) == ["fid", "inception_score"]
    line = refusal("evaluate.py", "--samples", sets / "two.npz", *flags, "--metrics", "sfid")
    assert "no images, nor the statistics that sfid needs" in line
    # the statistics that were stored were not made by these weights, and are not said to be
    evaluated(*flags, "--save-stats", sets / "kept.npz")
    with np.load(sets / "kept.npz") as kept:
        assert json.loads(str(kept["about"]))["weights"] == {}


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith("bn.bias"):
            value.normal_(std=0.1)
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inception_is_torch_fidelitys(inception_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    ours = load_inception(inception_weights)
    assert isinstance(ours, Inception)
    theirs = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    pixels = torch.tensor(photos(2)).permute(0, 3, 1, 2)
    pool, logits = theirs(pixels)
    seen = extract_features(ours, pixels)
    torch.testing.assert_close(seen.pool, pool)
    torch.testing.assert_close(seen.probabilities, logits.softmax(1))
    # the spatial features, layer by layer: the first seven channels of mixed_6/conv, flattened channel-last
    x = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    for name, layer in theirs.named_children():
        if name == "Mixed_6d":
            break
        x = layer(x)
    branch = theirs.Mixed_6d.branch1x1
    x = torch.relu(branch.bn(branch.conv(x)))
    assert x.shape == (2, 192, 17, 17)
    expected = torch.stack([x[:, c, row, column] for row in range(17) for column in range(17) for c in range(7)], dim=1)
    torch.testing.assert_close(seen.spatial, expected)


def test_reconstruction(good, tmp_path):
    evaluated(*good_flags("reconstruction", good, tmp_path), "--batch-size", 4)
    result = json.loads((tmp_path / "result.json").read_text())
    values = result["metrics"]
    assert list(values) == ["psnr", "ssim", "lpips", f"r{FD}"]
    images = open_images(good["data"])
    pixels = torch.stack([images[i][0] for i in range(len(images))])
    vae, lpips = published.fresh_vae(), load_lpips(str(good["vgg"]))
    with torch.no_grad():
        posterior = vae.encode(pixels_to_image(pixels))
        recon = image_to_pixels(vae.decode(posterior.mean))
        expected = lpips(pixels_to_image(pixels), pixels_to_image(recon)).mean()
    assert values["lpips"] == pytest.approx(float(expected), rel=1e-4)
    error = ((pixels.double() - recon.double()) ** 2).flatten(1).mean(1)
    assert values["psnr"] == pytest.approx(float((10 * torch.log10(255**2 / error)).mean()), rel=1e-6)
    assert values[f"r{FD}"] > 0
    z_mean = posterior.mean.double().mean((0, 2, 3))
    assert result["latents"]["mean"] == pytest.approx(z_mean.tolist(), rel=1e-3, abs=1e-4)
    assert len(result["latents"]["stored_std"]) == 4


@pytest.mark.slow
def test_evaluation_during_training(joint, tiny_data, tmp_path):
    output, flags = joint
    extra = (*flags, "--eval-steps", 2, "--eval-samples", 10, "--eval-features", "efficientnet-lite0")
    extra = (*extra, "--max-train-steps", 4, "--sampling-steps", 100, "--checkpointing-steps", 3)
    run("train_repae.py", *extra, "--exp-name", "evaluated")
    log = records(output / "evaluated/metrics.jsonl")
    found = {record["step"]: record[f"eval_{FD}"] for record in log if f"eval_{FD}" in record}
    assert list(found) == [2, 4]
    best = json.loads((output / "evaluated/checkpoints/best.json").read_text())
    step = min(found, key=found.get)
    assert (best["step"], best["values"]) == (step, {f"eval_{FD}": found[step]})
    assert best["measure"]["samples"] == 10
    assert read_checkpoint(output / "evaluated/checkpoints/best.pt")["steps"] == step
    # measuring changes nothing of the training
    run("train_repae.py", *extra, "--eval-steps", 0, "--exp-name", "unmeasured")
    one, two = (read_checkpoint(output / name / "checkpoints/0000004.pt") for name in ("evaluated", "unmeasured"))
    assert all(equal(one[part], two[part]) for part in one.keys() - {"args"})
    # what training measured is what generate.py and evaluate.py give
    sampling = ("--num-fid-samples", 10, "--cfg-scale", 1.0, "--pproc-batch-size", 3, "--sample-dir", tmp_path)
    run("generate.py", "--exp-path", output / "evaluated", "--train-steps", "best", *sampling)
    samples = tmp_path / f"evaluated_{step:07d}_cfg1.0-0.0-1.0.npz"
    evaluated("--samples", samples, "--reference", as_npz(tiny_data, tmp_path), *LITE0, "--metrics", "fid")
    measured = metrics_of(samples.with_name(samples.name.replace(".npz", ".metrics.json")))[FD]
    assert measured == pytest.approx(found[step], rel=1e-3)
    # two processes measure the same distance of the same weights
    run_ranks(2, "train_repae.py", *extra, "--max-train-steps", 2, "--exp-name", "evaluated-by-two")
    assert records(output / "evaluated-by-two/metrics.jsonl")[-1][f"eval_{FD}"] == pytest.approx(found[2], rel=1e-2)


def as_npz(data_dir: Path, folder: Path) -> Path:
    data = open_images(data_dir)
    pixels = np.stack([data[i][0].permute(1, 2, 0).numpy() for i in range(len(data))])
    np.savez(folder / "train.npz", arr_0=pixels)
    return folder / "train.npz"


@pytest.mark.slow
def test_evaluation_of_frozen_training_from_stored_statistics(joint, tmp_path, tiny_data, tiny_vae):
    output, _ = joint
    evaluated("--reference", as_npz(tiny_data, tmp_path), *LITE0, "--save-stats", tmp_path / "stats.npz")
    run("cache_latents.py", *cache_flags(tiny_data, tiny_vae[1], name="for-evaluation"))
    latents = ("--vae-latents-name", "for-evaluation", "--data-dir", tiny_data, "--vae-ckpt", tiny_vae[1])
    flags = (*TINY, *TINY_SIT, *latents, "--enc-type", "none", "--output-dir", output, "--exp-name", "frozen-evaluated")
    evaluation = ("--eval-steps", 2, "--eval-samples", 6, "--eval-features", "efficientnet-lite0")
    reference = ("--eval-reference", tmp_path / "stats.npz")
    run("train_ldm_only.py", *flags, *evaluation, *reference, "--max-train-steps", 2)
    assert records(output / "frozen-evaluated/metrics.jsonl")[1][f"eval_{FD}"] > 0
    assert (output / "frozen-evaluated/checkpoints/best.pt").is_file()


def test_dinov2_positions_are_resampled_as_its_own_code_does(tmp_path):
    """From 3x3 to 2x2 by a scale of 2.1/3, without antialiasing; and evaluate.py does so."""
    table = torch.randn(1, 10, 2)
    image = table[:, 1:].reshape(1, 3, 3, 2).permute(0, 3, 1, 2)
    expected = F.interpolate(image, scale_factor=(2.1 / 3, 2.1 / 3), mode="bicubic").permute(0, 2, 3, 1)
    result = dinov2_positions(table.double(), 2)
    assert torch.equal(result[:, 0], table[:, 0])
    torch.testing.assert_close(result[:, 1:], expected.reshape(1, 4, 2), rtol=1e-4, atol=1e-5)
    path = tmp_path / "dinov2.pth"
    torch.save({"state_dict": original("dinov2-vit-s")}, path)  # wrapped, as alignment takes it too
    with mock.patch("weights.features.encoder_spec", tiny_spec):
        network = load_encoder("dinov2-vit-s", path)
    expected = dinov2_positions(original("dinov2-vit-s")["pos_embed"], 16)
    assert torch.equal(network.encoder.network.pos_embed, expected)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    whole = network.encoder.network.forward_features(network.encoder.preprocess(pixels))
    torch.testing.assert_close(extract_features(network, pixels).pool, whole[:, 0])  # the class token


@pytest.mark.parametrize(
    ("count", "names", "few"),
    [
        (2049, "inception", None),
        (2048, "inception", "2048 of inception"),
        (800, "dinov2-vit-l,inception,dinov2-vit-b", "1024 of dinov2-vit-l, 2048 of inception"),
    ],
)
def test_the_warning_of_few_images_names_the_networks_that_need_more(count, names, few):
    said = []
    evaluate.warn_of_few("--samples", count, names.split(","), said.append)
    expected = f"warning: --samples holds {count} images, no more than features ({few}): Fréchet distances are biased"
    assert said == ([expected] if few else [])


@pytest.mark.parametrize(("compiled", "sizes"), [(True, [3, 3]), (False, [3, 2])])
def test_evaluation_shows_compiled_networks_one_shape_and_measures_no_sample_that_is_not_finite(
    monkeypatch, compiled, sizes
):
    sampled, seen, finite = [], [], torch.ones(2, 3, dtype=torch.bool)
    network = argparse.Namespace(name="network", module=lambda pixels: Features(seen.append(len(pixels)) or pixels))
    evaluation = object.__new__(Evaluation)
    settings = {"count": 5, "batch_size": 3, "rank": 0, "world": 1, "device": torch.device("cpu"), "sampling": None}
    vars(evaluation).update(settings, rows=3 * compiled, networks=[network], hosts=None)
    evaluation.moments = {"network": {"mu": torch.zeros(2), "sigma": torch.eye(2)}}

    def sample(ema, vae, indices, sampling, rows) -> tuple[torch.Tensor, torch.Tensor]:
        sampled.append(max(len(indices), rows))
        return torch.tensor(indices)[:, None] * torch.ones(2), finite

    monkeypatch.setattr("training.evaluation.sample_pixels", sample)
    assert evaluation(None, None)["eval_fd_network"] > 0
    assert (sampled, seen) == (sizes, [3, 2])
    finite[1, 2] = False
    assert np.isnan(evaluation(None, None)["eval_fd_network"])
