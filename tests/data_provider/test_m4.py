"""The M4 competition's files and the windows that are cut from them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data_provider.data_factory import batch_loader, epoch_batches, series_from_args
from data_provider.m4 import load_m4, read_wide
from data_provider.m4_synthetic import SERIES, write_synthetic_m4
from data_provider.patterns import PATTERNS, find_m4, m4_file
from layers.errors import InputError
from tests.m4_files import write_m4, write_wide
from tests.small_run import defaults
from utils.results.baselines import doubts, fit_ridge

T, H = 12, 6  # Yearly


def yearly(folder: Path, **lengths: tuple[int, ...]):
    write_m4(folder, "Yearly", **lengths)
    return load_m4(folder, "Yearly", T, H, H)


def flags(folder: Path, **others: object):
    return defaults(
        data="m4", seasonal_patterns="Yearly", root_path=str(folder), seq_len=T, label_len=H, pred_len=H, batch_size=2,
        num_workers=0, **others,
    )  # fmt: skip


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
        ("Y1,1,2\nY2,,,\n", "row 3, series 'Y2': got no values, expected at least one"),
        ("Y1,1,2\nY2,1,many,3\n", "row 3, series 'Y2', value 2: got 'many', expected a number"),
        ("Y1,1,,3\n", "row 2, series 'Y1', value 2: got an empty cell between its values, expected a number"),
        ("Y1,1\nY1,2\n", "row 3, series 'Y1': got an id that stands twice, expected an id of its own"),
        (",1,2\n", "row 2, series '': got no id, expected an id of its own"),
        ("Y1,1,inf\n", "row 2, series 'Y1', value 2: got 'inf', expected a number"),
        ("Y1,1e30\n", "row 2, series 'Y1', value 1: got '1e30', expected a number of at most 1e+18"),
        ("", "got no series, expected a header"),
    ],
)
def test_what_is_wrong_with_a_wide_file_is_named(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "Yearly-train.csv").write_text("id,V2,V3\n" + lines)
    with pytest.raises(InputError) as error:
        read_wide(tmp_path / "Yearly-train.csv")
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Yearly-train.csv").write_text("Y1,1,2\nY2,3,4\n")
    with pytest.raises(InputError, match="row 1: got the values of a series, .*, expected a header"):
        read_wide(tmp_path / "Yearly-train.csv")


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    write_m4(tmp_path, "Yearly", lengths=(20, 30))
    write_wide(tmp_path / "Yearly-test.csv", {"Y1": np.ones(6)})
    with pytest.raises(InputError, match="series 'Y2': got 0 values, expected 6, the horizon of Yearly"):
        load_m4(tmp_path, "Yearly", T, H, H)
    write_wide(tmp_path / "Yearly-test.csv", {"Y1": np.ones(6), "Y2": np.ones(5)})
    with pytest.raises(InputError, match="series 'Y2': got 5 values, expected 6"):
        load_m4(tmp_path, "Yearly", T, H, H)
    write_wide(tmp_path / "Yearly-test.csv", {"Y1": np.ones(7), "Y2": np.ones(6)})
    with pytest.raises(InputError, match="series 'Y1': got 7 values, expected at most 6"):
        load_m4(tmp_path, "Yearly", T, H, H)
    write_wide(tmp_path / "Yearly-test.csv", {"Y1": np.ones(6), "Y2": np.ones(6), "Y3": np.ones(6)})
    with pytest.raises(InputError, match="series 'Y3': got no such series in the training file"):
        load_m4(tmp_path, "Yearly", T, H, H)
    with pytest.raises(InputError, match="got 2 series, all shorter, expected at least one of 8 values"):
        yearly(tmp_path, lengths=(7, 3))


def test_files_are_looked_for_in_the_folder_and_in_m4(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("TIMELLM_DATA", raising=False)
    write_m4(tmp_path / "a" / "m4", "Weekly", lengths=(80,))
    for root in (tmp_path / "a", tmp_path / "a" / "m4"):
        assert find_m4(root, "Weekly")[1] == tmp_path / "a" / "m4" / "Weekly-test.csv"
    with pytest.raises(
        InputError, match="--seasonal_patterns Hourly: got no Hourly-train.csv and Hourly-test.csv, expected"
    ):
        find_m4(tmp_path / "a", "Hourly")
    monkeypatch.setenv("TIMELLM_DATA", str(tmp_path / "a"))
    assert find_m4(tmp_path / "none", "Weekly")[0].is_file()


def test_validation_and_test_windows_stand_at_the_ends(tmp_path: Path) -> None:
    series = yearly(tmp_path)
    test, val, train = (series.windows(flag) for flag in ("test", "val", "train"))
    assert (len(test), len(val), len(train)) == (6, 6, 6)
    long = list(map(len, series.known)).index(40)
    item = test[long]
    np.testing.assert_array_equal(item["x"][:, 0], series.known[long][-T:].astype(np.float32))
    np.testing.assert_array_equal(item["y"][-H:, 0], series.future[long].astype(np.float32))
    assert item["x_mask"].all() and item["y_mask"].all() and item["y"].shape == (2 * H, 1)
    item = val[long]
    np.testing.assert_array_equal(item["x"][:, 0], series.known[long][-T - H : -H].astype(np.float32))
    np.testing.assert_array_equal(item["y"][-H:, 0], series.known[long][-H:].astype(np.float32))
    short = list(map(len, series.known)).index(8)  # two values before its last horizon
    item = val[short]
    assert item["x_mask"][:, 0].tolist() == [0] * 10 + [1] * 2 and (item["x"][:10] == 0).all()
    np.testing.assert_array_equal(item["x"][10:, 0], series.known[short][:2].astype(np.float32))


def test_training_windows_stay_before_what_is_held_out_and_within_the_recent_values(tmp_path: Path) -> None:
    series = yearly(tmp_path)
    train = series.windows("train")
    cuts: dict[int, set[int]] = {}
    for draw in range(400):
        for number in range(len(train)):
            item, values = train[draw * len(train) + number], series.known[number]
            n, m = int(item["x_mask"].sum()), int(item["y_mask"].sum())
            end = np.flatnonzero(np.isclose(values, float(item["x"][-1, 0]), rtol=1e-6))[0] + 1  # the cut
            np.testing.assert_allclose(item["x"][T - n :, 0], values[max(end - T, 0) : end], rtol=1e-6)
            np.testing.assert_allclose(item["y"][-H:, 0][:m], values[end : end + m], rtol=1e-6)
            assert end + m <= len(values) - H and n == min(T, end) and 1 <= m <= H
            assert m == min(H, len(values) - H - end) and not item["y"][-H:, 0][m:].any()
            cuts.setdefault(number, set()).add(int(end))
    for number, values in enumerate(series.known):
        rows = len(values) - H
        assert cuts[number] == set(range(max(1, rows - 9), rows))  # 1.5 horizons of 6: the last 9


def test_series_that_stand_still_choose_no_penalty(tmp_path: Path) -> None:
    series = yearly(tmp_path, lengths=(30,) * 12)
    for n in (0, 1, 5, 10):  # with all of them moving, 0, 5 and 10 would choose
        series.known[n][:] = 7.0
    train, choosing = series.windows_for_a_map()
    assert choosing.ids == ["Y3", "Y9"] and train.ids == ["Y4", "Y5", "Y7", "Y8", "Y10", "Y12"]
    assert sum(len(x) for x, _ in choosing.sequences()) == choosing.sequence_count
    for values in series.known[3:]:
        values[:] = 7.0
    train, choosing = series.windows_for_a_map()  # one that moves is all there is
    assert train.ids == choosing.ids == ["Y3"]
    series.known[2][:] = 7.0
    train, choosing = series.windows_for_a_map()
    weights, penalty = fit_ridge(train, choosing)
    assert not weights.any()
    assert doubts(weights, penalty, choosing) == "none of the windows by which its penalty is chosen moves"


def test_order_and_cuts_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    series = yearly(tmp_path)
    args = flags(tmp_path)

    def items(epoch: int, seed: int, skip: int = 0) -> list[list[int]]:
        batches = epoch_batches(args, series.windows("train"), "train", seed=seed)
        batches.set_epoch(epoch, skip)
        return list(batches)

    assert items(3, 1) == items(3, 1) and items(3, 1)[1:] == items(3, 1, skip=1)
    assert len({str(items(epoch, seed)) for epoch in (1, 2) for seed in (1, 2)}) == 4
    numbers = [number % 6 for batch in items(1, 1) for number in batch]
    assert sorted(numbers) == list(range(6))  # each series once an epoch
    shares = [epoch_batches(args, series.windows("train"), "train", rank=rank, world=2, seed=1) for rank in (0, 1)]
    whole = epoch_batches(args, series.windows("train"), "train", seed=1)
    for batches in (*shares, whole):
        batches.set_epoch(2)
    assert [one + two for one, two in zip(*map(list, shares), strict=True)] == list(whole)


def test_the_loader_gives_masks_and_no_marks(tmp_path: Path) -> None:
    write_m4(tmp_path, "Yearly")
    dataset, loader = batch_loader(flags(tmp_path), "train", series_from_args(flags(tmp_path)))
    batch = next(iter(loader))
    assert batch.x.shape == (2, T) and batch.y.shape == (2, H) and batch.windows is None
    sequences = batch.to(torch.device("cpu"))
    assert sequences.x_mask.shape == (2, T) and sequences.y_mask.shape == (2, H)
    parts = sequences.split(1)
    assert torch.equal(torch.cat([part.y_mask for part in parts]), sequences.y_mask)
    assert torch.equal(torch.cat([part.x_mask for part in parts]), sequences.x_mask)
    assert dataset.window_dates(int(batch.index[0]))[0].startswith("Y")


def test_the_synthetic_set_says_what_it_is(tmp_path: Path) -> None:
    write_synthetic_m4(tmp_path / "one")
    for pattern, kind in PATTERNS.items():
        series = load_m4(tmp_path / "one", pattern, 2 * kind.horizon, kind.horizon, kind.horizon)
        assert series.synthetic and series.future.shape == (SERIES, kind.horizon)
        assert all((values > 0).all() for values in series.known) and len({len(values) for values in series.known}) > 5
        name = m4_file(pattern, "train")
        assert (tmp_path / "one" / name).read_bytes() == (write_synthetic_m4(tmp_path / "two") / name).read_bytes()
    assert not yearly(tmp_path / "own").synthetic
