"""Which flags, data and weights must stay the same when a run continues, and on every rank of a job."""

import argparse
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist

from errors import UserError
from models.numerics import distributed_world_size

# paths and settings of a machine, which may differ between machines
PATH_FLAGS = {
    *("output_dir", "logging_dir", "data_dir", "eval_reference", "inception_weights"),
    *("vae", "vae_ckpt", "disc_pretrained_ckpt", "loss_cfg_path", "vae_latents_name", "enc_ckpt", "wandb_history_path"),
    *("sit_ckpt", "num_workers", "offline", "continue_train_exp_dir"),
}
# flags that a run may change when it continues; any other would change the steps to come
RESUMABLE = PATH_FLAGS | {
    *("exp_name", "report_to", "max_train_steps", "epochs", "sampling_steps", "resume_step"),
    *("checkpointing_steps", "checkpointing_minutes", "keep_last", "check_ranks", "dry_run"),
    *("compile", "gradient_checkpointing", "recompute_levels", "eval_steps", "eval_samples", "eval_features"),
    "gradient_accumulation_steps",  # changes batch statistics, which are only taken where a VAE is trained
}
# what a run that starts from another run's checkpoint (--continue-train-exp-dir) may change as well
FORKABLE = {
    *("mixed_precision", "learning_rate", "vae_learning_rate", "disc_learning_rate", "max_grad_norm"),
    *("lr_warmup_steps", "lr_schedule", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
}
# the fingerprints of a run's identity, in words
IDENTITY = {
    "data": "images than --data-dir holds",
    "latents": "latents than --vae-latents-name holds",
    "vae": "weights than --vae-ckpt holds",
    "architecture": "VAE architecture than --vae names",
    "loss": "weights in --loss-cfg-path",
    "encoders": "weights of the encoders",
}


def changed_flags(before: dict, now: dict, free: Collection[str]) -> str:
    changed = [name for name in now if name in before and name not in free and before[name] != now[name]]
    return ", ".join(f"--{name.replace('_', '-')} {before[name]} -> {now[name]}" for name in changed)


def refuse_changed_flags(
    checkpoint: dict, flags: dict, identity: dict, path: Path, free: Collection[str] = RESUMABLE
) -> None:
    """Raise a UserError if a flag that is not `free`, or a fingerprint, is not as in a checkpoint that also has it."""
    before = checkpoint.get("args") or {}
    before = vars(before) if isinstance(before, argparse.Namespace) else before
    if what := changed_flags(before, flags, free):
        raise UserError(f"{path} was made with other flags ({what}); use the same ones, or another --exp-name")
    known = checkpoint.get("identity") or {}
    for name, what in IDENTITY.items():
        if name in known and name in identity and known[name] != identity[name]:
            raise UserError(f"{path} was made with other {what}; use the same, or another --exp-name")


def refuse_other_processes(flags: dict, identity: dict, group: dist.ProcessGroup | None) -> None:
    """Raise a UserError, on every rank, if one was started with other flags, data or weights than rank 0."""
    if distributed_world_size() == 1:
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (flags, identity), group=group)
    first_flags, first_identity = everyone[0]
    for rank, (its_flags, its_identity) in enumerate(everyone):
        if what := changed_flags(first_flags, its_flags, PATH_FLAGS):
            raise UserError(f"process {rank} was started with other flags than process 0 ({what}); use the same")
        for name, value in its_identity.items():
            if value != first_identity[name]:
                raise UserError(f"process {rank} has other {IDENTITY[name]} on process 0; use the same everywhere")
