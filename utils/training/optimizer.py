"""The optimizer, which steps the mapping layer's weight a block at a time, the scheduler of its learning rate, and the
average of the weights that it makes."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from layers.mapping import MappingLayer
from models.base import ForecastModel

# type2's rates, from the end of an epoch on.
TYPE2 = {2: 5e-5, 4: 1e-5, 6: 5e-6, 8: 1e-6, 10: 5e-7, 15: 1e-7, 20: 5e-8}


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
        for words, gradient in self._mapping.gradient_blocks(self._mapping.gradient_factor):
            self._kernel(
                [weight[words]], [gradient], [state["exp_avg"][words]], [state["exp_avg_sq"][words]], [], [state["step"]],
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip
            del gradient  # before the next block is formed


class Average:
    """The exponential moving average of the trained weights (`--ema`), with which a run is validated, tested and kept.

    A run of few steps would keep much of the weights that it began with: so its average is that of about the last quarter of
    its steps, until `decay` says fewer (polynomial decay, Shamir and Zhang, ICML 2013, with eta = 3).

    Attributes:
        tensors: the average of each trained tensor; none with a decay of 0.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad and decay]
        self.tensors = [parameter.detach().clone() for parameter in self.trained]

    def step(self, steps: int) -> None:
        """Take in the weights that the optimizer has made with its step number `steps`, the first being 1."""
        if self.tensors:
            average = get_ema_multi_avg_fn(min(self.decay, 1 - 4 / (steps + 3)))
            average(self.tensors, [parameter.detach() for parameter in self.trained], steps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averaged weights; nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, average in zip(self.trained, self.tensors, strict=True):
            parameter.data, average.data = average.data, parameter.data


def build_optimizer(name: str, model: ForecastModel, lr: float) -> torch.optim.Optimizer:
    """Adam, AdamW, or bitsandbytes' AdamW with 8-bit states, over the trained tensors."""
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=lr)
    return BlockAdam(list(model.parameters()), model.mapping_layer, lr, decoupled=name == "adamw")


def build_scheduler(
    args: Namespace, optimizer: torch.optim.Optimizer, steps_per_epoch: int, ranks: int
) -> tuple[LRScheduler, int]:
    """PyTorch's scheduler for `--lradj` under `--recipe`, and how often it steps after each iteration (0: once an epoch).

    It depends on nothing but the number of its steps, so a resumed run steps a new one as often.

    published is what the code of the paper does (KimMeen/Time-LLM, run_main.py): but for COS it makes a OneCycleLR, which
    sets the rate to a 25th and Adam's first beta to 0.95. TST alone steps it, by accelerate once for each process; the
    others start from the rate that they find.

    Args:
        ranks: processes of the group.
    """
    published, lr, total = args.recipe == "published", args.learning_rate, steps_per_epoch * args.train_epochs
    if args.lradj == "COS":
        return (
            (CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-8), 0)
            if published
            else (CosineAnnealingLR(optimizer, total), 1)
        )
    per_step = ranks if published else 1
    if published or args.lradj == "TST":
        steps, rise = per_step * total, args.pct_start
        if rise * steps == 1:  # the first step alone would be the rise, and OneCycleLR would divide by its length of 0
            rise -= 1e-9
        cycle = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rise, cycle_momentum=published)
        if args.lradj == "TST":
            return cycle, per_step
        lr = optimizer.param_groups[0]["lr"]
    rates = {  # by the epochs that are done
        "constant": lambda done: lr,
        "type1": lambda done: lr * 0.5 ** (max(0, done - 1) if published else done),
        "type2": lambda done: ([lr] + [rate for epoch, rate in TYPE2.items() if done >= epoch])[-1],
        "type3": lambda done: lr * 0.9 ** max(0, done - (3 if published else 2)),
        "PEMS": lambda done: lr * 0.95**done,
    }
    for group in optimizer.param_groups:
        group["initial_lr"] = 1.0  # what LambdaLR multiplies: so its factor is the rate itself, to the last bit
    return LambdaLR(optimizer, rates[args.lradj]), 0
