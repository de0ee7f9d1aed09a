"""Notes in a run: their texts, read by the language model, and the control of a test: does reading them help?"""

import contextlib
import hashlib
import json
from argparse import Namespace
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from data_provider.batches import Batch
from data_provider.data_factory import batch_loader
from data_provider.data_loader import Series
from layers.errors import StorageError
from layers.notes import encode, hashed_words
from models.base import ForecastModel
from models.TimeLLM import layers_of
from utils.results.metrics import difference
from utils.saving.files import write_atomic
from utils.training.context import Context
from utils.training.evaluate import score


def read_notes(model: ForecastModel, series: Series, args: Namespace, backbone: dict[str, Any]) -> None:
    """Have the model read the texts of a series' notes, each once.

    What the language model makes of a text is kept in a hidden file beside the data, where their folder can be written.

    Args:
        backbone: what the run's record says of the language model; its vectors are known by it.
    """
    assert model.notes is not None and series.notes is not None
    texts, kept = series.notes.texts, series.forecast_slice
    if args.text_encoder == "words":
        vectors = hashed_words(texts, model.notes.width)
    else:
        name = hashlib.sha256(json.dumps([backbone, layers_of(args)], sort_keys=True).encode()).hexdigest()[:12]
        file = series.path.with_name(f".{series.path.name}.notes-{name}.safetensors")
        keys = {text: hashlib.sha256(text.encode()).hexdigest() for text in texts}
        held = load_file(file) if file.is_file() else {}
        if new := [text for text in texts if keys[text] not in held]:
            made = encode(model.backbone, new)  # type: ignore[arg-type]  # it has one
            held |= {keys[text]: vector.clone() for text, vector in zip(new, made, strict=True)}
            if series.path.is_file():  # no frame of a program
                with contextlib.suppress(StorageError):
                    write_atomic(file, partial(save_file, held))
        vectors = torch.stack([held[keys[text]] for text in texts]) if texts else torch.zeros(1, model.notes.width)
    model.notes.read(vectors, torch.from_numpy(-series.mean[kept] / series.std[kept]))
    if model.prompts is not None:
        model.prompts.texts = texts


def control(context: Context, by_row: torch.Tensor, block: int) -> dict[str, Any]:
    """Score the test with its notes shuffled among their dates, and without notes.

    Args:
        by_row: squared errors `[W, H]` with the notes as they are, the mean over the columns.
        block: see `difference`.

    Returns:
        As metrics.json has it: for "true", "shuffled" and "no" the mse, that of the rows that a note speaks of, and what
        `difference` finds, the true notes' less theirs. "rows": the share of these rows; 0 stands alone.
    """
    series, data = context.windows, context.windows.windows("test")
    concerned = np.zeros(by_row.shape, bool)
    for window in range(len(data)):
        for _, first, last, _ in data[window]["notes"].tolist():
            concerned[window, first : last + 1] = True
    if not concerned.any():
        return {"rows": 0.0}
    errors = {"true": by_row}
    for name, notes in (("shuffled", series.notes.shuffled(seed=2021)), ("no", None)):
        errors[name] = torch.zeros_like(by_row)

        def consume(batch: Batch, forecast: torch.Tensor, held: torch.Tensor = errors[name]) -> None:
            squares = (forecast - batch.y).double().square().unflatten(0, (len(batch.index), -1)).mean(dim=1)
            held[batch.index.to(held.device)] = squares.to(held.device)

        _, loader = batch_loader(
            context.args, "test", replace(series, notes=notes), context.model.prompts,
            context.accelerator.process_index, context.accelerator.num_processes,
        )  # fmt: skip
        score(replace(context, loaders={"test": loader}), "test", consume)
    squared = {name: context.accelerator.reduce(held).cpu().numpy() for name, held in errors.items()}
    return {"rows": float(concerned.mean())} | {
        name: {
            "mse": float(of.mean()),
            "mse_concerned": float(of[concerned].mean()),
            "difference": difference(squared["true"].mean(axis=1), of.mean(axis=1), block),
        }
        for name, of in squared.items()
    }


def verdict(found: dict[str, Any]) -> str:
    """One line on what `control` has found."""
    if not found["rows"]:
        return "Notes: none speaks of a row that the test forecasts"
    names = {"true": "true", "shuffled": "shuffled among their dates", "no": "without"}
    said = ", ".join(f"{words} {found[name]['mse']:.4f}" for name, words in names.items())
    theirs = ", ".join(f"{found[name]['mse_concerned']:.4f}" for name in names)
    helps = {name: (found[name]["difference"] or [0] * 3)[2] < 0 for name in ("shuffled", "no")}
    apart = {name: found[name]["difference"] or [float("nan")] * 3 for name in ("shuffled", "no")}
    return (
        f"Notes: test MSE {said}; on the {100 * found['rows']:.0f} % of rows that they speak of {theirs}; "
        + "true less shuffled {:+.4f} (95 %: {:+.4f} to {:+.4f}), ".format(*apart["shuffled"])
        + "less without {:+.4f} ({:+.4f} to {:+.4f}): ".format(*apart["no"])
        + f"reading them {'helps' if helps['no'] and helps['shuffled'] else 'does not help'}"
        + ", their dates do" * (helps["no"] and not helps["shuffled"])
    )
