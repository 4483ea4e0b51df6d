"""AdamW with mixed precision, gradient clipping and accumulation.

Forward passes run under autocast; parameters, optimiser states and losses stay in float32. float16 gradients need loss
scaling, with a scaler per optimiser: the three losses of the joint step overflow at different scales.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def learning_rate_factor(step: int, last: int, warmup: int, schedule: str) -> float:
    """What the learning rates of 0-based `step` of `last` steps are multiplied by.

    It rises linearly to 1 over `warmup` steps. Then it stays 1, or falls as half a cosine (Loshchilov & Hutter, arXiv
    1608.03983) towards 0, which the step after the last would have.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (last - warmup))
    return 1.0


class Optimizer:
    """AdamW over `parameters`, with gradient clipping, accumulation and (for float16) loss scaling.

    A step whose gradient is not finite is skipped on the device, without a host sync; `skipped` counts such steps.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        epsilon: float = 1e-8,
        max_grad_norm: float = 1.0,
        mixed_precision: str = "no",
        accumulation_steps: int = 1,
    ):
        everything = list(parameters)
        self.parameters = [p for p in everything if p.requires_grad]
        self.fixed = {i for i, p in enumerate(everything) if not p.requires_grad}
        self.learning_rate = learning_rate
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")
        self.max_grad_norm = max_grad_norm
        self.accumulation_steps = accumulation_steps
        self.accumulated = 0
        self.skipped = torch.zeros((), device=device)

    def backward_and_step(self, loss: Tensor) -> Tensor | None:
        """Backward; at the last micro-batch also unscale, clip and step.

        Returns the gradient norm before clipping (a scalar on the device), or None before the last micro-batch.
        """
        self.scaler.scale(loss / self.accumulation_steps).backward()
        self.accumulated = (self.accumulated + 1) % self.accumulation_steps
        if self.accumulated:
            return None
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm, foreach=True)
        not_finite = (~norm.isfinite()).float()
        self.skipped += not_finite
        if self.scaler.is_enabled():
            self.scaler.step(self.adamw)
            self.scaler.update()
        else:
            # the fused kernel changes neither parameters nor moments if this is 1
            self.adamw.grad_scale, self.adamw.found_inf = None, not_finite
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def scale_learning_rate(self, factor: float) -> None:
        """Take the next steps with `factor` times the learning rate."""
        self.adamw.param_groups[0]["lr"] = factor * self.learning_rate

    def scaler_metrics(self, name: str) -> dict[str, Tensor]:
        """Loss scale and number of skipped steps, for the log; empty unless losses are scaled."""
        if not self.scaler.is_enabled():
            return {}
        scale = self.scaler.scale(torch.ones_like(self.skipped))
        return {f"loss_scale_{name}": scale, f"skipped_{name}": self.skipped.clone()}

    def named_tensors(self) -> dict[str, Tensor]:
        """Moments and step counters by parameter number, skipped steps and loss scale."""
        scale = torch.tensor(self.scaler.get_scale()) if self.scaler.is_enabled() else torch.ones(())
        found = {"skipped": self.skipped, "loss_scale": scale}
        for number, parameter in enumerate(self.parameters):
            found.update({f"{number}.{key}": value for key, value in self.adamw.state.get(parameter, {}).items()})
        return found

    def extra_state(self) -> dict:
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped.item()}

    def load_state_dict(self, adamw: dict, extra: dict | None = None) -> None:
        """Restore AdamW's state and, if given, `extra_state`.

        The reference's states also list parameters that are never trained (`pos_embed`), and are not fused.

        Raises:
            ValueError: the state belongs to another number of parameters.
        """
        ids = adamw["param_groups"][0]["params"]
        if len(ids) == len(self.parameters) + len(self.fixed):
            ids = [key for i, key in enumerate(ids) if i not in self.fixed]
        state = {new: adamw["state"][old] for new, old in enumerate(ids) if old in adamw["state"]}
        # learning rate, Adam's constants and `fused` stay this optimiser's
        group = {**self.adamw.state_dict()["param_groups"][0], "params": list(range(len(ids)))}
        self.adamw.load_state_dict({"state": state, "param_groups": [group]})
        for parameter, moments in self.adamw.state.items():  # fused AdamW needs the parameter's memory layout
            moments |= {
                key: torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
                for key, value in moments.items()
            }
        if extra:
            if extra["scaler"]:  # empty without loss scaling
                self.scaler.load_state_dict(extra["scaler"])
            self.skipped.fill_(extra["skipped"])
