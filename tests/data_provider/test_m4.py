"""The M4 competition's files and the windows that are cut from them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data_provider.data_factory import batch_loader, epoch_batches
from data_provider.m4 import load_m4, read_wide
from layers.errors import InputError
from tests.m4_files import write_m4, write_wide
from tests.small_run import defaults
from utils.results.baselines import doubts, fit_ridge

T, H = 12, 6  # Yearly


def yearly(folder: Path, **lengths: tuple[int, ...]):
    write_m4(folder, "Yearly", **lengths)
    return load_m4(folder, "Yearly", T, H, H)


def test_a_wide_file_is_read_as_pandas_reads_it(tmp_path: Path) -> None:
    write_m4(tmp_path, "Yearly")
    path = tmp_path / "Yearly-train.csv"
    frame = pd.read_csv(path, index_col=0)
    read = read_wide(path)
    assert list(read) == list(frame.index)
    for name, values in read.items():
        np.testing.assert_array_equal(values, frame.loc[name].dropna().to_numpy())
    # other writers: no quotes, NA behind the last value, Windows line ends, a byte-order mark, an empty line
    path.write_bytes(b"\xef\xbb\xbfid,F1,F2,F3\r\nW1,1,2.5,NA\r\n\r\n W2 ,3e2,,\r\n")
    assert {name: values.tolist() for name, values in read_wide(path).items()} == {"W1": [1, 2.5], "W2": [300]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("id,V2\nY1,1,2\nY2,,,\n", "row 3, series 'Y2': got no values, expected at least one"),
        ("id,V2\nY1,1,2\nY2,1,many,3\n", "row 3, series 'Y2', value 2: got 'many', expected a number"),
        ("id,V2\nY1,1,,3\n", "row 2, series 'Y1', value 2: got an empty cell between its values, expected a number"),
        ("id,V2\nY1,1\nY1,2\n", "row 3, series 'Y1': got an id that stands twice, expected an id of its own"),
        ("id,V2\n,1,2\n", "row 2, series '': got no id, expected an id of its own"),
        ("id,V2\nY1,1,inf\n", "row 2, series 'Y1', value 2: got 'inf', expected a number"),
        ("id,V2\nY1,1e30\n", "row 2, series 'Y1', value 1: got '1e30', expected a number of at most 1e+18"),
        ("Y1,1,2\nY2,3,4\n", "row 1: got the values of a series, 'Y1,1,2\\n'..., expected a header"),
    ],
)
def test_what_is_wrong_with_a_wide_file_is_named(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "Yearly-train.csv").write_text(lines)
    with pytest.raises(InputError) as error:
        read_wide(tmp_path / "Yearly-train.csv")
    assert message.replace("\n", "") in str(error.value).replace("\\\\n", "\\n")
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((6,), "series 'Y2': got 0 values, expected 6, the horizon of Yearly"),
        ((6, 5), "series 'Y2': got 5 values, expected 6"),
        ((7, 6), "series 'Y1': got 7 values, expected 6, the horizon"),
        ((6, 6, 6), "series 'Y3': got no such series in the training file"),
    ],
)
def test_files_that_do_not_belong_together_are_named(tmp_path: Path, lengths: tuple[int, ...], message: str) -> None:
    write_m4(tmp_path, "Yearly", lengths=(20, 30))
    write_wide(tmp_path / "Yearly-test.csv", {f"Y{n}": np.ones(length) for n, length in enumerate(lengths, 1)})
    with pytest.raises(InputError, match=message):
        load_m4(tmp_path, "Yearly", T, H, H)


def test_windows_are_cut_at_the_ends_and_at_random_before_what_is_held_out(tmp_path: Path) -> None:
    series = yearly(tmp_path, lengths=(13, 40, 25, 60, 33, 8, 7, 6))
    windows = {flag: series.windows(flag) for flag in ("train", "val", "test")}
    assert {flag: len(part) for flag, part in windows.items()} == {"train": 6, "val": 7, "test": 8}
    for number, known in enumerate(series.known):
        whole, n = np.append(known, series.future[number]), len(known)
        cuts = {"test": {n}, "val": {n - H} if n > H else set(), "train": set(range(max(1, n - H - 9), n - H))}
        for flag, places in cuts.items():  # trained on cuts within the last 1.5 horizons of 6 values
            part, found = windows[flag], set()
            for draw in range(200 if places and flag == "train" else len(places)):
                item = part[draw * len(part) + number] if flag == "train" else part[number]
                assert part.ids[item["index"] % len(part)] == series.ids[number]
                before, after = int(item["x_mask"].sum()), int(item["y_mask"].sum())
                cut = int(np.abs(whole - item["x"][-1].item()).argmin()) + 1
                end = n - H if flag == "train" else cut + H
                found.add(cut)
                history, future = np.zeros(T), np.zeros(H)
                history[T - before :], future[:after] = whole[cut - before : cut], whole[cut : cut + after]
                np.testing.assert_array_equal(item["x"][:, 0], history.astype(np.float32))
                np.testing.assert_array_equal(item["y"][-H:, 0], future.astype(np.float32))
                assert (before, after) == (min(T, cut), min(H, end - cut)) and item["y"].shape == (2 * H, 1)
                assert item["x_mask"][T - before :].all() and item["y_mask"][:after].all()
            assert found == places


def test_series_that_stand_still_choose_no_penalty(tmp_path: Path) -> None:
    series = yearly(tmp_path, lengths=(30,) * 12)
    for n in (0, 1, 5, 10):  # with all of them moving, 0, 5 and 10 would choose
        series.known[n][:] = 7.0
    train, choosing = series.windows_for_a_map()
    assert choosing.ids == ["Y3", "Y9"] and train.ids == ["Y4", "Y5", "Y7", "Y8", "Y10", "Y12"]
    x, y = (np.concatenate(part) for part in zip(*choosing.sequences(), strict=True))
    assert len(x) == choosing.sequence_count == 2 * 4 and y.shape[1] == H  # cut after 15 to 18 of 24 values
    np.testing.assert_allclose(x.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(x.std(axis=1), 1)
    for values in series.known[3:]:
        values[:] = 7.0
    train, choosing = series.windows_for_a_map()  # one that moves is all there is
    assert train.ids == choosing.ids == ["Y3"]
    series.known[2][:] = 7.0
    train, choosing = series.windows_for_a_map()
    weights, penalty = fit_ridge(train, choosing)
    assert not weights.any()
    assert doubts(weights, penalty, choosing) == "none of the windows by which its penalty is chosen moves"


def test_batches_have_masks_and_an_order_of_seed_and_epoch_alone(tmp_path: Path) -> None:
    series = yearly(tmp_path)
    args = defaults(data="m4", seq_len=T, label_len=H, pred_len=H, batch_size=2, num_workers=0, seed=1)
    batch = next(iter(batch_loader(args, "train", series)[1]))
    assert batch.x.shape == batch.x_mask.shape == (2, T) and batch.y.shape == batch.y_mask.shape == (2, H)
    assert torch.equal(batch.x, batch.x * batch.x_mask)

    def items(epoch: int, seed: int, skip: int = 0, **share: int) -> list[list[int]]:
        batches = epoch_batches(args, series.windows("train"), "train", seed=seed, **share)
        batches.set_epoch(epoch, skip)
        return list(batches)

    assert items(3, 1) == items(3, 1) and items(3, 1)[1:] == items(3, 1, skip=1)
    assert len({str(items(epoch, seed)) for epoch in (1, 2) for seed in (1, 2)}) == 4
    assert sorted(number % 6 for batch in items(1, 1) for number in batch) == list(range(6))  # each series once an epoch
    shares = [items(2, 1, rank=rank, world=2) for rank in (0, 1)]
    assert [one + two for one, two in zip(*shares, strict=True)] == items(2, 1)
