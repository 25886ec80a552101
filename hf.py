"""The folder hf of a run of train_gpt.py, which transformers opens with AutoModelForCausalLM and
AutoTokenizer."""

import itertools

import safetensors.torch

import common
import llama


def write(folder, weights, c, vocab, codec):
    """Writes the folder. weights: {name: tensor} on the CPU. vocab: the rows of the embedding."""
    between = codec.between if codec.kind == "gpt2" else None
    files = {"config.json": llama.hugging_face_config(c, vocab, between)}
    files["generation_config.json"] = {"bos_token_id": between, "eos_token_id": between}
    files |= tokenizer_files(codec, c.context)
    for name, content in files.items():
        common.write_json(folder / name, content)
    weights = {name: w.contiguous() for name, w in weights.items()}
    content = safetensors.torch.save(weights, {"format": "pt"})
    common.write_atomically(folder / "model.safetensors", lambda f: f.write(content))


def tokenizer_files(codec, context):
    """Returns {file name: content} of a byte-level BPE for AutoTokenizer. Bytes have no merges."""
    if codec.kind not in ("bytes", "gpt2"):
        return {}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    ranks = {bytes([i]): i for i in range(256)}
    added = []
    if codec.kind == "gpt2":
        end = "<|endoftext|>"
        about |= {"bos_token": end, "eos_token": end}
        ranks = codec.bpe._mergeable_ranks
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": codec.between, "content": end, "special": True} | flags]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    level["use_regex"] = codec.kind == "gpt2"
    vocab = {printable(token): i for token, i in ranks.items()}
    merges = [" ".join(map(printable, halves(token, ranks))) for token in ranks if len(token) > 1]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    tokenizer = {"version": "1.0", "added_tokens": added, "model": model}
    tokenizer |= {"pre_tokenizer": level, "decoder": level}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": about}


# GPT-2's vocabulary file writes each byte as a letter: itself if visible, or one from 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [i for i in range(256) if i not in VISIBLE]
LETTERS = {i: chr(i) for i in VISIBLE} | {i: chr(n) for n, i in enumerate(HIDDEN, 256)}


def printable(token):
    return "".join(LETTERS[byte] for byte in token)


def halves(token, ranks):
    """Returns the two tokens whose merge is this token. Merges of lower rank are made first."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
