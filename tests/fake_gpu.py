"""A GPU that computes nothing: PyTorch's CPU build made to run its CUDA path over FakeTensors.

A FakeTensor has a shape, a type and a device, and no values. Over them the program's own code runs as on "cuda": what
mixes devices or types raises, every storage is counted, and every place where the program waits for the device is noted.
Two things a CPU build lacks are compiled with g++ on first use: a device guard, and an answer to which accelerator
there is. They must be in the process before PyTorch, so this module is imported first, in a process of its own.

Not covered: values, streams, real kernels' demands, and what a GPU keeps for itself. `scaled_dot_product_attention`
runs as plain products, so its temporaries are larger than a real one's.
"""

# ruff: noqa: E402
import ctypes
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHIMS = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <optional>

static const c10::Device gpu(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return gpu; }
  c10::Device getDevice() const override { return gpu; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, gpu); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {
struct Hooks final : CUDAHooksInterface {
  explicit Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)

namespace accelerator {  // the autograd engine asks here; found before PyTorch's own, as it is loaded first
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}
}
"""


folder = Path(sys.argv[1])
library, source = folder / "fake_gpu.so", folder / "fake_gpu.cpp"
torch_folder = importlib.util.find_spec("torch").submodule_search_locations[0]
source.write_text(SHIMS, encoding="utf-8")
command = ["g++", *"-O0 -shared -fPIC -std=c++20".split(), f"-I{torch_folder}/include", source, "-o", library]
libraries = [f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"]
subprocess.run([*command, *libraries], check=True)
ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

import bitsandbytes
import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel

import layers.backbone
import utils.saving.checkpoint
import utils.setup
from data_provider.batches import Batch
from layers.prompt import Prompts
from tests.small_run import PRED_LEN, SEQ_LEN, command_line
from tests.test_cuda_path import BATCHES, CASES, PLACES, RETRY, STEPS
from utils.flags import parse_flags
from utils.saving.interrupt import Interrupts
from utils.training import evaluate, train

GPU = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]
COPIES = ("aten._to_copy.", "aten.copy_.", "aten.to.")  # how the names begin of what moves values between devices
# Kernels that take operands of one number type alone; a FakeTensor's stand-in for them takes any.
PRODUCTS = tuple(f"aten.{name}." for name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution"))
READS = ("aten._local_scalar_dense.default", "aten.item.default")  # what hands a value to Python


class FakeGPU(TorchDispatchMode):
    """Watches what runs inside it and inside its `tensors`.

    Attributes:
        now, peak: bytes that live on the GPU.
        operations: how many there were.
        waits: where the program waited for the device while `watching`: operation, file and line.
        answer: what the program reads where it reads a value, as a truth value or as a number.
        fail_in: operations until one raises out-of-memory; None: none does.
        emptied: `now`, each time that the program gave idle memory back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self.waits: list[str] = []
        self.watching = False
        self.answer = 0.0
        self.fail_in: int | None = None
        self.emptied: list[int] = []
        self._sizes: dict[int, int] = {}  # of the live storages, by id
        FakeTensorMode.avoid_device_init = True  # although `torch.cuda.is_available` says that there is one
        self.tensors = FakeTensorMode(allow_non_fake_inputs=False)

    def peak_of(self, work: Callable[[], object], answer: float = 0.0) -> int:
        """The highest `now` while `work` runs, without what a `peak_of` inside it measures."""
        outside = self.peak, self.answer
        self.peak, self.answer = self.now, answer
        try:
            work()
            return self.peak
        finally:
            self.peak, self.answer = outside

    def wait(self, what: str) -> None:
        """Note that the program waits for the device: where, in its own code."""
        if self.watching:
            places = [f"{os.path.relpath(frame.filename, ROOT)}:{frame.lineno}" for frame in traceback.extract_stack()]
            own = [place for place in places if not place.startswith(("..", "<", ".venv", "tests"))]
            self.waits.append(f"{what} in {own[-1] if own else '?'}")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(function), kwargs or {}
        if name.startswith("prim."):
            return function(*args, **kwargs)
        self.operations += 1
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                raise torch.OutOfMemoryError(f"CUDA out of memory (injected in {name})")
        if name in READS:
            if args[0].device.type == "cuda":
                self.wait(name)
            return bool(self.answer) if args[0].dtype == torch.bool else self.answer
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.dtype for tensor in operands}
        if name.startswith(PRODUCTS) and len(kinds) > 1:
            raise RuntimeError(f"{name}: operands of different types: {', '.join(sorted(map(str, kinds)))}")
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self._take(tensor)
        # A CPU tensor without axes goes to a kernel as a number; all others are copied, for which the program waits.
        copies = name.startswith(COPIES)
        devices = {
            tensor.device.type for tensor in [*operands, *made] if copies or tensor.dim() or tensor.device.type == "cuda"
        }
        if len(devices) > 1:
            given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
            if not given.get("non_blocking"):
                self.wait(name)
            elif made and made[0].device.type == "cpu" and made[0] is not args[0]:
                # Into memory that the program has provided, an event may say when the values are there.
                self.wait(f"{name}, whose values may be read before they are there,")
        return result

    def _take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if tensor.device.type == "cuda" and key not in self._sizes:
            self._sizes[key] = -(-storage.nbytes() // 512) * 512  # as the allocator rounds
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def pretend(gpu: FakeGPU) -> None:
    """Replace, for the rest of the process, what PyTorch asks the driver and what a FakeTensor cannot do."""
    total = 6 * 2**30
    cuda = torch.cuda
    cuda.amp.common.amp_definitely_not_available = lambda: False  # else autocast("cuda") switches itself off
    cuda.is_available = cuda.is_bf16_supported = lambda *_, **__: True
    cuda.current_device = lambda: 0
    cuda.synchronize = lambda *_: gpu.wait("torch.cuda.synchronize")
    cuda.empty_cache = lambda: gpu.emptied.append(gpu.now)
    cuda.mem_get_info = lambda *_: (total - gpu.now, total)
    cuda.memory_allocated = cuda.memory_reserved = lambda *_: gpu.now
    cuda.set_per_process_memory_fraction = lambda *_: None
    for module in (torch, cuda):
        module.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
        module.set_rng_state = lambda *_: None
    bitsandbytes.functional.create_dynamic_map = lambda *_, **__: torch.empty(256)  # a table of constants
    # A storage without memory can be neither copied nor read.
    FakeTensor.__deepcopy__ = lambda tensor, memo: tensor.clone()

    def stage(held: object, *_: Any) -> bytes:
        """What torch.save and safetensors do with tensors of a GPU: one after the other comes to the CPU."""
        for tensor in tree_leaves(held):
            if isinstance(tensor, torch.Tensor):
                tensor.cpu()
        return b""

    torch.save = utils.saving.checkpoint.save = stage
    nn.Module._apply = _apply


def _apply(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's own: a FakeTensor does not take another's data."""
    for child in module.children():
        child._apply(change)
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        changed = None if tensor is None else change(tensor.detach())
        if name in module._buffers:
            module._buffers[name] = changed
        elif changed is not None and changed.device != tensor.device:
            module._parameters[name] = nn.Parameter(changed, tensor.requires_grad)
    return module


class FourBitLinear(nn.Module):
    """Stands for bitsandbytes' Linear4bit, whose parameters cannot be FakeTensors: its packed weight and scales, and
    its own autograd function."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        values = layer.weight.numel()
        self.weight = nn.Parameter(torch.empty(values // 2, 1, dtype=torch.uint8, device=GPU), requires_grad=False)
        self.bias, self.compute_dtype = layer.bias, dtype
        scales = {"absmax": torch.empty(values // 64, device=GPU), "code": torch.empty(16, device=GPU)}
        self.quant_state = bitsandbytes.functional.QuantState(
            **scales, shape=layer.weight.shape, blocksize=64, quant_type="nf4", dtype=dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        product = bitsandbytes.matmul_4bit(x.to(self.compute_dtype), self.weight, bias=bias, quant_state=self.quant_state)
        return product.to(x.dtype)


def fake_load(info: Any, _layers: int, device: torch.device, four_bit: bool, dtype: torch.dtype) -> nn.Module:
    """Stands for `layers.backbone._load`: the folder's model without its weights."""
    config = AutoConfig.from_pretrained(info.folder)
    model = AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype).to(device)
    for parent in list(model.modules()) if four_bit else ():
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, FourBitLinear(child, dtype))
    return model


class Bench:
    """A training job on the fake GPU: the program's own set-up, loop, saver and evaluation, on batches without values."""

    WINDOWS, CHANNELS, TOKENS = 2, 3, 40  # of a batch; tokens of a prompt's statistics
    VOCABULARY = 2000  # the mapping layer's 8 MB outweigh all else, as on a real model

    def __init__(self, gpu: FakeGPU, backbone: Path, folder: Path, **flags: object):
        self.gpu = gpu
        self.save_peaks: list[int] = []
        large = folder / "backbone"
        shutil.copytree(backbone, large)
        config = json.loads((large / "config.json").read_text(encoding="utf-8"))
        (large / "config.json").write_text(json.dumps(config | {"vocab_size": self.VOCABULARY}), encoding="utf-8")
        usual = {"device": "cuda", "llm_layers": 2, "log_every": 10**6, "save_steps": 0, "max_sequences": 0}
        layers.backbone._load = fake_load
        utils.setup.find_device = lambda _args: (Accelerator(cpu=True), GPU)
        self.context = utils.setup.setup(parse_flags(command_line(folder, large, **usual | flags)), 0, Interrupts())
        assert not self.context.model.why_plain, self.context.model.why_plain  # the proof ran on this device
        self.context.loaders = {"train": self, "val": self}
        saver = self.context.training.saver
        save = saver.save
        saver.save = lambda progress: self.save_peaks.append(gpu.peak_of(lambda: save(progress), answer=1.0))

    def batch(self) -> Batch:
        M = self.WINDOWS * self.CHANNELS
        prompts = Prompts(torch.zeros(M, self.TOKENS, dtype=torch.long), torch.ones(M, dtype=torch.long))
        return Batch(torch.zeros(M, SEQ_LEN), torch.zeros(M, PRED_LEN), prompts)

    def layers(self) -> nn.ModuleList:
        model = self.context.model
        owner: Any = model.language_model if model.fast_path else model.backbone
        lists = [module for module in owner.model.modules() if isinstance(module, nn.ModuleList)]
        return next(found for found in lists if len(found) == owner.model.config.num_hidden_layers)

    def train(self, steps: int, save: bool = False) -> None:
        self.batches = self.batches_per_epoch = steps
        self.context.training.progress.next_epoch()
        train.train_epoch(self.context, train.Clock(self.context))
        self.gpu.watching = False
        if save:
            train.save(self.context)

    # What the program asks of a loader and of its sampler.

    batch_sampler = property(lambda self: self)

    def set_epoch(self, epoch: int, skip: int) -> None: ...

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.batches):
            batch = self.batch()
            self.gpu.watching = number > 0  # the first one makes what the others use again
            yield batch
        self.gpu.watching = False


def examine(bench: Bench) -> dict[str, Any]:
    """Steps, the last of them saved, an evaluation, and what is saved at an epoch's end; peaks in bytes."""
    gpu, context = bench.gpu, bench.context
    training = context.training
    kinds: set[str] = set()
    for layer in bench.layers():
        layer.register_forward_pre_hook(lambda _, inputs: kinds.add(str(inputs[0].dtype).removeprefix("torch.")))
    found: dict[str, Any] = {"step": gpu.peak_of(lambda: bench.train(STEPS, save=True)), "held": gpu.now}
    bench.batches = BATCHES
    gpu.emptied.clear()
    gpu.peak_of(lambda: evaluate.score(context, "val"), answer=1.0)
    found["emptied"] = len(gpu.emptied)
    found["checkpoint"] = gpu.peak_of(lambda: training.saver.save_checkpoint({}), answer=1.0)
    training.progress.next_epoch()
    train.save(context)
    found |= {"state": max(bench.save_peaks), "states": len(bench.save_peaks)}
    return found | {"waits": gpu.waits, "stream": sorted(kinds)}


def run_out_of_memory(bench: Bench) -> dict[str, Any]:
    """Let steps run out of memory, each at another place of its passes.

    For each: the bytes beyond those before its passes, whenever the program gave idle memory back, and when it tried
    again; and for an evaluation, when it tried again.
    """
    gpu, limits = bench.gpu, (bench.context.step_limit, bench.context.evaluation_limit)
    begun: list[int] = []
    place: int | None = None

    def watch(work):
        def watched(*args, **kwargs):
            begun.append(gpu.now)
            gpu.fail_in = place if len(begun) == 1 else None
            return work(*args, **kwargs)

        return watched

    def attempt(work) -> dict[str, Any]:
        begun.clear()
        gpu.emptied.clear()
        gc.collect()
        for limit in limits:
            limit.sequences = 0
        work()
        before, after = begun
        return {"place": place, "emptied": [now - before for now in gpu.emptied], "left": after - before}

    bench.train(1)
    first = gpu.operations
    bench.train(1)
    length = gpu.operations - first  # of a step; the optimizer's part of it is short
    gc.disable()  # what only the collector would free is left
    gc.freeze()  # it has less to look through
    train.forward_backward, evaluate.forecast_in_parts = map(watch, (train.forward_backward, evaluate.forecast_in_parts))
    tries = []
    for number in range(PLACES):
        place = number * int(0.9 * length) // PLACES
        tries.append(attempt(lambda: bench.train(1)))
    place = 20
    gpu.answer, bench.batches = 1.0, 1
    return {"tries": tries, "evaluation": attempt(lambda: evaluate.score(bench.context, "val"))["left"]}


def main(folder: Path, backbones: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Run all cases; of an error the program's part of the way to it, and what it says (PyTorch can say pages)."""
    report: dict[str, dict[str, Any]] = {}
    for name, (family, flags) in [*CASES.items(), (RETRY, CASES["fast, 4 bit, vocab"])]:
        gpu = FakeGPU()
        pretend(gpu)
        run = folder / name.replace(" ", "_")
        run.mkdir()
        try:
            with gpu.tensors, gpu:
                bench = Bench(gpu, backbones[family], run, llm_model=family, **flags)
                report[name] = run_out_of_memory(bench) if name == RETRY else examine(bench)
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if ".venv" not in frame.filename]
            told = "".join(traceback.format_list(frames))
            report[name] = {"error": f"{told}{type(error).__name__}: {str(error)[:500]}"}
    return report


if __name__ == "__main__":
    print(json.dumps(main(folder, {"QWEN": Path(sys.argv[2]), "GPT2": Path(sys.argv[3])})))
