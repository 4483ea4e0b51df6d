"""VAEs from and to diffusers and single files: the same weights to the bit, the same pictures to rounding."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import train_repae
from dataset import open_images
from errors import UserError
from hub import Hub, serving, use_hub
from models.autoencoder import VAE_CONFIGS, AutoencoderKL, pixels_to_image
from models.sit import SiT_models
from scripts import TINY, TINY_SIT, equal, records, run
from training.build import find_vae
from weights.checkpoint_io import fingerprint, read_checkpoint, vae_files, write_atomically, write_new
from weights.diffusers_layout import EARLIER_NAMES, from_diffusers_config, to_diffusers_state
from weights.vae import diffusers_files, find_statistics, find_weights, known_statistics, load_vae, open_vae

# FLUX's and SD 3.5's layout, small: 16 channels, no quant convolutions, shift and scaling factor
FLUX = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> str:
    """The folder of a small VAE of FLUX's layout, written by diffusers."""
    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**FLUX).save_pretrained(folder)
    return str(folder)


def assert_same_network(ours: AutoencoderKL, theirs: diffusers.AutoencoderKL, side: int) -> None:
    """Both encode and decode a picture alike, to 1e-5 of what comes out."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.eval().encode(image), theirs.eval().encode(image).latent_dist
        pictures = ours.decode(posterior.mean), theirs.decode(posterior.mean).sample
    for found, wanted in ((posterior.mean, expected.mean), (posterior.logvar, expected.logvar), pictures):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["f16d32", "flux-f8d16"])
def test_ours_to_diffusers_and_back(name, tmp_path):
    torch.manual_seed(1)
    vae, config = VAE_CONFIGS[name].build(), VAE_CONFIGS[name]
    scale = torch.rand(1, config.z_channels, 1, 1) + 0.3
    bias = torch.randn(1, config.z_channels, 1, 1)
    statistics = {"latents_scale": scale, "latents_bias": bias}
    write_new(diffusers_files(tmp_path, vae.state_dict(), config, statistics, 256))
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert_same_network(vae, theirs, 64)
    assert theirs.config.scaling_factor == 1
    torch.testing.assert_close(torch.tensor(theirs.config.latents_mean), bias.flatten())
    torch.testing.assert_close(torch.tensor(theirs.config.latents_std), 1 / scale.flatten())

    source = open_vae(f"diffusers:{tmp_path}", str(tmp_path), offline=True)
    assert source.config == config
    assert equal(load_vae(source).state_dict(), vae.state_dict())
    assert equal(known_statistics(source), (scale, bias))
    assert open_vae(name, str(tmp_path), offline=True).config is config


def test_earlier_names_of_attention(tmp_path):
    """SD-VAE is published with them; diffusers itself renames them."""
    vae = VAE_CONFIGS["f4d4-tiny"].build()
    state = to_diffusers_state(vae.state_dict(), vae.config)
    for earlier, present in EARLIER_NAMES.items():
        state = {key.replace(f".{present}.", f".{earlier}."): value for key, value in state.items()}
    assert "encoder.mid_block.attentions.0.query.weight" in state
    save_file(state, tmp_path / "vae.safetensors")
    loaded = load_vae(open_vae("f4d4-tiny", str(tmp_path / "vae.safetensors"), offline=True))
    assert equal(loaded.state_dict(), vae.state_dict())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_vae_that_was_aligned_to_a_foundation_model(wrapper, tmp_path):
    """LightningDiT publishes VA-VAE with what it was aligned to; what nobody knows is still refused."""
    vae, path, one = VAE_CONFIGS["f4d4-tiny"].build(), tmp_path / "vavae.pt", torch.ones(1)
    training = {"foundation_model.model.cls_token": one, "linear_proj.weight": one, "loss.logvar": one}
    state = {**vae.state_dict(), **training}
    write_atomically({wrapper: state} if wrapper else state, path)
    source = open_vae("f4d4-tiny", str(path), offline=True)
    assert equal(load_vae(source).state_dict(), vae.state_dict())
    write_atomically({wrapper: {**state, "regulariser.weight": one}} if wrapper else {**state, "x": one}, path)
    with pytest.raises(UserError, match="1 unexpected weights, first (regulariser.weight|x)"):
        load_vae(source)


@pytest.mark.parametrize("form", ["ckpt", "whole model", "half"])
def test_single_files(form, tmp_path):
    torch.manual_seed(0)
    vae = VAE_CONFIGS["f4d4-tiny"].build()
    state, path = vae.state_dict(), tmp_path / ("vae.ckpt" if form == "ckpt" else "vae.safetensors")
    if form == "ckpt":  # an autoencoder of latent diffusion, with its loss and average
        other = {"loss.discriminator.main.0.weight": torch.ones(1), "model_ema.decay": torch.ones(1)}
        write_atomically({"state_dict": {**state, **other}, "epoch": 3}, path)
    elif form == "whole model":
        inside = {f"first_stage_model.{key}": value.contiguous() for key, value in state.items()}
        save_file({**inside, "model.diffusion_model.out.weight": torch.ones(2)}, path)
    else:
        save_file({key: value.bfloat16().contiguous() for key, value in state.items()}, path)
        state = {key: value.bfloat16().float() for key, value in state.items()}
    source = open_vae("f4d4-tiny", str(path), offline=True)
    assert equal(load_vae(source).state_dict(), dict(state))
    with pytest.raises(UserError, match="vae-latents-stats.pt: no such file; train_vae.py --stats-only measures"):
        known_statistics(source)


def test_published_normalisers(tmp_path, flux, capsys):
    """They hold for what is published alone, not for a tuned VAE whose statistics were left behind."""
    save_file({"weight": torch.ones(1)}, tmp_path / "ae.safetensors")
    for name, scaling, shift in (("flux-f8d16", 0.3611, 0.1159), ("sd35-f8d16", 1.5305, 0.0609)):
        scale, bias = known_statistics(open_vae(name, str(tmp_path / "ae.safetensors"), offline=True))
        assert equal((scale, bias), (torch.full((1, 16, 1, 1), scaling), torch.full((1, 16, 1, 1), shift)))
    source = open_vae(f"diffusers:{flux}", flux, offline=True)
    scale, bias = known_statistics(source)
    assert (float(scale[0, 0]), float(bias[0, 0])) == pytest.approx((0.3611, 0.1159))
    assert "published scaling factor 0.3611 and shift 0.1159" in capsys.readouterr().out
    write_atomically(AutoencoderKL(source.config).state_dict(), tmp_path / "tuned.pt")
    for name in (f"diffusers:{flux}", "flux-f8d16", "sd35-f8d16"):
        source = open_vae(name, str(tmp_path / "tuned.pt"), offline=True)
        assert find_statistics(source) is None
        with pytest.raises(UserError, match="tuned-latents-stats.pt: no such file"):
            known_statistics(source)


def rarer_form(flux: str, folder: Path, form: str) -> list[Path]:
    """The VAE as diffusers writes it in other forms: half precision, shards, or a file of another name; its weights."""
    folder.mkdir(parents=True)
    shutil.copy(Path(flux, "config.json"), folder)
    vae = diffusers.AutoencoderKL.from_pretrained(flux, torch_dtype=torch.float16 if "half" in form else None)
    if form == "named":
        save_file(vae.state_dict(), folder / "flux_vae.safetensors")
    else:
        options = {"max_shard_size": "200KB"} if "shards" in form else {}
        options |= {"variant": "fp16"} if "half" in form else {}
        vae.save_pretrained(folder, safe_serialization="bin" not in form, **options)
    return sorted(path for path in folder.iterdir() if path.name != "config.json")


def states(flux: str) -> tuple[dict, dict]:
    """The weights of the VAE in float32, and rounded to float16."""
    whole = dict(load_vae(open_vae(f"diffusers:{flux}", flux, offline=True)).state_dict())
    return whole, {key: value.half().float() for key, value in whole.items()}


@pytest.mark.parametrize("form", ["half", "shards bin", "half shards", "named"])
def test_rarer_forms_of_a_folder(form, flux, tmp_path):
    """By the folder, the pipeline's folder above it, and the file itself; statistics are those of config.json."""
    folder, (whole, half) = tmp_path / "pipeline/vae", states(flux)
    files = rarer_form(flux, folder, form)
    assert not any(file.stem == "diffusion_pytorch_model" for file in files)
    index = next((file for file in files if ".index." in file.name), files[0])
    assert ("shards" in form) == (len(files) > 2)
    for given in (folder, folder.parent, *([index] if form != "named" else [])):
        source = open_vae(f"diffusers:{given}", str(given), offline=True)
        assert equal(dict(load_vae(source).state_dict()), half if "half" in form else whole)
        assert float(known_statistics(source)[0][0, 0]) == pytest.approx(0.3611)
    run("save_vae_weights.py", "--vae", f"diffusers:{given}", "--vae-name", "copy", "--save-dir", tmp_path)
    if "shards" in form:
        files[0].unlink()
        with pytest.raises(UserError, match=f"{files[0].name}: no such file"):
            load_vae(source)


def test_a_config_beside_a_file_of_another_name_may_be_of_something_else(flux, tmp_path):
    """It is ignored."""
    vae = VAE_CONFIGS["f4d4-tiny"].build()
    state = {key: value.contiguous() for key, value in vae.state_dict().items()}
    save_file(state, tmp_path / "vae.safetensors")
    write_atomically(state, tmp_path / "vae.pt")
    write_atomically(state, tmp_path / "v.index.3.ckpt")
    of_flux = Path(flux, "config.json").read_text()
    others = ('{"model_type": "vit"}', '{"_class_name": "SiT"}', '{"_class_name": "AutoencoderTiny"}', "[1]", "{")
    for config in (*others, of_flux):
        (tmp_path / "config.json").write_text(config)
        source = open_vae("f4d4-tiny", str(tmp_path / "vae.safetensors"), offline=True)
        assert source.published is None
        assert equal(load_vae(source).state_dict(), vae.state_dict())
    with pytest.raises(UserError, match="weights are missing, first encoder"):
        load_vae(open_vae(f"diffusers:{tmp_path}", str(tmp_path), offline=True))
    assert find_weights(str(tmp_path / "vae.pt"), offline=True)[1] is None
    load_vae(open_vae("f4d4-tiny", str(tmp_path / "v.index.3.ckpt"), offline=True))
    save_file(state, tmp_path / "second.safetensors")
    with pytest.raises(UserError, match="2 files of weights beside config.json; name one"):
        find_weights(str(tmp_path), offline=True)


@contextmanager
def hub_of(files: dict[str, bytes], cache: Path, monkeypatch) -> Iterator[Hub]:
    """A hub that serves these files, with an empty cache on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving(files) as hub:
        use_hub(hub, monkeypatch)
        yield hub


def test_a_repository_of_the_hub(flux, tmp_path, monkeypatch):
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    files = {f"/some/pipeline/resolve/v2/vae/{name}": Path(flux, name).read_bytes() for name in names}
    with hub_of({**files, "/some/pipeline/resolve/v2/model_index.json": b"{}"}, tmp_path / "hub", monkeypatch) as hub:
        with pytest.raises(UserError, match="some/pipeline@v2 is not on this machine, and offline"):
            find_weights("some/pipeline@v2", offline=True)
        path, config = find_weights("some/pipeline@v2", offline=False)
        assert path.read_bytes() == Path(flux, names[1]).read_bytes()
        assert from_diffusers_config(config, "").z_channels == 16
        asked = len(hub.requests)
        assert find_weights("some/pipeline@v2", offline=True)[0] == path
        assert find_weights("some/pipeline@v2", offline=False)[0] == path
        assert len(hub.requests) == asked
        with pytest.raises(UserError, match="could not download some/other"):
            find_weights("some/other", offline=False)


@pytest.mark.parametrize("form", ["half", "half shards"])
def test_rarer_forms_of_a_repository(form, flux, tmp_path, monkeypatch):
    files = [*rarer_form(flux, tmp_path / "vae", form), tmp_path / "vae/config.json"]
    _, half = states(flux)
    served = {f"/some/vae/resolve/main/{file.name}": file.read_bytes() for file in files}
    with hub_of(served, tmp_path / "hub", monkeypatch) as hub:
        for offline in (False, True):
            source = open_vae("diffusers:some/vae", "some/vae", offline)
            assert equal(dict(load_vae(source).state_dict()), half)
        assert sorted(hub.downloads()) == sorted(served)


@pytest.mark.slow
def test_a_vae_of_fluxs_layout_is_tuned_sampled_exported_and_cached(flux, tiny_data, vgg_weights, tmp_path):
    flags = (*TINY, *TINY_SIT, "--data-dir", tiny_data, "--lpips-vgg-ckpt", vgg_weights, "--output-dir", tmp_path)
    more = ("--vae", f"diffusers:{flux}", "--model", "SiT-XXS", "--exp-name", "flux", "--num-workers", 0)
    run("train_repae.py", *flags, *more, "--max-train-steps", 2)
    folder, tuned = tmp_path / "flux", tmp_path / "tuned"
    args = json.loads((folder / "args.json").read_text())
    assert (args["model"], args["vae"], args["vae_ckpt"]) == ("SiT-XXS/2", f"diffusers:{flux}", flux)
    assert len(records(folder / "metrics.jsonl")) == 2
    sampled = ("--num-fid-samples", 2, "--num-steps", 2, "--sample-dir", tmp_path, "--no-npz")
    run("generate.py", "--exp-path", folder, *sampled)
    extraction = ("--repae-ckpt", folder / "checkpoints/0000002.pt", "--vae-name", "tuned", "--save-dir", tmp_path)
    for form in ("diffusers", "pt"):
        run("save_vae_weights.py", *extraction, "--format", form)
    theirs = diffusers.AutoencoderKL.from_pretrained(tuned)
    assert not theirs.config.use_quant_conv
    before = diffusers.AutoencoderKL.from_pretrained(flux)
    assert fingerprint(theirs.state_dict()) != fingerprint(before.state_dict())
    checkpoint = read_checkpoint(folder / "checkpoints/0000002.pt")
    back = load_vae(open_vae(f"diffusers:{tuned}", str(tuned), offline=True))
    assert equal(dict(back.state_dict()), dict(checkpoint["vae"]))
    assert_same_network(back, theirs, 32)
    running = checkpoint["ema"]["bn.running_mean"], checkpoint["ema"]["bn.running_var"].sqrt()
    torch.testing.assert_close(torch.tensor(theirs.config.latents_mean), running[0])
    torch.testing.assert_close(torch.tensor(theirs.config.latents_std), running[1])
    # the card's commands are for the folder that it lies in
    cached = "python cache_latents.py --vae-arch diffusers:tuned --vae-ckpt-path tuned --vae-latents-name tuned"
    assert cached in (tuned / "README.md").read_text()
    # the other form holds the same, and is made of the first one as well
    run("save_vae_weights.py", "--vae", f"diffusers:{tuned}", "--vae-name", "again", "--save-dir", tmp_path)
    for suffix in (".pt", "-latents-stats.pt"):
        first, again = (read_checkpoint(tmp_path / name / f"{name}{suffix}") for name in ("tuned", "again"))
        assert equal(first, again)
    caching = ("--vae-arch", f"diffusers:{tuned}", "--vae-latents-name", "cached", "--data-dir", tiny_data)
    run("cache_latents.py", *caching, "--output-dir", tmp_path, "--num-workers", 0)
    assert json.loads((tmp_path / "cached/index.json").read_text())["shape"] == [16, 4, 4]


def test_statistics_alone(flux, tiny_data, tmp_path, capsys):
    flags = ("--stats-only", "--vae", f"diffusers:{flux}", "--exp-name", "flux", "--output-dir", tmp_path)
    flags += ("--batch-size", 4, "--data-dir", tiny_data, "--resolution", 32, "--report-to", "none", "--num-workers", 0)
    run("train_vae.py", *flags)
    assert "statistics of an earlier time" not in capsys.readouterr().err
    files = vae_files(tmp_path / "flux/flux.pt")
    assert [path.is_file() for path in files] == [True, True, False]
    source = open_vae(f"diffusers:{flux}", str(files.weights), offline=True)
    vae, (scale, bias) = load_vae(source), known_statistics(source)
    data = open_images(tiny_data)
    with torch.no_grad():
        posterior = vae.encode(pixels_to_image(torch.stack([data[i][0] for i in range(len(data))])))
    torch.testing.assert_close(bias.flatten(), posterior.mean.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    second = (posterior.mean.square() + posterior.std.square()).mean((0, 2, 3)) - bias.flatten().square()
    torch.testing.assert_close(scale.flatten(), second.rsqrt(), rtol=1e-3, atol=1e-5)


def test_a_model_without_a_patch_takes_it_from_the_vae():
    for vae, patch in (("f8d4", 2), ("flux-f8d16", 2), ("f16d32", 1), ("f4d4-tiny", 4)):
        args = train_repae.parse_args(["--exp-name", "x", "--model", "SiT-XL", "--vae", vae])
        find_vae(args)
        assert args.model == f"SiT-XL/{patch}"
        assert SiT_models[args.model].keywords["patch_size"] == patch
