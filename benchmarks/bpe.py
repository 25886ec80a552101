"""A byte-pair vocabulary of 4,096 tokens for Python's library, as a folder for train_gpt.py.

    pip install tokenizers
    python benchmarks/bpe.py            # data/bpe-4096 with train.bin, val.bin, meta.json

The tokenizer is trained on the training part of the text alone. A step of a language model with
such a vocabulary sees most tokens rarely, as in real language models; bytes have no rare tokens.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common
import text
import train_gpt

VOCABULARY = 4096
FOLDER = ROOT / "data" / f"bpe-{VOCABULARY}"


def documents():
    """The library's files as {"train": [text], "val": [text]}, split as train_gpt.py splits."""
    c = train_gpt.Config(out=str(ROOT / "runs" / "none"), data_dir=str(ROOT / "data"))
    texts = {"train": [], "val": []}
    for part, piece, begins in text.from_files(text.text_files(c)):
        if begins:
            texts[part].append(b"")
        texts[part][-1] += piece
    return {part: [own.decode(errors="replace") for own in all_] for part, all_ in texts.items()}


def main():
    from tokenizers import ByteLevelBPETokenizer

    if FOLDER.exists():
        sys.exit(f"{FOLDER} is there; remove it to make it anew")
    texts = documents()
    tokenizer = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    tokenizer.train_from_iterator(texts["train"], VOCABULARY, min_frequency=2, special_tokens=[end])
    between = tokenizer.token_to_id(end)
    half = FOLDER.with_name(f".{FOLDER.name}")
    shutil.rmtree(half, ignore_errors=True)
    meta = {"tokenizer": FOLDER.name, "vocab_size": VOCABULARY, "source": "stdlib"}
    for part, own in texts.items():
        tokens = []
        for encoded in tokenizer.encode_batch(own):
            tokens += [between, *encoded.ids]
        data = np.array(tokens[1:], "<u2")
        common.write_atomically(half / f"{part}.bin", data.tofile)
        meta[f"{part}_tokens"] = len(data)
    common.write_json(half / "meta.json", meta)
    half.rename(FOLDER)
    print(f"{FOLDER}: {meta['train_tokens']:,} and {meta['val_tokens']:,} tokens")


if __name__ == "__main__":
    main()
