"""The command line: every flag in any order, one line for what is wrong, the run's name, and what becomes of each flag."""

import random
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tests.realdata import ROOT
from utils.flags import BY_NAME, FLAGS, PRESETS, TEXT, parse_flags, recorded, resumed, run_name

# The command line of the reproduction guide, section 1.3.
GUIDE = (
    "--task_name long_term_forecast --is_training 1 --model_id ETTh1_512_96 --model_comment Qwen3B_fast --model TimeLLM "
    "--data ETTh1 --root_path ./dataset/ETT-small/ --data_path ETTh1.csv --features M --seq_len 512 --label_len 48 "
    "--pred_len 96 --e_layers 2 --d_layers 1 --factor 3 --enc_in 7 --dec_in 7 --c_out 7 --batch_size 4 --d_model 32 "
    "--n_heads 8 --d_ff 32 --llm_dim 2048 --llm_layers 6 --num_workers 2 --prompt_domain 1 --train_epochs 3 --itr 1 "
    "--dropout 0.1 --llm_model QWEN --llm_model_path /models/Qwen2.5-3B --load_in_4bit"
).split()
REQUIRED = GUIDE[:12]


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_flags(argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("run_main.py: error: ") and err.count("\n") == 1 and err[:-1].isprintable()
    return err.removeprefix("run_main.py: error: ").rstrip("\n")


def test_the_guides_command_line_in_any_order() -> None:
    args = parse_flags(GUIDE)
    found = args.seq_len, args.label_len, args.enc_in, args.llm_dim, args.load_in_4bit, args.is_training, args.llm_model_path
    assert found == (512, 48, 7, 2048, True, 1, "/models/Qwen2.5-3B")
    pairs = [pair.split() for pair in " ".join(GUIDE).replace(" --", "\n--").split("\n")]
    for seed in range(20):
        random.Random(seed).shuffle(pairs)
        assert parse_flags([word for pair in pairs for word in pair]) == args
    assert parse_flags([*GUIDE, "--seq_len=96", "--seq_len", "336"]).seq_len == 336  # the last one counts
    tail = "_test_0-Qwen3B_fast"
    name = "long_term_forecast_ETTh1_512_96_TimeLLM_ETTh1_ftM_sl512_ll48_pl96_dm32_nh8_el2_dl1_df32_fc3_ebtimeF"
    assert run_name(args, 0) == name + tail and run_name(args, "mean").endswith("_test_mean-Qwen3B_fast")


def test_documented_defaults_and_what_follows_from_other_flags() -> None:
    documented = {
        "seed": 2021, "itr": 1, "des": "test", "root_path": "./dataset", "data_path": "ETTh1.csv",
        "features": "M", "target": "OT", "freq": "h", "percent": 100, "num_workers": 2, "embed": "timeF",
        "seq_len": 96, "label_len": 48, "pred_len": 96, "dec_in": 7, "c_out": 7, "d_model": 16,
        "n_heads": 8, "d_ff": 32, "e_layers": 2, "d_layers": 1, "factor": 1, "moving_avg": 25,
        "dropout": 0.1, "activation": "gelu", "patch_len": 16, "stride": 8, "prompt_domain": 0,
        "llm_model": "QWEN", "llm_layers": 6, "load_in_4bit": False, "train_epochs": 10, "batch_size": 32,
        "eval_batch_size": 8, "patience": 10, "learning_rate": 1e-4, "loss": "MSE", "lradj": "type1",
        "pct_start": 0.2, "use_amp": False, "checkpoints": "./checkpoints/", "intervals": None,
        # Read off the data and the backbone where they are left out.
        "enc_in": None, "llm_dim": None, "llm_model_path": None,
    }  # fmt: skip
    for words, changed in (
        ("", {}), ("--load_in_4bit --use_amp yes", {"load_in_4bit": True, "use_amp": True}),
        ("--seq_len 24", {"seq_len": 24, "label_len": 24}), ("--data ETTm2", {"data_path": "ETTm2.csv"}),
        ("--data Weather", {"data_path": "weather.csv", "target": None, "freq": None}),
        ("--label_len 720", {"label_len": 96}), ("--intervals 95 80 95", {"intervals": (80.0, 95.0)}),
        ("--intervals none", {"intervals": ()}),
        ("--llm_model gpt2 --llm_model_path x", {"llm_model": "GPT2", "llm_model_path": "x"}),
    ):  # fmt: skip
        args = vars(parse_flags([*REQUIRED, *words.split()]))
        assert {name: args[name] for name in documented} == documented | changed
    assert args.keys() == {*(flag.name for flag in FLAGS), "names_rate", "set_by_preset", "all_rows", "reads_notes"}


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.type.expected != TEXT.expected], ids=lambda f: f.name)
def test_a_wrong_value_is_named(flag, capsys: pytest.CaptureFixture[str]) -> None:
    paths = "a folder", "a file name", "a folder or a hub id", "a run's folder or a checkpoint file"
    value = " " if flag.type.expected in paths else "?"
    found = [error_of([*words, f"--{flag.name}", value], capsys) for words in (GUIDE, [])]  # before what is missing
    assert found == [f"--{flag.name}: got {value!r}, expected {flag.type.expected}"] * 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (f"--{name} {value}", f"--{name}: got '{value}', expected {what}")
        for name, value, what in [
            ("is_training", "2", "a whole number from 0 to 1"), ("seed", "-1", "a whole number from 0 to 4294967295"),
            ("itr", "0", "a whole number of at least 1"), ("percent", "101", "a whole number from 1 to 100"),
            ("percent", "5.5", "a whole number"), ("seq_len", "4", "a whole number of at least 5"),
            ("d_ff", "1e3", "a whole number"), ("dropout", "1", "a number from 0 to below 1"),
            ("dropout", "nan", "a number"),
            ("learning_rate", "inf", "a number"), ("learning_rate", "0", "a number above 0"),
            ("pct_start", "1", "a number between 0 and 1"),
            ("intervals", "100", "numbers between 0 and 100"), ("intervals", "0", "numbers"),
            ("freq", "every!", "a pandas frequency"), ("encoding", "base64", "an encoding that Python knows"),
            ("model", "TimeLM", "one of Autoformer, DLinear, LinearStack, PatchTST, Ridge, TimeLLM; perhaps TimeLLM"),
            ("llm_ablation", "Atention", "one of off, none, attention, transformer, random; perhaps attention"),
        ]
    ]
    + [
        ("--seq_len 10", "--seq_len: got 10, expected --patch_len 16 or more"),
        ("--label_len 513 --model Autoformer", "--label_len: got 513, expected at most --seq_len 512"),
        ("--data custom --data_path", "--data_path: got no value right after it, expected a file name"),
        ("--label_len --pred_len 48 96", "--label_len: got no value right after it, expected a whole number"),
        ("--bacth_size 4", "--bacth_size: got an unknown flag, expected perhaps --batch_size"),
        ("--batch 4", "--batch: got an unknown flag"),
        ("--qqqqqqqq=4", "--qqqqqqqq: got an unknown flag, expected one that --help lists"),
        ("--seq_len 96 97", "'97': got a value without a flag"),
        ("--checkpoint somewhere", "--checkpoint: got somewhere, expected --is_training 0"),
        ("--append", "--append: got True, expected --do_predict"),
        ("--do_predict --predict_path x", "--predict_path: got x, expected --is_training 0"),
        ("--llm_model GPT2 --llm_model_path=", "--llm_model_path: got '', expected a folder or a hub id"),
        ("--task_name short_term_forecast", "--task_name: got short_term_forecast, expected short_term"),
    ],
)  # fmt: skip
def test_what_can_be_wrong(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of([*GUIDE, *words.split(" ")], capsys).startswith(expected)


def test_the_preset_fills_in_what_is_left_out() -> None:
    def held(*words: str) -> dict[str, object]:
        return vars(parse_flags([*REQUIRED, *words]))

    best = held("--preset", "best")
    assert best["set_by_preset"] == list(PRESETS["best"]) and best["preset"] is None and best["names_rate"] is False
    assert {name: best[name] for name in best["set_by_preset"]} == PRESETS["best"]
    for name, value in PRESETS["best"].items():  # as its flag reads it
        assert type(value) is type(BY_NAME[name].type(str(value))) and value == BY_NAME[name].type(str(value))
    given = held("--ema", "0.5", "--preset", "best", "--loss", "MSE", "--skip", "none")
    assert (given["ema"], given["loss"], given["skip"], given["skip_mode"]) == (0.5, "MSE", "none", "residual")
    assert given["set_by_preset"] == [
        name for name in best["set_by_preset"] if name not in {"ema", "loss", "skip", "skip_mode"}
    ]
    other = held("--preset", "best", "--model", "DLinear")  # of the training alone
    assert other["skip"] == "none" and other["ema"] == best["ema"] and other["d_model"] == held()["d_model"]
    test = held("--preset", "best", "--is_training", "0")  # finds the training that was started with it
    assert test == best | {"is_training": 0}


def test_missing_flags_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert error_of([], capsys).startswith("--task_name: got nothing, expected a value; missing too: --is_training")
    assert error_of(REQUIRED[:-2], capsys) == "--data: got nothing, expected a value"
    for words, flag in (("--llm_model GPT2", "--llm_model_path"), ("--data custom", "--data_path")):
        assert error_of([*REQUIRED, *words.split()], capsys).startswith(f"{flag}: got nothing, expected the ")
    # With a checkpoint it is the checkpoint that is missing: the flags would come from it.
    unread = "a damaged or unreadable file, the mean of repeats, or none of this program"
    for place, got in (
        (tmp_path / "gone", "no such file or folder"),
        (tmp_path, f"no record of a training in it ({unread})"),
    ):
        line = error_of(["--is_training", "0", "--do_predict", "--checkpoint", str(place)], capsys)
        assert line == f"--checkpoint {place}: got {got}, expected a run's folder or its checkpoint"


def test_no_words_end_in_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    chance, names = random.Random(0), [flag.name for flag in FLAGS] + ["unheard_of"]
    odd = ["", "-", "---", "=", "-1", "1e400", "9" * 5000, "nan", "\n", "\x1b[2J", "\ud800", "%(prog)s", "@file", "--seed"]
    for _ in range(300):
        name, word, place = chance.choice(names), chance.choice(odd), chance.randrange(len(REQUIRED) + 1)
        words = chance.choice([[f"--{name}={word}"], [f"--{name}", word], [word], [f"--{name}{word}"]])
        try:
            parse_flags([*REQUIRED[:place], *words, *REQUIRED[place:]])
        except SystemExit:
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1 and err[:-1].isprintable(), words


def test_the_runs_name_stays_one_folder_of_these_flags() -> None:
    name = run_name(parse_flags([*GUIDE, "--model_id", "../a/b", "--des", "..", "--model_comment", "时/x/../y:\n*"]), 0)
    assert Path(name).name == name and name.endswith("_ebtimeF___0-时_x_.._y___") and not name.startswith(".")
    held = vars(parse_flags(GUIDE))
    named = {flag for flag in held if run_name(Namespace(**held | {flag: "other"}), 0) != run_name(Namespace(**held), 0)}
    assert named == set(
        "task_name model_id model data features seq_len label_len pred_len d_model n_heads e_layers d_layers d_ff factor "
        "embed des model_comment".split()
    )


@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("--seq_len x", 2), ("--bacth_size 4", 2)])
def test_help_and_a_wrong_flag_answer_before_torch_is_loaded(words: str, code: int) -> None:
    program = (
        "import sys, run_main\n"
        "try:\n"
        f"    run_main.main({words.split()})\n"
        "except SystemExit as stop:\n"
        "    assert not {'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)\n"
        "    sys.exit(stop.code)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr.count("\n")) == (code, bool(code))
    shown = run.stdout.split()
    assert code or (all(f"--{flag.name}" in shown for flag in FLAGS) and "\nlanguage model:\n" in run.stdout)


# What states and checkpoints hold; a change here makes old runs stop resuming, or old checkpoints mean something else.
ROLES = {
    "resumed": "task_name model_id model_comment model seed des data features target percent embed seq_len label_len "
    "pred_len enc_in d_model n_heads d_ff e_layers d_layers factor dropout patch_len stride prompt_domain llm_model llm_dim "
    "llm_layers load_in_4bit prototypes prompt_decimals batch_size learning_rate optimizer loss lradj pct_start use_amp "
    "max_iters skip use_reprogramming llm_ablation use_prompt prompt_lags moving_avg activation data_pretrain "
    "seasonal_patterns recipe stack_windows skip_mode head_dropout fft_weight ema bounds text_column holidays text_encoder "
    "text_prompt",
    "never recorded": "resume save_steps log_every checkpoints checkpoint do_predict predict_path predict_steps "
    "save_predictions plots tensorboard torch_checkpoint intervals append refit names_rate set_by_preset "
    "all_rows reads_notes",
    "fixed": "llm_layers prompt_decimals seq_len patch_len stride n_heads d_ff use_amp skip llm_ablation use_prompt "
    "prompt_lags stack_windows skip_mode text_encoder text_prompt",
    "baseline": "label_len factor moving_avg activation",
    "inherit": "task_name model_id model_comment model des seed features embed num_workers seq_len label_len pred_len "
    "d_model n_heads d_ff e_layers d_layers factor dropout patch_len stride prompt_domain llm_model llm_model_path llm_dim "
    "llm_layers load_in_4bit prototypes prompt_decimals eval_batch_size use_amp skip use_reprogramming llm_ablation "
    "use_prompt prompt_lags moving_avg activation seasonal_patterns stack_windows skip_mode text_encoder text_prompt",
    "inherit, of the data": "data root_path data_path target freq percent fill_missing prompt_text enc_in data_pretrain "
    "data_path_pretrain encoding date_column id_column drop_columns dayfirst bounds season text_path text_column holidays",
}


def test_what_becomes_of_each_flag() -> None:
    args = parse_flags(GUIDE)
    found = {"resumed": set(resumed(args)), "never recorded": vars(args).keys() - recorded(args)}
    for role in ("fixed", "baseline", "inherit"):
        found[role] = {flag.name for flag in FLAGS if role in flag.roles.split()}
    found["inherit, of the data"] = {flag.name for flag in FLAGS if flag.group == "data"}
    found["inherit"] -= found["inherit, of the data"]
    assert found == {role: set(names.split()) for role, names in ROLES.items()}
