"""What makes a run the run it is: the flags, data and weights that must stay the same when it continues."""

import argparse
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist

from errors import UserError
from models.numerics import distributed_world_size

# flags that may differ from machine to machine; the content of these files is in the checkpoint, or is compared
PATH_FLAGS = {
    *("output_dir", "logging_dir", "data_dir", "eval_reference", "inception_weights"),
    *("vae", "vae_ckpt", "disc_pretrained_ckpt", "loss_cfg_path", "vae_latents_name", "enc_ckpt", "wandb_history_path"),
    *("sit_ckpt", "num_workers", "offline", "continue_train_exp_dir"),
}
# the flags that a continued run may change; every other one would make it another run
RESUMABLE = PATH_FLAGS | {
    *("exp_name", "report_to", "max_train_steps", "epochs", "sampling_steps", "resume_step"),
    *("checkpointing_steps", "checkpointing_minutes", "keep_last", "check_ranks", "dry_run"),
    *("compile", "gradient_checkpointing", "eval_steps", "eval_samples", "eval_features"),
}
# what another run that starts from a checkpoint may do otherwise: how it optimises, as when the first one was lost, and
# where it has its encoders' tokens from
FORKABLE = {
    *("mixed_precision", "learning_rate", "vae_learning_rate", "disc_learning_rate", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
}
# what runs did before these flags were there
EARLIER_FLAGS = {
    "resample_tokens": False,
    "projector": "mlp",
    "spatial_norm": None,
    "disc_warmup_steps": 0,
}
# what a run's identity may name, and what it stands for
IDENTITY = {
    "data": "images than --data-dir holds",
    "latents": "latents than --vae-latents-name holds",
    "vae": "weights than --vae-ckpt holds",
    "architecture": "VAE architecture than --vae names",
    "loss": "weights in --loss-cfg-path",
    "encoders": "weights of the encoders",
    "draws": "random numbers, by another version of this code",
}


def changed_flags(before: dict, now: dict, free: Collection[str]) -> str:
    """The flags that both have, with other values, in words; empty if there are none but `free` ones."""
    changed = [name for name in now if name in before and name not in free and before[name] != now[name]]
    return ", ".join(f"--{name.replace('_', '-')} {before[name]} -> {now[name]}" for name in changed)


def refuse_changed_flags(
    checkpoint: dict, flags: dict, identity: dict, path: Path, free: Collection[str] = RESUMABLE
) -> None:
    """Raise a UserError if the checkpoint's run had other flags than `flags`, but for those that are `free` to change.

    The same for `identity`, where the checkpoint has one.
    """
    before = checkpoint.get("args") or {}
    before = {**EARLIER_FLAGS, **(vars(before) if isinstance(before, argparse.Namespace) else before)}
    if what := changed_flags(before, flags, free):
        raise UserError(f"{path} was made with other flags ({what}); use the same ones, or another --exp-name")
    known = checkpoint.get("identity") or {}
    for name, what in IDENTITY.items():
        # a run of another kind, which this one may start from, has other names
        if name in known and name in identity and known[name] != identity[name]:
            raise UserError(f"{path} was made with other {what}; use the same, or another --exp-name")


def refuse_other_processes(flags: dict, identity: dict, group: dist.ProcessGroup | None) -> None:
    """Raise a UserError, on every process, if one was started with other flags, data or weights than the first."""
    if distributed_world_size() == 1:
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (flags, identity), group=group)
    first_flags, first_identity = everyone[0]
    for number, (its_flags, its_identity) in enumerate(everyone):
        if what := changed_flags(first_flags, its_flags, PATH_FLAGS):
            raise UserError(f"process {number} was started with other flags than process 0 ({what}); use the same")
        for name, value in its_identity.items():
            if value != first_identity[name]:
                raise UserError(f"process {number} has other {IDENTITY[name]} on process 0; use the same everywhere")
