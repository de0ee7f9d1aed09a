"""The CUDA path without a GPU, over FakeTensors (tests/fake_gpu.py): devices and types, waits for the device, memory.

PyTorch must not be in the process before the fake GPU is, so the cases run in one of their own:
`python -m tests.test_cuda_path`, which ends with a line of JSON that says what each case found.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.fake_gpu import Bench

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCHES = 2, 2  # of training, and of an evaluation
RETRY = "out of memory"  # the name of one more case
PLACES = 10  # where memory runs out, evenly over a step's passes
# name -> family, flags
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "fast, 4 bit, vocab": ("QWEN", {"load_in_4bit": True}),
    "fast, 4 bit, direct": ("QWEN", {"load_in_4bit": True, "prototypes": "direct"}),
    "fast, bf16, vocab": ("QWEN", {}),
    "fast, recomputed, in parts": ("QWEN", {"load_in_4bit": True, "grad_checkpoint": True, "max_sequences": 4}),
    "plain, 4 bit, direct": ("QWEN", {"load_in_4bit": True, "prototypes": "direct", "fast_path": "plain"}),
    "plain, bf16, vocab": ("QWEN", {"fast_path": "plain"}),
    "GPT2, bf16, vocab": ("GPT2", {}),
    "fast, fp16, vocab": ("QWEN", {"amp_dtype": "fp16"}),
    "fast, 4 bit with fp16, direct": ("QWEN", {"load_in_4bit": True, "prototypes": "direct", "amp_dtype": "fp16"}),
    "AdamW in 8 bits": ("QWEN", {"load_in_4bit": True, "optimizer": "adamw8bit"}),
}


@pytest.fixture(scope="module")
def report(backbones: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case -> what its process found."""
    import torch

    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has a CUDA of its own")
    folder = tmp_path_factory.mktemp("fake_gpu")
    words = [str(path) for path in (folder, backbones["qwen2"], backbones["gpt2"])]
    command = [sys.executable, "-m", "tests.test_cuda_path", *words]
    environment = os.environ | {"FAKE_GPU_FOLDER": str(folder)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture
def found(report, case: str) -> dict[str, Any]:
    """What one case found."""
    if "error" in report[case]:
        pytest.skip("the case ended in an error, which another test shows")
    return report[case]


@pytest.mark.parametrize("case", [*CASES, RETRY])
def test_no_device_or_type_is_mixed(report, case: str) -> None:
    assert report[case].get("error") is None, report[case]["error"]


@pytest.mark.parametrize("case", CASES)
def test_the_residual_stream_is_as_narrow_as_it_may_be(found, case: str) -> None:
    """A wider one raises nothing under autocast: the layers are only slower and keep more."""
    assert found["stream"] == ["float32" if "fp16" in case else "bfloat16"]


# bitsandbytes' optimizer waits by itself.
@pytest.mark.parametrize("case", [case for case in CASES if case != "AdamW in 8 bits"])
def test_a_step_waits_for_the_device_where_it_reads_the_loss_and_an_evaluation_nowhere(found, case: str) -> None:
    assert found["waits"] and all("utils/training/train.py" in wait for wait in found["waits"])


@pytest.mark.parametrize("case", CASES)
def test_saving_takes_no_more_memory_than_a_step(found, case: str) -> None:
    assert found["states"] == 2 and found["state"] >= found["held"] > 0, found
    for saved in ("pack", "state", "checkpoint"):
        assert found[saved] <= found["step"], f"{saved}: {found}"


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_does_not_lie_beside_the_idle_blocks_of_steps(found, case: str) -> None:
    assert found["emptied"] == 1  # and not once a batch, as that waits for the device


@pytest.mark.parametrize("case", [RETRY])
def test_nothing_is_left_on_the_device_where_a_step_is_tried_again(found, case: str) -> None:
    tries = found["tries"]
    assert len(tries) == PLACES
    assert [try_ for try_ in tries if not try_["emptied"] or try_["emptied"][-1] or try_["left"]] == []


@pytest.mark.parametrize("case", [RETRY])
def test_nothing_is_left_on_the_device_where_an_evaluation_is_tried_again(found, case: str) -> None:
    assert found["evaluation"] == 0


def examine(bench: "Bench") -> dict[str, Any]:
    """Steps, the last of them saved, an evaluation, and what is saved at an epoch's end; peaks in bytes."""
    from utils.saving.state import pack
    from utils.training.evaluate import score
    from utils.training.train import save

    gpu, job = bench.gpu, bench.job
    training = job.training
    kinds: set[str] = set()
    for layer in bench.layers():
        layer.register_forward_pre_hook(lambda _, inputs: kinds.add(str(inputs[0].dtype).removeprefix("torch.")))
    found: dict[str, Any] = {"step": gpu.peak_of(lambda: bench.train(STEPS, save=True)), "held": gpu.now}
    bench.batches = BATCHES
    gpu.emptied.clear()
    found["evaluation"] = gpu.peak_of(lambda: score(job, "val"), answer=1.0)
    found["emptied"] = len(gpu.emptied)
    found["checkpoint"] = gpu.peak_of(lambda: training.saver.save_checkpoint({}), answer=1.0)
    training.progress.next_epoch()
    save(job)
    found |= {"state": max(bench.save_peaks), "states": len(bench.save_peaks)}
    found["pack"] = gpu.peak_of(lambda: pack(job.model, training.optimizer, training.progress, {}, job.device), answer=1.0)
    return found | {"waits": gpu.waits, "stream": sorted(kinds)}


def run_out_of_memory(bench: "Bench") -> dict[str, Any]:
    """Let steps run out of memory, each at another place of its passes.

    For each: the bytes beyond those before its passes, whenever the program gave idle memory back, and when it tried
    again; and for an evaluation, when it tried again.
    """
    from utils.training import evaluate, train

    gpu, limits = bench.gpu, (bench.job.step_limit, bench.job.evaluation_limit)
    passes, forecast = train.forward_backward, evaluate.forecast_in_parts
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
    train.forward_backward, evaluate.forecast_in_parts = watch(passes), watch(forecast)
    tries = []
    for number in range(PLACES):
        place = number * int(0.9 * length) // PLACES
        tries.append(attempt(lambda: bench.train(1)))
    place = 20
    gpu.answer, bench.batches = 1.0, 1
    return {"tries": tries, "evaluation": attempt(lambda: evaluate.score(bench.job, "val"))["left"]}


def main(folder: Path, backbones: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Run all cases."""
    from tests.fake_gpu import Bench, FakeGPU, pretend

    report: dict[str, dict[str, Any]] = {}
    for name, (family, flags) in [*CASES.items(), (RETRY, CASES["fast, 4 bit, vocab"])]:
        gpu = FakeGPU()
        pretend(gpu)
        run = folder / name.replace(" ", "_")
        run.mkdir()
        try:
            with gpu:
                bench = Bench(gpu, backbones[family], run, llm_model=family, **flags)
                report[name] = run_out_of_memory(bench) if name == RETRY else examine(bench)
        except Exception as error:
            report[name] = {"error": describe(error)}
    return report


def describe(error: Exception) -> str:
    """The program's part of the way to an error, and what it says (PyTorch can say pages)."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if ".venv" not in frame.filename]
    return "".join(traceback.format_list(frames)) + f"{type(error).__name__}: {str(error)[:500]}"


if __name__ == "__main__":
    words = [Path(word) for word in sys.argv[1:]]
    print(json.dumps(main(words[0], {"QWEN": words[1], "GPT2": words[2]})))
