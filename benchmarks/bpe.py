"""A byte-pair vocabulary of 4,096 tokens for Python's library, as a folder for train_gpt.py.

    python benchmarks/bpe.py            # data/bpe-4096 with train.bin, val.bin, meta.json

The tokenizer is trained on the training part of the text alone. A step of a language model with
such a vocabulary sees most tokens rarely, as in real language models; bytes have no rare tokens.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

VOCABULARY = 4096
FOLDER = ROOT / "data" / f"bpe-{VOCABULARY}"


def documents():
    """The library's files as {"train": [text], "val": [text]}, split as train_gpt.py splits."""
    c = train_gpt.Config(data="stdlib", out="runs/none", data_dir="data")
    texts = {"train": [], "val": []}
    for part, piece, begins in train_gpt.from_files(train_gpt.text_files(c)):
        if begins:
            texts[part].append(b"")
        texts[part][-1] += piece
    return {part: [text.decode(errors="replace") for text in own] for part, own in texts.items()}


def main():
    texts = documents()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts["train"], VOCABULARY, min_frequency=2, special_tokens=["<|endoftext|>"]
    )
    between = tokenizer.token_to_id("<|endoftext|>")
    meta = {"tokenizer": f"bpe-{VOCABULARY}", "vocab_size": VOCABULARY, "source": "stdlib"}
    meta["sha256"] = {}
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as half:
        for part, own in texts.items():
            tokens = []
            for encoded in tokenizer.encode_batch(own):
                tokens += [between, *encoded.ids]
            data = np.array(tokens[1:], "<u2").tobytes()
            Path(half, f"{part}.bin").write_bytes(data)
            meta[f"{part}_tokens"] = len(tokens) - 1
            meta["sha256"][part] = hashlib.sha256(data).hexdigest()
        Path(half, "meta.json").write_text(json.dumps(meta, indent=1))
        Path(half).rename(FOLDER)
        Path(half).mkdir()  # what the context manager removes
    print(json.dumps(meta, indent=1))


if __name__ == "__main__":
    main()
