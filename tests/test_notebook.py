"""The notebook: its cells run in order, from the repository's root, as plain Python in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.realdata import ROOT

NOTEBOOK = ROOT / "notebooks" / "forecast.ipynb"
RUN = """
import json, sys
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
many, two_days, scores = names["many"], names["two_days"], names["scores"]
facts = dict(
    columns=list(names["forecast"].columns), rows=len(two_days), first=str(two_days["date"].iloc[0]),
    last=str(names["known"]["date"].iloc[-1]), bands=bool((two_days["OT_lo95"] < two_days["OT_hi95"]).all()),
    stations=many["station"].value_counts(sort=False).to_dict(),
    starts=many.groupby("station")["date"].min().astype(str).to_dict(),
    windows=scores["windows"], picture=str(names["picture"]),
)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_outputs_are_cleared(cells) -> None:
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert NOTEBOOK.stat().st_size < 20_000


def test_cells_run_in_order(tmp_path: Path) -> None:
    env = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", RUN, str(NOTEBOOK)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1])
    bands = [f"{name}_{end}{level}" for name in ("HUFL", "OT") for level in (80, 95) for end in ("lo", "hi")]
    assert found["columns"] == ["date", "HUFL", "OT", *bands]
    assert found["rows"] == 48 and found["first"] > found["last"] and found["bands"]
    assert found["stations"] == {"north": 24, "south": 24, "east": 24}
    assert found["starts"]["east"] < found["starts"]["north"] == found["starts"]["south"]
    assert found["windows"] == 200 - 96 - 24 + 1
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG") and Path(found["picture"]).is_relative_to(tmp_path)
    assert sum("% of 48 rows" in line for line in lines) == 2
    assert lines[-2].startswith("frame: got no row between ")
