"""The command line: every flag in any order, one line for what is wrong, the run's name."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from utils.command_line import parse_flags
from utils.flags import FLAGS, clean_name, run_name

ROOT = Path(__file__).resolve().parents[2]

REQUIRED = (
    "--task_name long_term_forecast --is_training 1 --model_id ETTh1_512_96 --model_comment Qwen3B_fast "
    "--model TimeLLM --data ETTh1"
).split()

# The command line of the reproduction guide, section 1.3.
GUIDE = (
    REQUIRED
    + (
        "--root_path ./dataset/ETT-small/ --data_path ETTh1.csv --features M --seq_len 512 --label_len 48 "
        "--pred_len 96 --e_layers 2 --d_layers 1 --factor 3 --enc_in 7 --dec_in 7 --c_out 7 --batch_size 4 "
        "--d_model 32 --n_heads 8 --d_ff 32 --llm_dim 2048 --llm_layers 6 --num_workers 2 --prompt_domain 1 "
        "--train_epochs 3 --itr 1 --dropout 0.1 --llm_model QWEN --llm_model_path /models/Qwen2.5-3B "
        "--load_in_4bit"
    ).split()
)


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command line prints."""
    with pytest.raises(SystemExit) as stop:
        parse_flags(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("run_main.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err.removeprefix("run_main.py: error: ").rstrip("\n")


def test_guides_command_line() -> None:
    args = parse_flags(GUIDE)
    assert (args.seq_len, args.label_len, args.pred_len, args.batch_size) == (512, 48, 96, 4)
    assert (args.enc_in, args.llm_dim, args.llm_layers, args.factor) == (7, 2048, 6, 3)
    assert args.load_in_4bit is True and args.is_training == 1 and args.dropout == 0.1
    assert args.llm_model_path == "/models/Qwen2.5-3B"


def test_documented_defaults() -> None:
    args = parse_flags(REQUIRED)
    documented = {
        "seed": 2021, "itr": 1, "des": "test", "root_path": "./dataset", "data_path": "ETTh1.csv",
        "features": "M", "target": "OT", "freq": "h", "percent": 100, "num_workers": 2, "embed": "timeF",
        "seq_len": 96, "label_len": 48, "pred_len": 96, "dec_in": 7, "c_out": 7, "d_model": 16,
        "n_heads": 8, "d_ff": 32, "e_layers": 2, "d_layers": 1, "factor": 1, "moving_avg": 25,
        "dropout": 0.1, "activation": "gelu", "patch_len": 16, "stride": 8, "prompt_domain": 0,
        "llm_model": "QWEN", "llm_layers": 6, "load_in_4bit": False, "train_epochs": 10, "batch_size": 32,
        "eval_batch_size": 8, "patience": 10, "learning_rate": 1e-4, "loss": "MSE", "lradj": "type1",
        "pct_start": 0.2, "use_amp": False, "checkpoints": "./checkpoints/",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in documented} == documented
    # Read off the data and the backbone where they are left out.
    assert args.enc_in is None and args.llm_dim is None and args.llm_model_path is None


def test_any_order_gives_the_same() -> None:
    pairs: list[list[str]] = []
    for word in GUIDE:
        if word.startswith("--"):
            pairs.append([word])
        else:
            pairs[-1].append(word)
    expected = parse_flags(GUIDE)
    for seed in range(20):
        random.Random(seed).shuffle(pairs)
        assert parse_flags([word for pair in pairs for word in pair]) == expected


def test_last_value_wins_and_equals_sign() -> None:
    args = parse_flags([*GUIDE, "--seq_len=96", "--seq_len", "336"])
    assert args.seq_len == 336


@pytest.mark.parametrize(
    ("words", "expected"),
    [("", True), ("True", True), ("1", True), ("yes", True), ("False", False), ("0", False)],
)
@pytest.mark.parametrize("name", ["load_in_4bit", "use_amp", "output_attention", "resume", "grad_checkpoint"])
def test_switches_with_and_without_value(name: str, words: str, expected: bool) -> None:
    assert getattr(parse_flags([f"--{name}", *words.split(), *REQUIRED]), name) is expected


BAD_VALUES = [
    ("--task_name", "imputation"), ("--is_training", "2"), ("--model", "Informer"), ("--seed", "-1"),
    ("--itr", "0"), ("--device", "tpu"), ("--data", "ETTh9"), ("--features", "X"), ("--freq", "every day"),
    ("--percent", "0"), ("--percent", "101"), ("--percent", "5.5"), ("--num_workers", "-1"),
    ("--embed", "none"), ("--seq_len", "0"), ("--seq_len", "4"), ("--seq_len", "many"), ("--seq_len", ""),
    ("--intervals", "0"), ("--intervals", "100"), ("--intervals", "-5"), ("--intervals", "nan"), ("--intervals", "all"),
    ("--label_len", "-1"), ("--pred_len", "0"), ("--enc_in", "0"), ("--d_model", "-3"), ("--n_heads", "0"),
    ("--d_ff", "1e3"), ("--dropout", "1"), ("--dropout", "-0.1"), ("--dropout", "nan"),
    ("--patch_len", "0"), ("--stride", "0"), ("--prompt_domain", "ETT"), ("--llm_model", "MISTRAL"),
    ("--llm_dim", "big"), ("--llm_layers", "0"), ("--load_in_4bit", "maybe"), ("--prototypes", "none"),
    ("--prompt_decimals", "-1"), ("--fast_path", "fast"), ("--train_epochs", "0"), ("--batch_size", "0"),
    ("--eval_batch_size", "0"), ("--patience", "0"), ("--learning_rate", "0"), ("--learning_rate", "inf"),
    ("--optimizer", "sgd"), ("--loss", "MAE"), ("--lradj", "type2"), ("--pct_start", "0"),
    ("--pct_start", "1"), ("--max_sequences", "-1"), ("--max_iters", "-1"), ("--save_steps", "-1"),
    ("--log_every", "0"), ("--model_id", " "), ("--fill_missing", "zero"), ("--predict_steps", "0"),
    ("--save_predictions", "all"), ("--plots", "2"), ("--amp_dtype", "int8"),
    ("--torch_checkpoint", "2"), ("--test_every", "-1"), ("--llm_ablation", "all"), ("--skip", "yes"),
    ("--use_prompt", "2"), ("--use_reprogramming", "no"), ("--prompt_lags", "5"), ("--activation", "tanh"),
    ("--data_pretrain", "ETTh9"), ("--seasonal_patterns", "Decadal"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), BAD_VALUES)
def test_bad_value_is_named(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of([*GUIDE, flag, value], capsys)
    assert line.startswith(f"{flag}: got {value!r}, expected ")
    if flag in ("--features", "--optimizer", "--skip", "--device"):  # nothing is near to these values
        assert "perhaps" not in line


PATHS = [
    "--root_path",
    "--data_path",
    "--data_path_pretrain",
    "--llm_model_path",
    "--checkpoints",
    "--checkpoint",
    "--predict_path",
]


@pytest.mark.parametrize("value", ["", " ", "x" * 256, "x/" * 2000, "a\ud800", "a\0b"])
@pytest.mark.parametrize("flag", PATHS)
def test_a_path_that_no_file_system_takes(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of([*GUIDE, "--is_training", "0", flag, value], capsys)
    assert line.startswith(f"{flag}: got {value!r}, expected a ")


def test_bad_values_cover_every_flag_that_can_be_wrong() -> None:
    takes_any_text = {
        "--model_comment", "--des", "--target", "--loader", "--prompt_text",
    }  # fmt: skip
    same_kind_as_one_tried = {
        "--dec_in", "--c_out", "--e_layers", "--d_layers", "--factor", "--moving_avg", "--align_epochs",
        "--output_attention", "--use_amp", "--grad_checkpoint", "--resume", "--do_predict", "--append", "--tensorboard",
    }  # fmt: skip
    assert {f"--{flag.name}" for flag in FLAGS} == {flag for flag, _ in BAD_VALUES} | set(
        PATHS
    ) | takes_any_text | same_kind_as_one_tried


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("--seq_len 10", "--seq_len: got 10, shorter than a patch, expected --patch_len 16 or more"),
        ("--label_len 513 --model Autoformer", "--label_len: got 513, expected at most --seq_len 512"),
        ("--data custom --data_path", "--data_path: got no value right after it, expected a file name"),
        ("--intervals none 80", "--intervals: got none beside numbers, expected numbers between 0 and 100"),
        ("--label_len --pred_len 48 96", "--label_len: got no value right after it, expected a whole number"),
        ("--bacth_size 4", "--bacth_size: got an unknown flag, expected perhaps --batch_size"),
        ("--batch 4", "--batch: got an unknown flag"),
        (
            "--llm_ablation Atention",
            "--llm_ablation: got 'Atention', expected one of off, none, attention, transformer, random; perhaps attention",
        ),
        (
            "--model TimeLM",
            "--model: got 'TimeLM', expected one of Autoformer, DLinear, PatchTST, Ridge, TimeLLM; perhaps TimeLLM",
        ),
        ("--skip rigde", "--skip: got 'rigde', expected one of none, ridge, linear; perhaps ridge"),
        ("--prompt_lags peek", "--prompt_lags: got 'peek', expected one of paper, peaks"),
        ("--prompt_lags peak", "--prompt_lags: got 'peak', expected one of paper, peaks; perhaps peaks"),
        ("--qqqqqqqq=4", "--qqqqqqqq: got an unknown flag, expected one that --help lists"),
        ("--seq_len 96 97", "'97': got a value without a flag"),
        ("--checkpoint somewhere", "--checkpoint: got it with --is_training 1, expected --is_training 0"),
        ("--append", "--append: got it without --do_predict, expected both"),
        ("--do_predict --predict_path x", "--predict_path: got it with --is_training 1, expected --is_training 0"),
        (f"--des {'x' * 300}", "--model_id, --model_comment, --des: got 'xxxxxxxxxxxxxxxxxxxx'... in a run name of "),
        ("--help=x", "--help: got a value, expected none"),
        ("-hx", "--help: got a value, expected none"),
        ("--seed=--", "--seed: got '--', expected a whole number from 0 to 4294967295"),
        ("--seed --", "--seed: got no value right after it, expected a whole number from 0 to 4294967295"),
        ("--load_in_4bit=--", "--load_in_4bit: got '--', expected nothing, or True or False"),
        ("--des=--", "--des: got '--', expected some text"),
        ("--", "--: got an unknown flag, expected "),
        ("-device\n", "-device\\n: got an unknown flag, expected perhaps --device"),
    ],
)
def test_what_else_can_be_wrong(extra: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of([*GUIDE, *extra.split(" ")], capsys).startswith(expected)


ODD = [
    "", "-", "--", "---", "=", "-h", "-h=", "-1", "1e400", "9" * 5000, "nan", "x", "\n", "\x1b[2J", "\ud800", "%(prog)s",
    "@file", "--seed", "--help", "None", "[]", " 5 ",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_no_words_end_in_a_traceback(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(seed)
    names = [flag.name for flag in FLAGS] + ["help", "unheard_of"]
    for _ in range(300):
        words = list(REQUIRED)
        for _ in range(chance.randint(1, 3)):
            name, odd, place = chance.choice(names), chance.choice(ODD), chance.randrange(len(words) + 1)
            forms = [[f"--{name}={odd}"], [f"--{name}", odd], [odd], [f"-{name}{odd}"], [f"--{name}{odd}"]]
            words[place:place] = chance.choice(forms)
        try:
            parse_flags(words)
        except SystemExit as stop:
            out, err = capsys.readouterr()
            if stop.code == 0:  # -h stood among them
                assert out and not err
                continue
            assert (stop.code, out) == (2, ""), words
            assert err.startswith("run_main.py: error: ") and err.count("\n") == 1 and err[:-1].isprintable(), words


def test_a_checkpoint_that_is_not_there_is_named_before_the_flags_it_would_give(capsys) -> None:
    line = error_of(["--is_training", "0", "--do_predict", "--checkpoint", "no/such"], capsys)
    assert line.startswith("--checkpoint no/such: got no such file or folder")


def test_missing_flags_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--task_name: got nothing" in error_of([], capsys)
    given = "--task_name long_term_forecast --is_training 1 --model TimeLLM --data ETTh1"
    line = error_of(given.split(), capsys)
    assert line.startswith("--model_id: got nothing") and "--model_comment" in line


def test_other_families_need_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of([*REQUIRED, "--llm_model", "GPT2"], capsys).startswith("--llm_model_path: got nothing")
    assert parse_flags([*REQUIRED, "--llm_model", "gpt2", "--llm_model_path", "x"]).llm_model == "GPT2"


def test_defaults_that_follow_from_other_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_flags([*REQUIRED, "--seq_len", "24"]).label_len == 24
    assert parse_flags([*REQUIRED, "--data", "ETTm2"]).data_path == "ETTm2.csv"
    assert error_of([*REQUIRED, "--data", "custom"], capsys).startswith("--data_path: got nothing, expected the CSV's name")


def test_run_name() -> None:
    assert run_name(parse_flags(GUIDE), 0) == (
        "long_term_forecast_ETTh1_512_96_TimeLLM_ETTh1_ftM_sl512_ll48_pl96_dm32_nh8_el2_dl1_df32_fc3"
        "_ebtimeF_test_0-Qwen3B_fast"
    )
    assert run_name(parse_flags(GUIDE), 3).endswith("_test_3-Qwen3B_fast")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Qwen3B_fast-1.5", "Qwen3B_fast-1.5"),
        ("时序模型", "时序模型"),
        ("..", "_"),
        ("../../etc", "_.._etc"),
        ("/etc/passwd", "_etc_passwd"),
        (".hidden", "hidden"),
        ("a b\\c:d\n*", "a_b_c_d__"),
    ],
)
def test_clean_name(text: str, cleaned: str) -> None:
    assert clean_name(text) == cleaned


def test_run_name_stays_one_folder() -> None:
    args = parse_flags([*GUIDE, "--model_id", "../a/b", "--des", "..", "--model_comment", "/x/../y"])
    name = run_name(args, 0)
    assert Path(name).name == name and not name.startswith(".")


def test_help_lists_every_flag_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_flags(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for group in ("run:", "data:", "task:", "model:", "language model:", "training:", "output:"):
        assert f"\n{group}\n" in out
    words = out.split()
    for word in GUIDE:
        assert not word.startswith("--") or word in words
    assert "accepted, unused" in " ".join(words)


def test_wrong_flag_answers_before_torch_is_loaded() -> None:
    code = (
        "import sys, run_main\n"
        "try:\n"
        "    run_main.main(['--seq_len', 'x'])\n"
        "except SystemExit as stop:\n"
        "    assert not {'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)\n"
        "    sys.exit(stop.code)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    expected = "run_main.py: error: --seq_len: got 'x', expected a whole number of at least 5\n"
    assert (run.returncode, run.stderr) == (2, expected)


def test_a_folder_that_is_no_runs_is_named_before_the_flags_it_would_give(capsys, tmp_path: Path) -> None:
    line = error_of(["--is_training", "0", "--do_predict", "--checkpoint", str(tmp_path)], capsys)
    assert line == f"--checkpoint {tmp_path}: got no record of a training in it, expected a run's folder or its checkpoint"
