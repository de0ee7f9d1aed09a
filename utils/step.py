"""One training step: forward, backward, and the update of what is trained."""

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from layers.backbone import require_bitsandbytes
from models.TimeLLM import Model
from utils.batches import Batch


def build_optimizer(name: str, model: Model, rate: float) -> torch.optim.Optimizer:
    """Adam, AdamW, or bitsandbytes' AdamW with 8-bit states, over the trained tensors."""
    parameters = list(model.parameters())
    if name == "adamw8bit":
        require_bitsandbytes("optimizer adamw8bit")
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=rate)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    # fused: one pass over the weights, and no temporary copies of them
    return kind(parameters, lr=rate, fused=parameters[0].device.type in ("cpu", "cuda"))


def gradients(model: Model, batch: Batch, accelerator: Accelerator, max_sequences: int = 0) -> torch.Tensor:
    """Leave the batch's gradients in the trained tensors; return its mean squared error, detached.

    The prototypes' keys and values are made once. The sequences run in parts of at most
    `max_sequences`, whose gradients add up at the keys and values, and flow on from there once.
    """
    with accelerator.autocast():
        made = model.text_prototypes()
    prototypes = tuple(t.detach().requires_grad_() for t in made)
    loss = torch.zeros((), device=batch.x.device)
    for part in batch.parts(max_sequences):
        with accelerator.autocast():
            forecast = model.forecast(part.x, part.prompts, prototypes)
        share = F.mse_loss(forecast.float(), part.y) * (len(part.x) / len(batch.x))
        share.backward()
        loss += share.detach()
    torch.autograd.backward(made, [t.grad for t in prototypes])
    if accelerator.num_processes > 1:
        for parameter in model.parameters():
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
    return loss
