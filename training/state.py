"""A run's folder of checkpoints: which one to continue from, and which ones to keep."""

import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from diffusion.transport import TIME_CONVENTION
from errors import UserError
from storage.files import replace_text
from training.distributed import unwrap
from training.optimizer import Optimizer
from weights.checkpoint_io import (
    BEST_CHECKPOINT,
    checkpoint_path,
    load_weights,
    numbered_checkpoints,
    read_checkpoint,
    write_atomically,
)


class TrainingState:
    """Everything that a checkpoint holds, registered once by name: saving and loading are the same list.

    Args:
        networks: key -> network (wrapped or not); the reference's keys are model, ema, vae, discriminator.
        optimizers: key -> Optimizer; the reference's keys are opt, opt_vae, opt_disc.
        tensors: further tensors, restored in place.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        optimizers: dict[str, Optimizer],
        tensors: dict[str, Tensor],
    ):
        self.networks = {name: unwrap(network) for name, network in networks.items()}
        self.optimizers = optimizers
        self.tensors = tensors

    def to_dict(self, args: dict, step: int, identity: dict | None = None) -> dict:
        """The checkpoint after `step` steps, plain data only.

        `args` holds every flag by its underscore name, `identity` what else makes this run the run it is.
        """
        return {
            **{name: network.state_dict() for name, network in self.networks.items()},
            **{name: optimizer.adamw.state_dict() for name, optimizer in self.optimizers.items()},
            "args": args,
            "steps": step,
            "identity": identity or {},
            "optimizer_extras": {name: optimizer.extra_state() for name, optimizer in self.optimizers.items()},
            "tensors": self.tensors,
            "time_convention": TIME_CONVENTION,
        }

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name that says where it belongs; all are the same on every process."""
        found = {f"tensors.{name}": tensor for name, tensor in self.tensors.items()}
        for name, network in self.networks.items():
            found.update({f"{name}.{key}": value for key, value in network.state_dict().items()})
        for name, optimizer in self.optimizers.items():
            found.update({f"{name}.{key}": value for key, value in optimizer.named_tensors().items()})
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
            try:
                optimizer.load_state_dict(checkpoint[name], extras.get(name))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{source}: {name} is no state of this optimiser ({error})") from error
        for name, tensor in self.tensors.items():
            if name in checkpoint.get("tensors", {}):
                tensor.copy_(checkpoint["tensors"][name])
        return checkpoint["steps"]


class CheckpointFolder:
    """The checkpoints of one run; only the run's first process calls this.

    Those of --checkpointing-steps stay. The others (by time, by a signal) are listed in rolling.json, and all but the
    newest few are deleted again. A checkpoint that is found damaged is renamed to NAME.damaged.

    Args:
        directory: RUN/checkpoints.
        log: prints a line.
    """

    def __init__(self, directory: Path, log: Callable[[str], None]):
        self.directory, self.log = directory, log
        self.rolling_note = directory / "rolling.json"
        self.best_note = directory / "best.json"
        self.damaged: list[Path] = []

    def to_continue(self, resume_step: int, elsewhere: str | None) -> Path | None:
        """The newest checkpoint that is whole; the first time that --resume-step is given, the one it names.

        Without checkpoints of its own the run starts from those of the run `elsewhere`, if that is given.

        Raises:
            UserError: there is none where there should be, or every one is damaged.
        """
        if self.directory.is_symlink() and not self.directory.exists():
            raise UserError(
                f"{self.directory}: a link to {self.directory.readlink()}, which is not there; mount or mend it"
            )
        own = numbered_checkpoints(self.directory)
        if own and resume_step and self.superseded(resume_step).exists():
            where = self.superseded(resume_step)
            self.log(f"this run went back to step {resume_step} before; to do so again, rename {where}")
            resume_step = 0
        folder = self.directory if own or elsewhere is None else Path(elsewhere) / "checkpoints"
        if resume_step:
            chosen = checkpoint_path(self.directory, resume_step)
            if not chosen.is_file() and elsewhere is not None:
                chosen = checkpoint_path(Path(elsewhere) / "checkpoints", resume_step)
            read_checkpoint(chosen)
            return chosen
        candidates = numbered_checkpoints(folder)
        if elsewhere is not None and not candidates:
            raise UserError(f"--continue-train-exp-dir {elsewhere}: no checkpoints in {folder}")
        return self._newest_whole(candidates)

    def _newest_whole(self, candidates: list[Path]) -> Path | None:
        for path in reversed(candidates):
            try:
                read_checkpoint(path)
            except (UserError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EIO:
                    raise
                self.log(f"warning: {error}; trying the one before")
                self.damaged.append(path)
            else:
                return path
        if candidates:
            raise UserError(
                f"{candidates[0].parent}: all {len(candidates)} checkpoints are damaged; put copies of them back, or "
                "choose another --exp-name to start afresh"
            )
        return None

    def superseded(self, resume_step: int) -> Path:
        """Where --resume-step puts what came after that step."""
        return self.directory / f"superseded-by-resume-at-{resume_step:07d}"

    def take_over(self, resume_step: int, step: int, log: Path) -> None:
        """Make the folder that of a run that continues after `step`: damaged checkpoints get another name, and with
        --resume-step later ones are put aside, so that the same command goes on from here instead of coming back."""
        for path in self.damaged:
            if path.parent == self.directory:
                path.rename(path.with_name(path.name + ".damaged"))
        if resume_step and not self.superseded(resume_step).exists():
            self._put_aside(self.superseded(resume_step), step, log)

    def _put_aside(self, place: Path, step: int, log: Path) -> None:
        unfinished = place.with_suffix(".tmp")
        unfinished.mkdir(parents=True, exist_ok=True)
        for path in numbered_checkpoints(self.directory):
            if int(path.stem) > step:
                path.rename(unfinished / path.name)
        if read_note(self.best_note).get("step", 0) > step:
            # the note last: without it, the best checkpoint would be taken for none
            for path in filter(Path.exists, (self.directory / BEST_CHECKPOINT, self.best_note)):
                path.rename(unfinished / path.name)
        if log.exists():
            shutil.copyfile(log, unfinished / log.name)
        unfinished.rename(place)

    def save(self, content: dict, permanent: bool, keep_last: int) -> None:
        """Write the checkpoint `content`, then delete all but the newest `keep_last` of those that are not permanent.

        Raises:
            OSError: it cannot be written; those that are there stay.
        """
        step = content["steps"]
        path = checkpoint_path(self.directory, step)
        self.directory.mkdir(parents=True, exist_ok=True)
        rolling = self.rolling()
        permanent |= path.is_file() and step not in rolling
        rolling = rolling - {step} if permanent else rolling | {step}
        self._note_rolling(rolling)
        write_atomically(content, path)
        there = sorted(step for step in rolling if checkpoint_path(self.directory, step).is_file())
        old = there[: max(len(there) - keep_last, 0)]
        for step in old:
            checkpoint_path(self.directory, step).unlink()
        self._note_rolling(set(there) - set(old))

    def rolling(self) -> set[int]:
        """Steps of checkpoints that may be deleted; if the list is lost, none may."""
        steps = read_note(self.rolling_note).get("steps", [])
        return {step for step in steps if isinstance(step, int)} if isinstance(steps, list) else set()

    def _note_rolling(self, steps: set[int]) -> None:
        if steps != self.rolling():
            replace_text(self.rolling_note, json.dumps({"steps": sorted(steps)}) + "\n")

    def save_if_best(self, content: dict, measure: str, judge: str, values: dict[str, float]) -> None:
        """Keep `content` as best.pt if values[judge] is the lowest yet; another `measure` starts afresh.

        best.json says what was measured, the best one's step and its values.
        """
        best = read_note(self.best_note)
        if best.get("measure") != measure or values[judge] < best.get("values", {}).get(judge, math.inf):
            write_atomically(content, self.directory / BEST_CHECKPOINT)
            note = {"measure": measure, "step": content["steps"], "values": values}
            replace_text(self.best_note, json.dumps(note, indent=1) + "\n")


def read_note(path: Path) -> dict:
    """The mapping in a small JSON file; empty if it is missing or damaged."""
    try:
        note = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        note = {}
    return note if isinstance(note, dict) else {}
