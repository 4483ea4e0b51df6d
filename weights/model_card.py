"""The model card of a tuned VAE, README.md: what the VAE is, how it was trained, and what was measured.

configs/model_card.md is the template; `card_facts` gathers what stands in it.
"""

import json
import shutil
from pathlib import Path

import yaml
from torch import Tensor

from errors import UserError
from models.autoencoder import VAE_CONFIGS
from storage.files import replace_text, written_whole
from weights.checkpoint_io import ema_latent_statistics, fingerprint, training_flags, vae_files
from weights.vae import CONFIG, DIFFUSERS, DIFFUSERS_FILES, stated_architecture

TEMPLATE = Path(__file__).parent.parent / "configs/model_card.md"
TO_FILL_IN = "**FILL IN.**"  # the template's placeholder for the license; a card without it has been edited
NOT_REPEATED = {"config", "resume_step"}
PICTURES = {"reconstructions": "Originals, above their reconstructions", "samples": "Samples of the joint run"}


def write_model_card(folder: Path, name: str, checkpoint: dict, path: Path, metrics: list[Path]) -> list[Path]:
    """Write README.md, and copies of the run's latest pictures, beside the VAE `name` in `folder`; returns their paths.

    The VAE was taken from the joint `checkpoint` at `path`. `metrics` are results of evaluate.py, of this VAE or of
    samples decoded by it. A card that somebody edited stays, and the new one becomes README.new.md.

    Raises:
        UserError: a file of `metrics` does not hold such results, or is of another VAE.
    """
    from huggingface_hub import ModelCard, ModelCardData

    facts = card_facts(folder, name, checkpoint, path, metrics)
    pictures = copy_pictures(path.absolute().parent.parent, folder, int(checkpoint.get("steps", 0)))
    data = ModelCardData(
        library_name="diffusers" if facts["is_diffusers"] else "pytorch",
        tags=["autoencoder", "vae", "latent-diffusion", "repa-e"],
    )
    text = ModelCard.from_template(data, str(TEMPLATE), pictures=pictures, **facts).content
    card = folder / "README.md"
    if card.exists() and TO_FILL_IN not in card.read_text(encoding="utf8"):
        card = folder / "README.new.md"
    replace_text(card, text.rstrip() + "\n")
    return [card, *(folder / file for file in pictures.values())]


def card_facts(folder: Path, name: str, checkpoint: dict, path: Path, metrics: list[Path]) -> dict:
    """The template's variables, apart from the pictures."""
    flags, identity = training_flags(checkpoint, path), checkpoint.get("identity") or {}
    step, run, state = int(checkpoint.get("steps", 0)), path.absolute().parent.parent, checkpoint["vae"]
    vae_hash = vae_fingerprint(state)
    files = vae_files(folder / f"{name}.pt")
    is_diffusers = (folder / CONFIG).is_file() and (folder / DIFFUSERS_FILES[0]).is_file()
    config = stated_architecture(checkpoint) or VAE_CONFIGS.get(flags.get("vae"))
    class_name = getattr(config, "settings", {}).get("_class_name", "AutoencoderKL")
    scale, bias = ema_latent_statistics(checkpoint["ema"], str(path))
    repeated = {key: value for key, value in flags.items() if value is not None and key not in NOT_REPEATED}
    hashes = {"images": identity.get("data"), **(identity.get("encoders") or {})}
    others = {"loss": identity.get("loss"), "time": checkpoint.get("time_convention")}
    return {
        "name": name,
        "is_diffusers": is_diffusers,
        "class_name": class_name,
        "inside": class_name == "AutoencoderKLFlux2",
        "arch": f"{DIFFUSERS}{name}" if is_diffusers else flags.get("vae"),
        "weights": name if is_diffusers else f"{name}/{files.weights.name}",
        "statistics": files.statistics.name if files.statistics.is_file() else None,
        "discriminator": files.discriminator.name if files.discriminator.is_file() else None,
        "vae": flags.get("vae") if flags.get("vae") in VAE_CONFIGS else None,
        "parameters": f"{sum(value.numel() for value in state.values()):,}",
        "channels": bias.numel(),
        "downsampling": config and config.downsampling,
        "mean_range": f"{bias.min():.3g} to {bias.max():.3g}",
        "std_range": f"{1 / scale.max():.3g} to {1 / scale.min():.3g}",
        "steps": f"{step:,}",
        "images_seen": f"{step * flags['batch_size']:,}" if "batch_size" in flags else None,
        "flags": yaml.safe_dump({"exp_name": run.name, **repeated}, allow_unicode=True) if flags else None,
        "measured": [measured(file, vae_hash) for file in metrics],
        "checkpoint": f"{run.name}/checkpoints/{path.name}",
        "identity": {
            "fingerprint of the VAE's weights": vae_hash,
            **{f"fingerprint of {what}": value for what, value in hashes.items() if value},
            **{what: value for what, value in others.items() if value},
        },
    }


def copy_pictures(run: Path, folder: Path, step: int) -> dict[str, str]:
    """Copy a run's latest pictures up to `step` into `folder`; title -> file name."""
    copied = {}
    for kind, title in PICTURES.items():
        steps = {int(path.stem): path for path in (run / kind).glob("*.png") if path.stem.isdigit()}
        if latest := max((number for number in steps if number <= step), default=None):
            with open(steps[latest], "rb") as content, written_whole(folder / f"{kind}.png") as file:
                shutil.copyfileobj(content, file)
            copied[f"{title}, at step {latest}"] = f"{kind}.png"
    return copied


def vae_fingerprint(state: dict[str, Tensor]) -> str:
    """The hash by which generate.py and evaluate.py identify a VAE: that of its weights in float32."""
    return fingerprint({key: value.float() for key, value in state.items()})


def measured(file: Path, vae_hash: str) -> str:
    """One line with the results of evaluate.py in `file`, which must not be of another VAE."""
    what = f"--metrics {file}"
    try:
        results = json.loads(file.read_text(encoding="utf8"))
        values = ", ".join(f"{name} {value:.4g}" for name, value in results["metrics"].items())
        if "vae" in results:
            subject, known = f"reconstruction of {results['images']['count']} images", results["vae"]["fingerprint"]
        else:
            made = (results["manifest"] or {}).get("samples", {})
            subject = f"{results['samples']['count']} samples against {Path(results['reference']['path']).name}"
            if made:
                sampler = f"{made['mode']}, {made['num_steps']} steps, guidance {made['cfg_scale']:g} for t from "
                sampler += f"{made['guidance_low']:g} to {made['guidance_high']:g}"
                subject += f", of {made['experiment']} at step {made['train_steps']} ({made['model']}; {sampler})"
            known = made.get("vae_fingerprint")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{what}: not what evaluate.py writes; expected its .metrics.json") from None
    if known not in (None, vae_hash):
        raise UserError(f"{what}: measured another VAE than this one; leave it out, or measure again")
    return f"{subject}: {values}"
