"""The number types of a run, chosen once in its set-up.

In fp16 the loss is scaled, so that small gradients are not lost, nor large ones infinite: the scale halves at a step with
infinite or NaN numbers, which is skipped, and doubles after GOOD_STEPS good ones (Micikevicius et al., ICLR 2018). It is
part of `Progress`, and `train_step` keeps it: torch's GradScaler does not see the mapping layer's factored gradient.
"""

from argparse import Namespace
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GOOD_STEPS = 2000  # in a row, after which the scale doubles
LARGEST_SCALE = 2.0**24


@dataclass(frozen=True)
class Precision:
    """Number types of a run.

    Attributes:
        device_type: "cpu" or "cuda".
        autocast_dtype: what products are computed in; None: each in the type of its operands.
        weights_dtype: of the frozen language model's weights; in 4 bit, of the products with them.
        is_scaled: whether the loss is multiplied before the backward pass.
        note: a line for the log; empty where everything is as ever on such a device.
    """

    device_type: str
    autocast_dtype: torch.dtype | None
    weights_dtype: torch.dtype
    is_scaled: bool = False
    note: str = ""

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, self.autocast_dtype, enabled=self.autocast_dtype is not None)


def choose_precision(args: Namespace, device: torch.device, uses_llm: bool = True) -> Precision:
    """What `--amp_dtype` stands for on this device; a model without a language model is small and stays in float32.

    auto: on a GPU bf16, or fp16 where it has none of its own; on the CPU float32, or bf16 with `--use_amp`. The
    frozen layers are held in bf16 on a GPU and in 4 bit, on the CPU in float32, unless fp16 or fp32 is asked for.
    """
    if not uses_llm:
        return Precision(device.type, None, torch.float32)
    is_cuda = device.type == "cuda"
    usual = "bf16" if is_cuda or args.use_amp else "fp32"
    held = torch.bfloat16 if is_cuda or args.load_in_4bit else torch.float32
    name = args.amp_dtype
    if name == "auto":
        # PyTorch emulates bf16 on older GPUs, which is slow.
        lacks_bf16 = is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False)
        name = "fp16" if lacks_bf16 else usual
    if name == "fp16" or name == args.amp_dtype == "fp32":
        held = DTYPES[name]
    reason = " (this GPU has no bf16)" if args.amp_dtype == "auto" else ""
    notes = {usual: "", "fp16": f"Numbers: fp16 with loss scaling{reason}"}
    dtype, note = None if name == "fp32" else DTYPES[name], notes.get(name, f"Numbers: {name}")
    return Precision(device.type, dtype, held, name == "fp16", note)
