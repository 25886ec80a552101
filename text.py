"""The data of train_gpt.py: texts, their tokens in train.bin and val.bin, and batches of them.

A prepared folder holds train.bin and val.bin (whole numbers of 2 or 4 bytes, unsigned) and
meta.json with "tokenizer", "vocab_size" and either "dtype" ("uint16" or "uint32") or
"train_tokens" and "val_tokens".
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import sysconfig
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
NO_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # in Python's library


# --------------------------------------------------------------------------------------- texts
def text_files(c):
    """The text files behind --data, in a fixed order. Hidden files are left out."""
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
    for name in ("out", "data_dir"):  # they would become text of the run
        folder = Path(getattr(c, name)).resolve()
        inside = path.is_dir() and path.resolve() in (folder, *folder.parents)
        check(c, "data", not inside, f"a folder that does not hold --{name.replace('_', '-')}")
    found = [path] if path.is_file() else sorted(p for p in path.rglob(pattern) if p.is_file())
    parts = {p: p.relative_to(path).parts for p in found}
    found = [p for p in found if not skip & set(parts[p])]
    found = [p for p in found if not any(part.startswith(".") for part in parts[p])]
    names = ", ".join(HUB)
    check(c, "data", found, f"an existing file or folder of files, or stdlib, shakespeare, {names}")
    texts = [p for p in found if is_text(p)]
    check(c, "data", texts, f"text in UTF-8 or the like, unlike {found[0]}")
    if len(texts) < len(found):
        other = min(set(found) - set(texts))
        common.note(f"--data: leaves out {len(found) - len(texts)} files without text, as {other}")
    return texts


def is_text(path):
    """A zero among the first bytes means a program, a picture or UTF-16, as git decides."""
    with open(path, "rb") as f:
        return 0 not in f.read(1 << 16)


def from_files(files):
    """Pieces of text (part, bytes, whether a document begins). Of twenty files or more every
    twentieth is held out, of fewer the last tenth of each."""
    files = list(files)
    random.Random(0).shuffle(files)
    for i, path in enumerate(files):
        size = path.stat().st_size
        cut = size if i % 20 else 0
        cut = size * 9 // 10 if len(files) < 20 else cut
        with open(path, "rb") as f:
            for part, end in (("train", cut), ("val", size)):
                begins = True
                while text := f.read(min(1 << 19, end - f.tell())):
                    rest = f.readline(min(1 << 19, end - f.tell()))  # as gpt2 takes no half words
                    yield part, text + rest, begins
                    begins = False


def from_hub(c):
    """The same, streamed from huggingface.co, its cache or a local copy."""
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
    """Texts to tokens and back. What the tokens of a prepared folder mean is not known here."""

    def __init__(self, tokenizer, vocab=256):
        self.kind = kind = tokenizer
        self.vocab = vocab
        self.between = None  # the token between documents
        if kind == "bytes":
            self.between = ord("\n")
        if kind == "gpt2":
            import tiktoken

            way = "use --tokenizer bytes, or set TIKTOKEN_CACHE_DIR to a folder with gpt2"
            with instead(f"--tokenizer: {way}; tiktoken can't fetch its vocabulary"):
                self.bpe = tiktoken.get_encoding("gpt2")
            self.vocab = self.bpe.n_vocab
            self.between = self.bpe.eot_token

    def encode(self, texts):
        if self.kind == "gpt2":
            texts = [text.decode(errors="replace") for text in texts]
            return self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        if self.kind != "bytes" and any(texts):
            raise common.BadInput("--prompt: allowed is none for tokens of an unknown meaning")
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, tokens):
        if self.kind == "gpt2":
            return self.bpe.decode(tokens)
        if self.kind == "bytes":
            return bytes(tokens).decode(errors="replace")
        return " ".join(map(str, tokens))


def hugging_face_tokenizer(codec, context):
    """{file name: content} that AutoTokenizer opens: a byte-level BPE, without merges for bytes."""
    if codec.kind not in ("bytes", "gpt2"):
        return {}
    ranks = {bytes([i]): i for i in range(256)}
    ranks = codec.bpe._mergeable_ranks if codec.kind == "gpt2" else ranks
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    added = []
    if codec.kind == "gpt2":
        about |= {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": codec.between, "content": "<|endoftext|>", "special": True}
        added = [token | flags]
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    vocab = {printable(token): i for token, i in ranks.items()}
    merges = [" ".join(map(printable, halves(token, ranks))) for token in ranks if len(token) > 1]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": pieces | {"use_regex": codec.kind == "gpt2"},
        "decoder": pieces | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": about}


def printable(token):
    """Bytes as GPT-2's vocabulary file writes them: one visible letter a byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [i for i in range(256) if i not in visible]
    letters = dict(zip(visible, visible, strict=True)) | {b: 256 + i for i, b in enumerate(hidden)}
    return "".join(chr(letters[byte]) for byte in token)


def halves(token, ranks):
    """The two tokens whose merge is this one: merges of lower rank are made first."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ----------------------------------------------------------------------------- prepared folder
def prepare(c):
    """The folder with train.bin, val.bin and meta.json behind --data; made once, whole or not."""
    if (Path(c.data) / "train.bin").exists():
        return Path(c.data)
    files = [] if c.data in HUB else text_files(c)
    name = f"{Path(c.data).stem}-{c.tokenizer}"
    if files:
        known = repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
        name += f"-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    folder = Path(c.data_dir) / name
    if (folder / "meta.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # without meta.json it is half of one
    half = folder.with_name(f".{name}.{os.getpid()}")
    half.mkdir(parents=True, exist_ok=True)
    try:
        write_tokens(c, half, from_files(files) if files else from_hub(c))
        with contextlib.suppress(OSError):  # another run was first
            half.rename(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
        with contextlib.suppress(OSError):  # where something is in it
            half.parent.rmdir()
    return folder


def write_tokens(c, folder, pieces):
    codec = Codec(c.tokenizer)
    source = " ".join(filter(None, HUB.get(c.data, [c.data])))
    meta = {"tokenizer": c.tokenizer, "vocab_size": codec.vocab, "source": source}
    meta |= {"dtype": "uint16"}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        bins = {"train": train, "val": val}
        batches = iter(lambda: list(itertools.islice(pieces, 64)), [])
        quiet = not sys.stderr.isatty()
        for batch in tqdm(batches, f"tokens of {c.data}", unit=" batches", disable=quiet):
            encoded = codec.encode([text for _, text, _ in batch])
            for (part, _, begins), tokens in zip(batch, encoded, strict=True):
                separator = [codec.between] if begins and bins[part].tell() else []
                bins[part].write(np.concatenate((separator, tokens)).astype("<u2").tobytes())
        for part, f in bins.items():
            f.flush()
            os.fsync(f.fileno())
            meta[f"{part}_tokens"] = f.tell() // 2
            check_length(c, part, f.tell() // 2)
    common.write_json(folder / "meta.json", meta)


def padded(vocab):
    """50257 to 50304, as GPUs multiply whole blocks faster."""
    return -(-vocab // 64) * 64


def check_length(c, part, n):
    more = f"more text: {part} has {n} tokens, no more than one --context of {c.context}"
    check(c, "data", n > c.context, more)


class Data:
    """Tokens in memory-mapped files. A batch is a function of seed and step, so a resumed run sees
    the same batches.

    tokens: what they mean, {"tokenizer": ..., "vocab": ...}. vocab: the rows of an embedding.
    sha256: of all tokens.
    """

    def __init__(self, c):
        folder = prepare(c) if common.LOCAL_RANK == 0 else None
        common.over_ranks([0])  # the others find the data made
        self.c = c
        folder = folder or prepare(c)
        with instead(f"--data: {folder / 'meta.json'} needs tokenizer and vocab_size"):
            meta = json.loads((folder / "meta.json").read_text())
            self.tokens = {"tokenizer": str(meta["tokenizer"]), "vocab": int(meta["vocab_size"])}
        fits = 2 <= self.tokens["vocab"] <= 2**20
        check(c, "data", fits, f"a vocab_size of 2 to 2^20 in {folder / 'meta.json'}")
        self.vocab = padded(self.tokens["vocab"])
        self.train, self.val = (self.read(folder, meta, part) for part in ("train", "val"))
        self.sha256 = common.from_first_rank(self.checked(folder) if RANK == 0 else None)

    def read(self, folder, meta, part):
        """The tokens in a file, of the type and the number that meta.json names."""
        c = self.c
        path = folder / f"{part}.bin"
        check(c, "data", path.exists(), f"a folder that has {path}")
        size = path.stat().st_size
        n = meta.get(f"{part}_tokens")
        kind = meta.get("dtype") or {2: "uint16", 4: "uint32"}.get(size / n if n else None)
        names = f"dtype (uint16 or uint32) or {part}_tokens in {folder / 'meta.json'}"
        check(c, "data", kind or n, f"a folder with {names}")
        width = {"uint16": 2, "uint32": 4}.get(kind, 0)
        fits = width and size == width * (n or size // width)
        check(c, "data", fits, f"{path} of {size:,} bytes with fitting {names}")
        with open(path, "rb") as f:
            check(c, "data", f.read(6) != b"\x93NUMPY", f"bare tokens in {path}, not a .npy file")
        check_length(c, part, size // width)
        return np.memmap(path, f"<u{width}", "r")

    def checked(self, folder):
        """The checksum of all tokens, which are below the size of the vocabulary."""
        digest = hashlib.sha256()
        for part, tokens in (("train", self.train), ("val", self.val)):
            for start in range(0, len(tokens), 1 << 24):
                piece = np.ascontiguousarray(tokens[start : start + (1 << 24)])
                top = int(piece.max())
                text = f"tokens below vocab_size, {self.tokens['vocab']}, in {part}.bin of {folder}"
                check(self.c, "data", top < self.tokens["vocab"], f"{text}, which has {top}")
                digest.update(piece)
        return digest.hexdigest()

    def windows(self, tokens, starts):
        """Inputs and targets, (sequences, context) each, on the device."""
        rows = tokens[starts[:, None] + np.arange(self.c.context + 1)].astype(np.int64)
        rows = torch.from_numpy(rows)
        rows = rows.pin_memory() if self.c.device == "cuda" else rows
        rows = rows.to(self.c.device, non_blocking=True)
        return rows[:, :-1], rows[:, 1:]

    def batch(self, step):
        """This rank's micro-batches of a step. Which sequences form one does not depend on the
        number of ranks."""
        c = self.c
        rng = np.random.default_rng((c.seed, step))
        starts = rng.integers(len(self.train) - c.context, size=c.batch_size)
        firsts = range(RANK * c.micro_batch, c.batch_size, RANKS * c.micro_batch)
        return [self.windows(self.train, starts[i : i + c.micro_batch]) for i in firsts]

    def validation(self):
        """This rank's micro-batches of sequences that do not depend on the number of ranks, in the
        shapes of training, for which the model is compiled."""
        c = self.c
        count = min(c.eval_sequences, (len(self.val) - 1) // c.context)
        count = max(1, count // c.batch_size) * c.batch_size
        starts = np.linspace(0, len(self.val) - c.context - 1, count).astype(np.int64)
        for first in range(RANK * c.micro_batch, count, RANKS * c.micro_batch):
            yield self.windows(self.val, starts[first : first + c.micro_batch])
