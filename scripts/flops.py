"""Floating-point operations of a training step on the fast path, and the machine's rate for them."""

import sys

if __name__ == "__main__":  # before the imports, which would not be found
    sys.exit("scripts/flops.py is a part of scripts/benchmark.py, not a program: python scripts/benchmark.py --help")

import time
from typing import Any

import torch
from torch import nn

from data_provider.batches import Batch
from layers.fast.linear import FrozenWeight, product
from layers.reprogramming import ReprogrammingLayer
from models.TimeLLM import PROTOTYPES, Model


def linear_values(module: nn.Module) -> int:
    """Values of all matrices in a module; a 4-bit layer counts by its true shape, GPT2's Conv1D as a Linear."""
    total = 0
    part: Any
    for part in module.modules():
        if isinstance(part, nn.Linear):
            total += part.in_features * part.out_features
        elif type(part).__name__ == "Conv1D":
            total += part.weight.numel()
    return total


def training_step_flops(model: Model, batch: Batch) -> int:
    """Operations that the step cannot do without; a product of m x k and k x n counts 2*m*k*n.

    The terms stand in scripts/BENCHMARK.md.
    """
    backbone = model.backbone
    config = backbone.model.config
    assert batch.prompts is not None, "the loader has made no prompts"
    M, n = batch.prompts.ids.shape
    P0, f = len(model.prefix_ids), model.d_ff
    L = model.output_projection.linear.in_features // f
    S, layers, D = P0 + n + L, config.num_hidden_layers, backbone.hidden_size
    heads_width = config.num_attention_heads * (getattr(config, "head_dim", None) or D // config.num_attention_heads)
    kv_width = heads_width // backbone.groups
    decoder = linear_values(backbone.model)  # all layers
    last = decoder // layers - 2 * D * kv_width  # of the last layer, statistics need keys and values alone
    statistics = 2 * n * (decoder - last) + 4 * n * (P0 + n) * heads_width * (layers - 1)
    # Forward: scores and their product with the values. Backward: two such products of S slots for the
    # queries' gradient, and two of L slots: a frozen prefix's keys and values have none.
    attention = 8 * L * S + 4 * L * L
    patches = 2 * 2 * L * decoder + attention * heads_width * layers

    reprogramming = model.reprogramming_layer
    assert isinstance(reprogramming, ReprogrammingLayer)
    width, d = reprogramming.query_projection.weight.shape  # h*f, d
    cross = 3 * (2 * L * d * width + 4 * L * PROTOTYPES * width + 2 * L * width * D)
    patch_embedding = 2 * 2 * L * model.patch_embedding.value_embedding.tokenConv.weight.numel()
    head = 3 * 2 * model.output_projection.linear.weight.numel()
    once = 3 * 2 * PROTOTYPES * D * 2 * width  # keys and values of the prototypes
    if model.mapping_layer is not None:
        once += 2 * 2 * PROTOTYPES * backbone.vocab_size * D  # W·E forward, and backward to W
    return M * (statistics + patches + cross + patch_embedding + head) + once


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of a square matrix product, the best of fifteen: five of each way that a step uses."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    packed = FrozenWeight(b, prepacked=True)
    packed.forward(a)
    best = float("inf")
    for _ in range(5):
        for multiply in (lambda: torch.mm(a, b), lambda: product(a, b), lambda: packed.forward(a)):
            _wait(device)
            began = time.perf_counter()
            multiply()
            _wait(device)
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
