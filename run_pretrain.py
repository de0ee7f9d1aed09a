"""Entry for transfer: train on one data set, validate and test on another, under the name of the published script.

    python run_pretrain.py --data_pretrain ETTh1 --data ETTh2 ...

It is run_main.py, which takes the same flags; here ``--data_pretrain`` may not be left out.
"""

import sys

from run_main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "run_pretrain.py"))
