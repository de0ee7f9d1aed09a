"""Files that earlier code has left, written by hand as it wrote them: states resume, checkpoints are tested and
forecast with, figures are reported."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import run_main
from data_provider.data_factory import series_from_args
from layers.backbone import find_backbone
from tests.models.test_TimeLLM import TRAINED
from tests.small_run import COLUMNS, command_line, figures, run_folder, train, write_csv
from utils.command_line import parse_flags
from utils.results.comparison import report

# What that code's states compared, and what its records held.
COMPARED = (
    "batch_size d_ff d_layers d_model data des dropout e_layers embed enc_in factor features label_len learning_rate "
    "llm_dim llm_layers llm_model load_in_4bit loss lradj max_iters model model_comment model_id n_heads optimizer "
    "patch_len pct_start percent pred_len prompt_decimals prompt_domain prototypes seed seq_len stride target task_name "
    "use_amp"
).split()
RECORDED = (
    COMPARED
    + (
        "is_training itr device root_path data_path freq fill_missing num_workers loader seasonal_patterns dec_in c_out "
        "moving_avg activation prompt_text output_attention llm_model_path fast_path train_epochs eval_batch_size patience "
        "align_epochs max_sequences grad_checkpoint"
    ).split()
)
STATE_TENSORS = {
    *(f"model.{name}" for name in TRAINED),
    *(f"optimizer.{n}.{moment}" for n in range(len(TRAINED)) for moment in ("step", "exp_avg", "exp_avg_sq")),
    "random.torch",
}


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """A safetensors file in whose header the SHA-256 of all of it stands first, taken with zeros in its place."""
    header: dict[str, dict] = {"__metadata__": {"sha256": "0" * 64} | metadata}
    data = b""
    for name, tensor in tensors.items():
        kind = {torch.float32: "F32", torch.uint8: "U8"}[tensor.dtype]
        piece = tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    path.write_bytes(whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1))


def header_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    held = path.read_bytes()
    return json.loads(held[8 : 8 + int.from_bytes(held[:8], "little")])["__metadata__"]


class OldRun:
    """A run of one epoch as earlier code would have left it: its tensors, in files of that time."""

    def __init__(self, words: list[str], ended: Path):
        """Args:
        words: the run's command line; its folder is filled.
        ended: the folder of such a run.
        """
        self.words, self.folder = words, run_folder(words)
        self.args = parse_flags(words)
        self.series = series_from_args(self.args)
        self.info = find_backbone(self.args.llm_model, self.args.llm_model_path)
        self.lines = (ended / "train.log").read_text().splitlines()
        self.new_record = json.loads((ended / "checkpoint.json").read_text())
        self.metrics = json.loads((ended / "metrics.json").read_text())
        self.held = json.loads(header_of(ended / "state.1.safetensors")["state"])
        self.tensors = load_file(ended / "state.1.safetensors")
        trained = load_file(ended / "checkpoint.safetensors")
        assert self.tensors.keys() == STATE_TENSORS and trained.keys() == set(TRAINED)
        self.folder.mkdir(parents=True)
        self.write_state()
        write(self.folder / "checkpoint.safetensors", trained, record=json.dumps(self.record()))
        (self.folder / "checkpoint.json").write_text(json.dumps(self.record()))
        self.write_metrics()

    def flags(self, names: list[str]) -> dict[str, object]:
        filled = {"enc_in": 3, "llm_dim": 128, "prompt_text": self.new_record["flags"]["prompt_text"]}
        return {name: value for name, value in (vars(self.args) | filled).items() if name in names}

    def record(self) -> dict[str, object]:
        values = pd.read_csv(self.series.path)[list(COLUMNS)].to_numpy()[:224]
        mark = {"rows": 224, "sha256": hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()}
        return {
            "flags": self.flags(RECORDED),
            "backbone": self.backbone(),
            "data": {"file": "series.csv", "rows": 320, "synthetic": False, "step": "1 hour", "mark": mark},
            "columns": list(COLUMNS),
            "target": "OT",
            "scaler": {"mean": self.series.mean.tolist(), "deviation": self.series.deviation.tolist()},
            **{name: self.new_record[name] for name in ("epoch", "train_loss", "vali_loss", "test_loss", "test_mae")},
            "versions": {"torch": "2.13.0+cpu"},
        }

    def backbone(self) -> dict[str, object]:
        return {
            "llm_model": "QWEN",
            "model_type": "qwen2",
            "hidden_size": 128,
            "vocab_size": self.info.vocab_size,
            "fingerprint": self.info.identity["fingerprint"],
            "layers": 1,
            "load_in_4bit": False,
        }

    def write_state(self, **progress: object) -> None:
        """The state at the end of the epoch; `progress` replaces what it says of how far the run is."""
        data = hashlib.sha256(self.series.values.tobytes() + self.series.dates.asi8.tobytes())
        identity = {f"--{name}": value for name, value in self.flags(COMPARED).items()} | {
            "the data's columns": list(COLUMNS),
            "the data's number of rows": 320,
            "the data's values (SHA-256)": data.hexdigest(),
            "the prompt's description": self.new_record["flags"]["prompt_text"],
            **{f"the language model's {name}": value for name, value in self.backbone().items()},
            "the number of processes": 1,
        }
        epoch = {name: self.new_record[name] for name in ("epoch", "train_loss", "vali_loss", "test_loss", "test_mae")}
        reached = {
            "epoch": 2,
            "iteration": 0,
            "loss_sum": 0.0,
            "best": self.new_record["vali_loss"],
            "worse": 0,
            "skipped": 0,
            "skipped_in_a_row": 0,
            "max_sequences": self.held["progress"]["max_sequences"],
            "history": [epoch],
        }
        moments = ("step", "exp_avg", "exp_avg_sq")
        state = {
            "version": 1,
            "identity": identity,
            "progress": reached | progress,
            "random": {"python": self.held["random"]["python"], "numpy": self.held["random"]["numpy"]},
            "optimizer": [
                [n, {"dict": {moment: {"tensor": f"optimizer.{n}.{moment}"} for moment in moments}}]
                for n in range(len(TRAINED))
            ],
        }
        write(self.folder / "state.1.safetensors", self.tensors, state=json.dumps(state))

    def write_metrics(self, without: tuple[str, ...] = ()) -> None:
        """metrics.json, in which the ridge has an error that no measurement gives."""
        of = {"file": "series.csv", "rows": 320, "columns": list(COLUMNS), "target": None, "seq_len": 32, "pred_len": 8}
        detail = "linear map T to H, relative penalty 1e-06"
        ridge = {"name": "ridge", "mse": 0.0123, "mae": 0.09, "seconds": 0.1, "detail": detail, "title": "ridge regression"}
        names = "test checkpoint data peak_memory_gib windows first_forecast_row flags standardised own_units".split()
        held = {name: self.metrics[name] for name in names} | {
            "baselines": {"of": of | {"train_rows": 224}, "rows": [ridge]}
        }
        kept = {name: value for name, value in held.items() if name not in without}
        (self.folder / "metrics.json").write_text(json.dumps(kept))


@pytest.fixture(scope="module")
def ended(backbones, tmp_path_factory) -> Path:
    """The folder of a run that has ended after an epoch."""
    words = command_line(tmp_path_factory.mktemp("ended"), backbones["qwen2"], plots=0, save_predictions=0)
    assert run_main.main(words) == 0
    return run_folder(words)


@pytest.fixture
def old(argv, ended: Path) -> OldRun:
    return OldRun(argv(resume=True), ended)


def test_a_state_resumes_to_the_same_end(old, argv, capsys, tmp_path: Path) -> None:
    whole = argv(train_epochs=2, checkpoints=tmp_path / "whole")
    expected = train(whole, capsys)
    found = train([*old.words, "--train_epochs", "2"], capsys)
    assert "Resuming from state.1.safetensors: epoch 2, iteration 0" in found
    assert not any(line.startswith("WARNING") for line in found) and figures(found) == figures(expected)
    tensors, others = (load_file(run_folder(words) / "checkpoint.safetensors") for words in (old.words, whole))
    assert all(torch.equal(tensors[name], others[name]) for name in TRAINED)


def test_a_states_best_loss_and_patience_count(old, capsys) -> None:
    before = (old.folder / "checkpoint.safetensors").read_bytes()
    old.write_state(best=1e-9, worse=2)
    lines = train([*old.words, "--train_epochs", "9", "--patience", "3", "--intervals", "none"], capsys)
    counters = [line for line in lines if line.startswith("EarlyStopping")]
    assert counters == ["EarlyStopping counter: 3 out of 3"] and "Early stopping" in lines
    assert (old.folder / "checkpoint.safetensors").read_bytes() == before and figures(lines) == figures(old.lines)
    assert "This run is finished (2 epochs); only the test is left" in train([*old.words, "--patience", "3"], capsys)


def test_a_checkpoint_is_tested_and_forecast_with(old, capsys) -> None:
    for words in ([*old.words, "--is_training", "0"], ["--is_training", "0", "--checkpoint", str(old.folder)]):
        lines = train(words, capsys)
        assert figures(lines) == figures(old.lines) and not any(line.startswith("WARNING") for line in lines)
        assert parse_flags(words).use_amp is False
    lines = train(["--is_training", "0", "--checkpoint", str(old.folder), "--do_predict"], capsys)
    assert f"Forecast saved at: {old.folder / 'forecast.csv'}" in lines and not any("zero-shot" in line for line in lines)


def test_a_records_mark_knows_the_trainings_data(old, capsys) -> None:
    """Rows may have come since; other values under the same name are other data."""
    test = ["--is_training", "0", "--checkpoint", str(old.folder)]
    grown = write_csv(old.series.path, rows=330)
    values = pd.read_csv(grown)
    values.iloc[:320] = pd.read_csv(write_csv(grown.parent / "again.csv"))
    values.to_csv(grown, index=False)
    train(test, capsys)
    assert not (old.folder / "on_series").exists()
    write_csv(grown, seed=1)
    train(test, capsys)
    assert (old.folder / "on_series" / "metrics.json").is_file()


def test_figures_are_reported(old) -> None:
    """The simple forecasts are measured anew: that code did not say over which penalties its ridge was chosen."""
    still_older = (("baselines",), ("baselines", "flags"), ("baselines", "flags", "windows", "peak_memory_gib"))
    for without in ((), *still_older):
        old.write_metrics(without)
        text = report(old.folder)
        assert f"{float(figures(old.lines)[0]):9.4f}" in text and "0.0123" not in text
        assert all(name in text for name in ("ridge regression", "repeat the last 24 h", "repeat the last value"))
        assert "rows" in json.loads((old.folder / "metrics.json").read_text())["baselines"]
