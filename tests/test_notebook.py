"""The notebook: its cells run in order, from the repository's root, as plain Python in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_outputs_are_cleared_and_cells_run_in_order(tmp_path: Path) -> None:
    code = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    env = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", RUN, str(NOTEBOOK)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, refused, facts = done.stdout.splitlines()
    found, ends = json.loads(facts), ("lo80", "hi80", "lo95", "hi95")
    picture = Path(found.pop("picture"))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.is_relative_to(tmp_path)
    assert found.pop("first") > found.pop("last")
    starts = found.pop("starts")
    assert starts["east"] < starts["north"] == starts["south"]
    assert found == {
        "columns": ["date", "HUFL", "OT", *(f"{name}_{end}" for name in ("HUFL", "OT") for end in ends)],
        "rows": 48, "bands": True, "windows": 200 - 96 - 24 + 1, "stations": {"north": 24, "south": 24, "east": 24},
    }  # fmt: skip
    assert sum("% of 48 rows" in line for line in lines) == 2 and refused.startswith("frame: got no row between ")
