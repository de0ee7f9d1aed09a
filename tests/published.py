"""Flag sets of the published scripts of the Time-LLM family: one set a run, as its shell passes the words.

Taken from the folder scripts/ of github.com/KimMeen/Time-LLM (TimeLLM_ETTh1.sh, ..., TimeLLM_M4.sh), the shell's variables
filled in and the launcher left out.
"""

from typing import NamedTuple


class FlagSet(NamedTuple):
    """The words of one run, and the program that its script starts."""

    script: str
    program: str
    text: str

    def value(self, flag: str) -> str | None:
        """The last value of a flag; None where it is left out."""
        words = self.text.split()
        places = [place for place, word in enumerate(words) if word == flag]
        return words[places[-1] + 1] if places else None


FORECAST = "--task_name long_term_forecast --is_training 1 "
ETT = (
    FORECAST
    + "--root_path ./dataset/ETT-small/ {files} --model_id {name}_512_{horizon} --model TimeLLM {sets} --features M "
    "--seq_len 512 --label_len 48 --pred_len {horizon} --factor 3 --enc_in 7 --dec_in 7 --c_out 7 --des Exp --itr 1 {last} "
    "--model_comment TimeLLM-{name}"
)
WIDE = (
    FORECAST
    + "--root_path ./dataset/{folder}/ --data_path {folder}.csv --model_id {model_id} --model TimeLLM --data {data} "
    "--features M --seq_len 512 --label_len {label_len} --pred_len {horizon} --e_layers 2 --d_layers 1 --factor 3 "
    "--enc_in {n} --dec_in {n} --c_out {n} {width}--batch_size {batch_size} --learning_rate 0.01 --llm_layers 32 "
    "--train_epochs {epochs} --model_comment TimeLLM-{data}"
)
M4 = (
    "--task_name short_term_forecast --is_training 1 --root_path ./dataset/m4 --seasonal_patterns {pattern} --model_id "
    "m4_{pattern} --model TimeLLM --data m4 --features M --enc_in 1 --dec_in 1 --c_out 1 --llm_layers 32 --d_model 8 "
    "--d_ff 32 --patch_len 1 --stride 1 --batch_size 24 --des Exp --itr 1 --learning_rate 0.001 --loss SMAPE "
    "--train_epochs 50 --model_comment TimeLLM-M4"
)
PATTERNS = {"Monthly": 18, "Yearly": 6, "Weekly": 13, "Daily": 14, "Quarterly": 8, "Hourly": 48}  # of M4, with horizons

# What follows --itr, by script and horizon; a flag that comes twice holds its last value.
_LAST = {
    "ETTh1": {
        96: "--d_model 32 --d_ff 128 --batch_size 24 --learning_rate 0.01 --llm_layers 32 --train_epochs 100",
        192: "--d_model 32 --d_ff 128 --batch_size 24 --learning_rate 0.02 --llm_layers 32 --train_epochs 100",
        336: "--d_model 32 --d_ff 128 --batch_size 24 --lradj COS --learning_rate 0.001 --llm_layers 32 --train_epochs 100",
        720: "--d_model 32 --d_ff 128 --batch_size 24 --learning_rate 0.01 --llm_layers 32 --train_epochs 100",
    },
    "ETTh2": {
        96: "--d_model 32 --d_ff 128 --batch_size 24 --learning_rate 0.01 --llm_layers 32 --train_epochs 10",
        192: "--d_model 32 --d_ff 128 --batch_size 24 --lradj TST --learning_rate 0.002 --llm_layers 32 --train_epochs 10",
        336: "--d_model 32 --d_ff 128 --batch_size 24 --lradj TST --learning_rate 0.005 --llm_layers 32 --train_epochs 10",
        720: "--d_model 16 --d_ff 128 --batch_size 24 --learning_rate 0.005 --lradj TST --llm_layers 32 --train_epochs 20 "
        "--patience 10",
    },
    "ETTm1": {96: "--d_model 32 --d_ff 128 --batch_size 24 --lradj TST --learning_rate 0.001 --llm_layers 32 "
              "--train_epochs 100"} | dict.fromkeys(
        (192, 336, 720),
        "--d_model 32 --d_ff 128 --batch_size 24 --learning_rate 0.01 --lradj TST --learning_rate 0.001 --llm_layers 32 "
        "--train_epochs 100 --patience 20",
    ),
    "ETTm2": {96: "--d_model 32 --d_ff 128 --batch_size 16 --learning_rate 0.01 --llm_layers 32 --train_epochs 10"}
    | dict.fromkeys(
        (192, 336, 720),
        "--d_model 32 --d_ff 128 --batch_size 24 --learning_rate 0.01 --lradj TST --learning_rate 0.002 --llm_layers 32 "
        "--train_epochs 10",
    ),
    "ETTh1_ETTh2": {
        96: "--d_model 32 --d_ff 128 --batch_size 24 --learning_rate 0.01 --llm_layers 32 --train_epochs 5",
        192: "--d_model 32 --d_ff 128 --batch_size 24 --learning_rate 0.02 --llm_layers 32 --train_epochs 5",
        336: "--d_model 32 --d_ff 128 --batch_size 24 --lradj COS --learning_rate 0.001 --llm_layers 32 --train_epochs 5",
        720: "--d_model 32 --d_ff 128 --batch_size 24 --learning_rate 0.01 --llm_layers 32 --train_epochs 5",
    },
}  # fmt: skip
# --model_id, --label_len, --pred_len, widths, --batch_size and --train_epochs. Traffic's last set has a --label_len longer
# than --seq_len, where the others have --pred_len 720.
_WIDE = {
    ("ECL", "electricity", 321): [(f"ECL_512_{h}", 48, h, "", 24, 10) for h in (96, 192, 336, 720)],
    ("Traffic", "traffic", 862): [
        ("traffic_512_96", 48, 96, "", 24, 10),
        ("traffic_512_96", 48, 192, "", 24, 10),
        ("traffic_512_96", 48, 336, "", 1, 10),
        ("traffic_512_96", 720, 96, "", 24, 10),
    ],
    ("Weather", "weather", 21): [
        ("weather_512_96", 48, 96, "--d_model 32 --d_ff 32 ", 24, 10),
        ("weather_512_192", 48, 192, "--d_model 32 --d_ff 32 ", 24, 10),
        ("weather_512_336", 48, 336, "--d_model 32 --d_ff 128 ", 24, 10),
        ("weather_512_720", 48, 720, "--d_model 32 --d_ff 128 ", 24, 15),
    ],
}


PUBLISHED: list[FlagSet] = []
for name, by_horizon in _LAST.items():
    *source, target = name.split("_")
    files = "".join(f"--data_path_pretrain {each}.csv " for each in source) + f"--data_path {target}.csv"
    sets = "".join(f"--data_pretrain {each} " for each in source) + f"--data {target}"
    for horizon, last in by_horizon.items():
        text = ETT.format(name=name, files=files, sets=sets, horizon=horizon, last=last)
        PUBLISHED.append(FlagSet(f"TimeLLM_{name}.sh", "run_pretrain.py" if source else "run_main.py", text))
for (data, folder, n), rows in _WIDE.items():
    for model_id, label_len, horizon, width, batch_size, epochs in rows:
        text = WIDE.format(data=data, folder=folder, n=n, model_id=model_id, label_len=label_len, horizon=horizon,
                           width=width, batch_size=batch_size, epochs=epochs)  # fmt: skip
        PUBLISHED.append(FlagSet(f"TimeLLM_{data}.sh", "run_main.py", text))
PUBLISHED += [FlagSet("TimeLLM_M4.sh", "run_m4.py", M4.format(pattern=pattern)) for pattern in PATTERNS]
