"""The optimizer, which steps the mapping layer's weight a block at a time, and the learning rates of `--lradj`."""

import math

import torch
from torch import nn

from layers.backbone import require_bitsandbytes
from layers.mapping import MappingLayer
from models.base import ForecastModel


class BlockAdam(torch.optim.Adam):
    """Adam or AdamW, PyTorch's fused kernels, that step the mapping layer's weight some words at a time.

    The gradient of that weight is the largest tensor of a step; of its two factors only a block is formed at once,
    and goes into the kernel with the same words of weight and moments. The result is that of one kernel for all.
    """

    def __init__(self, parameters: list[nn.Parameter], mapping: MappingLayer | None, lr: float, decoupled: bool):
        """Args:
        mapping: the layer whose weight is among the parameters; None: there is none.
        decoupled: AdamW, with PyTorch's weight decay; else Adam without.
        """
        decay = 1e-2 if decoupled else 0.0
        super().__init__(parameters, lr=lr, weight_decay=decay, decoupled_weight_decay=decoupled, fused=True)
        self._mapping = mapping
        if mapping is not None:
            mapping.factored = True
        self._kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        super().step()
        if self._mapping is None or self._mapping.gradient_factor is None:
            return
        weight, group = self._mapping.weight, self.param_groups[0]
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        for words, gradient in self._mapping.gradient_blocks():
            self._kernel(
                [weight[words]], [gradient], [state["exp_avg"][words]], [state["exp_avg_sq"][words]], [], [state["step"]],
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip
            del gradient  # before the next block is formed


def build_optimizer(name: str, model: ForecastModel, lr: float) -> torch.optim.Optimizer:
    """Adam, AdamW, or bitsandbytes' AdamW with 8-bit states, over the trained tensors."""
    parameters = list(model.parameters())
    if name == "adamw8bit":
        require_bitsandbytes("optimizer adamw8bit")
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=lr)
    return BlockAdam(parameters, model.mapping_layer, lr, decoupled=name == "adamw")


def learning_rate(schedule: str, base: float, step: int, steps_per_epoch: int, epochs: int, pct_start: float = 0.2) -> float:
    """The learning rate of training step `step` (0, 1, … over the whole run), a plain function, so that a resumed run
    needs no state for it.

    type1 halves it each epoch; type3 keeps it for 3 epochs, then multiplies by 0.9 each; COS is a half
    cosine over the run, step by step; TST is one cycle (Smith and Topin, 2018) with PyTorch's defaults:
    from base / 25 up to base over `pct_start` of the run, then down to base / 250,000, both as cosines.
    """
    epoch = step // steps_per_epoch  # 0, 1, …
    total = steps_per_epoch * epochs
    if schedule == "constant":
        return base
    if schedule == "type1":
        return base * 0.5**epoch
    if schedule == "type3":
        return base * 0.9 ** max(0, epoch - 2)
    if schedule == "COS":
        return _cosine(base, 0.0, step / total)
    if schedule == "TST":
        top = pct_start * total - 1  # the step that has the full rate
        if 0 < top >= step:
            return _cosine(base / 25, base, step / top)
        return _cosine(base, base / 25e4, (step - top) / (total - 1 - top))
    raise ValueError(f"unknown schedule {schedule}")


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
