"""Results page: an introduction and the tables of studies, joined into one Markdown file.

    python scripts/results_page.py RESULTS.md --intro scripts/studies/RESULTS.intro.md studies/llm studies/skip

A study's part is its results.md (`python scripts/study.py GRID.toml --out studies/llm --table` makes it anew), without its
pictures; `--data FOLDER` writes dataset/ETT-small where the commands name that folder.
"""

import argparse
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, only scripts/ is on the path

from layers.errors import InputError, input_error  # noqa: E402
from utils.errors import StorageError  # noqa: E402
from utils.saving.files import write_text  # noqa: E402
from utils.study.table import MARKDOWN  # noqa: E402


def main(argv: list[str]) -> int:
    """Write the page; return the exit code."""
    parser = argparse.ArgumentParser(prog="results_page.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("page", type=Path, help="the file to write")
    parser.add_argument("studies", type=Path, nargs="+", help="folders of studies")
    parser.add_argument("--intro", type=Path, required=True, help="what stands above the tables")
    parser.add_argument("--data", help="the folder of the data in these runs")
    args = parser.parse_args(argv)
    try:
        parts = [read(args.intro), *(part(read(folder / MARKDOWN), args.data) for folder in args.studies)]
        write_text(args.page, "\n".join(parts))
    except (InputError, StorageError) as error:
        print(f"results_page.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(f"Written: {args.page}, {len(args.studies)} studies")
    return 0


def read(path: Path) -> str:
    """A file's text.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise input_error(path, f"no readable file ({error})", "one", "study.py --table makes a study's") from error


def part(text: str, data: str | None) -> str:
    """A study's results.md as a part of a longer page: headings a level deeper, no pictures, data where others have them."""
    text = re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)
    text = re.sub(r"^!\[.*\]\(.*\)\n*", "", text, flags=re.MULTILINE)
    return text.replace(data, "dataset/ETT-small") if data else text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
