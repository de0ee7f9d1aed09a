"""A look inside a run: attention and words against plain algebra, prompts left out and exchanged, its folder unharmed."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.TimeLLM import Model
from scripts import explain
from scripts.explain import main
from tests.small_run import SEQ_LEN, command_line, run_folder
from utils.flags import parse_flags
from utils.run import main as run
from utils.saving.interrupt import Interrupts
from utils.setup import load_checkpoint, setup
from utils.training.context import Context

QUIET = {"plots": 0, "save_predictions": 0, "torch_checkpoint": 0, "test_every": 0}
WINDOWS = [0, 20, 40, 56]


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def opened(run: Path, tmp_path: Path, *words: str) -> Context:
    """The run, set up and loaded as the script does."""
    flags = parse_flags(["--is_training", "0", "--checkpoint", str(run), "--checkpoints", str(tmp_path), *words])
    context = setup(flags, 0, Interrupts())
    load_checkpoint(context)
    return context


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, backbones: dict[str, Path]) -> dict[str, Path]:
    """Runs of few steps, of the kinds that differ here."""
    kinds: dict[str, tuple[str, dict[str, object]]] = {
        "vocab": ("qwen2", {}),
        "direct": ("llama", {"prototypes": "direct", "llm_model": "LLAMA", "features": "MS", "target": "flow"}),
        "bert": ("bert", {"llm_model": "BERT", "prototypes": "direct", "features": "S"}),
        "bare": ("qwen2", {"use_reprogramming": 0, "use_prompt": 0}),
        "no llm": ("qwen2", {"llm_ablation": "none"}),
        "dlinear": ("qwen2", {"model": "DLinear", "llm_model_path": None}),
    }
    found = {}
    for name, (family, flags) in kinds.items():
        few = QUIET | {"max_iters": 2, "eval_batch_size": 64, "learning_rate": 1e-2} | flags
        argv = command_line(tmp_path_factory.mktemp("run"), backbones[family], **few)
        assert run(parse_flags(argv)) == 0
        found[name] = run_folder(argv)
    return found


def test_the_script_leaves_a_picture_and_changes_nothing(runs, capsys) -> None:
    for name, channel in (("direct", "flow"), ("bert", "OT")):
        before = hashes(runs[name])
        capsys.readouterr()
        assert main([str(runs[name]), "--windows", "6"]) == 0
        out, after = capsys.readouterr().out, hashes(runs[name])
        assert {Path(file).name for file in after.keys() - before.keys()} == {"explain.png"}
        assert {file: after[file] for file in before} == before
        assert (runs[name] / "explain.png").read_bytes()[:4] == b"\x89PNG"
        assert f"forecast from 2020-01-12 20:00:00; channel: {channel}\n" in out  # the middle window
        used = out.split("Used most, mean of the heads\n")[1].split("\n\n")[0].splitlines()[1:]
        shares = [float(line.split()[1]) for line in used]
        assert len(used) == 12 and shares == sorted(shares, reverse=True) and shares[-1] >= 1
        assert all(len(re.findall(r"['\"] -?\d\.\d\d", line)) == 5 for line in used)
        assert "Forecasts of 6 test windows" in out and "prompt left out" in out
    before, elsewhere = hashes(runs["vocab"]), runs["vocab"].parent / "new" / "folder"
    words = ["--windows", "6", "--out", str(elsewhere), "--channel", "load", "--description", "Something else."]
    assert main([str(runs["vocab"]), *words, "--eval_batch_size", "2"]) == 0
    assert hashes(runs["vocab"]) == before and [p.name for p in elsewhere.iterdir()] == ["explain.png"]


def test_the_window_is_the_one_that_begins_at_the_date_or_last_before_it(runs, tmp_path, capsys) -> None:
    # Rows 256 to 319 are tested: forecasts begin from 2020-01-11 16:00 to 2020-01-14 00:00.
    for date, begins in (
        ("2020-01-12", "2020-01-12 00:00:00"),
        ("2020-01-12 05:59", "2020-01-12 05:00:00"),
        ("2020-01-14", "2020-01-14 00:00:00"),
    ):
        assert main([str(runs["bare"]), "--window", date, "--out", str(tmp_path)]) == 0
        assert f"forecast from {begins};" in capsys.readouterr().out


def test_what_a_run_does_not_have_is_left_out_with_a_sentence(runs, tmp_path, capsys) -> None:
    for name, has_attention in (("bare", False), ("no llm", True)):
        assert main([str(runs[name]), "--out", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert "No prompt to try out: this run has none" in out and "with another prompt" not in out
        assert ("No attention to show" not in out) == ("Used most" in out) == has_attention
        assert (tmp_path / name / "explain.png").exists() == has_attention


def test_errors_are_one_line(runs, tmp_path, capsys) -> None:
    vocab = str(runs["vocab"])
    for words, line in (
        ([str(tmp_path / "none")], r"--checkpoint \S+none: got no such file or folder, expected a run's folder or its chec"),
        ([str(runs["dlinear"])], r"\S+: got DLinear on custom, expected a run of TimeLLM"),
        ([vocab, "--window", "2019-05-01"], r"--window: got 2019-05-01, expected a date from 2020-01-11 16:00:00 to 2020-"),
        ([vocab, "--window", "2020-01-14 01:00"], r"--window: got 2020-01-14 01:00, expected a date from"),
        ([vocab, "--window", "soon"], r"--window: got soon, expected a date from"),
        ([vocab, "--window", "2020-01-12T00:00+01:00"], r"--window: got 2020-01-12T00:00\+01:00, expected a date from"),
        ([vocab, "--window", "nat"], r"--window: got nat, expected a date from"),
        ([vocab, "--channel", "heat"], r"--channel: got 'heat', expected one that is forecast: load, flow, OT"),
        ([str(runs["direct"]), "--channel", "OT"], r"--channel: got 'OT', expected one that is forecast: flow$"),
        ([vocab, "--windows", "1"], r"--windows: got 1, expected a whole number of at least 2"),
        ([vocab, "--do_predict"], r"\S+: got TimeLLM on custom with --do_predict, expected"),
        ([vocab, "--no_flag", "1"], r"--no_flag: got an unknown flag, expected"),
        ([], r"the following arguments are required: run"),
    ):
        capsys.readouterr()
        try:
            code: object = main(words)
        except SystemExit as stop:  # the command line's own errors
            code = stop.code
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1, (words, error)
        assert re.match(r"explain\.py: error: (" + line + ")", error), error


def test_attention_is_a_softmax_over_the_prototypes(runs, tmp_path) -> None:
    for name in ("vocab", "direct", "bert"):
        context = opened(runs[name], tmp_path)
        model = cast(Model, context.model)
        x = explain.read_windows(context, [3], None).x[:1]  # (1, T)
        weights = explain.attention(model, x)
        state = {key: value.double() for key, value in load_file(runs[name] / "checkpoint.safetensors").items()}
        prototypes = state.get("prototypes")
        if prototypes is None:
            E = model.backbone.embeddings.double()
            prototypes = state["mapping_layer.weight"] @ E + state["mapping_layer.bias"][:, None]
        z = x.double()
        z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()
        padded = torch.cat([z, z[:, -1:].expand(1, 8)], dim=1)
        patches = [padded[0, start : start + 16] for start in range(0, SEQ_LEN, 8)]
        L, kernel = len(patches), state["patch_embedding.value_embedding.tokenConv.weight"]  # (d, P, 3)
        h, f, expected = 2, 8, []
        query_weight, query_bias, key_weight, key_bias = (
            state[f"reprogramming_layer.{part}_projection.{kind}"]
            for part in ("query", "key")
            for kind in ("weight", "bias")
        )
        for i in range(L):
            token = sum(kernel[:, :, k] @ patches[(i + k - 1) % L] for k in range(3))  # (d,)
            query, keys = query_weight @ token + query_bias, prototypes @ key_weight.t() + key_bias
            scores = [keys[:, a * f : (a + 1) * f] @ query[a * f : (a + 1) * f] / f**0.5 for a in range(h)]
            expected.append(torch.stack([score.exp() / score.exp().sum() for score in scores]))
        assert weights.shape == (h, L, 1000) == (2, 4, 1000)
        assert torch.allclose(weights.double(), torch.stack(expected, dim=1), rtol=1e-3, atol=1e-9)


def test_nearest_words_are_those_of_a_search_through_all(runs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(explain, "BLOCK", 97)  # several blocks, the last one short
    for name in ("vocab", "direct", "bert"):
        model = cast(Model, opened(runs[name], tmp_path).model)
        asked = [7, 0, 999]
        near = explain.nearest_words(model, asked)
        with torch.no_grad():
            prototypes = model.text_prototypes().double().numpy()
        tokenizer = model.backbone.tokenizer
        words = model.backbone.embeddings[: len(tokenizer)].double().numpy()
        centred, mine = words - words.mean(0), prototypes - prototypes.mean(0)
        cosines = mine @ centred.T / np.linalg.norm(mine, axis=1)[:, None] / np.linalg.norm(centred, axis=1)
        for place, prototype in enumerate(asked):
            best = np.argsort(-cosines[prototype])[:5]
            assert [word for word, _ in near[place]] == [explain.readable(tokenizer, int(i)) for i in best]
            assert np.allclose([cosine for _, cosine in near[place]], cosines[prototype, best], atol=1e-4)


@pytest.mark.parametrize("fast_path", ["auto", "plain"])
def test_a_prompt_left_out_is_a_model_without_one(runs, tmp_path, fast_path) -> None:
    for name in ("vocab", "direct", "bert"):
        context = opened(runs[name], tmp_path, "--fast_path", fast_path)
        model = cast(Model, context.model)
        assert model.fast_path == (fast_path == "auto" and name != "bert")
        trials = explain.try_prompts(context, WINDOWS, "Another one.").set_index("changed")
        flags = parse_flags(["--is_training", "0", "--checkpoint", str(runs[name]), "--use_prompt", "0"])
        without = Model(flags, model.backbone).eval()
        without.load_state_dict(model.state_dict())
        batch = explain.read_windows(context, WINDOWS, model.prompts)
        with torch.inference_mode():
            as_is, expected = model(batch).double(), without(replace(batch, prompts=None)).double()
        move = (expected - as_is).square().mean().sqrt() / as_is.var(1, correction=0).mean().sqrt()
        assert trials.moves["prompt left out"] == pytest.approx(move.item(), rel=1e-3) and move > 1e-3
        assert trials.mse["prompt left out"] == pytest.approx((expected - batch.y).square().mean().item(), rel=1e-4)
        assert trials.mse["as it is"] == pytest.approx((as_is - batch.y).square().mean().item(), rel=1e-4)
        assert trials.moves["nothing (rounding)"] < 1e-5 and trials.mse_change["as it is"] == 0
        # Each exchange reaches the forecast, of a random backbone that looks at its prompt.
        assert (trials.moves.iloc[3:] > 1e-5).all() and len(trials) == 5


def test_another_order_of_the_windows_changes_nothing(runs, tmp_path) -> None:
    context = opened(runs["vocab"], tmp_path, "--bounds", "OT:none:0")  # so that a forecast depends on its column
    trials = explain.try_prompts(context, WINDOWS, "Another one.").set_index("changed")
    assert trials.moves["nothing (rounding)"] < 1e-5 < trials.moves["prompt left out"]
