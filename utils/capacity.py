"""How many sequences fit into memory at once (the default of `--max_sequences`)."""

import psutil
import torch

from layers.prompt import MAX_PROMPT_TOKENS
from layers.reprogramming import ATTENTION_DROPOUT
from models.TimeLLM import PROTOTYPES, Model

SHARE = 0.7  # of the free memory; the rest is for what is not counted, and for fragmentation
OPTIMIZER_BYTES = {"adam": 8, "adamw": 8, "adamw8bit": 2}  # of state for each trained value
# On the CPU larger tensors than this are slower: the C library maps memory for each anew and gives it back.
# Below FEW sequences the backbone's weights would be read too often.
LARGEST_TENSOR, FEW = 24 * 2**20, 32
STATISTICS_TOKENS = 128  # about, with all digits


def fitting_sequences(model: Model, args) -> int:
    """Sequences that one part of a step may hold, a power of two, at least 1.

    A power of two, so that the same machine finds the same number in its next run although a little
    more or less is free: the parts decide how sums are rounded.

    Args:
        args: the run's flags, of which `is_training`, `optimizer` and `grad_checkpoint` decide.
    """
    backbone, head = model.backbone, model.output_projection.linear
    patches = head.in_features // model.d_ff
    prompt = min(len(model.prompts.opening_ids) + STATISTICS_TOKENS, MAX_PROMPT_TOKENS)
    each = backbone.bytes_per_sequence(patches, prompt, model.fast_path, args.grad_checkpoint)
    heads = model.reprogramming_layer.n_heads
    if backbone.device.type == "cpu" and args.is_training and ATTENTION_DROPOUT:
        each += patches * PROTOTYPES * heads  # which scores were dropped, a byte each
    each += 8 * patches * heads * model.d_ff * 4  # queries and their attention's results, and gradients
    free = _free_bytes(backbone.device)
    if args.is_training:  # gradients and optimizer state are not there yet
        free -= sum(p.numel() for p in model.parameters()) * (4 + OPTIMIZER_BYTES[args.optimizer])
    fit = max(1, int(SHARE * free / each))
    if backbone.device.type == "cpu":
        tokens = max(patches, STATISTICS_TOKENS) if model.fast_path else prompt + patches
        fit = min(fit, max(FEW, LARGEST_TENSOR // (tokens * backbone.inner_size * backbone.embeddings.element_size())))
    return 1 << (fit.bit_length() - 1)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        fraction = torch.cuda.get_per_process_memory_fraction(device)
        total = torch.cuda.get_device_properties(device).total_memory
        return min(free + held, int(fraction * total) - torch.cuda.memory_allocated(device))
    return psutil.virtual_memory().available
