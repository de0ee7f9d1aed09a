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


def test_summary_passes_over_epochs_without_a_number(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.json").write_text("{}")
    rows = ["epoch,vali_loss,peak_memory_gib", "1,nan,0", "2,0.5,0", "3,0.7,0"]
    for kept, best in ((rows, (2, 0.5)), (rows[:2], (None, None))):
        (tmp_path / "run" / "history.csv").write_text("\n".join(kept) + "\n")
        (found,) = load("summary").read_runs(tmp_path)
        assert (found["best_epoch"], found["vali"]) == best


def test_own_file_script_says_what_it_needs(tmp_path):
    script = ROOT / "scripts" / "TimeLLM_custom.sh"
    for words, message in (
        ([], "usage: "),
        (["--seq_len", "9"], "usage: "),
        (["none.csv"], "none.csv: got no such file, expected a CSV file"),
    ):
        done = subprocess.run(["bash", script, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_summary_without_runs(tmp_path, capsys):
    summary = load("summary")
    for folder in (tmp_path, tmp_path / "none"):
        try:
            summary.main([str(folder)])
        except SystemExit as stop:
            assert stop.code == 2
        assert capsys.readouterr().err.count("\n") == 1
