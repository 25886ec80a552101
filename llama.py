"""The model of train_gpt.py: a Llama with the names and the arithmetic of Hugging Face's
LlamaForCausalLM, with embeddings of its own for input and output."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Normalise(torch.autograd.Function):
    """Computes the RMS norm of x (..., width) without gains. On a CPU this takes half as many
    passes over x as torch's own. The scale is an output, so that second derivatives see it."""

    @staticmethod
    def forward(ctx, x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (size.square() / x.shape[-1] + 1e-6).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.set_materialize_grads(False)
        return y, scale

    @staticmethod
    def backward(ctx, grad, grad_scale):
        y, scale = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        if grad_scale is not None:  # only in a second derivative
            along = along + grad_scale * scale / y.shape[-1]
        return torch.addcmul(grad, y, along, value=-1).mul_(scale)


class Rotate(torch.autograd.Function):
    """Embeds positions by rotation in x (batch, time, heads, size). The two halves of a head are
    the pairs, as in Hugging Face's Llama. cos and sin: (time, 1, size), sin's first half negative.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def turn(x, cos, sin):
    halves_swapped = x.float().roll(x.shape[-1] // 2, dims=-1)
    return halves_swapped.mul_(sin).addcmul_(x.float(), cos).to(x.dtype)  # in place: one buffer


def normalise(x):
    return Normalise.apply(x)[0]


def project(x, norm, *layers):
    """Computes several linear layers as one. The gains of the norm before the layers multiply the
    weights and not x, since the weights are fewer numbers."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]) * norm.weight)


def linears(**sizes):
    return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        d = c.width
        self.input_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.self_attn = linears(q_proj=(d, d), k_proj=(d, d), v_proj=(d, d), o_proj=(d, d))
        self.post_attention_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.mlp = linears(gate_proj=(d, c.ffn), up_proj=(d, c.ffn), down_proj=(c.ffn, d))

    def forward(self, x, cos, sin):  # x: (batch, time, width)
        x = x + self.attend(normalise(x), cos, sin)
        h = normalise(x)
        norm = self.post_attention_layernorm
        mlp = self.mlp
        gate, up = project(h, norm, mlp.gate_proj), project(h, norm, mlp.up_proj)
        return x + mlp.down_proj(F.silu(gate) * up)

    def attend(self, h, cos, sin):
        layer = self.self_attn
        norm = self.input_layernorm
        qk = project(h, norm, layer.q_proj, layer.k_proj).unflatten(-1, (2 * self.heads, -1))
        q, k = Rotate.apply(qk, cos, sin).transpose(1, 2).chunk(2, dim=1)  # (b, heads, t, size)
        v = project(h, norm, layer.v_proj).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return layer.o_proj(mixed.transpose(1, 2).flatten(-2))


class Llama(nn.Module):
    """c needs layers, width, heads, ffn, context and dtype; vocab is the number of tokens."""

    def __init__(self, c, vocab):
        super().__init__()
        self.dtype = getattr(torch, c.dtype)
        blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        embed = nn.Embedding(vocab, c.width)
        norm = nn.RMSNorm(c.width, eps=1e-6)
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": blocks, "norm": norm})
        self.lm_head = nn.Linear(c.width, vocab, bias=False)
        self.loss = head_loss
        half = c.width // c.heads // 2
        angles = torch.outer(torch.arange(c.context), 10000.0 ** (-torch.arange(half) / half))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1), persistent=False)
        for name, p in self.named_parameters():  # what writes to the residual stream starts smaller
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.layers) if writes else 0.02)

    def forward(self, tokens, targets=None):
        """Returns the logits (batch, time, vocab) of tokens (batch, time). With targets
        (batch, time) it returns the mean cross entropy."""
        with torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.model.embed_tokens(tokens)
            cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
            for block in self.model.layers:
                x = block(x, cos, sin)
            x = normalise(x) * self.model.norm.weight
            if targets is None:
                return self.lm_head(x).float()
            return self.loss(self.lm_head.weight, x, targets)


def head_loss(weight, x, targets):
    """Returns the mean cross entropy. weight: (vocab, width), x: (batch, time, width)."""
    logits = F.linear(x, weight).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten())


def compile_blocks(model):
    """Compiles block by block. Blocks are alike, so one compilation serves all of them."""
    model.loss = torch.compile(head_loss, dynamic=False)
    for block in model.model.layers:
        block.compile(dynamic=False)


@torch.no_grad()
def generate(model, c, tokens, vocab, generator):
    """Returns the list of tokens with c.tokens more. The model sees the last --context of them."""
    for _ in range(c.tokens):
        window = torch.tensor([tokens[-c.context :]], device=c.device)
        logits = model(window)[0, -1, :vocab].cpu().double()
        likely = logits.topk(min(c.top_k if c.temperature else 1, vocab))
        chances = ((likely.values - likely.values[0]) / (c.temperature or 1)).softmax(-1)
        choice = torch.multinomial(chances, 1, generator=generator)
        tokens = tokens + likely.indices[choice].tolist()
    return tokens


def flops_per_token(model, c):
    """Returns the operations that a training step takes for each token (PaLM, appendix B)."""
    embedding = model.model.embed_tokens.weight.numel()
    matrices = sum(p.numel() for p in model.parameters()) - embedding
    return 6 * matrices + 12 * c.layers * c.width * c.context


def memory(model, c, shards=1):
    """Estimates the bytes that training takes on one device. The estimate was not measured.

    Weights, gradients, two moments and the copy that IRE's step makes are float32. IRE's mask takes
    one byte. SoftIRE's factor takes three more, which are not counted. `shards` devices share all
    of these. A micro-batch keeps its logits in three forms, and for each token and layer about 9
    activations of the width and 4 of the feed-forward.
    """
    parameters = sum(p.numel() for p in model.parameters())
    size = 4 if c.dtype == "float32" else 2
    tokens = c.micro_batch * c.context
    activations = tokens * c.layers * (9 * c.width + 4 * c.ffn) * size
    logits = tokens * model.lm_head.out_features * (size + 8)
    return 21 * parameters / shards + activations + logits


def hugging_face_config(c, vocab, between):
    """Returns config.json for transformers. What is missing (rope_theta 10000, rms_norm_eps 1e-6,
    untied embeddings) is the default there. between: the token between documents, or None."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": vocab,
        "hidden_size": c.width,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "max_position_embeddings": c.context,
        "bos_token_id": between,
        "eos_token_id": between,
    }
