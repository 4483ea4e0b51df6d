"""The card of a tuned VAE: a README that says what it is, how it was made and how good it is, from what is known.

configs/model_card.md is the template. A paragraph of it whose $placeholder has no value is left out, and with it what
only announces it, a line that ends in a colon or a heading: a card never says what is not known.
"""

import json
import platform
import re
import shlex
import shutil
from collections import deque
from importlib.metadata import version
from pathlib import Path
from string import Template

from torch import Tensor

from errors import UserError
from storage.files import replace_text, written_whole
from training.log import is_record
from training.state import read_note
from weights.checkpoint_io import ema_latent_statistics, fingerprint, strip_prefixes, training_flags, vae_files
from weights.vae import CONFIG, DIFFUSERS, DIFFUSERS_FILES

TEMPLATE = Path(__file__).parent.parent / "configs/model_card.md"
TO_FILL_IN = "**FILL IN.**"  # stands in the template until somebody has read the card
LOGGED_STEPS = 100
LOGGED = (
    *("psnr", "reconstruction_loss", "perceptual_loss", "kl_loss", "weighted_gan_loss", "vae_align_loss"),
    *("denoising_loss", "proj_loss"),
)
# what a run's flags say of its training, in the order of the card
TRAINING = {
    "starting VAE": "vae_ckpt",
    "its discriminator": "disc_pretrained_ckpt",
    "images": "data_dir",
    "size of the images": "resolution",
    "images a step": "batch_size",
    "transformer": "model",
    "encoder": "enc_type",
    "block aligned": "encoder_depth",
    "weight of the VAE's alignment": "vae_align_proj_coeff",
    "weight of the transformer's alignment": "proj_coeff",
    "learning rate of the VAE": "vae_learning_rate",
    "precision": "mixed_precision",
    "loss": "loss_cfg_path",
}
NOT_REPEATED = {"resume_step", "wandb_history_path"}


def write_model_card(folder: Path, name: str, checkpoint: dict, path: Path, metrics: list[Path]) -> list[Path]:
    """Write README.md, and the run's newest pictures, beside the VAE `name` that lies in `folder`; returns their paths.

    A card whose licence has been filled in stays, and the new one becomes README.new.md.

    Args:
        folder: holds the VAE's .pt files, diffusers' files, or both.
        checkpoint: the joint checkpoint that it was taken from.
        path: where that lies; log and pictures are its run's, as far as they are there.
        metrics: results of evaluate.py, of this VAE or of samples decoded by it.

    Raises:
        UserError: a file of `metrics` is no such results, or of another VAE.
    """
    flags, step, run = training_flags(checkpoint, path), int(checkpoint.get("steps", 0)), path.absolute().parent.parent
    pictures = {kind: newest_picture(run / kind, step) for kind in ("reconstructions", "samples")}
    facts = {
        "name": name,
        **uses(folder, name, flags),
        **architecture(flags, strip_prefixes(checkpoint["vae"])),
        **latents(checkpoint, path),
        "training": training(flags, checkpoint.get("identity") or {}, step),
        "command": training_command({"exp_name": run.name, **flags}) if flags else None,
        "measured": "\n".join(measured(file, vae_fingerprint(checkpoint)) for file in metrics),
        **logged(run / "metrics.jsonl", step),
        "best": best(path.parent, step),
        "reproducing": reproducing(checkpoint, path, run.name, step),
    }
    written = []
    for kind, picture in pictures.items():
        if picture is not None:
            facts |= {kind: f"{kind}.png", f"{kind}_step": int(picture.stem)}
            copy_file(picture, folder / f"{kind}.png")
            written.append(folder / f"{kind}.png")
    card, text = folder / "README.md", fill(TEMPLATE.read_text(encoding="utf8"), facts)
    if card.exists() and TO_FILL_IN not in card.read_text(encoding="utf8"):  # somebody has worked on it
        card = folder / "README.new.md"
    replace_text(card, text)
    return [card, *written]


def fill(template: str, facts: dict) -> str:
    """The template with its placeholders filled, but for paragraphs that lack a value and what announces them."""
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    kept, is_kept = [], False
    for paragraph in reversed(template.strip().split("\n\n")):
        lonely = paragraph.endswith(":") and not is_kept
        lonely |= paragraph.startswith("## ") and (not kept or kept[-1].startswith("## "))
        is_kept = not lonely and known.keys() >= set(Template(paragraph).get_identifiers())
        if is_kept:
            kept.append(paragraph)
    return "\n\n".join(Template(paragraph).substitute(known) for paragraph in reversed(kept)) + "\n"


def uses(folder: Path, name: str, flags: dict) -> dict[str, str]:
    """How the files that are there are loaded, and which convention their latent statistics have."""
    files = vae_files(folder / f"{name}.pt")
    is_diffusers = (folder / CONFIG).is_file() and (folder / DIFFUSERS_FILES[0]).is_file()
    facts = {"library": "diffusers" if is_diffusers else "pytorch"}
    conventions = []
    if files.statistics.is_file():
        conventions.append(f"`{files.statistics.name}` holds latents_bias = mean and latents_scale = 1/std.")
    if is_diffusers:
        facts["diffusers_code"] = (
            "import torch\nfrom diffusers import AutoencoderKL\n"
            f'vae = AutoencoderKL.from_pretrained("{name}")\n'
            "mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)\n"
            "std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)\n"
            "z_norm = (vae.encode(image).latent_dist.sample() - mean) / std  # image: (B,3,H,W) with range [-1, 1]\n"
            "image = vae.decode(z_norm * std + mean).sample"
        )
        conventions.append(
            "config.json holds latents_mean, latents_std and scaling_factor 1.0, as SDXL's pipelines take them: "
            "(z - latents_mean)·scaling_factor/latents_std."
        )
    if (arch := flags.get("vae")) is not None:
        is_row = not str(arch).startswith(DIFFUSERS)
        arch, weights = (f"{DIFFUSERS}{name}", name) if is_diffusers else (arch, f"{name}/{files.weights.name}")
        if is_row or is_diffusers:  # else the architecture is nowhere here
            facts["project_commands"] = (
                f"python cache_latents.py --vae-arch {arch} --vae-ckpt-path {weights} --vae-latents-name {name}\n"
                f"accelerate launch train_ldm_only.py --vae {arch} --vae-ckpt {weights} --vae-latents-name {name} ..."
            )
    if files.discriminator.is_file():
        facts["discriminator"] = files.discriminator.name
    return {**facts, "normaliser": " ".join(conventions)}


def architecture(flags: dict, state: dict[str, Tensor]) -> dict[str, str]:
    """Name, size and shapes of the VAE with this state dict."""
    halvings = len({key.split(".")[2] for key in state if re.match(r"encoder\.down\.\d+\.downsample\.", key)})
    channels, parameters = state["decoder.conv_in.weight"].shape[1], sum(value.numel() for value in state.values())
    is_row = not str(flags.get("vae", DIFFUSERS)).startswith(DIFFUSERS)
    named = f"`{flags['vae']}`: an" if is_row else "An"
    return {
        "channels": str(channels),
        "architecture": f"{named} AutoencoderKL of {parameters:,} parameters; an image (3,H,W) with range [-1, 1] has "
        f"latents ({channels},H/{2**halvings},W/{2**halvings}).",
    }


def latents(checkpoint: dict, path: Path) -> dict[str, str]:
    """The range of the channels' means and standard deviations, of the averaged transformer's normaliser."""
    scale, bias = ema_latent_statistics(checkpoint["ema"], str(path))
    std = 1 / scale
    return {
        "latents": f"means from {bias.min():.3g} to {bias.max():.3g}, standard deviations from {std.min():.3g} to "
        f"{std.max():.3g}."
    }


def training(flags: dict, identity: dict, step: int) -> str:
    """A table of what is known of the training."""
    rows = {what: f"`{flags[flag]}`" for what, flag in TRAINING.items() if flags.get(flag) is not None}
    if isinstance(identity.get("loss"), dict):
        rows["loss"] = ", ".join(f"{name} {value}" for name, value in identity["loss"].items())
    if step:
        rows["steps"] = f"{step:,}"
        if "batch_size" in flags:
            rows["images seen"] = f"{step * flags['batch_size']:,}"
    return table(rows)


def table(rows: dict[str, str]) -> str:
    """A table of two columns; empty without rows."""
    lines = [f"| {what} | {value} |" for what, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def training_command(flags: dict) -> str:
    """The command line of a joint run with these flags, by underscore name.

    Flags that train_repae.py does not have are left out, and so are those that have their default.
    """
    from train_repae import command_line

    defaults = vars(command_line().parse_args(["--exp-name", ""]))
    changed = {
        name: flags[name]
        for name, default in defaults.items()
        if name in flags and name not in NOT_REPEATED and flags[name] not in (default, None)
    }
    words = [word for name, value in changed.items() for word in flag_words(f"--{name.replace('_', '-')}", value)]
    return " \\\n    ".join(["accelerate launch train_repae.py", *words])


def flag_words(flag: str, value: object) -> list[str]:
    """What stands on a command line for `value`, quoted as a shell needs it."""
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [f"{flag} {shlex.quote(str(each))}" for each in values]


def vae_fingerprint(checkpoint: dict) -> str:
    """What generate.py and evaluate.py know the checkpoint's VAE by: the hash of its weights in float32."""
    return fingerprint({key: value.float() for key, value in checkpoint["vae"].items()})


def measured(file: Path, vae: str) -> str:
    """A line of what evaluate.py found.

    Raises:
        UserError: the file is none of evaluate.py's, or it measured another VAE than the one of fingerprint `vae`.
    """
    what = f"--metrics {file}"
    try:
        document = json.loads(file.read_text(encoding="utf8"))
        values = ", ".join(f"{name} {value:.4g}" for name, value in document["metrics"].items())
        subject, known = reconstruction(document) if "vae" in document else samples(document)
    except FileNotFoundError:
        raise UserError(f"{what}: no such file") from None
    except (ValueError, TypeError, KeyError, AttributeError, IsADirectoryError):
        raise UserError(f"{what}: not what evaluate.py writes; expected its .metrics.json") from None
    if known not in (None, vae):
        raise UserError(f"{what}: measured another VAE than this one; leave it out, or measure again")
    return f"- {subject}: {values}"


def reconstruction(document: dict) -> tuple[str, str]:
    """What a reconstruction was measured on, and its VAE's fingerprint."""
    return f"reconstruction of {document['images']['count']} images", document["vae"]["fingerprint"]


def samples(document: dict) -> tuple[str, str | None]:
    """Which samples were measured, and the fingerprint of the VAE that decoded them, if they say it."""
    made, reference = (document["manifest"] or {}).get("samples", {}), Path(document["reference"]["path"]).name
    subject = f"{document['samples']['count']} samples against {reference}"
    if made:
        guided = made["cfg_scale"] > 1
        interval = f" for t from {made['guidance_low']:g} to {made['guidance_high']:g}" if guided else ""
        how = f"{made['mode']}, {made['num_steps']} steps, guidance {made['cfg_scale']:g}{interval}"
        subject += f", of {made['experiment']} at step {made['train_steps']} ({made['model']}; {how})"
    return subject, made.get("vae_fingerprint")


def logged(log: Path, step: int) -> dict[str, str]:
    """Means of the last scalars that a run logged up to `step`, and over how many steps they are; empty without any."""
    if not log.is_file():
        return {}
    last = deque(maxlen=LOGGED_STEPS)
    with open(log, "rb") as lines:
        last.extend(line for line in lines if is_record(line, step))
    rows, records = {}, [json.loads(line) for line in last]
    for name in LOGGED:
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            rows[name] = f"{sum(values) / len(values):.4g}"
    return {"logged": table(rows), "logged_steps": str(len(last))} if rows else {}


def best(checkpoints: Path, step: int) -> str | None:
    """The lowest distance that training measured, and where, unless that was after `step`."""
    note = read_note(checkpoints / "best.json")
    if not note.get("values") or note["step"] > step:
        return None
    values = ", ".join(f"{name} {value:.4g}" for name, value in note["values"].items())
    return (
        f"The lowest distance while training (50 Euler steps, no guidance) was at step {note['step']}: {values}, of "
        f"{note['measure']['samples']} samples."
    )


def newest_picture(folder: Path, step: int) -> Path | None:
    """The run's picture of the highest step up to `step`, if there is any."""
    found = [path for path in folder.glob("*.png") if path.stem.isdigit() and int(path.stem) <= step]
    return max(found, key=lambda path: int(path.stem), default=None)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file so that `target` is whole or not there."""
    with open(source, "rb") as content, written_whole(target) as file:
        shutil.copyfileobj(content, file)


def reproducing(checkpoint: dict, path: Path, run: str, step: int) -> str:
    """A table of what else the weights depend on, as far as the checkpoint says it."""
    identity = checkpoint.get("identity") or {}
    rows = {
        "checkpoint": f"`{run}/checkpoints/{path.name}`",
        "fingerprint of the VAE's weights": f"`{vae_fingerprint(checkpoint)}`",
    }
    if "data" in identity:
        rows["fingerprint of the images"] = f"`{identity['data']}`"
    for name, value in (identity.get("encoders") or {}).items():
        rows[f"fingerprint of {name}"] = f"`{value}`"
    if "time_convention" in checkpoint:
        rows["time"] = checkpoint["time_convention"]
    rows["exported with"] = f"Python {platform.python_version()}, torch {version('torch')}"
    return table(rows)
