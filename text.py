"""The data of train_gpt.py: texts, their tokens in train.bin and val.bin, and batches of tokens.

A prepared folder holds train.bin and val.bin (unsigned whole numbers of 2 or 4 bytes) and
meta.json with "tokenizer", "vocab_size" and either "dtype" ("uint16" or "uint32") or
"train_tokens" and "val_tokens".
"""

import contextlib
import hashlib
import random
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import RANK, RANKS, check, instead

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
HUB = {  # on huggingface.co: name and configuration
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "minipile": ("JeanKaddour/minipile", None),
    "openwebtext": ("Skylion007/openwebtext", None),
}
PIECE = 1 << 19  # bytes of text that are read at a time
META = "meta.json with tokenizer, vocab_size and dtype (uint16 or uint32)"
NO_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # in Python's library


# --------------------------------------------------------------------------------------- texts
def text_files(c):
    """Returns the text files behind --data in a fixed order, without hidden files."""
    path = Path(c.data)
    pattern = "*"
    skip = set()
    if c.data == "stdlib":
        path = Path(sysconfig.get_paths()["stdlib"])
        pattern = "*.py"
        skip = NO_SOURCE
    elif c.data == "shakespeare":
        path = Path(c.data_dir) / "shakespeare.txt"
        url, sha256 = SHAKESPEARE
        common.download(url, path, sha256, f"--data: put the text at {path}")
    for name in ("out", "data_dir"):  # files in there would become text
        holds = Path(getattr(c, name)).resolve().is_relative_to(path.resolve())
        check(c, "data", not holds, f"a folder that does not hold {common.flag(name)}")
    found = [path] if path.is_file() else sorted(p for p in path.rglob(pattern) if p.is_file())
    parts = {p: p.relative_to(path).parts for p in found}
    found = [p for p in found if not any(x in skip or x.startswith(".") for x in parts[p])]
    texts = [p for p in found if is_text(p)]
    names = ", ".join(("stdlib", "shakespeare", *HUB))
    check(c, "data", texts, f"a text file or a folder of text files, in UTF-8 or the like, {names}")
    if len(texts) < len(found):
        other = min(set(found) - set(texts))
        common.say(skipped=f"{len(found) - len(texts)} files without text, such as {other}")
    return texts


def is_text(path):
    """Decides as git does: a zero byte means a program, a picture or UTF-16."""
    with open(path, "rb") as f:
        return 0 not in f.read(1 << 16)


def from_files(files):
    """Yields pieces of text: (part, bytes, whether a document begins). Of twenty files or more,
    every twentieth is held out. Of fewer files, the last tenth of each is held out."""
    files = list(files)
    random.Random(0).shuffle(files)
    for i, path in enumerate(files):
        size = path.stat().st_size
        cut = size if i % 20 else 0
        cut = size * 9 // 10 if len(files) < 20 else cut
        with open(path, "rb") as f:
            for part, end in (("train", cut), ("val", size)):
                begins = True
                while text := f.read(min(PIECE, end - f.tell())):
                    text += f.readline(min(PIECE, end - f.tell()))  # so that no word is cut
                    yield part, text, begins
                    begins = False


def from_hub(c):
    """Yields the same from huggingface.co, its cache or a local copy."""
    from datasets import load_dataset

    lines = c.data.startswith("wikitext")  # rows are the lines of one document
    with instead(f"--data: name a text file or a folder; datasets can't read {HUB[c.data][0]}"):
        splits = load_dataset(*HUB[c.data], streaming=True)
        for split in ("train", "validation"):
            for i, row in enumerate(splits.get(split, ())):
                held_out = split != "train" or ("validation" not in splits and i % 2000 == 0)
                yield "val" if held_out else "train", row["text"].encode(), i == 0 or not lines


# -------------------------------------------------------------------------------------- tokens
class Codec:
    """Turns texts into tokens and back. Tokens of another tokenizer are only numbers here."""

    def __init__(self, tokenizer, vocab=256):
        self.kind = tokenizer
        self.vocab = vocab
        self.between = ord("\n") if tokenizer == "bytes" else None  # the token between documents
        if tokenizer == "gpt2":
            import tiktoken

            way = "use --tokenizer bytes, or set TIKTOKEN_CACHE_DIR to a folder with gpt2"
            with instead(f"--tokenizer: {way}; tiktoken can't fetch its vocabulary"):
                self.bpe = tiktoken.get_encoding("gpt2")
            self.vocab = self.bpe.n_vocab
            self.between = self.bpe.eot_token

    def encode(self, text):
        if self.kind == "gpt2":
            return self.bpe.encode_ordinary(text.decode(errors="replace"))
        if self.kind != "bytes" and text:
            got = f"--prompt: got {text.decode(errors='replace')!r}"
            raise common.BadInput(f"{got}, allowed is none: no tokenizer for {self.kind}")
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens):
        if self.kind == "gpt2":
            return self.bpe.decode(tokens)
        if self.kind == "bytes":
            return bytes(tokens).decode(errors="replace")
        return " ".join(map(str, tokens))


# ----------------------------------------------------------------------------- prepared folder
def is_prepared(c):
    return (Path(c.data) / "train.bin").exists()


def read_meta(folder):
    with instead(f"--data: got {folder}, allowed are train.bin, val.bin and {META}"):
        meta = common.read_json(folder / "meta.json")
        return meta | {"tokenizer": str(meta["tokenizer"]), "vocab_size": int(meta["vocab_size"])}


def prepare(c):
    """Returns the folder of the tokens behind --data. The folder is made once."""
    if is_prepared(c):
        return Path(c.data)
    files = [] if c.data in HUB else text_files(c)
    name = f"{Path(c.data).stem}-{c.tokenizer}"
    if files:
        known = repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
        name += f"-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    folder = Path(c.data_dir) / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as part:
        made = Path(part, name)
        made.mkdir()
        write_tokens(c, made, from_files(files) if files else from_hub(c))
        with contextlib.suppress(OSError):  # another run was first
            made.rename(folder)
    return folder


def write_tokens(c, folder, pieces):
    codec = Codec(c.tokenizer)
    meta = {"tokenizer": c.tokenizer, "vocab_size": codec.vocab, "dtype": "uint16"}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        bins = {"train": train, "val": val}
        for part, text, begins in tqdm(pieces, f"tokens of {c.data}", disable=None):
            separator = [codec.between] if begins and bins[part].tell() else []
            tokens = np.concatenate((separator, codec.encode(text)))
            bins[part].write(tokens.astype("<u2").tobytes())
        for part, f in bins.items():
            meta[f"{part}_tokens"] = f.tell() // 2
    common.write_json(folder / "meta.json", meta)


def vocabulary(c):
    """Returns the rows of an embedding, also before the tokens are made."""
    if is_prepared(c):
        return padded(read_meta(Path(c.data))["vocab_size"])
    return 50304 if c.tokenizer == "gpt2" else 256


def padded(vocab):
    """Rounds up, such as 50257 to 50304, as GPUs multiply whole blocks faster."""
    return -(-vocab // 64) * 64


class Data:
    """Holds tokens in memory-mapped files. A batch is a function of seed and step, so a resumed run
    sees the same batches.

    tokens: what they mean, {"tokenizer": ..., "vocab": ...}. codec: for these tokens, made here so
    that a missing tokenizer is no surprise after the training. vocab: the rows of an embedding.
    sha256: of all tokens, or of a sample where there are many.
    """

    def __init__(self, c):
        folder = prepare(c) if common.LOCAL_RANK == 0 else None
        common.over_ranks([0])  # the other ranks find the tokens made
        self.c = c
        folder = folder or prepare(c)
        meta = read_meta(folder)
        kind = meta["tokenizer"]
        same = c.tokenizer == kind or "tokenizer" not in c.given
        check(c, "tokenizer", same, f"{kind}, as {folder}/meta.json says")
        self.tokens = {"tokenizer": kind, "vocab": meta["vocab_size"]}
        with instead(f"--data: got {folder}, allowed are train.bin, val.bin and {META}"):
            self.train, self.val = (self.read(folder, meta, part) for part in ("train", "val"))
        self.codec = Codec(**self.tokens)
        self.vocab = padded(self.tokens["vocab"])
        self.sha256 = self.checksum()

    def read(self, folder, meta, part):
        """Returns the tokens in a file. Their number in meta.json tells the bytes of each. Without
        a number, their dtype does."""
        path = folder / f"{part}.bin"
        size = path.stat().st_size
        n = meta.get(f"{part}_tokens")
        width = size / n if n else {"uint16": 2, "uint32": 4}[meta["dtype"]]
        fits = width in (2, 4) and size % width == 0
        fitting = f"tokens of 2 or 4 bytes, as meta.json says; {path} has {size:,} bytes"
        check(self.c, "data", fits, fitting)
        count = size // int(width)
        more = f"more text: {part} has {count} tokens, no more than one --context"
        check(self.c, "data", count > self.c.context, f"{more} of {self.c.context}")
        return np.memmap(path, f"<u{int(width)}", "r")

    def checksum(self):
        """Returns a checksum of the tokens, and checks that they are below vocab_size. From a file
        of more than 2^24 tokens it takes 256 pieces: reading a whole corpus takes too long."""
        digest = hashlib.sha256()
        for tokens in (self.train, self.val):
            for start in range(0, len(tokens), max(1 << 16, len(tokens) >> 8)):
                piece = np.ascontiguousarray(tokens[start : start + (1 << 16)])
                top = int(piece.max())
                allowed = f"tokens below vocab_size, {self.tokens['vocab']}, in {tokens.filename}"
                fits = top < self.tokens["vocab"]
                check(self.c, "data", fits, f"{allowed}, which has {top}")
                digest.update(piece)
        return digest.hexdigest()

    def micro_batches(self, tokens, starts):
        """Yields inputs and targets of this rank's share, (micro_batch, context) each."""
        c = self.c
        for first in range(RANK * c.micro_batch, len(starts), RANKS * c.micro_batch):
            at = starts[first : first + c.micro_batch, None] + np.arange(c.context + 1)
            rows = torch.from_numpy(tokens[at].astype(np.int64))
            cuda = c.device == "cuda"
            rows = rows.pin_memory() if cuda else rows
            rows = rows.to(c.device, non_blocking=cuda)  # on a Mac such a copy can be wrong
            yield rows[:, :-1], rows[:, 1:]

    def batch(self, step):
        """Returns this rank's micro-batches of a step. The step's sequences do not depend on the
        number of ranks."""
        rng = np.random.default_rng((self.c.seed, step))
        starts = rng.integers(len(self.train) - self.c.context, size=self.c.batch_size)
        return list(self.micro_batches(self.train, starts))

    def validation(self):
        """Returns this rank's micro-batches for the validation. They have the shapes of training,
        for which the model is compiled. Their sequences do not depend on the number of ranks."""
        c = self.c
        count = min(c.eval_sequences, (len(self.val) - 1) // c.context)
        count = max(1, count // c.batch_size) * c.batch_size
        starts = np.linspace(0, len(self.val) - c.context - 1, count).astype(np.int64)
        return self.micro_batches(self.val, starts)
