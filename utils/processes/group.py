"""The group of processes that accelerate or torchrun has started; of one process, nothing."""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from layers.errors import input_error
from utils.flags import differing

AFTER_THE_FIRST = 10.0  # seconds; the first process needs less for its imports and its line
# The last word before accelerate's own flags: of `accelerate launch`, `accelerate-launch`, or `python -m`.
LAUNCH = ("launch", "accelerate-launch", "accelerate.commands.launch", "accelerate/commands/launch.py")


def launched() -> int:
    """How many processes the launcher has started, as it tells each."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_those_of_accelerate() -> None:
    """Start the processes that `accelerate launch --cpu --num_processes N` was asked for.

    With --cpu accelerate leaves it to MPI's launcher to start processes, and starts one itself. Where no MPI has been,
    its own command line is run again here as it would be for GPUs, which does start them; this process becomes that
    launcher. Where there is nothing to mend, this returns.

    Raises:
        InputError: accelerate's command line cannot be found.
    """
    # It sets an address to meet at where it was asked for more than one process, and leaves the number untold.
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    by_mpi = any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMIX_RANK"))
    if not asked or by_mpi or "WORLD_SIZE" in os.environ:
        return
    import psutil

    parent = psutil.Process().parent()
    words = parent.cmdline() if parent else []
    script = next((place for place, word in enumerate(words) if word == sys.argv[0]), None)
    start = next((place for place, word in enumerate(words) if word in LAUNCH or word.endswith(LAUNCH[1:])), None)
    if start is None or script is None:
        hint = "start them with --config_file scripts/accelerate/cpu.yaml, or with torchrun"
        raise input_error("accelerate launch --cpu", "one process", "as many as --num_processes says", hint)
    options = [word for word in words[start + 1 : script] if word != "--cpu"]
    os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *options, *words[script:]])


def tells_errors() -> bool:
    """Whether this process is its machine's first: what goes wrong before the watch is there, each machine says once.

    The others wait here: a launcher ends all as soon as one has ended, and the first might not have spoken yet.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    time.sleep(AFTER_THE_FIRST)
    return False


def in_group(args: Namespace, work: Callable[[], int]) -> int:
    """The exit code of `work`, under the group's watch."""
    # The watch ends a group of which one has failed. NCCL's own would end processes that could still say so.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    import torch.distributed as dist

    from layers.ranks import from_all
    from utils.processes.watch import Watch

    join(args)
    watch = Watch(dist.get_rank(), dist.get_world_size(), lambda value: from_all(value)[0])
    # From here on who is slow, because the first process measures and writes alone, may take its time.
    dist.distributed_c10d._set_pg_timeout(timedelta(days=1))

    def all_alike() -> int:
        first = from_all(args)[0]
        if name := differing(args, first):
            expected = f"{getattr(first, name)}, as the first process has it"
            raise input_error(f"--{name}", getattr(args, name), expected, "give all the same command line")
        return work()

    code = watch.run(all_alike)
    dist.destroy_process_group()
    return code


def join(args: Namespace) -> Any:
    """The process's accelerator, which is in the group that its launcher has started, if it has.

    Raises:
        InputError: fewer GPUs than processes on this machine.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    meeting = InitProcessGroupKwargs(timeout=timedelta(minutes=10))
    cpu = args.device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu and torch.cuda.is_available() and here > torch.cuda.device_count():
        hint = "start fewer, or give --device cpu"
        raise input_error(f"--device {args.device}", f"{here} processes on this machine", "a GPU for each", hint)
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[meeting])
