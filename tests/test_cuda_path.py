"""The CUDA path without a GPU, over FakeTensors (tests/fake_gpu.py): devices and types, waits for the device, memory.

PyTorch must not be in the process before the fake GPU is, so the cases run in one of their own:
`python -m tests.fake_gpu`, which ends with a line of JSON that says what each case found.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCHES = 2, 2  # of training, and of an evaluation
RETRY = "out of memory"  # the name of one more case
PLACES = 6  # where memory runs out, evenly over a step's passes
# name -> family, flags
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "fast, 4 bit, vocab": ("QWEN", {"load_in_4bit": True}),
    "fast, bf16, direct": ("QWEN", {"prototypes": "direct"}),
    "fast, recomputed, in parts": ("QWEN", {"load_in_4bit": True, "grad_checkpoint": True, "max_sequences": 4}),
    "plain, 4 bit, direct": ("QWEN", {"load_in_4bit": True, "prototypes": "direct", "fast_path": "plain"}),
    "plain, bf16, vocab": ("QWEN", {"fast_path": "plain"}),
    "GPT2, bf16, vocab": ("GPT2", {}),
    "fast, 4 bit with fp16, vocab": ("QWEN", {"load_in_4bit": True, "amp_dtype": "fp16"}),
    "AdamW in 8 bits": ("QWEN", {"load_in_4bit": True, "optimizer": "adamw8bit"}),
}


@pytest.fixture(scope="module")
def report(backbones: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    if shutil.which("g++") is None or pytest.importorskip("torch").version.cuda is not None:
        pytest.skip("no g++, or a PyTorch with a CUDA of its own")
    folder = tmp_path_factory.mktemp("fake_gpu")
    command = [sys.executable, "-m", "tests.fake_gpu", folder, backbones["qwen2"], backbones["gpt2"]]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_devices_types_waits_and_memory(report, case: str) -> None:
    found = report[case]
    assert found.get("error") is None, found["error"]  # no device or type is mixed
    # A wider stream raises nothing under autocast: the layers are only slower and keep more.
    assert found["stream"] == ["float32" if "fp16" in case else "bfloat16"]
    if case != "AdamW in 8 bits":  # bitsandbytes' optimizer waits by itself
        # At one line, where the loop reads the loss; an evaluation waits nowhere.
        (place,) = {wait.split(" in ")[1] for wait in found["waits"]}
        assert place.startswith("utils/training/train.py"), place
    assert found["states"] == 2 and found["state"] >= found["held"] > 0, found
    for saved in ("state", "checkpoint"):
        assert found[saved] <= found["step"], f"{saved} takes more memory than a step: {found}"
    # An evaluation does not lie beside the idle blocks of steps; and not once a batch, as that waits for the device.
    assert found["emptied"] == 1


def test_nothing_is_left_on_the_device_where_a_step_or_an_evaluation_is_tried_again(report) -> None:
    found = report[RETRY]
    assert found.get("error") is None, found["error"]
    assert len(found["tries"]) == PLACES and found["evaluation"] == 0
    assert [each for each in found["tries"] if not each["emptied"] or each["emptied"][-1] or each["left"]] == []
