"""What models and variants of Time-LLM refuse: flags that do not go together, and checkpoints of others."""

from argparse import Namespace

import pytest
import torch

import layers.backbone
from tests.small_run import (
    refusal,
    run_folder,
    train,
)
from utils.checks import check_checkpoint, check_model, outline
from utils.command_line import parse_flags
from utils.saving.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model": "DLinear", "llm_ablation": "none"}, ["--llm_ablation", "none", "DLinear"]),
        ({"model": "Ridge", "skip": "ridge"}, ["--skip", "ridge", "Ridge"]),
        ({"model": "PatchTST", "load_in_4bit": True}, ["--load_in_4bit", "PatchTST"]),
        ({"model": "PatchTST", "max_sequences": 8}, ["--max_sequences", "8", "PatchTST"]),
        ({"model": "Autoformer", "max_sequences": 1}, ["--max_sequences", "1", "Autoformer"]),
        ({"model": "Autoformer", "features": "MS"}, ["--features", "MS", "Autoformer"]),
        ({"model": "DLinear", "moving_avg": 24}, ["--moving_avg", "24", "odd"]),
        ({"model": "Autoformer", "moving_avg": 2}, ["--moving_avg", "2", "odd"]),
        ({"llm_ablation": "random", "load_in_4bit": True}, ["--llm_ablation random", "--load_in_4bit"]),
        ({"model": "PatchTST", "n_heads": 3}, ["--n_heads", "3", "--d_model 8"]),
        ({"llm_ablation": "most"}, ["--llm_ablation", "'most'", "attention"]),
        ({"skip": "DLinear"}, ["--skip", "'DLinear'", "none, ridge, linear"]),
        ({"model": "Transformer"}, ["--model", "'Transformer'", "Autoformer"]),
        ({"prompt_lags": "all"}, ["--prompt_lags", "'all'", "peaks"]),
        ({"use_prompt": 2}, ["--use_prompt", "'2'"]),
    ],
)  # fmt: skip
def test_what_is_refused(argv, capsys, monkeypatch, flags: dict, words: list[str]) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("weights were made")

    monkeypatch.setattr(layers.backbone, "_load", fail)
    monkeypatch.setattr(layers.backbone, "_draw", fail)
    line = refusal(argv(**flags), capsys)
    assert all(word in line for word in words), line
    assert not run_folder(argv()).exists()


def test_a_checkpoint_of_another_model_is_refused(small, capsys) -> None:
    words = small(model="DLinear", max_iters=1)
    train(words, capsys)
    given = ["--is_training", "0", "--device", "cpu", "--checkpoint", str(run_folder(words))]
    for model in ("Ridge", "PatchTST", "Autoformer", "TimeLLM"):
        assert f"--model: got {model}, expected DLinear" in refusal([*given, "--model", model], capsys)


@pytest.mark.parametrize(
    ("trained", "asked"),
    [
        ({"llm_ablation": "random"}, {"llm_ablation": "off"}),
        ({}, {"llm_ablation": "random"}),
        ({}, {"llm_ablation": "none"}),
        ({"llm_ablation": "none"}, {"llm_ablation": "attention"}),
        ({}, {"use_prompt": 0}),
        ({}, {"prompt_lags": "peaks"}),
        ({}, {"skip": "ridge"}),
        ({"skip": "linear"}, {"skip": "ridge"}),
        ({}, {"use_reprogramming": 0}),
    ],
)
def test_a_checkpoint_of_another_variant_is_refused(small, trained: dict, asked: dict) -> None:
    """Where no tensor's shape tells the two apart, the record does."""
    given, wanted = (parse_flags(small(**{"is_training": 0, "enc_in": 3} | flags)) for flags in (trained, asked))
    for args in (given, wanted):
        args.prompt_text = "words"
    made, model = (outline(args, check_model(args)) for args in (given, wanted))
    record = {"flags": vars(given)}
    held = Namespace(flags=record["flags"], file="checkpoint", check=lambda shapes: compared(shapes, made))
    with pytest.raises((ValueError, AssertionError)):
        check_checkpoint(wanted, held, model, same_data=False)
    check_checkpoint(given, held, made, same_data=False)


@pytest.mark.parametrize("asked", [{"llm_ablation": "random"}, {"use_prompt": 0}, {"prompt_lags": "peaks"}])
def test_a_checkpoint_from_before_the_variants_is_none_of_them(small, capsys, monkeypatch, asked: dict) -> None:
    """Its record does not have the flags; the model was the paper's."""
    words = small(max_iters=1)
    train(words, capsys)
    flags = {name: value for name, value in Checkpoint.open(run_folder(words)).flags.items() if name not in asked}
    monkeypatch.setattr(Checkpoint, "flags", flags)
    test = [*words, "--is_training", "0"]
    train(test, capsys)
    (flag, value), *_ = asked.items()
    assert f"--{flag}: got {value}, expected " in refusal([*test, f"--{flag}", str(value)], capsys)


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("DLinear", {"moving_avg": 5}), ("Autoformer", {"moving_avg": 5}), ("Autoformer", {"activation": "relu"}),
        ("Autoformer", {"factor": 3}), ("Autoformer", {"label_len": 16}),
    ],
)  # fmt: skip
def test_a_flag_that_changes_forecasts_is_that_of_the_training(small, capsys, model: str, asked: dict) -> None:
    words = small(model=model, max_iters=1)
    train(words, capsys)
    (flag, value), *_ = asked.items()
    given = ["--is_training", "0", "--device", "cpu", "--plots", "0", "--checkpoint", str(run_folder(words))]
    assert f"--{flag}: got {value}, expected " in refusal([*given, f"--{flag}", str(value)], capsys)


def compared(shapes: dict, model: torch.nn.Module) -> None:
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
