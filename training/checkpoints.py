"""What a checkpoint of training holds, and a run's folder of checkpoints: which to continue from, which to keep.

training/loop.py decides when to save; weights/checkpoint_io.py has the files' names and format.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.transport import TIME_CONVENTION
from errors import UserError
from storage.files import replace_text
from training.distributed import unwrap
from training.log import normaliser_drift
from training.optimizer import Optimizer
from weights.checkpoint_io import (
    BEST_CHECKPOINT,
    checkpoint_path,
    load_weights,
    numbered_checkpoints,
    read_checkpoint,
    write_atomically,
)

# keys of a checkpoint, which are the reference's, and the fields of a step's networks that they hold
NETWORKS = {"model": "sit", "ema": "ema", "vae": "vae", "discriminator": "discriminator"}
OPTIMIZERS = {"opt": "opt_sit", "opt_vae": "opt_vae", "opt_disc": "opt_disc"}


class TrainingState:
    """Everything that a checkpoint holds, by its keys there; networks may be wrapped, tensors are restored in place."""

    def __init__(self, networks: dict[str, nn.Module], optimizers: dict[str, Optimizer], tensors: dict[str, Tensor]):
        self.networks = {name: unwrap(network) for name, network in networks.items()}
        self.optimizers = optimizers
        self.tensors = tensors

    def to_dict(self, args: dict, step: int, identity: dict, classes: dict | None) -> dict:
        """The checkpoint after `step` steps of a run with flags `args`, fingerprints `identity` and such `classes`."""
        return {
            **{name: network.state_dict() for name, network in self.networks.items()},
            **{name: optimizer.adamw.state_dict() for name, optimizer in self.optimizers.items()},
            "args": args,
            "steps": step,
            "identity": identity,
            "classes": classes,
            "optimizer_extras": {name: optimizer.extra_state() for name, optimizer in self.optimizers.items()},
            "tensors": self.tensors,
            "time_convention": TIME_CONVENTION,
        }

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor by its full name; all are the same on every rank."""
        found = {f"tensors.{name}": tensor for name, tensor in self.tensors.items()}
        for name, network in self.networks.items():
            found.update({f"{name}.{key}": value for key, value in network.state_dict().items()})
        for name, optimizer in self.optimizers.items():
            found.update({f"{name}.{key}": value for key, value in optimizer.named_tensors().items()})
        return found

    def metrics(self) -> dict[str, Tensor]:
        """What is logged of the state itself: loss scales (float16), and how far the latent normaliser has drifted."""
        found = {}
        for key, optimizer in self.optimizers.items():
            found |= optimizer.scaler_metrics(OPTIMIZERS[key].removeprefix("opt_"))
        if "bn_start" in self.tensors:
            found |= normaliser_drift(self.networks["model"].bn, self.tensors["bn_start"])
        return found

    def restore(self, checkpoint: dict, source: str) -> int:
        """Load a checkpoint, ours or the reference's, and return its step.

        Raises:
            UserError: a part is missing or does not fit.
        """
        parts = [*self.networks, *self.optimizers, "steps"]
        if missing := [name for name in parts if name not in checkpoint]:
            raise UserError(f"{source}: no {', '.join(missing)} inside; this is no checkpoint of this kind of training")
        for name, network in self.networks.items():
            load_weights(network, checkpoint[name], f"{source}: {name}")
        extras = checkpoint.get("optimizer_extras", {})
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(checkpoint[name], extras.get(name))
        for name, tensor in self.tensors.items():
            if name in checkpoint.get("tensors", {}):
                tensor.copy_(checkpoint["tensors"][name])
        return checkpoint["steps"]


def state_of(nets) -> TrainingState:
    fields = vars(nets)
    tensors = {"lecam": nets.lecam} if "lecam" in fields else {}
    if {"vae", "sit"} <= fields.keys():
        bn = unwrap(nets.sit).bn  # its statistics (2,C) at the start, for `normaliser_drift`
        tensors["bn_start"] = torch.stack([bn.running_mean, bn.running_var])
    networks = {key: fields[name] for key, name in NETWORKS.items() if name in fields}
    return TrainingState(networks, {key: fields[name] for key, name in OPTIMIZERS.items() if name in fields}, tensors)


class CheckpointFolder:
    """The checkpoints of one run, in RUN/checkpoints; only the first rank uses it.

    Checkpoints of --checkpointing-steps are permanent. Those saved by time or by a signal are rolling: rolling.json
    lists them in the order in which they were written, and all but the newest few are deleted.
    """

    def __init__(self, directory: Path, log: Callable[[str], None]):
        self.directory, self.log = directory, log
        self.rolling_note = directory / "rolling.json"
        self.best_note = directory / "best.json"

    def to_continue(self, resume_step: int, elsewhere: str | None) -> Path | None:
        """The newest whole checkpoint, or that of `resume_step` if it is given; None if there are no checkpoints.

        A run without checkpoints starts from those of the run folder `elsewhere`, if that is given.

        Raises:
            UserError: the checkpoint asked for is missing or damaged, or all are damaged.
        """
        folder, candidates = self.directory, numbered_checkpoints(self.directory)
        if elsewhere is not None and not candidates:
            folder = Path(elsewhere) / "checkpoints"
            if not (candidates := numbered_checkpoints(folder)):
                raise UserError(f"--continue-train-exp-dir {elsewhere}: no checkpoints in {folder}")
        chosen = checkpoint_path(folder, resume_step)
        went_on = elsewhere is not None and folder == self.directory and chosen not in candidates
        if not resume_step or went_on:  # then resume_step is one of the other run's
            return self._newest_whole(candidates)
        read_checkpoint(chosen)
        later = ", ".join(path.name for path in candidates if int(path.stem) > resume_step)
        if later and folder == self.directory:
            hint = "delete them, or a start without --resume-step continues from the newest"
            self.log(f"warning: --resume-step {resume_step} leaves later checkpoints in {folder} ({later}); {hint}")
        return chosen

    def _newest_whole(self, candidates: list[Path]) -> Path | None:
        for path in reversed(candidates):
            try:
                read_checkpoint(path)
            except UserError as error:
                self.log(f"warning: {error}; trying the one before")
            else:
                return path
        if candidates:
            what = "checkpoints are damaged; put copies of them back, or choose another --exp-name to start afresh"
            raise UserError(f"{candidates[0].parent}: all {len(candidates)} {what}")
        return None

    def save(self, content: dict, permanent: bool, keep_last: int) -> None:
        """Write the checkpoint `content`, then delete all but the `keep_last` rolling ones that were written last.

        Raises:
            OSError: it cannot be written; the checkpoints that exist stay.
        """
        path = checkpoint_path(self.directory, content["steps"])
        self.directory.mkdir(parents=True, exist_ok=True)
        noted = [checkpoint_path(self.directory, step) for step in read_note(self.rolling_note).get("steps", [])]
        permanent |= path.is_file() and path not in noted
        rolling = [other for other in noted if other.is_file() and other != path] + ([] if permanent else [path])
        if rolling != noted:  # first, so that a checkpoint that is written is in the list
            replace_text(self.rolling_note, json.dumps({"steps": [int(other.stem) for other in rolling]}) + "\n")
        write_atomically(content, path)
        for old in rolling[:-keep_last]:
            old.unlink()

    def save_if_best(self, content: dict, measure: dict, judge: str, values: dict[str, float]) -> None:
        """Keep `content` as best.pt if values[judge] is the lowest so far under the same `measure`.

        best.json holds the measure, the best step and its values.
        """
        best = read_note(self.best_note)
        bound = best.get("values", {}).get(judge, math.inf) if best.get("measure") == measure else math.inf
        if values[judge] < bound:
            write_atomically(content, self.directory / BEST_CHECKPOINT)
            note = {"measure": measure, "step": content["steps"], "values": values}
            replace_text(self.best_note, json.dumps(note, indent=1) + "\n")


def read_note(path: Path) -> dict:
    """The mapping in a small JSON file; empty if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError):
        return {}
