"""`--config`: flags from files, and the presets of published experiments."""

import argparse
import importlib
import json
import re

import pytest
import yaml

import dataset
from errors import UserError
from generate import set_name
from published import FLAGS
from scripts import LAST, ROOT, records, run
from test_flags import PUBLISHED
from weights.trained_run import Experiment

PRESETS = sorted((ROOT / "configs/presets").glob("*.yaml"))
REPAE = ("train_repae", "save_vae_weights", "generate", "evaluate")
FROZEN = ("cache_latents", "train_ldm_only", "generate", "evaluate")
SECTIONS = {
    "repae-sdvae-xl2": REPAE,
    "repae-invae-xl1": REPAE,
    "repae-vavae-xl1": REPAE,
    "sit-sdvae-xl2": FROZEN,
    "repa-sdvae-xl2": FROZEN,
    "repa-e2e-vavae-xl1": FROZEN,
}
# differences of the presets from the published command lines
JOINT_LINE = """--model=SiT-XL/{patch} --vae={arch} --vae-ckpt=pretrained/{vae}/{vae}-{arch}.pt
    --disc-pretrained-ckpt=pretrained/{vae}/{vae}-{arch}-discriminator-ckpt.pt --exp-name=sit-repae-{vae}"""
SDVAE = "--model=SiT-XL/2 --vae=f8d4 --vae-ckpt=pretrained/sdvae/sdvae-f8d4.pt --vae-latents-name=sdvae"
FROZEN_LINES = {
    "repa-e2e-vavae-xl1": "--exp-name=sit-ldm-e2e-vavae",
    "repa-sdvae-xl2": f"{SDVAE} --exp-name=sit-repa-sdvae",
    "sit-sdvae-xl2": f"{SDVAE} --exp-name=sit-sdvae --max-train-steps=7000000 --enc-type=none --proj-coeff=0",
}
PUBLISHED_FILES = {"sit-sdvae-xl2": "SiT-XL-2-256x256", "repa-sdvae-xl2": "repa-last"}
GUIDANCE = {
    "repae-sdvae-xl2": (2.2, 0, 0.65),
    "repae-invae-xl1": (1.8, 0, 0.825),
    "repae-vavae-xl1": (1.9, 0, 0.825),
    "sit-sdvae-xl2": (1.5, 0, 1),
    "repa-sdvae-xl2": (1.8, 0, 0.7),
    "repa-e2e-vavae-xl1": (2.5, 0, 0.75),
}


def parsed(script: str, *flags: object) -> dict:
    return vars(importlib.import_module(script).parse_args([*map(str, flags)]))


def preset(name: str, script: str, *flags: str) -> dict:
    """The flags of a script that a preset gives, and `flags` after it."""
    return parsed(script, "--config", ROOT / f"configs/presets/{name}.yaml", *flags)


def from_file(tmp_path, text: str, *flags: object) -> dict:
    """The flags of joint training that a file of this text gives, and `flags` after it."""
    path = tmp_path / "flags.yaml"
    path.write_text(text)
    return parsed("train_repae", "--config", path, *flags)


def test_presets_are_the_published_command_lines():
    for vae, arch, patch in (("sdvae", "f8d4", 2), ("invae", "f16d32", 1), ("vavae", "f16d32", 1)):
        line = f"{PUBLISHED['train_repae.py'][0]} {JOINT_LINE.format(vae=vae, arch=arch, patch=patch)}"
        assert preset(f"repae-{vae}-xl{patch}", "train_repae") == parsed("train_repae", *line.split())
    for name, line in FROZEN_LINES.items():
        flags = preset(name, "train_ldm_only")
        assert flags == parsed("train_ldm_only", *PUBLISHED["train_ldm_only.py"][0].split(), *line.split())
        cached = preset(name, "cache_latents")
        assert (cached["vae_arch"], cached["vae_ckpt_path"]) == (flags["vae"], flags["vae_ckpt"])
        assert (cached["vae_latents_name"], cached["output_dir"]) == (flags["vae_latents_name"], flags["data_dir"])


@pytest.mark.parametrize("name", GUIDANCE)
def test_presets_sample_as_published_and_measure_that(name):
    flags = preset(name, "generate")
    assert (flags["mode"], flags["num_steps"], flags["num_fid_samples"], flags["heun"]) == ("sde", 250, 50000, False)
    assert (flags["cfg_scale"], flags["guidance_low"], flags["guidance_high"]) == GUIDANCE[name]
    trained = preset(name, SECTIONS[name][0] if name.startswith("repae") else "train_ldm_only")
    assert flags["path_type"] == trained["path_type"]
    if name in PUBLISHED_FILES:
        assert (str(flags["sit_ckpt"]), flags["vae"]) == (f"pretrained/{PUBLISHED_FILES[name]}.pt", trained["vae"])
        experiment = Experiment(PUBLISHED_FILES[name], 0, trained, None, None, assumed="the path")
    else:
        assert str(flags["exp_path"]) == f"{trained['output_dir']}/{trained['exp_name']}"
        assert flags["train_steps"] == trained["max_train_steps"]
        experiment = Experiment(trained["exp_name"], flags["train_steps"], trained, None, None)
    samples = set_name(argparse.Namespace(**flags), experiment)
    assert str(preset(name, "evaluate")["samples"]) == f"{flags['sample_dir']}/{samples}.npz"
    if name.startswith("repae"):
        checkpoint = flags["exp_path"] / f"checkpoints/{flags['train_steps']:07d}.pt"
        assert preset(name, "save_vae_weights")["repae_ckpt"] == checkpoint


def test_every_preset_has_the_sections_and_commands_of_its_experiment():
    assert [path.stem for path in PRESETS] == sorted(SECTIONS)
    for path in PRESETS:
        text = path.read_text()
        assert tuple(yaml.safe_load(text)) == SECTIONS[path.stem]
        commands = re.findall(r"^#.* (\w+)\.py --config (\S+)$", text, re.MULTILINE)
        assert commands == [(script, f"configs/presets/{path.name}") for script in SECTIONS[path.stem]]


def test_values_are_spelled_as_on_the_command_line(tmp_path):
    text = """
        exp_name: run
        compile: false
        qk-norm: true
        mixed_precision: no  # which YAML takes for false
        seed: -1
        learning_rate: 1e-3
        spatial_norm: 0.5
        vae_ckpt: ~
        enc_type: [dinov2-vit-b, mae-vit-l]
        enc_ckpt: [dinov2-vit-b=README.md, mae-vit-l=README.md]
        output_dir: ${exp_name}/here"""
    line = """--exp-name run --no-compile --qk-norm --mixed-precision no --seed=-1 --learning-rate 0.001
        --spatial-norm 0.5 --enc-type dinov2-vit-b,mae-vit-l --enc-ckpt dinov2-vit-b=README.md
        --enc-ckpt mae-vit-l=README.md --output-dir run/here"""
    assert from_file(tmp_path, text) == parsed("train_repae", *line.split())
    replaced = from_file(tmp_path, text, "--enc-ckpt", "mae-vit-l=errors.py")
    assert replaced["enc_ckpt"] == ["mae-vit-l=errors.py"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 4", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("train_repa: {seed: 1}", "unknown key 'train_repa'; did you mean 'train_repae'?"),
        ("batch_size: many", "argument --batch-size: 'many' is no integer; see "),
        ("enc_ckpt: [dinov2-vit-b=README.md, x]", "argument --enc-ckpt: 'x', expected NAME=PATH"),
        ("fused_attn: 'yes'", "fused_attn is 'yes', expected true or false"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_file_and_key(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        from_file(tmp_path, text, "--exp-name", "x")
    assert str(error.value).startswith(f"--config {tmp_path}/flags.yaml: {message}")


# flags that take a path, and what else a script needs
PATHS = {
    "preprocessing": ("imagenet_path output_path", ""),
    "train_vae": ("vae_ckpt loss_cfg_path disc_pretrained_ckpt lpips_vgg_ckpt", "--exp-name x"),
    "train_repae": ("output_dir logging_dir data_dir continue_train_exp_dir sit_ckpt eval_reference", "--exp-name x"),
    "train_ldm_only": ("vae_ckpt inception_weights exp_name vae_latents_name", ""),
    "cache_latents": ("vae_ckpt_path data_dir output_dir", ""),
    "save_vae_weights": ("repae_ckpt save_dir metrics", ""),
    "generate": ("exp_path vae_ckpt sample_dir", ""),
    "evaluate": ("samples reference save_stats output", ""),
}


@pytest.mark.parametrize("script", PATHS)
def test_home_and_environment_are_expanded_in_every_path(tmp_path, monkeypatch, script):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "some where")
    names, others = PATHS[script]
    pairs = (("~/a/$PLACE", f"{tmp_path}/a/some where"), ("${HOME}/b=~", f"{tmp_path}/b=~"), ("c~/d$", "c~/d$"))
    for text, expected in pairs:
        given = dict.fromkeys(names.split(), text)
        (tmp_path / "flags.yaml").write_text(yaml.safe_dump({script: given}))
        line = [f"--{name.replace('_', '-')}={text}" for name in given]
        for flags in (line, ["--config=~/flags.yaml"], ["--config", "$HOME/flags.yaml"]):
            found = parsed(script, *flags, *others.split())
            values = {name: found[name][0] if name == "metrics" else found[name] for name in given}
            assert set(map(str, values.values())) == {expected}, values


def test_home_and_environment_inside_values(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COUNT", "7")
    monkeypatch.setenv("scratch", "/s")
    (tmp_path / "w.pt").touch()
    flags = ("--exp-name", "x", "--enc-ckpt=mae-vit-l=~/w.pt", "--enc-ckpt", "dinov2-vit-b=$HOME/w.pt")
    found = parsed("train_repae", *flags, "--vae=diffusers:~/vae")
    assert found["enc_ckpt"] == [f"mae-vit-l={tmp_path}/w.pt", f"dinov2-vit-b={tmp_path}/w.pt"]
    assert (found["vae"], found["vae_ckpt"]) == (f"diffusers:{tmp_path}/vae", f"{tmp_path}/vae")
    found = from_file(tmp_path, "exp_name: run-$COUNT-${seed}\nseed: $COUNT\nenc_ckpt: ['mae-vit-l=~/w.pt']")
    assert (found["exp_name"], found["seed"]) == ("run-7-7", 7)
    assert found["enc_ckpt"] == [f"mae-vit-l={tmp_path}/w.pt"]
    assert from_file(tmp_path, "exp_name: x\noutput_dir: ${scratch}/$scratch")["output_dir"] == "/s//s"
    monkeypatch.setattr("sys.argv", ["dataset.py", "--verify=~/nothing"])
    with pytest.raises(UserError, match=f"{tmp_path}/nothing: no shards"):
        dataset.main()


def test_an_unknown_variable_or_user_is_named_unless_the_path_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ("--output-dir=$NO_SUCH/exps", "--output-dir=${NO_SUCH}", "--enc-ckpt=mae-vit-l=$NO_SUCH/w.pt")
    for flag in (*where, "--vae=diffusers:a$NO_SUCH"):
        with pytest.raises(UserError, match=r"argument --.*the environment has no variable NO_SUCH"):
            parsed("train_repae", "--exp-name", "x", flag)
    for text in ("output_dir: $NO_SUCH/exps", "output_dir: ${NO_SUCH}/exps", "train_repae: {data_dir: $NO_SUCH}"):
        with pytest.raises(UserError, match="--config .*NO_SUCH"):
            from_file(tmp_path, text, "--exp-name", "x")
    with pytest.raises(UserError, match="--data-dir: '~no-such-user/x': there is no such user"):
        parsed("train_repae", "--exp-name", "x", "--data-dir=~no-such-user/x")
    for name in ("$NO_SUCH", "~file"):
        (tmp_path / name).mkdir()
        assert parsed("train_repae", "--exp-name", "x", f"--data-dir={name}")["data_dir"] == name


def test_a_published_args_json_is_a_config(tmp_path):
    flags = from_file(tmp_path, json.dumps({**FLAGS, "vae_ckpt": None}), "--exp-name", "x")
    assert flags == {**parsed("train_repae", "--exp-name", "x"), **FLAGS}


def test_the_command_line_overrides_the_section_which_overrides_the_flags_outside(tmp_path, monkeypatch, capsys):
    text = "seed: 1\nepochs: 1\nnum-workers: 1\ntrain_repae: {seed: 2, epochs: 2, exp_name: f}"
    flags = from_file(tmp_path, text, "--seed", 3)
    assert [flags[name] for name in ("seed", "epochs", "num_workers", "exp_name")] == [3, 2, 1, "f"]
    printed = "flags from the command line: seed=3 flags from flags.yaml: epochs=2 num_workers=1 exp_name=f"
    assert capsys.readouterr().out.replace(f"{tmp_path}/", "").split() == printed.split()
    monkeypatch.setenv("RANK", "1")
    from_file(tmp_path, text)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_args_json_of_a_run_repeats_it(whole_run):
    path, checkpoint = whole_run / "args.json", whole_run / f"checkpoints/{LAST:07d}.pt"
    saved, before = path.read_text(), checkpoint.stat().st_mtime_ns
    assert parsed("train_repae", "--config", path) == json.loads(saved)
    run("train_repae.py", "--config", path)
    assert (path.read_text(), checkpoint.stat().st_mtime_ns) == (saved, before)
    assert len(records(whole_run / "metrics.jsonl")) == LAST
