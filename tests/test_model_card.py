"""The card of a tuned VAE: everything that is known stands in it, and nothing else."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import published
import train_repae
from errors import UserError
from images import make_data
from scripts import call
from weights.checkpoint_io import read_checkpoint
from weights.model_card import TEMPLATE, fill, training_command, vae_fingerprint, write_model_card

FLAGS = (
    *("--exp-name", "my run", "--data-dir", "/data/o'clock", "--vae", "f4d4-tiny", "--vae-ckpt", "sd/sd.pt"),
    *("--vae-align-proj-coeff", "0.75", "--no-fused-attn", "--gradient-checkpointing", "--learning-rate", "1e-6"),
    *("--enc-ckpt", "dinov2-vit-b=README.md", "--enc-ckpt", "mae-vit-l=pyproject.toml", "--resume-step", "5"),
)


@pytest.fixture
def run(tmp_path) -> tuple[Path, dict, Path]:
    """A folder with a VAE, the joint checkpoint of step 400000 that it is of, and that one's path."""
    path = published.write_run(tmp_path / "sit-repae", joint=True)
    vae = published.write_vae(tmp_path / "e2e")
    return vae.parent, read_checkpoint(path), path


def card(run, metrics=()) -> str:
    """The card of the fixture's VAE."""
    folder, checkpoint, path = run
    write_model_card(folder, "sdvae", checkpoint, path, list(metrics))
    return (folder / "README.md").read_text()


def test_a_published_checkpoint_alone_gives_a_card_of_what_is_known(run):
    folder, checkpoint, path = run
    assert write_model_card(folder, "sdvae", checkpoint, path, []) == [folder / "README.md"]
    text = card(run)
    assert "an AutoencoderKL of 293,159 parameters" in text
    assert "latents (4,H/4,W/4)" in text
    assert "Over 4 channels" in text
    assert "means from -0.2 to 0.3, standard deviations from 0.25 to 2." in text
    assert "| steps | 400,000 |" in text
    assert vae_fingerprint(checkpoint) in text
    assert "library_name: pytorch\n" in text
    assert "**FILL IN.**" in text and "# license: FILL IN" in text
    assert "--vae f4d4-tiny --vae-ckpt sdvae/sdvae.pt" in text
    for absent in ("diffusers", "## Metrics", "Means of", "## Pictures", "images seen", "| time |", "lowest", "$"):
        assert absent not in text, absent


def test_the_card_says_how_what_is_there_is_loaded(run):
    folder = run[0]
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / name).touch()
    text = card(run)
    assert "library_name: diffusers\n" in text
    assert 'AutoencoderKL.from_pretrained("sdvae")' in text
    assert "`sdvae-latents-stats.pt` holds" in text and "config.json holds latents_mean" in text
    assert "--vae diffusers:sdvae --vae-ckpt sdvae " in text
    for path in folder.glob("*.pt"):
        path.unlink()
    text = card(run)
    assert "--vae diffusers:sdvae --vae-ckpt sdvae " in text
    assert "sdvae-latents-stats.pt" not in text and "sdvae-discriminator-ckpt.pt" not in text


def test_the_diffusers_code_of_the_card_runs(run, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(scaling_factor=1.0, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 4.0])
    vae.save_pretrained(run[0])
    code = card(run).split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run[0].parent)
    names = {"image": torch.zeros(1, 3, 8, 8)}
    exec(code.replace('"sdvae"', '"e2e"'), names)
    assert names["image"].shape == (1, 3, 8, 8)
    assert names["z_norm"].shape == (1, 4, 8, 8)


def test_the_training_command_is_the_run_again_and_holds_no_defaults():
    args = vars(train_repae.parse_args(list(FLAGS)))
    command = training_command({**args, "flag_of_others": 3, "config": "x.yaml"})
    launcher, launch, script, *words = shlex.split(command.replace("\\\n", ""))
    assert (launcher, launch, script) == ("accelerate", "launch", "train_repae.py")
    assert vars(train_repae.parse_args(words)) == {**args, "resume_step": 0}
    assert not {"--batch-size", "--model", "--compile", "--config", "--resume-step"} & set(words)


def test_a_run_that_lacks_its_name_is_called_as_its_folder_is(run):
    assert "    --exp-name sit-repae \\\n" in card(run)


def test_log_pictures_and_the_best_are_those_up_to_the_checkpoint(run):
    folder, checkpoint, path = run
    exp = path.parent.parent
    records = [{"step": i, "psnr": i, "kl_loss": None if i == 400000 else 2.0} for i in range(399801, 400010)]
    (exp / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4')
    (path.parent / "best.json").write_text(
        json.dumps({"measure": {"samples": 100}, "step": 300000, "values": {"eval_fid": 12.3456}})
    )
    for kind, steps in {"reconstructions": (10, 399990, 400010), "samples": (390000,)}.items():
        (exp / kind).mkdir()
        for step in steps:
            Image.new("RGB", (2, 2), (step % 251, 0, 0)).save(exp / kind / f"{step:07d}.png")
    written = write_model_card(folder, "sdvae", checkpoint, path, [])
    assert written == [folder / name for name in ("README.md", "reconstructions.png", "samples.png")]
    assert (folder / "reconstructions.png").read_bytes() == (exp / "reconstructions/0399990.png").read_bytes()
    text = (folder / "README.md").read_text()
    assert "Means of the last 100 logged steps" in text
    assert "| psnr | 4e+05 |" in text and "| kl_loss | 2 |" in text and "proj_loss" not in text
    assert "at step 399990:\n\n![reconstructions](reconstructions.png)" in text
    assert "was at step 300000: eval_fid 12.35, of 100 samples" in text


@pytest.fixture
def results(run, tmp_path, vgg_weights) -> dict[str, Path]:
    """What evaluate.py writes about the VAE and about samples of its run."""
    samples = tmp_path / "samples/sit-repae_0400000_cfg1.5-0.0-1.0"
    sampling = ("--exp-path", run[2].parent.parent, "--sample-dir", samples.parent, "--num-fid-samples", 4)
    data = make_data(tmp_path / "images", per_class=2)
    features = ("--features", "efficientnet-lite0", "--num-workers", 0)
    vae = (
        "--vae",
        run[0] / "sdvae.pt",
        "--vae-arch",
        published.VAE,
        "--data-dir",
        data,
        "--lpips-vgg-ckpt",
        vgg_weights,
    )
    for script, *flags in (
        ("generate.py", *sampling, "--num-steps", 2, "--no-png"),
        ("evaluate.py", "--samples", f"{samples}.npz", "--reference", f"{samples}.npz", *features),
        ("evaluate.py", *vae, *features),
    ):
        code, stderr = call(script, *flags)
        assert code == 0, stderr
    return {"samples": Path(f"{samples}.metrics.json"), "reconstruction": run[0] / "sdvae.metrics.json"}


def test_results_of_evaluate_are_quoted_and_those_of_other_vaes_refused(run, results):
    text = card(run, results.values())
    values = {name: json.loads(file.read_text())["metrics"] for name, file in results.items()}
    assert f"- reconstruction of 6 images: psnr {values['reconstruction']['psnr']:.4g}, ssim " in text
    how = "of sit-repae at step 400000 (SiT-XXS/2; ode, 2 steps, guidance 1.5 for t from 0 to 1)"
    fd = values["samples"]["fd_efficientnet_lite0"]
    assert f"- 4 samples against sit-repae_0400000_cfg1.5-0.0-1.0.npz, {how}: fd_efficientnet_lite0 {fd:.4g}, " in text
    for file in results.values():
        good = file.read_text()
        file.write_text(good.replace(vae_fingerprint(run[1]), "another"))
        with pytest.raises(UserError, match=f"{file.name}: measured another VAE than this one"):
            card(run, results.values())
        file.write_text(good)
    for content in ("[]", "{", '{"metrics": {}, "samples": null, "manifest": null, "reference": null}'):
        file.write_text(content)
        with pytest.raises(UserError, match=f"{file.name}: not what evaluate.py writes"):
            card(run, [file])
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        card(run, [file.with_name("nowhere.json")])


def test_what_a_checkpoint_of_ours_also_knows_stands_in_the_card(run):
    folder, checkpoint, path = run
    args = vars(train_repae.parse_args(["--exp-name", "joint", "--vae", "f4d4-tiny"]))
    identity = {"data": "data-hash", "encoders": {"dinov2-vit-b": "encoder-hash"}, "loss": {"kl_weight": 1e-6}}
    text = card((folder, {**checkpoint, "args": args, "identity": identity, "time_convention": "t=0 data"}, path))
    for known in (
        "data-hash",
        "encoder-hash",
        "kl_weight 1e-06",
        "| time | t=0 data |",
        "| images seen | 102,400,000 |",
    ):
        assert known in text, known


def test_paragraphs_without_values_take_their_announcements_with_them():
    template = "# $a\n\n## One\n\nsee:\n\n$b\n\n## Two\n\ntext\n\n## Three\n\n$c"
    assert fill(template, {"a": "x", "b": "", "c": None}) == "# x\n\n## Two\n\ntext\n"
    assert (
        fill(template, {"a": "x", "b": "$y", "c": "z"})
        == template.replace("$a", "x").replace("$b", "$y").replace("$c", "z") + "\n"
    )


def test_the_template_is_a_card_of_the_hub():
    from huggingface_hub import ModelCard

    text = TEMPLATE.read_text(encoding="utf8").replace("$library", "diffusers")
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.library_name == "diffusers" and "vae" in data.tags and data.license is None
