"""Forecasts from Python: a trained run, loaded once, that forecasts pandas frames many times.

    from utils.forecaster import Forecaster

    forecaster = Forecaster.load("checkpoints/<run>")
    forecaster.predict(frame)  # date, a column a channel, and the ends of their bands: OT_lo80, OT_hi80, ...

`run_main.py --do_predict` forecasts with the same class.
"""

import threading
from argparse import Namespace
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import ConcatDataset

from data_provider.batches import Batch, WindowCollate, Windows, pad_notes
from data_provider.data_factory import epoch_batches, make_loader
from data_provider.data_loader import Series, WindowDataset
from data_provider.notes import notes_from_args, row_step, wall_clock
from data_provider.table import FRAME, check_rows, tables_of
from data_provider.timestamps import frequency, time_marks
from layers.errors import input_error
from utils.flags import flags_for, longest_window
from utils.results.bands import Intervals, name_of, units
from utils.results.baselines import LAST, SEASON, season_length
from utils.results.forecast import bands_of, forecast_frame, on_the_trainings_scale
from utils.results.log import RunLog
from utils.results.metrics import Metrics
from utils.results.notes import read_notes
from utils.saving.interrupt import Interrupts
from utils.saving.state import random_state, set_random_state
from utils.setup import describe_run, load_checkpoint, make_context, make_plan
from utils.training.context import Context
from utils.training.evaluate import PrototypeKV, forecast_within_memory, score

AT_ONCE = 64  # sequences of one channel each that are forecast at a time
Levels = Sequence[float] | str | None
# A model's cache of its prompt, the tokenizer, the random state and matplotlib's settings serve one thread at a time.
ONE_AT_A_TIME = threading.RLock()


# A method that no other thread runs meanwhile: what the model has read of notes is that of one call, too.
def one_at_a_time(method: Callable) -> Callable:
    @wraps(method)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with ONE_AT_A_TIME:
            return method(*args, **kwargs)

    return alone


class Forecaster:
    """A trained model that forecasts; it prints nothing, writes nothing, and what a user can mend is an InputError.

    Several threads may call one Forecaster, or several. Their work is done one after the other: PyTorch uses all cores for
    each, and what the threads get is what one thread would.

    Attributes:
        notes: lines that the command line would have printed: warnings, why there are no prediction intervals, and how the
            dates of frames were read.
    """

    def __init__(self, context: Context):
        """`context` has its checkpoint; see `load` for programs."""
        self.context, self.notes = context, list(context.remarks)
        # The step of the training in words, where its record has it.
        self._step = context.checkpoint.record.get("data", {}).get("step")  # type: ignore[union-attr]
        context.model.eval()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "auto",
        llm_model_path: str | Path | None = None,
        fill_missing: str | None = None,
        **flags: object,
    ) -> "Forecaster":
        """Load the run of a training: its folder, or the checkpoint in it.

        Args:
            device: auto (the GPU where there is one), cpu or cuda.
            llm_model_path: folder or hub id of the language model, where it no longer is where the training had it.
            fill_missing: fill empty cells of the frames, "linear" or "ffill"; None: as the training did.
            flags: other flags of the command line by their names, such as max_sequences.

        On a GPU PyTorch takes no more memory from here on than is free now, as in a run.

        Raises:
            InputError: no checkpoint there, or one that cannot be used with these flags on this machine.
            RunError: no memory for the model.
        """
        args = flags_for(path, device=device, llm_model_path=llm_model_path, fill_missing=fill_missing, **flags)
        with ONE_AT_A_TIME:
            plan = make_plan(args, 0, in_program=True)
            log = RunLog(terminal=False)
            before = random_state(plan.device)
            context = make_context(plan, 0, describe_run(plan, 0), log, Interrupts())
            log.lines.clear()  # what a run says of itself in any case
            load_checkpoint(context)
            set_random_state(before, plan.device)  # the caller's own draws go on as if nothing had been loaded
            context.remarks += log.lines
            return cls(context)

    def __repr__(self) -> str:
        args, bands = self.context.args, self.context.intervals
        levels = f", bands of {' '.join(map(name_of, bands.levels))} %" if bands else ""
        return f"Forecaster({args.model}, {args.seq_len} -> {args.pred_len} rows, {len(self.columns)} columns{levels})"

    @property
    def columns(self) -> list[str]:
        return self.context.series.forecast_columns

    @cached_property
    def prototype_kv(self) -> PrototypeKV:
        """What all forecasts share, such as the text prototypes: made by the first one, then kept."""
        with torch.inference_mode():
            return self.context.model.prototype_kv()

    @one_at_a_time
    def predict(
        self,
        frame: pd.DataFrame,
        steps: int | None = None,
        intervals: Levels = "auto",
        id_column: str | None = None,
        notes: pd.DataFrame | None = None,
    ) -> pd.DataFrame:
        """Forecast the rows that follow a frame.

        Args:
            frame: a column `date` or a DatetimeIndex, and the columns of the training in their own units; its last
                seq_len rows (with a linear stack those of its longest window) are read, others are left alone. Their step is
                that of the training.
            steps: rows to forecast; more than pred_len go on from the forecast itself. None: pred_len.
            intervals: levels in per cent, such as (80, 95), which the checkpoint must have; "auto": all that it has;
                None or (): no bands.
            id_column: names the series of each row. They are forecast at once, each from its own rows: what each has
                alone, up to the rounding of float32 (see below).
            notes: columns date and text, and if need be until and known (docs/notes.md), for a model that was trained with
                notes; None: those of the frame's own column of texts, where the training had one, and holidays.

        Returns:
            `date`, with `id_column` that column, the forecast columns, and then the ends of each one's bands, as in
            forecast.csv; a row a step, series after series in the order of their first rows.

        Time-LLM's prompts print statistics of the rows. Beyond pred_len these are forecasts, so there a difference in
        the last bit, as between a series alone and among others, or between a CPU and a GPU, may change a printed digit,
        and the forecast by more than rounding.

        Raises:
            InputError: rows, columns, dates, steps or levels that cannot be used, in one line that names them.
            RunError: not even one sequence fits into the GPU's memory.
        """
        histories = self._histories(frame, id_column, notes=notes)
        forecasts = self.forecast(list(histories.values()), steps, self._intervals(intervals))
        if id_column is not None:
            if id_column in forecasts[0].columns:
                raise input_error("id_column", repr(id_column), "a name that no column of the forecast has")
            for forecast, name in zip(forecasts, histories, strict=True):
                forecast.insert(1, id_column, pd.Series([name] * len(forecast), dtype=frame[id_column].dtype))
        return pd.concat(forecasts, ignore_index=True)

    @torch.inference_mode()
    def forecast(self, histories: Sequence[Series], steps: int | None, intervals: Intervals | None) -> list[pd.DataFrame]:
        """As `predict`, for S series of the same columns on the same scale, a frame each; a run forecasts with it, too.

        Raises:
            InputError: steps that are no number of rows, or rows without a common step.
        """
        context, args, S = self.context, self.context.args, len(histories)
        T, H, whole = args.seq_len, args.pred_len, not context.model.channel_independent
        L = T + context.model.history
        steps = H if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
            raise input_error("steps", repr(steps), "a whole number of at least 1")
        dates = [series.future_dates(int(steps)) for series in histories]
        windows = np.stack([series.values[-L:, series.forecast_slice] for series in histories])  # (S, L, N)
        if whole:  # it reads the calendar, too
            calendar = [series.dates[-T:].append(series.future_dates(steps + H)) for series in histories]
            each = [time_marks(pd.DatetimeIndex(rows), args.freq, args.embed) for rows in calendar]
            marks = torch.from_numpy(np.stack(each)).to(context.device)  # (S, T + steps + H, F)
        # Side by side, so that the sums of each series are those that it has alone.
        rows = torch.from_numpy(np.concatenate(windows, axis=1)).to(context.device)  # (L, S*N), and longer each time
        for start in range(0, steps, H):  # where a forecast ends, the next goes on from it
            x, ahead = rows[-L:].unflatten(1, (S, -1)).transpose(0, 1), []  # (S, L, N)
            at_once, most = (args.eval_batch_size, 0) if whole else (S, AT_ONCE)  # whole windows are not cut any smaller
            for part in (slice(first, first + at_once) for first in range(0, S, at_once)):
                sequences = x[part].transpose(1, 2).flatten(0, 1)  # (M, L)
                earlier, window = sequences.split([L - T, T], dim=1)
                batch = Batch(
                    window,
                    window.new_empty(len(window), 0),
                    history=earlier,
                    channel=torch.arange(x.shape[2], device=x.device).repeat(len(x[part])),
                )
                if (notes := histories[0].notes) is not None:  # all have the same
                    days = [wall_clock(each[start : start + H]) for each in dates[part]]
                    known = [
                        torch.from_numpy(notes.about((clock := wall_clock(series.dates))[-1], ahead, row_step(clock)))
                        for series, ahead in zip(histories[part], days, strict=True)
                    ]
                    batch.notes = pad_notes(known).repeat_interleave(x.shape[2], dim=0).to(x.device)
                if whole:
                    later = marks[part, start + T - args.label_len : start + T + H]
                    batch.windows = Windows(x[part], marks[part, start : start + T], later, slice(None))
                ahead.append(forecast_within_memory(context, batch, self.prototype_kv, most))  # (M, H)
            rows = torch.cat([rows, torch.cat(ahead).t().to(rows)])
        values = rows[L : L + steps].unflatten(1, (S, -1)).transpose(0, 1).cpu().numpy()  # (S, steps, N)
        return [forecast_frame(*each, intervals) for each in zip(histories, dates, values, windows[:, -T:], strict=True)]

    @one_at_a_time
    def evaluate(
        self,
        frame: pd.DataFrame,
        intervals: Levels = "auto",
        id_column: str | None = None,
        notes: pd.DataFrame | None = None,
    ) -> dict[str, Any]:
        """Score every window of a frame: forecasts of its rows from those before them.

        Args:
            frame, intervals, id_column, notes: as those of `predict`. All rows are read; where one is missing, windows go
                over the gap, as those of a test do.

        Returns:
            As metrics.json: `test` (mse, mae on the standardised scale), `windows`, `first_forecast_row`, `standardised`
            and `own_units` (by channel and step), and `intervals` (coverage, width, losses) with prediction intervals.
            `learned_until` is the date of the last row that the training saw, and `windows_after` how many windows forecast
            later rows alone; `baselines` has mse and mae of repeating the last value, and the last season that a window
            holds.

        Raises:
            InputError: see `predict`; a series shorter than seq_len + pred_len.
        """
        context, args = self.context, self.context.args
        T, H, h, parts, starts = args.seq_len, args.pred_len, context.model.history, [], []
        for series in self._histories(frame, id_column, h + T + H, notes).values():
            marks = time_marks(series.dates, args.freq or frequency(series.step), args.embed)
            rows, history = (series.values[h:], marks[h:], series.dates[h:]), series.values if h else None
            parts.append(WindowDataset(*rows, T, args.label_len, H, history=history, notes=series.notes))
            starts += [series.dates[h + T], series.dates[len(series.dates) - H]]
        kept = context.series.forecast_slice
        columns, mean, std = self.columns, context.series.mean[kept], context.series.std[kept]
        bounds = context.series.standard_bounds
        metrics = Metrics(columns, mean, std, H, self._intervals(intervals), context.device, bounds)
        season = args.season or season_length(series.step)
        simple = {LAST: [-1] * H} | ({SEASON: np.arange(H) % season - season} if 1 < season <= T else {})
        others = {name: Metrics(columns, mean, std, H, None, context.device) for name in simple}

        def consume(batch: Batch, forecast: torch.Tensor) -> None:
            pred, true, x = (v.view(len(batch.index), len(columns), -1) for v in (forecast, batch.y, batch.x))
            metrics.add(pred, true, units(x))
            for name, rows in simple.items():
                others[name].add(x[..., rows], true, units(x))

        windows: ConcatDataset[Any] = ConcatDataset(parts)
        collate = WindowCollate(H, None, context.model.prompts, whole=not context.model.channel_independent)
        batches = epoch_batches(args, windows, "test")
        loader = make_loader(windows, batches, num_workers=0, collate=collate)
        scores = score(replace(context, loaders={"test": loader}), "test", consume)
        learned = context.checkpoint.trained_data.get("learned_until")  # type: ignore[union-attr]
        first = pd.DatetimeIndex(np.concatenate([part.dates[T : len(part) + T] for part in parts]))
        return {
            "learned_until": learned,
            "windows_after": int((first.tz_localize(None) > pd.Timestamp(learned).tz_localize(None)).sum())
            if learned
            else None,
            "baselines": {name: held.result()["standardised"]["all"] for name, held in others.items()},
            "test": {"mse": scores.mse, "mae": scores.mae},
            "windows": len(windows),
            "first_forecast_row": [str(min(starts)), str(max(starts))],
            **metrics.result(),
        }

    @one_at_a_time
    def plot(
        self,
        frame: pd.DataFrame | None = None,
        steps: int | None = None,
        intervals: Levels = "auto",
        id_column: str | None = None,
        path: str | Path | None = None,
        forecast: pd.DataFrame | None = None,
    ) -> Any:
        """Draw the forecast of a frame behind its last rows, a panel a column and series; the first seven are drawn.

        Args:
            frame, steps, intervals, id_column: as those of `predict`. Without a frame the forecast is drawn alone.
            forecast: what `predict` has returned; None: it is made here, of the frame.
            path: a PNG file to write; its folder is made where need be.

        Returns:
            The matplotlib figure, or `path`.

        Raises:
            InputError: see `predict`.
            StorageError: the file cannot be written.
        """
        from utils.results.plots import PANELS, forecast_figure, panels_of  # only now: matplotlib takes a second to load

        if frame is None and forecast is None:
            raise input_error("plot", "neither frame nor forecast", "one of them, or both")
        columns, needed = self.columns, ["date", *self.columns, *([] if id_column is None else [id_column])]
        histories = {} if frame is None else self._histories(frame, id_column)
        if forecast is None:
            made = self.forecast(list(histories.values()), steps, self._intervals(intervals))
            found = dict(zip(histories, made, strict=True))
        elif not isinstance(forecast, pd.DataFrame) or forecast.empty or not set(needed) <= set(forecast.columns):
            raise input_error("forecast", f"a {type(forecast).__name__}", f"what predict has returned, with {needed}")
        else:
            found = {None: forecast} if id_column is None else dict(iter(forecast.groupby(id_column, sort=False)))
        panels, H = [], self.context.args.pred_len
        for name, rows in found.items():
            known = histories.get(name)
            history = None if known is None else pd.DataFrame(known.own, known.dates, columns)
            prefix = "" if id_column is None else f"{name}: "
            ahead = rows.set_index(pd.DatetimeIndex(rows["date"]))[columns]
            panels += panels_of(history, ahead, bands_of(rows, columns), H, prefix=prefix)
        file = None if path is None else Path(path)
        figure = forecast_figure(panels[:PANELS], self._step or "the step of the training", file)
        return file or figure

    # The series of a frame by name, on the training's scale, each of at least `rows` rows.
    def _histories(
        self, frame: pd.DataFrame, id_column: str | None, rows: int = 0, notes: pd.DataFrame | None = None
    ) -> dict[Hashable, Series]:
        context, found, args = self.context, {}, self.context.args
        for name, table in tables_of(
            frame, context.series.columns, id_column, args.fill_missing, args.date_column, args.id_column, args.dayfirst,
            args.drop_columns,
        ).items():  # fmt: skip
            check_rows(table, longest_window(args), self._step)
            if len(table.dates) < rows:
                got, expected = f"{len(table.dates)} rows", f"at least {rows}, a window of history and horizon"
                raise input_error(table.path, got, expected)
            self.notes += [table.read_as] if table.read_as not in ("", *self.notes) else []
            found[name] = on_the_trainings_scale(table, context.checkpoint, context.args)  # type: ignore[arg-type]
        if context.model.notes is None:
            if notes is not None:
                raise input_error("notes", "a frame", "None: the training had no notes")
            return found
        if notes is None and args.text_column in frame.columns:
            if len(found) > 1:
                raise input_error("notes", "nothing", "a frame of them: a column of texts would speak to all series")
            dates = frame[args.date_column or "date"] if (args.date_column or "date") in frame.columns else frame.index
            notes = pd.DataFrame({"date": dates, "text": frame[args.text_column]})
        own = Namespace(**vars(args) | {"text_path": None, "text_column": None})  # the training's are not those of a frame
        read = notes_from_args(
            own, FRAME, pd.DatetimeIndex(sorted(d for of in found.values() for d in of.dates[[0, -1]])), notes
        )
        found = {name: replace(series, notes=read) for name, series in found.items()}
        if read is not None:
            self.notes += [read.read_as] if read.read_as not in ("", *self.notes) else []
            read_notes(context.model, next(iter(found.values())), args, context.record["backbone"])
        return found

    # Those of the checkpoint that are asked for.
    def _intervals(self, asked: Levels) -> Intervals | None:
        held = self.context.intervals
        if isinstance(asked, str) and asked == "auto":
            return held
        try:
            levels = tuple(sorted({float(level) for level in asked or ()}))
        except (TypeError, ValueError):
            raise input_error("intervals", repr(asked), "levels such as (80, 95), 'auto' or None") from None
        if not levels:
            return None
        wrong = [level for level in levels if held is None or not 0 < level < 100 or not held.has([level])]
        if held is not None and not wrong:
            return held.only(levels)
        file = self.context.checkpoint.file if self.context.checkpoint else "the run"
        had = f"those that it has, {' '.join(map(name_of, held.levels))}" if held else "none, for it has none"
        hint = f"calibrate them without training: python run_main.py --is_training 0 --checkpoint {file} --intervals "
        raise input_error("intervals", f"{name_of(wrong[0])} of {file}", had, hint + " ".join(map(name_of, levels)))
