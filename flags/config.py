"""Flags from the command line, from `--config FILE`, such as a preset or another run's args.json, and from accelerate.

A file is YAML or JSON. It holds flags, `batch_size: 256`, and sections named after scripts, `train_repae:`. A script
reads the flags outside all sections and those of its own section. The command line overrides the section, which
overrides the flags outside. null leaves a flag at its default. A list gives a repeatable flag several times; other
flags take it joined by commas. $NAME and ${NAME} are variables of the environment; the latter may also be another key
of the file.
"""

import argparse
import io
import os
import re
import sys
import textwrap
from pathlib import Path

from errors import Parser, UserError, nearest, one_line
from loss.vae_loss import VAELossConfig

SCRIPTS = (
    *("preprocessing", "train_vae", "train_repae", "save_vae_weights", "cache_latents"),
    *("train_ldm_only", "generate", "evaluate"),
)
LAUNCHER = "accelerate launch"  # whose settings, like its precision, reach a script as environment variables
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")  # each process would hold a part of the weights


def parse_flags(parser: Parser, argv: list[str] | None, script: str) -> argparse.Namespace:
    """The flags of the command line `argv` (None: this process's), of the file that its --config names, of accelerate.

    The first takes precedence over the second, which does over the third. Training, and any script with flags from the
    latter two, prints what each sets. The result has no `config`, so that args.json holds the flags themselves. A
    UserError begins with the file's name if the file is at fault.
    """
    argv = sys.argv[1:] if argv is None else argv
    what = "YAML or JSON of flags, or of sections named after scripts; the command line overrides it"
    parser.add_argument("--config", metavar="FILE", help=what)
    defaults, _ = parse_into(parser, [], {})
    given, complaint = parse_into(parser, argv, dict.fromkeys(defaults))
    given = {name: value for name, value in given.items() if value is not None}
    path = given.pop("config", None)
    del defaults["config"]
    words = {} if path is None else read_words(path, script, defaults)
    words = {name: part for name, part in words.items() if name not in given}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()  # "no" also where nothing was set
    is_set = "mixed_precision" in defaults and precision not in ("", "no")
    taken = ["mixed_precision"] if is_set and "mixed_precision" not in {*given, *words} else []
    try:
        shared = [f"--mixed-precision={precision}" for _ in taken]
        args = parser.parse_args([*shared, *(word for part in words.values() for word in part), *argv])
    except UserError as error:
        if str(error) == complaint:
            raise
        at_fault = taken and "argument --mixed-precision:" in str(error)
        raise UserError(f"{LAUNCHER if at_fault else f'--config {path}'}: {error}") from None
    del args.config
    if script.startswith("train_"):
        refuse_sharding()
    if (path or taken or script.startswith("train_")) and os.environ.get("RANK", "0") == "0":
        changed = [name for name in words if getattr(args, name) != defaults[name]]
        for source, names in (("the command line", given), (path, changed), (LAUNCHER, taken)):
            text = f"flags from {source}: " + "  ".join(f"{name}={getattr(args, name)}" for name in names)
            if names:
                print(textwrap.fill(text, 120, subsequent_indent="    ", break_on_hyphens=False), flush=True)
        if is_set and args.mixed_precision != precision:
            print(f"mixed_precision={args.mixed_precision} takes precedence over accelerate's {precision}", flush=True)
    return args


def refuse_sharding() -> None:
    """Raise a UserError if accelerate is to shard the networks, which training replicates."""
    for name in SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1"):
            how = "every process holds all weights; start it by accelerate launch --multi_gpu, or by torchrun"
            raise UserError(f"accelerate's {name} is not supported: {how}")


def parse_into(parser: Parser, words: list[str], values: dict) -> tuple[dict, str]:
    """`values` updated by the `words` of a command line, and the parser's complaint, if any."""
    found, complaint = argparse.Namespace(**values), ""
    try:
        parser.parse_args(words, found)
    except UserError as error:
        complaint = str(error)
    return vars(found), complaint


def read_words(path: str, script: str, defaults: dict[str, object]) -> dict[str, list[str]]:
    """The flags that a file sets for `script`, as words of a command line, by name; `defaults` has all known names."""
    what = f"--config {path}"
    config = {str(key): value for key, value in read_yaml(path, what).items()}
    sections = [key for key in config if key in SCRIPTS]
    if sections and script not in sections:
        raise UserError(f"{what}: no section {script}: in it, but {', '.join(sections)}")
    section = config.get(script) or {}
    if not isinstance(section, dict):
        raise UserError(f"{what}: {script} is {section!r}, expected a section of flags")
    words = {}
    for key, value in ({key: value for key, value in config.items() if key not in SCRIPTS} | section).items():
        if (name := key.replace("-", "_")) not in defaults:
            raise UserError(f"{what}: unknown key {key!r}; did you mean {nearest(name, [*defaults, *SCRIPTS])!r}?")
        if value is not None:
            words[name] = to_words(name, value, defaults[name], f"{what}: {key}")
    return words


def to_words(name: str, value: object, default: object, what: str) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{what} is {value!r}, expected true or false")
        if value == default:
            return []
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, list) else [value]
    # YAML reads the words yes and no as booleans, but --mixed-precision no is a name
    texts = [("yes" if part else "no") if isinstance(part, bool) else os.path.expandvars(str(part)) for part in values]
    repeatable = isinstance(default, list)
    return [f"--{flag}={text}" for text in (texts if repeatable else [",".join(texts)])]


def load_loss_config(path: str) -> VAELossConfig:
    """Read the `losses:` section of a YAML like configs/l1_lpips_kl_gan.yaml."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    what = f"--loss-cfg-path {path}"
    config = read_yaml(path, what)
    losses = config.get("losses")
    if not isinstance(losses, dict):
        raise UserError(f"{what}: no section `losses:`")
    mode = ((config.get("model") or {}).get("vq_model") or {}).get("quantize_mode", "vae")
    if mode != "vae":
        raise UserError(f"{what}: model.vq_model.quantize_mode is {mode!r}; only vae is supported")
    try:
        loss = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(VAELossConfig), losses))
    except OmegaConfBaseException as error:
        raise UserError(f"{what}: losses.{error.full_key}: {one_line(error)}") from None
    for name, allowed in {"reconstruction_loss": ("l1", "l2"), "perceptual_loss": ("lpips",)}.items():
        if (value := getattr(loss, name)) not in allowed:
            raise UserError(f"{what}: losses.{name} is {value!r}, expected {' or '.join(allowed)}")
    return loss


def read_yaml(path: str, what: str) -> dict:
    """The mapping in a YAML file, with interpolations resolved; a UserError that begins with `what` if it has none."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not Path(path).is_file():
        raise UserError(f"{what}: no such file")
    try:
        text = Path(path).read_text(encoding="utf8")
        keys = re.findall(r"^\s*([\w-]+)\s*:", text, re.MULTILINE)
        text = re.sub(r"(?<!\\)\$\{(\w+)\}", lambda m: m[0] if m[1] in keys else f"${{oc.env:{m[1]}}}", text)
        config = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{what}: not a readable YAML file ({type(error).__name__}: {one_line(error)})") from error
    if not isinstance(config, dict):
        raise UserError(f"{what}: expected a mapping of keys to values")
    return config
