"""Sampling: draws that depend on seed and index alone; exactly the files that were asked for."""

import errno
import json
import shutil
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import published
from diffusion.samplers import Guidance, sample_ode
from diffusion.sampling import (
    DECODE_BATCH,
    Sampling,
    decode_pixels,
    generator_for,
    sample_pixels,
    sampling_noise,
)
from errors import UserError
from models.autoencoder import image_to_pixels
from models.numerics import AUTOCAST_DTYPES, cast_weights
from models.sit import SiT_models
from scripts import refusal, run
from storage.files import WAITING
from storage.sample_files import SampleFiles
from weights.checkpoint_io import fingerprint, write_new
from weights.trained_run import REFERENCE_DEFAULTS, load_experiment, load_transformer
from weights.vae import diffusers_files

STEP = published.STEP
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    published.write_run(root / "joint", joint=True, args_inside=False)
    published.write_run(root / "frozen", joint=False, vae_ckpt=published.write_vae(root / "vae"), args_json=False)
    return root


def sample(run_folder, folder, *flags, count=7):
    """Run generate.py in this process; the path of the samples without suffix."""
    more = ("--sample-dir", folder, "--num-fid-samples", count, "--num-steps", 3, *flags)
    run("generate.py", "--exp-path", run_folder, *more)
    (manifest,) = folder.glob("*.json")
    return manifest.with_suffix("")


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    """Seven samples of the joint run as PNGs and npz; the path without suffix."""
    return sample(runs / "joint", tmp_path_factory.mktemp("made"))


@pytest.fixture
def again(made, tmp_path):
    shutil.copytree(made.parent, tmp_path / "again")
    return tmp_path / "again" / made.name


def npz_of(path):
    return path.with_name(path.name + ".npz")


def pixels_of(path) -> np.ndarray:
    return np.load(npz_of(path))["arr_0"]


def test_draws_are_functions_of_seed_and_index():
    def draws(seed, indices):
        return list(islice(sampling_noise(seed, indices, SHAPE), 4))

    together = draws(0, list(range(6)))
    for indices in ([0, 1, 2], [3], [5, 4]):
        for whole, part in zip(together, draws(0, indices), strict=True):
            assert torch.equal(whole[indices], part)
    assert not torch.equal(together[0][1], draws(1, [0])[0][0])  # (seed 0, index 1) is not (seed 1, index 0)
    assert not torch.equal(together[0], together[1])
    generator = generator_for(0, "sample", 2)
    for draw in together:  # none is drawn over by the next
        assert torch.equal(draw[2], torch.randn(SHAPE, generator=generator))


def settings(*flags: str) -> Sampling:
    args = generate.parse_args(["--exp-path", "x", *flags])
    run = SimpleNamespace(flags={"path_type": "linear"}, class_counts=())
    return generate.sampling_settings(args, run, torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["joint", "frozen"])
def test_a_published_run_is_sampled_by_its_average_and_its_vae(runs, tmp_path, name):
    path = sample(runs / name, tmp_path, "--cfg-scale", 2, "--guidance-high", 0.8, "--labels", "balanced", count=3)
    assert path.name == f"{name}_0400000_cfg2.0-0.0-0.8"
    sit, vae = published.fresh_sit(), published.fresh_vae()
    noise = torch.stack([torch.randn(SHAPE, generator=generator_for(0, "sample", i)) for i in range(3)])
    guidance = Guidance(2.0, null_label=3, low=0.0, high=0.8)
    z_norm = sample_ode(lambda x, t, y: sit(x, t, y)[0], noise, torch.arange(3), 3, guidance)
    scale, bias = (value.reshape(1, 4, 1, 1) for value in published.STATISTICS.values())
    expected = image_to_pixels(vae.decode((z_norm / scale + bias).float())).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 10
    assert np.abs(pixels_of(path).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("form", published.FORMS)
def test_a_transformer_that_others_published_is_sampled_by_its_vae(runs, tmp_path, form, capsys):
    """It lacks the normaliser, whose statistics are those of the VAE, and flags, which args.json completes."""
    flags = {key: value for key, value in published.FLAGS.items() if key != "num_classes"}
    other = published.write_foreign_run(tmp_path / "run", form, {**flags, "vae_ckpt": "moved.pt"})
    moved = "the VAE moved.pt, which is not there; say where it lies by --vae-ckpt FILE"
    assert moved in refusal("generate.py", "--exp-path", other)
    capsys.readouterr()
    options = ("--cfg-scale", 2, "--labels", "balanced", "--no-png")
    path = sample(other, tmp_path / "own", *options, "--vae-ckpt", runs / "vae/sdvae.pt")
    assert np.array_equal(pixels_of(path), pixels_of(sample(runs / "frozen", tmp_path / "frozen", *options)))
    said, taken = capsys.readouterr().out, {"bare": "a bare state dict"}.get(form, f"{form} (no ema inside)")
    assert (f"{STEP:07d}.pt: sampling from {taken}" in said) == (form not in ("REPA", "ema"))


def test_statistics_that_a_vae_states_are_said_to_be_taken(tmp_path, capsys):
    """REPA's latents are those of SD-VAE by its published factor; without any statistics the error says what to do."""
    other, folder = published.write_foreign_run(tmp_path / "run", "REPA", {"vae": published.VAE}), tmp_path / "sd-vae"
    vae, ones = published.fresh_vae(), torch.ones(1, 4, 1, 1)
    files = diffusers_files(folder, vae.state_dict(), vae.config, {"latents_scale": ones, "latents_bias": ones}, 32)
    config = json.loads(files[folder / "config.json"])
    config = {key: value for key, value in config.items() if not key.startswith(("latents_", "scaling_"))}
    write_new({**files, folder / "config.json": json.dumps(config).encode()})
    sample(other, tmp_path / "own", "--vae-ckpt", folder, count=1)
    assert "the published scaling factor 0.18215 and shift 0" in capsys.readouterr().out
    loaded = load_experiment(other, vae_ckpt=str(folder))
    assert torch.allclose(loaded.sit.latent_statistics()[0], torch.tensor(0.18215))
    torch.save(vae.state_dict(), tmp_path / "alone.pt")
    line = refusal("generate.py", "--exp-path", other, "--vae-ckpt", tmp_path / "alone.pt")
    assert "alone-latents-stats.pt: no such file; train_vae.py --stats-only measures them" in line


@pytest.mark.parametrize("flags", [("--mode", "ode"), ("--mode", "ode", "--heun"), ("--mode", "sde")])
def test_samples_do_not_depend_on_the_batch(runs, tmp_path, flags):
    one = pixels_of(sample(runs / "joint", tmp_path / "one", *flags, "--no-png", "--pproc-batch-size", 1))
    all_at_once = pixels_of(sample(runs / "joint", tmp_path / "all", *flags, "--no-png", "--pproc-batch-size", 7))
    assert np.abs(one.astype(int) - all_at_once).max() <= 1
    assert np.abs(one[0].astype(int) - one[1]).max() > 10


@pytest.mark.slow
def test_sampler_flags_change_the_samples(runs, tmp_path):
    made = {
        flags: pixels_of(sample(runs / "joint", tmp_path / "-".join(flags), "--no-png", *flags, count=2)).tobytes()
        for flags in (
            *((), ("--heun",), ("--mode", "sde"), ("--cfg-scale", "4"), ("--guidance-low", "0.5")),
            *(("--guidance-high", "0.5"), ("--global-seed", "1"), ("--num-steps", "5"), ("--classes", "1")),
        )
    }
    assert len(set(made.values())) == len(made)


def test_pngs_and_npz_hold_the_same_and_nothing_else(made):
    assert sorted(entry.name for entry in made.parent.iterdir()) == [
        *(made.name, made.name + ".json", made.name + ".npz")
    ]
    assert [entry.name for entry in sorted(made.iterdir())] == [f"{i:06d}.png" for i in range(7)]
    stored = np.load(npz_of(made))
    assert stored.files == ["arr_0"]
    assert (stored["arr_0"].shape, stored["arr_0"].dtype) == ((7, 32, 32, 3), np.uint8)
    for i, row in enumerate(stored["arr_0"]):
        assert np.array_equal(row, np.asarray(Image.open(made / f"{i:06d}.png")))


def test_the_manifest_says_what_shaped_the_samples(runs, tmp_path):
    path = sample(runs / "frozen", tmp_path, "--mode", "sde", "--cfg-scale", 1.5, "--guidance-low", 0.1, count=2)
    manifest = json.loads((tmp_path / (path.name + ".json")).read_text())
    samples, state = manifest["samples"], published.fresh_sit().state_dict()
    shaping = {k: v for k, v in state.items() if not k.startswith("projectors.")}
    assert samples.pop("time_convention") == "t=0 data, t=1 noise"
    assert samples.pop("model_fingerprint") == fingerprint(shaping)
    assert samples.pop("vae_fingerprint") == fingerprint(published.fresh_vae().state_dict())
    others = f"""experiment=frozen train_steps={STEP} model=SiT-XXS/2 vae=f4d4-tiny count=2 resolution=32 num_classes=3
        labels=random seed=0 pixels=rounded mode=sde num_steps=3 heun=False mixed_precision=no tf32=True cfg_scale=1.5
        guidance_low=0.1 guidance_high=1.0 path_type=linear"""
    assert {f"{name}={value}" for name, value in samples.items()} == set(others.split())
    assert manifest["made_with"]["torch"] == torch.__version__


def files_of(path, npz=True, png=True) -> SampleFiles:
    """The set that generate.py made at `path`."""
    samples = json.loads(path.with_name(path.name + ".json").read_text())["samples"]
    return SampleFiles(path.parent, path.name, samples, png, npz)


def test_an_interrupted_set_resumes_from_its_parts(runs, again):
    whole = pixels_of(again)
    npz_of(again).unlink()
    files = files_of(again)
    files.parts.mkdir()
    mark = np.full((3, 32, 32, 3), 7, np.uint8)
    for indices in ([0, 1, 2], [3, 4]):
        for write in files.writes(indices, mark[: len(indices)]):
            write()
    assert files.missing() == {5, 6}
    (again / "000004.png").unlink()  # as if the process was killed after the part and before the PNG
    (again / ".000005.png.1.tmp").write_bytes(b"half")
    assert files.missing() == {4, 5, 6}
    sample(runs / "joint", again.parent, "--pproc-batch-size", 3)
    assert np.array_equal(pixels_of(again)[:3], mark)
    assert np.abs(pixels_of(again)[3:].astype(int) - whole[3:]).max() <= 1  # 3, 4 and 5 are one batch, made whole
    assert not files.parts.exists()
    assert [entry.name for entry in sorted(again.iterdir())] == [f"{i:06d}.png" for i in range(7)]
    assert np.array_equal(np.asarray(Image.open(again / "000006.png")), pixels_of(again)[6])


def test_without_an_npz_a_set_resumes_from_its_pngs(runs, again):
    whole = pixels_of(again)
    npz_of(again).unlink()
    (again / "000003.png").unlink()
    kept = (again / "000002.png").stat().st_mtime_ns
    assert files_of(again, npz=False).missing() == {3}
    sample(runs / "joint", again.parent, "--no-npz", "--pproc-batch-size", 2)
    assert np.abs(np.asarray(Image.open(again / "000003.png")).astype(int) - whole[3]).max() <= 1
    assert (again / "000002.png").stat().st_mtime_ns != kept  # of the same batch
    assert not npz_of(again).exists()
    assert not files_of(again).parts.exists()


def test_a_finished_set_is_not_sampled_again(runs, again, monkeypatch):
    monkeypatch.setattr(generate, "sample_pixels", None)
    before = {entry: entry.stat().st_mtime_ns for entry in again.parent.rglob("*")}
    for flags in (("--pproc-batch-size", 2), ("--no-npz",)):
        sample(runs / "joint", again.parent, *flags)
    assert {entry: entry.stat().st_mtime_ns for entry in again.parent.rglob("*")} == before
    shutil.rmtree(again)
    sample(runs / "joint", again.parent, "--no-png", "--grid")
    assert again.with_name(again.name + ".png").is_file()


def test_what_cannot_be_resumed_is_one_line(runs, again):
    flags = ("--exp-path", runs / "joint", "--sample-dir", again.parent, "--num-fid-samples", 7, "--num-steps", 3)
    np.savez(npz_of(again), arr_0=np.zeros((6, 32, 32, 3), np.uint8))
    assert f"{npz_of(again)} is not of this set; delete" in refusal("generate.py", *flags)
    again.with_name(again.name + ".json").unlink()
    assert f"no {again.name}.json says how it was made" in refusal("generate.py", *flags)


def test_a_sample_that_is_missing_at_the_end_is_named_and_nothing_is_removed(again):
    files = files_of(again)
    npz_of(again).unlink()
    files.parts.mkdir()
    for write in files.writes([0, 1, 2], np.zeros((3, 32, 32, 3), np.uint8)):
        write()
    with pytest.raises(UserError, match="sample 3 is missing"):
        files.finish()
    assert not npz_of(again).exists()


def test_what_a_writing_thread_cannot_do_ends_sampling_in_one_line(runs, tmp_path, monkeypatch):
    real_sample, sampled = generate.sample_pixels, []

    def full(files, index, image):
        raise OSError(errno.ENOSPC, "No space left on device", f"{index}.png")

    def counted(*args):
        sampled.append(args)
        return real_sample(*args)

    flags = ("--exp-path", runs / "joint", "--sample-dir", tmp_path, "--num-steps", 1, "--pproc-batch-size", 1)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "sample_pixels", counted)
        patch.setattr(SampleFiles, "_write_png", full)
        line = refusal("generate.py", *flags, "--num-fid-samples", 20)
    assert "No space left on device: '0.png'; free some space and run the same again" in line
    assert len(sampled) <= WAITING + 1
    run("generate.py", *flags, "--num-fid-samples", 20)


def test_compiled_networks_see_the_same_shapes_in_every_batch(runs, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    def compile_on_cpus(modules, wanted, device) -> bool:
        for module in modules:
            module.compile(backend="eager", fullgraph=True)
        return wanted

    flags = ("--cfg-scale", 2, "--guidance-high", 0.5, "--no-png")
    plain = pixels_of(sample(runs / "joint", tmp_path / "plain", *flags, count=7))
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(generate, "COMPILE_FROM", 1)
    monkeypatch.setattr(generate, "compile_in_place", compile_on_cpus)
    # batches of 3, of which the last one has one sample; blocks see 3 and 6 rows, the decoder 3
    path = sample(runs / "joint", tmp_path / "compiled", *flags, "--pproc-batch-size", 3, count=7)
    assert np.abs(pixels_of(path).astype(int) - plain).max() <= 1
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    assert json.loads(path.with_name(path.name + ".json").read_text())["made_with"]["compile"]


def test_latents_are_decoded_in_parts_as_equal_as_can_be():
    vae, sizes = published.fresh_vae(), []
    vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    z = torch.randn(2 * DECODE_BATCH + 1, *SHAPE)
    pixels, finite = decode_pixels(vae, z)
    assert finite.tolist() == [True] * len(z)
    assert sizes == [11, 11, 11]
    with torch.no_grad():
        expected = torch.cat([image_to_pixels(vae.decode(part)) for part in z.split(1)])
    assert (pixels.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_cast_once_give_what_autocast_gives(precision):
    sit, vae = published.fresh_sit().requires_grad_(False), published.fresh_vae().requires_grad_(False)
    sampling = settings("--mixed-precision", precision, "--num-steps", "3")
    before, _ = sample_pixels(sit, vae, [0, 1], sampling)
    for network in (sit, vae):
        cast_weights(network, precision)
    casts = Counter(parameter.dtype for parameter in sit.parameters())
    assert casts[AUTOCAST_DTYPES[precision]] > casts[torch.float32] > 0
    assert torch.equal(sample_pixels(sit, vae, [0, 1], sampling)[0], before)


def test_flags_that_did_not_exist_mean_what_was_done_then():
    with torch.device("meta"):
        ema = SiT_models["SiT-S/2"](qk_norm=True).state_dict()
    sit = load_transformer(ema, {**REFERENCE_DEFAULTS, "model": "SiT-S/2"}, (4, 32, 32), "ema")
    assert (sit.input_size, sit.num_classes, sit.null_label) == (32, 1000, 1000)
    assert any("q_norm" in key for key in sit.state_dict())
    assert REFERENCE_DEFAULTS["path_type"] == "linear"
