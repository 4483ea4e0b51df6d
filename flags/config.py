"""`--config FILE`: flags from a file, such as a published experiment's of configs/presets/ or another run's args.json.

A file is YAML or JSON. It holds flags, `batch_size: 256`, and sections named after scripts, `train_repae:`, of which
each script takes its own. Flags beside the sections count for every script that reads the file, and each must have
them; a section goes before them, and the command line before everything. Values are checked by the script's parser, as
if they stood on the command line; null leaves a flag's default, and a list is a flag given several times or, where it
cannot be, joined by commas.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from errors import Parser, UserError, nearest, unknown_name
from loss.vae_loss import VAELossConfig

SCRIPTS = (
    *("preprocessing", "train_vae", "train_repae", "save_vae_weights", "cache_latents"),
    *("train_ldm_only", "generate", "evaluate"),
)


def parse_flags(parser: Parser, argv: list[str] | None, script: str) -> argparse.Namespace:
    """The flags of the command line `argv` (None: this process's) and of the file that its --config names.

    The first process prints where each is from, in training always, else if there is a file. What comes back has no
    `config`: a run begun by a file continues by the same flags from anywhere.

    Args:
        parser: the script's, with all its flags.
        script: its name, one of SCRIPTS, which is that of its section.

    Raises:
        UserError: a flag is wrong or missing, on the command line or, then named, in the file.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON of flags, or of sections named after scripts, like configs/presets/* or a run's args.json; "
        "the command line goes before it",
    )
    given, _ = flags_set(parser, argv)
    path = given.pop("config", None)
    words = {} if path is None else file_words(parser, path, script)
    from_file = [name for name in words if name not in given]
    args = parser.parse_args([*(word for name in from_file for word in words[name]), *argv])
    del args.config
    if (path or script.startswith("train_")) and os.environ.get("RANK", "0") == "0":
        print(describe(vars(args), {"the command line": given, str(path): from_file}), flush=True)
    return args


def flags_set(parser: Parser, words: list[str]) -> tuple[dict, str]:
    """What the `words` of a command line set, without defaults, and the parser's complaint, if it has one.

    It also complains of required flags that are not among them, but after all are read.
    """
    found = argparse.Namespace(**{action.dest: None for action in parser._actions})
    complaint = ""
    try:
        parser.parse_args(words, found)
    except UserError as error:
        complaint = str(error)
    return {name: value for name, value in vars(found).items() if value is not None}, complaint


def file_words(parser: Parser, path: str, script: str) -> dict[str, list[str]]:
    """What a file says of a script's flags, as words of a command line, by flag.

    Raises:
        UserError: one line that begins with the file's name; no such file, no such flag, or not such a value.
    """

    what = f"--config {path}"
    flags = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    words = {}
    for key, value in chosen_keys(read_yaml(path, what), script, what).items():
        if (name := key.replace("-", "_")) not in flags:
            raise UserError(f"{what}: unknown key {key!r}; did you mean {nearest(name, [*flags, *SCRIPTS])!r}?")
        words[name] = [] if value is None else spelled(flags[name], value, f"{what}: {key}")
        for word in words[name]:
            accepted, complaint = flags_set(parser, [word])
            if name not in accepted:
                raise UserError(f"{what}: {complaint}")
    return {name: part for name, part in words.items() if part}


def chosen_keys(config: dict, script: str, what: str) -> dict[str, object]:
    """The keys of a file that are for `script`: those of its section, and those beside all sections."""
    config = {str(key): value for key, value in config.items()}
    sections = [key for key in config if key in SCRIPTS]
    if sections and script not in sections:
        raise UserError(f"{what}: no section {script}: in it, but {', '.join(sections)}")
    section = config.get(script) or {}
    if not isinstance(section, dict):
        raise UserError(f"{what}: {script} is {section!r}, expected a section of flags")
    return {key: value for key, value in config.items() if key not in SCRIPTS} | section


def spelled(action: argparse.Action, value: object, what: str) -> list[str]:
    """A flag of the parser with a file's `value`, as words of a command line; none for a flag that is left away."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{what} is {value!r}, expected true or false")
        return action.option_strings[:1] if value else action.option_strings[1:]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(part, (dict, list, type(None))) for part in values):
        raise UserError(f"{what} is {value!r}, expected a value or a list of them")
    # YAML takes the words yes and no for booleans: no precision, --mixed-precision no, is one
    texts = [("yes" if part else "no") if isinstance(part, bool) else str(part) for part in values]
    repeatable = isinstance(action.default, list)
    return [f"{action.option_strings[0]}={text}" for text in (texts if repeatable else [",".join(texts)])]


def describe(flags: dict[str, object], sources: dict[str, Iterable[str]]) -> str:
    """All `flags`, those of each of the `sources` first and then the defaults, wrapped to 120 columns."""
    named = {name for names in sources.values() for name in names}
    parts = {f"flags from {source}": names for source, names in sources.items()}
    parts["defaults"] = [name for name in flags if name not in named]
    lines = []
    for what, names in parts.items():
        text = f"{what}: " + "  ".join(f"{name}={flags[name]}" for name in names)
        lines += textwrap.wrap(text, 120, subsequent_indent="    ", break_on_hyphens=False) if names else []
    return "\n".join(lines)


def load_loss_config(path: str) -> VAELossConfig:
    """Read the `losses:` section of a YAML like configs/l1_lpips_kl_gan.yaml.

    Raises:
        UserError: one line naming the file, what was found and what was expected.
    """
    what = f"--loss-cfg-path {path}"
    config = read_yaml(path, what)
    losses = config.get("losses")
    if not isinstance(losses, dict):
        raise UserError(f"{what}: no section `losses:`")
    mode = ((config.get("model") or {}).get("vq_model") or {}).get("quantize_mode", "vae")
    if mode != "vae":
        raise UserError(f"{what}: model.vq_model.quantize_mode is {mode!r}; only vae is supported")
    known = {field.name: type(field.default) for field in fields(VAELossConfig)}
    for name, value in losses.items():
        if name not in known:
            raise UserError(f"{what}: " + unknown_name("key below losses:", name, known))
        if isinstance(value, bool) or not isinstance(value, str if known[name] is str else (int, float)):
            raise UserError(f"{what}: losses.{name} is {value!r}, expected {known[name].__name__}")
    for name, allowed in {"reconstruction_loss": ("l1", "l2"), "perceptual_loss": ("lpips",)}.items():
        if losses.get(name, allowed[0]) not in allowed:
            raise UserError(f"{what}: losses.{name} is {losses[name]!r}, expected {' or '.join(allowed)}")
    return VAELossConfig(**{name: known[name](value) for name, value in losses.items()})


def read_yaml(path: str, what: str) -> dict:
    """The mapping in a YAML file, interpolations resolved; a UserError that begins with `what` if there is none."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not Path(path).is_file():
        raise UserError(f"{what}: no such file")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{what}: not a readable YAML file ({type(error).__name__})") from error
    if not isinstance(config, dict):
        raise UserError(f"{what}: expected a mapping of keys to values")
    return config
