"""What `accelerate launch` and its configuration file ask for: settings reach a script as environment variables."""

import os

from errors import UserError

# settings that are flags here too, with the value that accelerate also sends where nothing was set
SHARED = {"mixed_precision": "no", "gradient_accumulation_steps": "1"}
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")  # each process would hold a part of the weights


def launcher_settings() -> dict[str, str]:
    """The flags of `SHARED` that accelerate sets, by name."""
    found = {name: os.environ.get(f"ACCELERATE_{name.upper()}", unset).lower() for name, unset in SHARED.items()}
    return {name: value for name, value in found.items() if value not in ("", SHARED[name])}


def refuse_sharding() -> None:
    """Raise a UserError if accelerate is to shard the networks, which training replicates."""
    for name in SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1"):
            how = "every process holds all weights; start it by accelerate launch --multi_gpu, or by torchrun"
            raise UserError(f"accelerate's {name} is not supported: {how}")
