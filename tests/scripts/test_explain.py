"""A look inside a run: attention and words against plain algebra, prompts left out and exchanged, its folder unharmed."""

import hashlib
import json
import re
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from layers.backbone import find_backbone
from models.TimeLLM import Model
from scripts.explain import main, other_description
from tests.small_run import PRED_LEN, SEQ_LEN, command_line, run_folder
from utils.command_line import parse_flags
from utils.results import inside
from utils.results.inside import Trial, conclusion, percent
from utils.run import load_checkpoint
from utils.run import main as run
from utils.saving.interrupt import Interrupts
from utils.saving.tensors import write_tensors
from utils.setup import setup
from utils.training.session import Job

QUIET = {"plots": 0, "save_predictions": 0, "torch_checkpoint": 0, "test_every": 0}
WINDOWS = [0, 20, 40, 56]


def hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def trained(folder: Path, backbone: Path, **flags: object) -> Path:
    """A run of few steps; its folder."""
    argv = command_line(folder, backbone, **QUIET | {"max_iters": 2, "eval_batch_size": 64, "learning_rate": 1e-2} | flags)
    assert run(parse_flags(argv)) == 0
    return run_folder(argv)


def opened(run: Path, tmp_path: Path, *words: str) -> Job:
    """The run's job, as the script sets it up."""
    job = setup(parse_flags(["--is_training", "0", "--checkpoint", str(run), "--checkpoints", str(tmp_path), *words]), 0,
                Interrupts())  # fmt: skip
    load_checkpoint(job)
    return job


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, backbones: dict[str, Path]) -> dict[str, Path]:
    """Runs of the kinds that differ here."""
    kinds: dict[str, tuple[str, dict[str, object]]] = {
        "vocab": ("qwen2", {}),
        "direct": ("llama", {"prototypes": "direct", "llm_model": "LLAMA", "features": "MS", "target": "flow"}),
        "bert": ("bert", {"llm_model": "BERT", "prototypes": "direct", "features": "S"}),
        "bare": ("qwen2", {"use_reprogramming": 0, "use_prompt": 0}),
        "no llm": ("qwen2", {"llm_ablation": "none"}),
        "dlinear": ("qwen2", {"model": "DLinear", "llm_model_path": None}),
    }
    return {
        name: trained(tmp_path_factory.mktemp("run"), backbones[family], **flags) for name, (family, flags) in kinds.items()
    }


def test_the_script_leaves_two_files_and_changes_none(runs, capsys) -> None:
    for name in ("direct", "bert"):
        before = hashes(runs[name])
        capsys.readouterr()
        assert main([str(runs[name]), "--windows", "6"]) == 0
        out, after = capsys.readouterr().out, hashes(runs[name])
        assert {Path(file).name for file in after.keys() - before.keys()} == {"explain.png", "explain.json"}
        assert {file: after[file] for file in before} == before
        assert (runs[name] / "explain.png").read_bytes()[:4] == b"\x89PNG"
        found = json.loads((runs[name] / "explain.json").read_text("utf-8"))
        assert found["channel"] == {"direct": "flow", "bert": "OT"}[name]
        assert found["prompt"]["windows"] == 6 and found["prompt"]["conclusion"] in out
        assert found["window"]["number"] == (64 - PRED_LEN) // 2
        used = found["attention"]["used_most"]
        assert all(len(part["prototypes"]) == 12 and part["prototypes"][0]["share"] >= 1e-3 for part in used)
        words = used[0]["prototypes"][0]["words"]
        assert len(words) == 5 and all(f"'{word['text']}' " in out for word in words)
        for trial in found["prompt"]["trials"].values():
            assert trial["name"] in out and trial["mse_before"] == found["prompt"]["mse"]
    before = hashes(runs["vocab"])
    elsewhere = runs["vocab"].parent / "new" / "folder"
    assert (
        main([str(runs["vocab"]), "--windows", "6", "--out", str(elsewhere), "--channel", "load", "--eval_batch_size", "2"])
        == 0
    )
    assert hashes(runs["vocab"]) == before and sorted(p.name for p in elsewhere.iterdir()) == [
        "explain.json", "explain.png",
    ]  # fmt: skip


def test_the_window_is_the_one_that_begins_at_the_date_or_last_before_it(runs, tmp_path, capsys) -> None:
    out = ["--out", str(tmp_path), "--windows", "2"]
    # Rows 256 to 319 are tested: forecasts begin from 2020-01-11 16:00 to 2020-01-14 00:00.
    for date, begins, number in (
        ("2020-01-12", "2020-01-12 00:00:00", 8),
        ("2020-01-12 05:59", "2020-01-12 05:00:00", 13),
        ("2020-01-14", "2020-01-14 00:00:00", 56),
    ):
        assert main([str(runs["bare"]), "--window", date, *out]) == 0
        assert json.loads((tmp_path / "explain.json").read_text())["window"] | {"first_row": ""} == {
            "number": number, "first_row": "", "first_forecast_row": begins,
        }  # fmt: skip
        assert ("or before" in capsys.readouterr().out) == (begins[:16] != (date + " 00:00")[:16])


def test_what_a_run_does_not_have_is_left_out_with_a_sentence(runs, tmp_path, capsys) -> None:
    for name, attention, prompt in (
        ("bare", "No attention to show: this run has no text prototypes (--use_reprogramming 0).", "--use_prompt 0"),
        ("no llm", "", "--llm_ablation none"),
    ):
        assert main([str(runs[name]), "--out", str(tmp_path / name)]) == 0
        out, found = capsys.readouterr().out, json.loads((tmp_path / name / "explain.json").read_text())
        assert (found["attention"] == attention and attention in out) or not attention
        assert found["prompt"] == f"No prompt to try out: this run has none ({prompt})." and found["prompt"] in out
        assert (tmp_path / name / "explain.png").exists() == (not attention)


def test_errors_are_one_line(runs, tmp_path, capsys) -> None:
    vocab = str(runs["vocab"])
    for words, line in (
        (
            [str(tmp_path / "none")],
            r"--checkpoint \S+none: got no such file or folder, expected a run's folder or its checkp",
        ),
        ([str(tmp_path)], r"--checkpoint \S+: got no record of a training in it, expected a run's folder"),
        (
            [str(runs["dlinear"])],
            r"--model: got DLinear, which has neither prototypes nor prompt, expected a run of TimeLLM",
        ),
        (
            [vocab, "--window", "2019-05-01"],
            r"--window: got 2019-05-01, expected a date from 2020-01-11 16:00:00 to 2020-01-14",
        ),
        ([vocab, "--window", "2020-01-14 01:00"], r"--window: got 2020-01-14 01:00, expected a date from"),
        ([vocab, "--window", "soon"], r"--window: got 'soon', expected a date such as 2020-01-11 16:00:00"),
        ([vocab, "--window", "2020-01-12T00:00+01:00"], r"--window: got '2020-01-12T00:00\+01:00', expected a date such as"),
        ([vocab, "--window", "nat"], r"--window: got nat, expected a date from"),
        ([vocab, "--channel", "heat"], r"--channel: got 'heat', expected one that is forecast: load, flow, OT"),
        ([str(runs["direct"]), "--channel", "OT"], r"--channel: got 'OT', expected one that is forecast: flow$"),
        ([vocab, "--windows", "1"], r"--windows: got 1, expected a whole number of at least 2"),
        ([vocab, "--do_predict"], r"--do_predict: got it, expected none"),
        ([vocab, "--data_path", "none.csv"], r".*none\.csv.*: got .*, expected "),
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
        job = opened(runs[name], tmp_path)
        model = cast(Model, job.model)
        x = inside.read_windows(job, [3], None).x[:1]  # (1, T)
        weights = inside.attention(model, x)
        state = {key: value.double() for key, value in load_file(runs[name] / "checkpoint.safetensors").items()}
        if "prototypes" in state:
            prototypes = state["prototypes"]
        else:
            E = model.backbone.embeddings.double()
            prototypes = state["mapping_layer.weight"] @ E + state["mapping_layer.bias"][:, None]
        z = x.double()
        z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()
        padded = torch.cat([z, z[:, -1:].expand(1, 8)], dim=1)
        patches = [padded[0, start : start + 16] for start in range(0, SEQ_LEN - 16 + 16, 8)]
        L, kernel = len(patches), state["patch_embedding.value_embedding.tokenConv.weight"]  # (d, P, 3)
        h, f, expected = 2, 8, []
        for i in range(L):
            token = sum(kernel[:, :, k] @ patches[(i + k - 1) % L] for k in range(3))  # (d,)
            query = state["reprogramming_layer.query_projection.weight"] @ token
            query = query + state["reprogramming_layer.query_projection.bias"]
            keys = prototypes @ state["reprogramming_layer.key_projection.weight"].t()
            keys = keys + state["reprogramming_layer.key_projection.bias"]
            scores = [keys[:, a * f : (a + 1) * f] @ query[a * f : (a + 1) * f] / f**0.5 for a in range(h)]
            expected.append(torch.stack([score.exp() / score.exp().sum() for score in scores]))
        assert weights.shape == (h, L, 1000) == (2, 4, 1000)
        assert torch.allclose(weights.sum(-1), torch.ones(h, L), atol=1e-5)
        assert torch.allclose(weights.double(), torch.stack(expected, dim=1), rtol=1e-3, atol=1e-9)
        figures = inside.spread_of(weights)
        entropy = -(weights.double() * weights.double().log()).sum(-1)
        assert figures["strongest_head"] == int(entropy.mean(1).argmin())
        assert figures["effective"] == pytest.approx(entropy.exp().mean().item(), rel=1e-4)
        assert inside.most_used(weights, 3) == weights.mean((0, 1)).argsort(descending=True)[:3].tolist()


def test_patches_that_read_the_same_are_said_to() -> None:
    one = torch.zeros(2, 4, 10)
    one[..., 3] = 1
    figures = inside.spread_of(one)
    assert (figures["effective"], figures["between_patches"]) == (1, 0) and inside.most_used(one, 1) == [3]
    half = one.clone()
    half[:, :2] = half[:, :2].roll(1, -1)
    assert inside.spread_of(half)["between_patches"] == pytest.approx(0.5)
    assert inside.spread_of(torch.full((2, 4, 10), 0.1))["effective"] == pytest.approx(10)
    assert inside.strongest_head(torch.stack([torch.full((4, 10), 0.1), one[0]])) == 1


def test_nearest_words_are_those_of_a_search_through_all(runs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(inside, "BLOCK", 97)  # several blocks, the last one short
    for name in ("vocab", "direct", "bert"):
        model = cast(Model, opened(runs[name], tmp_path).model)
        asked = [7, 0, 999]
        near = inside.nearest_words(model, asked)
        with torch.no_grad():
            prototypes = model.text_prototypes().double().numpy()
        tokenizer = model.backbone.tokenizer
        words = model.backbone.embeddings[: len(tokenizer)].double().numpy()
        centred, mine = words - words.mean(0), prototypes - prototypes.mean(0)
        cosines = mine @ centred.T / np.linalg.norm(mine, axis=1)[:, None] / np.linalg.norm(centred, axis=1)
        for place, prototype in enumerate(asked):
            best = np.argsort(-cosines[prototype])[:5]
            assert [word.text for word in near.words[place]] == [inside.readable(tokenizer, int(i)) for i in best]
            assert np.allclose([word.cosine for word in near.words[place]], cosines[prototype, best], atol=1e-4)
        mean = words.mean(0)
        assert near.mean == pytest.approx(
            (words @ mean / np.linalg.norm(words, axis=1)).max() / np.linalg.norm(mean), abs=1e-4
        )
        assert 0 < near.random[0] <= near.random[1] < 1 and near.others[1] <= cosines.max() + 1e-4
        # A prototype that is a word is nearest to it.
        some = torch.tensor(centred[:50]).float()
        model.text_prototypes = lambda some=some: torch.cat([some, -some])
        found = inside.nearest_words(model, [40]).words[0][0]
        assert found.text == inside.readable(tokenizer, 40) and found.cosine == pytest.approx(1, abs=1e-4)


def test_tokens_are_readable(backbones) -> None:
    qwen = find_backbone("QWEN", str(backbones["qwen2"])).tokenizer
    (forecast,) = qwen(" forecast")["input_ids"]
    assert inside.readable(qwen, forecast) == " forecast"
    for text, shown in (("\n", r"\n"), ("\x7f", r"\x7f"), ("ä", r"\xc3")):
        assert inside.readable(qwen, qwen(text)["input_ids"][0]) == shown
    assert inside.readable(qwen, qwen.convert_tokens_to_ids("<|endoftext|>")) == "<|endoftext|>"

    class Pieces:  # SentencePiece, of which no small tokenizer is at hand
        tokens = ["<unk>", "▁", "▁load", "<0xE4>"]

        def convert_ids_to_tokens(self, number: int) -> str:
            return self.tokens[number]

        def convert_tokens_to_ids(self, token: str) -> int:
            return self.tokens.index(token) if token in self.tokens else 0

    assert [inside.readable(Pieces(), i) for i in range(4)] == ["<unk>", " ", " load", "<0xE4>"]
    bert = find_backbone("BERT", str(backbones["bert"])).tokenizer
    assert inside.readable(bert, bert.convert_tokens_to_ids("[CLS]")) == "[CLS]"


@pytest.mark.parametrize("fast_path", ["auto", "plain"])
def test_a_prompt_left_out_is_a_model_without_one(runs, tmp_path, fast_path) -> None:
    for name in ("vocab", "direct", "bert"):
        job = opened(runs[name], tmp_path, "--fast_path", fast_path)
        assert cast(Model, job.model).fast_path == (fast_path == "auto" and name != "bert")
        with torch.inference_mode():
            as_is = inside.forecast(job, inside.read_windows(job, WINDOWS, job.model.prompts))
        trials = inside.try_prompts(job, WINDOWS, "Another one.")
        without = Model(_without_prompt(job), cast(Model, job.model).backbone).eval()
        without.load_state_dict(job.model.state_dict())
        bare = inside.read_windows(job, WINDOWS, None)
        with torch.inference_mode():
            expected = without(bare)
        change = (expected - as_is).double().square().mean().sqrt() / as_is.double().var(1, correction=0).mean().sqrt()
        assert trials["left_out"].change == pytest.approx(change.item(), rel=1e-3) and change > 1e-3
        assert trials["left_out"].mse == pytest.approx((expected - bare.y).square().mean().item(), rel=1e-4)
        assert trials["rounding"].change < 1e-5
        # Each exchange reaches the forecast, of a random backbone that looks at its prompt.
        assert all(trials[key].change > 1e-5 for key in ("shuffled", "one_window", "description", "nudged"))
        # The model is what it was.
        with torch.inference_mode():
            again = inside.forecast(job, inside.read_windows(job, WINDOWS, job.model.prompts))
        assert torch.allclose(again, as_is, atol=1e-6)


def _without_prompt(job: Job):
    words = ["--is_training", "0", "--checkpoint", str(job.checkpoint.file), "--use_prompt", "0"]
    return parse_flags(words)


def test_exchanged_prompts_are_those_that_they_are_said_to_be(runs, tmp_path, monkeypatch) -> None:
    job = opened(runs["vocab"], tmp_path)
    model = cast(Model, job.model)
    seen: list[tuple[list[int], list[list[int]]]] = []

    def note(opening, ids, length, patches):
        seen.append((opening, [row[:n].tolist() for row, n in zip(ids, length.tolist(), strict=True)]))
        return patches

    monkeypatch.setattr(model, "language_model", note)
    inside.try_prompts(job, WINDOWS, "Another one.")
    (ours, own), rounding, left_out, shuffled, one, described, nudged = seen
    assert rounding == (ours, own[::-1]) and nudged == (ours, own) and left_out == ([], [[]] * len(own))
    windows = [own[start : start + 3] for start in range(0, len(own), 3)]  # three channels each
    moved = [shuffled[1][start : start + 3] for start in range(0, len(own), 3)]
    assert sorted(moved) == sorted(windows) and all(a != b for a, b in zip(moved, windows, strict=True))
    assert one == (ours, windows[2] * 4)
    text = model.backbone.tokenizer.decode(described[0])
    assert "Dataset description: Another one.Task description" in text and described[1] == own


def test_a_head_of_zeros_is_moved_by_no_prompt(runs, tmp_path) -> None:
    job = opened(runs["vocab"], tmp_path)
    for tensor in cast(Model, job.model).output_projection.state_dict().values():
        tensor.zero_()
    trials = inside.try_prompts(job, WINDOWS, "Another one.")
    # Its forecasts are the windows' means: they have no deviation, and their error is what counts.
    assert all(trial.mse == trial.mse_before for key, trial in trials.items() if key != "nudged")
    assert trials["nudged"].mse != trials["nudged"].mse_before
    assert conclusion(trials, 64).endswith(": this run does not use its prompt.")


def test_a_run_that_ignores_its_prompt_is_said_to(runs, tmp_path) -> None:
    """Its head looks at hardly more than its bias."""
    tensors = load_file(runs["vocab"] / "checkpoint.safetensors")
    small = {key: value * (1e-6 if key.endswith("linear.weight") else 1) for key, value in tensors.items()}
    small["output_projection.linear.bias"] = torch.linspace(-1, 1, PRED_LEN)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint.json").write_bytes((runs["vocab"] / "checkpoint.json").read_bytes())
    record = {"record": (runs["vocab"] / "checkpoint.json").read_text("utf-8")}
    write_tensors(folder / "checkpoint.safetensors", small, record)
    assert main([str(folder), "--windows", "4", "--description", "Something else."]) == 0
    found = json.loads((folder / "explain.json").read_text("utf-8"))["prompt"]
    assert (
        found["conclusion"].endswith("this run does not use its prompt.") and found["other_description"] == "Something else."
    )
    assert ": on these 4 windows, fewer than the 20 that would speak for others, this run" in found["conclusion"]


def trials(**changes: tuple[float | None, float]) -> dict[str, Trial]:
    kinds = ("rounding", "left_out", "shuffled", "one_window", "description", "nudged")
    return {kind: Trial(kind, (c := changes.get(kind, (0.0, 0.0)))[0], 1.0, 1.0 + c[1]) for kind in kinds}


def test_the_conclusion_follows_from_the_numbers() -> None:
    nothing = conclusion(trials(shuffled=(0.004, 0.002), description=(0.003, 0.0)), 20)
    assert nothing == (
        "With other statistics the forecast moves by 0.40 % of its deviation and the error changes by +0.20 %, with another "
        "description by 0.30 % and 0 %, with no prompt at all by 0 % and 0 %: this run does not use its prompt."
    )
    for changes, verdict in (
        ({"left_out": (0.5, 0.2)}, "does not matter to this run, that there is one does: with none it errs more"),
        ({"one_window": (0.2, 0.0)}, "prompt's statistics (with another's it errs as much); with none it errs as much"),
        (
            {"description": (0.2, 0.1), "left_out": (1.0, -0.1)},
            "prompt's description (with another's it errs more); with none it errs less",
        ),
        (
            {"shuffled": (0.2, -0.1), "description": (0.2, 0.1)},
            "prompt's statistics (with another's it errs less) and description (with another's it errs more); with none it "
            "errs as much",
        ),
        # What rounding does as well is no effect.
        ({"rounding": (0.03, 0.0), "shuffled": (0.05, 0.0)}, "this run does not use its prompt"),
    ):
        assert conclusion(trials(**changes), 64).endswith(f"{verdict}.")
        few = conclusion(trials(**changes), 19)
        assert few.endswith(f"{verdict}.") and ": on these 19 windows, fewer than the 20 " in few
    flat = {kind: Trial(kind, None, 1.0, 1.0) for kind in trials()}
    assert conclusion(flat, 64).startswith(
        "With other statistics the error changes by 0 %, with another description by 0 %, with"
    )
    assert [percent(v) for v in (0, 1e-6, 0.0042, 0.042, 0.42)] == ["0 %", "less than 0.01 %", "0.42 %", "4.2 %", "42 %"]


def test_the_other_description_is_another() -> None:
    bank = other_description("None of them.")
    assert bank.startswith("The Electricity Consuming Load") and other_description(bank) != bank
    assert other_description(bank[:40]) == other_description(bank)  # cut, for it did not fit
