"""Tables of runs and studies, and the script for a user's own file where it is called wrongly."""

import importlib.util
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_file_script_says_what_it_needs(tmp_path):
    script = ROOT / "scripts" / "TimeLLM_custom.sh"
    for words, message in (
        ([], "usage: "),
        (["--seq_len", "9"], "usage: "),
        (["none.csv"], "none.csv: got no such file, expected a CSV file"),
    ):
        done = subprocess.run(["bash", script, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
