"""The program without the dropout of the reprogramming attention, whose rate is no flag: what is exact then can be compared.

Its processes are started as run_main.py's are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import layers.reprogramming  # noqa: E402
from run_main import main  # noqa: E402

if __name__ == "__main__":
    layers.reprogramming.ATTENTION_DROPOUT = 0.0
    sys.exit(main(sys.argv[1:]))
