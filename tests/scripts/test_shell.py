"""The experiment scripts: flags and their order, weights, data, allocator, and what the caller's shell keeps.

They run in a copy of the scripts folder with a Python that prints how it was called.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from utils.flags import parse_flags
from utils.validate import check_flags

ROOT = Path(__file__).resolve().parents[2]
SMALL = [f"TimeLLM_{name}_2.sh" for name in ("ETTh1", "ETTh2", "ETTm1", "ETTm2")]
EXPERIMENTS = [*SMALL, "TimeLLM_ETTh1_24G.sh"]
FAMILY = {"ECL": "electricity", "Traffic": "traffic", "Weather": "weather"}

# Stands in for Python: answers the two questions that the scripts ask, and prints the call of run_main.py.
RECORDER = """#!/usr/bin/env bash
case $1 in
  -c) [ -n "$FAKE_TORCH" ] && echo "$FAKE_TORCH" ;;
  scripts/get_data.py) echo "progress" >&2; echo "said by get_data"; echo "data: $FAKE_DATA" ;;
  scripts/make_backbone.py) echo "backbone=$*" ;;
  scripts/report.py) echo "table=$2" ;;
  scripts/m4_scores.py) shift; printf 'scored=%s\\n' "$@" ;;
  run_main.py | run_pretrain.py | run_m4.py)
    echo "program=$1"
    echo "cwd=$PWD"
    echo "alloc=${PYTORCH_ALLOC_CONF-} cuda=${PYTORCH_CUDA_ALLOC_CONF-}"
    shift; printf 'arg=%s\\n' "$@"
    echo "Checkpoints saved at: ./checkpoints/run one"
    exit "${FAKE_EXIT:-0}" ;;
esac
"""


class Copy:
    """A repository with nothing but the scripts, in a folder with a space in its name."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "time llm"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        data = self.root / "dataset" / "ETT-small"
        data.mkdir(parents=True)
        for name in ("ETTh1", "ETTh2", "ETTm1", "ETTm2"):
            (data / f"{name}.csv").touch()
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.tool("recorder", RECORDER)
        self.tool("uname", "#!/bin/sh\necho 6.1.0-generic\n")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        path = f"{self.bin}:{os.environ['PATH']}"
        self.env = {"PATH": path, "PYTHON": "recorder", "FAKE_TORCH": "2.13.0+cpu"}

    def tool(self, name: str, text: str) -> None:
        """Put a program on the scripts' PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def bash(self, command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a bash command line in another folder than the repository."""
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.elsewhere,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run(self, script: str, *flags: str, **env: str) -> list[str]:
        """The arguments with which a script calls run_main.py."""
        done = self.bash(f'bash "{self.root}/scripts/{script}" "$@"'.replace('"$@"', " ".join(flags)), **env)
        assert done.returncode == 0, done.stderr
        assert f"cwd={self.root}\n" in done.stdout
        return re.findall("^arg=(.*)$", done.stdout, re.MULTILINE)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_etth1_has_the_guides_flags(copy: Copy) -> None:
    guide = (
        "--task_name long_term_forecast --is_training 1 --root_path ./dataset/ETT-small/ --data_path "
        "ETTh1.csv --model_id ETTh1_512_96 --model_comment Qwen3B_fast --model TimeLLM --data ETTh1 "
        "--features M --seq_len 512 --label_len 48 --pred_len 96 --e_layers 2 --d_layers 1 --factor 3 "
        "--dec_in 7 --c_out 7 --batch_size 4 --d_model 32 --n_heads 8 --d_ff 32 "
        "--llm_layers 6 --num_workers 2 --prompt_domain 1 --train_epochs 3 --itr 1 --dropout 0.1 "
        "--llm_model QWEN --load_in_4bit --resume "
    ).split()
    weights = ["--llm_model_path", f"{copy.root}/base_models/Qwen2.5-3B"]
    assert parse_flags(copy.run("TimeLLM_ETTh1_2.sh")) == parse_flags(guide + weights)


@pytest.mark.parametrize("name", FAMILY)
def test_scripts_of_the_familys_other_files(copy: Copy, name: str) -> None:
    """Their files are not fetched; the published hyperparameters, in what a small card can hold."""
    args, file = parse_flags(copy.run(f"TimeLLM_{name}_2.sh", "--percent", "10")), FAMILY[name]
    assert (args.data, args.data_path, args.model_id) == (name, f"{file}.csv", f"{name}_512_96")
    assert args.root_path == "./dataset/" and args.prompt_domain == 1 and args.resume and args.load_in_4bit
    assert (args.d_ff, args.learning_rate, args.max_sequences) == (32, 0.01, None)
    assert (args.seq_len, args.pred_len, args.llm_layers, args.percent) == (512, 96, 6, 10)


def test_own_csv_is_resumed_unless_told_otherwise(copy: Copy) -> None:
    (copy.elsewhere / "my.csv").write_text("date,a\n")
    args = parse_flags(copy.run("TimeLLM_custom.sh", "my.csv"))
    assert args.resume and args.do_predict and args.data_path == "my.csv"
    assert args.root_path.rstrip("/") == str(copy.elsewhere)
    assert not parse_flags(copy.run("TimeLLM_custom.sh", "my.csv", "--resume", "False")).resume
    preset = parse_flags(copy.run("TimeLLM_custom.sh", "my.csv", "--preset", "best"))
    assert (preset.skip, preset.batch_size, preset.n_heads) == ("stack", 16, 4)  # all that it sets
    (copy.elsewhere / "my.v2.csv.gz").write_text("")
    words = copy.run("TimeLLM_custom.sh", "my.v2.csv.gz", "--date_column", "Zeit", "--drop_columns", "'wind dir'", "note")
    args = parse_flags(words)
    assert (args.model_id, args.data_path) == ("my.v2", "my.v2.csv.gz")
    assert (args.date_column, args.drop_columns) == ("Zeit", ["wind dir", "note"])


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_own_flags_come_last_and_keep_their_spaces(copy: Copy, script: str) -> None:
    argv = copy.run(script, "--train_epochs", "7", "--des", "'two words'")
    assert argv[-4:] == ["--train_epochs", "7", "--des", "two words"]
    args = parse_flags(argv)
    assert args.train_epochs == 7
    assert args.enc_in is args.llm_dim is None  # read off data and model: nobody is told to leave out what he has not given


@pytest.mark.parametrize("script", ["TimeLLM_custom.sh my.csv", "TimeLLM_ETTh1_24G.sh", "TimeLLM_Weather_2.sh"])
@pytest.mark.parametrize("words", ["--model DLinear", "--model=PatchTST"])
def test_a_script_runs_a_model_without_a_language_model(copy: Copy, script: str, words: str) -> None:
    (copy.elsewhere / "my.csv").write_text("date,a\n")
    args = parse_flags(copy.run(*script.split(), words, "--device", "cpu"))
    check_flags(args)  # nothing of the script is refused
    assert words.endswith(args.model)


@pytest.mark.parametrize("failure", ["0", "2"])
def test_source_leaves_the_shell_as_it_was(copy: Copy, failure: str) -> None:
    state = "pwd; set -o; shopt; declare -F; compgen -v | sort"
    source = f'source "{copy.root}/scripts/TimeLLM_ETTh1_2.sh" > ran'
    done = copy.bash(f"LINENO=0; {state} > a; {source}; echo rc=$?; {state} > b; diff a b", FAKE_EXIT=failure)
    bashs_own = {"_", "PIPESTATUS"}  # come up as any shell goes on
    differences = [line for line in done.stdout.splitlines() if line[:1] in "<>"]
    changed = [line for line in differences if line.split()[1] not in bashs_own]
    assert f"rc={failure}" in done.stdout and changed == [], done.stdout
    assert "arg=--task_name" in (copy.elsewhere / "ran").read_text()


@pytest.mark.parametrize(
    ("torch", "kernel", "expected"),
    [
        ("2.13.0+cpu", "6.1.0-generic", "alloc=expandable_segments:True cuda="),
        ("2.13.0+cu130", "5.15.167.4-microsoft-standard-WSL2", "alloc= cuda="),
        ("2.9.0", "6.1.0", "alloc=expandable_segments:True cuda="),
        ("2.8.1", "6.1.0", "alloc= cuda=expandable_segments:True"),
        ("3.0.0", "6.1.0", "alloc=expandable_segments:True cuda="),
    ],
)
def test_allocator(copy: Copy, torch: str, kernel: str, expected: str) -> None:
    copy.tool("uname", f"#!/bin/sh\necho {kernel}\n")
    done = copy.bash(f'bash "{copy.root}/scripts/TimeLLM_ETTh1_2.sh"', FAKE_TORCH=torch)
    assert f"\n{expected}\n" in done.stdout


def test_synthetic_data_stops_the_script(copy: Copy) -> None:
    (copy.root / "dataset/ETT-small/ETTh2.csv").unlink()
    script = f'bash "{copy.root}/scripts/TimeLLM_ETTh2_2.sh"'
    done = copy.bash(script, FAKE_DATA="dataset/synthetic/synthetic.csv")
    assert done.returncode == 1 and "arg=" not in done.stdout
    assert "said by get_data" in done.stdout and "ETTh2.csv: got only synthetic data" in done.stderr
    own = copy.bash(f"{script} --root_path dataset/synthetic --data_path synthetic.csv")
    assert own.returncode == 0 and "get_data" not in own.stdout


def test_quickstart_goes_from_data_to_table(copy: Copy) -> None:
    script = f'bash "{copy.root}/scripts/quickstart.sh" --train_epochs 2'
    done = copy.bash(script, FAKE_DATA="dataset/synthetic/ETTh1_synthetic.csv")
    assert done.returncode == 0, done.stderr
    args = parse_flags(re.findall("^arg=(.*)$", done.stdout, re.MULTILINE))
    assert (args.root_path, args.data_path) == ("dataset/synthetic", "ETTh1_synthetic.csv")
    assert (args.model_id, args.train_epochs) == ("ETTh1_synthetic_512_96", 2)
    assert "--preset tiny --out base_models/tiny-random\n" in done.stdout
    assert "\ntable=./checkpoints/run one\nquickstart: 0 min " in done.stdout
    failed = copy.bash(script, FAKE_DATA="dataset/ETT-small/ETTh1.csv", FAKE_EXIT="2")
    assert failed.returncode == 2 and "table=" not in failed.stdout


M4_PATTERNS = ("Monthly", "Yearly", "Weekly", "Daily", "Quarterly", "Hourly")


def test_m4_runs_every_pattern_and_gathers_the_scores(copy: Copy) -> None:
    (copy.root / "dataset" / "m4").mkdir()
    for pattern in M4_PATTERNS:
        for part in ("train", "test"):
            (copy.root / "dataset" / "m4" / f"{pattern}-{part}.csv").touch()
    done = copy.bash(f'bash "{copy.root}/scripts/TimeLLM_M4.sh" --des "two words"')
    assert done.returncode == 0, done.stderr
    runs = done.stdout.split("program=run_m4.py\n")[1:]
    args = [parse_flags(re.findall("^arg=(.*)$", run, re.MULTILINE)) for run in runs]
    assert [run.seasonal_patterns for run in args] == list(M4_PATTERNS)
    assert {(run.loss, run.patch_len, run.stride, run.batch_size, run.des) for run in args} == {
        ("SMAPE", 1, 1, 24, "two words")
    }
    assert [(run.seq_len, run.pred_len) for run in args] == [(36, 18), (12, 6), (26, 13), (28, 14), (16, 8), (96, 48)]
    assert done.stdout.count("scored=./checkpoints/run one") == 6
    failed = copy.bash(f'bash "{copy.root}/scripts/TimeLLM_M4.sh"', FAKE_EXIT="130")
    assert failed.returncode == 130 and "scored=" not in failed.stdout


@pytest.mark.parametrize("words", [[], ["--seq_len", "9"], ["none.csv"]])
def test_own_file_script_says_what_it_needs(tmp_path: Path, words: list[str]) -> None:
    script = ROOT / "scripts" / "TimeLLM_custom.sh"
    done = subprocess.run(["bash", script, *words], cwd=tmp_path, capture_output=True, text=True)
    message = "none.csv: got no such file, expected a CSV file" if "none.csv" in words else "usage: "
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_every_script_is_valid_bash() -> None:
    for script in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0, script
