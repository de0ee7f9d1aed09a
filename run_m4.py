"""Entry of the M4 competition's runs under the name that published scripts start: the program is that of run_main.py."""

import sys

from run_main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "run_m4.py"))
