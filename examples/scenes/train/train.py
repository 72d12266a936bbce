#!/usr/bin/env python3
"""Trains the scenes model: a small LLaVA (CLIP-style ViT, projector, LLaMA) that answers questions
about pictures of coloured digits.

  train.py vit       the ViT alone, with labels for every patch
  train.py decoder   projector and decoder on the answers (--vit-lr: the ViT goes on learning too)
  train.py evaluate  accuracy of the exported weights on pictures drawn with unseen (t10k) digits
  train.py export    the checkpoint as model.safetensors (also done at every checkpoint)
  train.py parity    reference values of the exported weights, to compare another program with

Pictures, questions and labels come from the program draw_scenes. Needs PyTorch >= 1.13 and numpy.
A stage goes on from its checkpoint in --work; without one it starts from the weights in --model
(or from nothing with --fresh). The learning rate follows the clock: --minutes is the stage's length.
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a process is fastest for matrices this small
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = ["colour", "digit", "place", "count", "list"]

# ------------------------------------------------------------------------------------- the model
SIDE, PATCH, GRID = 96, 8, 12            # pixels, pixels, patches
PATCHES = GRID * GRID                    # 144
WIDTH, HEADS, HEAD = 128, 4, 32          # both the ViT and the decoder
VIT_LAYERS, VIT_MLP = 6, 384
LAYERS, MLP, VOCAB = 8, 352, 53
EPS, THETA = 1e-5, 10000.0
BEFORE = [1, 4, 6]                       # <s> user :
PREFIX = len(BEFORE) + PATCHES           # 147 tokens stand before the question
VIT = "vision_tower.vision_model."
LM = "language_model.model."
PROJECTOR = "multi_modal_projector."

# Linear heads that teach the ViT; they are no part of the exported model.
PATCH_HEADS = {"digit": 11, "colour": 9, "quadrant": 4, "rank": 6, "count": 6, "centre": 1, "offset": 2}
CLASS_HEADS = {"digits": 10, "colours": 8, "count": 6}


def initial_weights(seed):
    """Every weight by its name in the safetensors file (the ViT's training heads begin with "head.")."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda std, *shape: torch.randn(*shape, generator=random) * std
    p = {}

    def linear(name, out, inp, std=None, bias=True):
        p[name + ".weight"] = normal(std or 0.6 / math.sqrt(inp), out, inp)
        if bias:
            p[name + ".bias"] = torch.zeros(out)

    def norm(name, bias=True):
        p[name + ".weight"] = torch.ones(WIDTH)
        if bias:
            p[name + ".bias"] = torch.zeros(WIDTH)

    p[VIT + "embeddings.class_embedding"] = normal(0.5, WIDTH)
    p[VIT + "embeddings.patch_embedding.weight"] = normal(1 / math.sqrt(3 * PATCH * PATCH), WIDTH, 3, PATCH, PATCH)
    p[VIT + "embeddings.position_embedding.weight"] = normal(0.3, PATCHES + 1, WIDTH)
    norm(VIT + "pre_layrnorm")
    for i in range(VIT_LAYERS):
        layer = f"{VIT}encoder.layers.{i}."
        for name in "qkv":
            linear(f"{layer}self_attn.{name}_proj", WIDTH, WIDTH)
        linear(layer + "self_attn.out_proj", WIDTH, WIDTH, 0.6 / math.sqrt(WIDTH * 2 * VIT_LAYERS))
        norm(layer + "layer_norm1")
        norm(layer + "layer_norm2")
        linear(layer + "mlp.fc1", VIT_MLP, WIDTH)
        linear(layer + "mlp.fc2", WIDTH, VIT_MLP, 0.6 / math.sqrt(VIT_MLP * 2 * VIT_LAYERS))
    norm(VIT + "post_layernorm")
    linear(PROJECTOR + "linear_1", WIDTH, WIDTH, 0.1 / math.sqrt(WIDTH))  # a trained ViT's features are about 7
    linear(PROJECTOR + "linear_2", WIDTH, WIDTH)
    p[LM + "embed_tokens.weight"] = normal(0.5, VOCAB, WIDTH)
    for i in range(LAYERS):
        layer = f"{LM}layers.{i}."
        norm(layer + "input_layernorm", False)
        norm(layer + "post_attention_layernorm", False)
        for name in "qkv":
            linear(f"{layer}self_attn.{name}_proj", WIDTH, WIDTH, bias=False)
        linear(layer + "self_attn.o_proj", WIDTH, WIDTH, 0.6 / math.sqrt(WIDTH * 2 * LAYERS), False)
        linear(layer + "mlp.gate_proj", MLP, WIDTH, bias=False)
        linear(layer + "mlp.up_proj", MLP, WIDTH, bias=False)
        linear(layer + "mlp.down_proj", WIDTH, MLP, 0.6 / math.sqrt(MLP * 2 * LAYERS), False)
    norm(LM + "norm", False)
    linear("language_model.lm_head", VOCAB, WIDTH, 0.02, False)
    for name, size in PATCH_HEADS.items():
        linear("head.patch." + name, size, WIDTH, 0.02)
    for name, size in CLASS_HEADS.items():
        linear("head.class." + name, size, WIDTH, 0.02)
    return p


def matmul(x, weight, bias=None):
    """x @ weight.T + bias in x's type; the weights stay in float32."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def heads(x):  # [B, S, 128] -> [B * 4, S, 32], contiguous: batched products are 10 x faster so
    return x.view(x.shape[0], x.shape[1], HEADS, HEAD).transpose(1, 2).contiguous().view(-1, x.shape[1], HEAD)


def unheads(x):  # [B * 4, S, 32] -> [B, S, 128]
    return x.view(-1, HEADS, x.shape[1], HEAD).transpose(1, 2).reshape(-1, x.shape[1], WIDTH)


def attend(q, k, v, mask=None):
    """q already carries 1 / sqrt(32)."""
    scores = torch.bmm(q, k.transpose(1, 2)) if mask is None else torch.baddbmm(mask, q, k.transpose(1, 2))
    return torch.bmm(F.softmax(scores, -1), v)


def vision(p, pixels, dtype, whole=False):
    """pixels: [B, 96, 96, 3] bytes -> features [B, 144, 128] of all layers but the last (float32); whole: also
    the class token after the last layer and post_layernorm [B, 128], which only the ViT's training uses."""
    batch = pixels.shape[0]
    x = pixels.to(torch.float32) / 127.5 - 1
    x = x.view(batch, GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 3, 5, 2, 4).reshape(batch, PATCHES, 3 * PATCH * PATCH)
    x = matmul(x.to(dtype), p[VIT + "embeddings.patch_embedding.weight"].view(WIDTH, -1)).float()
    x = torch.cat([p[VIT + "embeddings.class_embedding"].expand(batch, 1, WIDTH), x], 1)
    x = x + p[VIT + "embeddings.position_embedding.weight"]
    norm = lambda x, name: F.layer_norm(x, (WIDTH,), p[name + ".weight"], p[name + ".bias"], EPS)
    x = norm(x, VIT + "pre_layrnorm")
    features = None
    for i in range(VIT_LAYERS if whole else VIT_LAYERS - 1):
        layer = f"{VIT}encoder.layers.{i}."
        last = i == VIT_LAYERS - 1
        if last:
            features = x[:, 1:]
        y = norm(x, layer + "layer_norm1").to(dtype)
        project = lambda name, y: matmul(y, p[f"{layer}self_attn.{name}.weight"], p[f"{layer}self_attn.{name}.bias"])
        if last:  # nothing but the class token is wanted from here
            x = x[:, :1]
        q = heads(project("q_proj", y[:, :1] if last else y) * HEAD ** -0.5)
        y = attend(q, heads(project("k_proj", y)), heads(project("v_proj", y)))
        x = x + project("out_proj", unheads(y))
        y = norm(x, layer + "layer_norm2").to(dtype)
        y = matmul(y, p[layer + "mlp.fc1.weight"], p[layer + "mlp.fc1.bias"])
        y = y * torch.sigmoid(1.702 * y)  # quick_gelu
        x = x + matmul(y, p[layer + "mlp.fc2.weight"], p[layer + "mlp.fc2.bias"])
    return (features, norm(x[:, 0], VIT + "post_layernorm")) if whole else x[:, 1:]


def projector(p, features, dtype):
    x = matmul(features.to(dtype), p[PROJECTOR + "linear_1.weight"], p[PROJECTOR + "linear_1.bias"])
    return matmul(F.gelu(x), p[PROJECTOR + "linear_2.weight"], p[PROJECTOR + "linear_2.bias"]).float()


class RmsNorm(torch.autograd.Function):
    """By hand, for it takes half the passes over the memory that autograd takes."""

    @staticmethod
    def forward(context, x, weight, dtype):
        scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).pow_(2).div_(WIDTH).add_(EPS))
        x = x * scale
        context.save_for_backward(x, scale, weight)
        return (x * weight).to(dtype)

    @staticmethod
    def backward(context, grad):
        x, scale, weight = context.saved_tensors
        grad = grad.float()
        along = grad * x
        mean = (along @ weight).div_(-WIDTH)[..., None]
        return (grad * weight).addcmul_(x, mean).mul_(scale), along.sum((0, 1)), None


def rotary(positions):
    """cos and sin [..., S, 128] of positions [..., S], the same for every head; rotate-half layout."""
    angle = positions.float()[..., None] * THETA ** (-torch.arange(0, HEAD, 2).float() / HEAD)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos] * HEADS, -1), torch.cat([-sin, sin] * HEADS, -1)


def decoder(p, visual, tokens, positions, own, dtype):
    """Logits [B, L, 53] of question and answer tokens behind a picture.

    visual [B, 144, 128]; tokens, positions [B, L]: the turns of the picture, one behind the other;
    own [B, L, L]: true where a token may see a token of its own turn. Every token sees the whole prefix
    (three tokens and the picture), so each turn is computed as if it were the picture's only one."""
    batch, length = tokens.shape
    embed = p[LM + "embed_tokens.weight"]
    x = torch.cat([embed[BEFORE].expand(batch, -1, -1), visual, F.embedding(tokens, embed)], 1)
    cos, sin = rotary(torch.cat([torch.arange(PREFIX).expand(batch, -1), positions], 1))
    cos, sin = cos.to(dtype), sin.to(dtype)
    forbid = lambda allowed: torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9).to(dtype)
    causal = forbid(torch.ones(PREFIX, PREFIX, dtype=torch.bool).tril())
    see = torch.cat([torch.ones(batch, length, PREFIX, dtype=torch.bool), own], 2)
    see = forbid(see)[:, None].expand(-1, HEADS, -1, -1).reshape(batch * HEADS, length, PREFIX + length)

    def norm(x, name):
        return RmsNorm.apply(x, p[name], dtype)

    def rope(x, cos, sin):
        turned = x.view(*x.shape[:2], HEADS, 2, HEAD // 2).flip(3).view_as(x)
        return heads(x * cos + turned * sin)

    for i in range(LAYERS):
        layer = f"{LM}layers.{i}."
        last = i == LAYERS - 1  # the prefix is wanted no further than its last keys and values
        y = norm(x, layer + "input_layernorm.weight")
        project = lambda name, y: matmul(y, p[f"{layer}self_attn.{name}.weight"])
        start = PREFIX if last else 0
        x = x[:, start:]
        q = rope(project("q_proj", y[:, start:]) * HEAD ** -0.5, cos[:, start:], sin[:, start:])
        k, v = rope(project("k_proj", y), cos, sin), heads(project("v_proj", y))
        y = attend(q[:, PREFIX - start:], k, v, see)
        if not last:
            y = torch.cat([attend(q[:, :PREFIX], k[:, :PREFIX], v[:, :PREFIX], causal), y], 1)
        x = x + project("o_proj", unheads(y))
        y = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = matmul(y, p[layer + "mlp.gate_proj.weight"]), matmul(y, p[layer + "mlp.up_proj.weight"])
        y = gate * torch.sigmoid(gate) * up  # F.silu is 3 x slower on bfloat16
        x = x + matmul(y, p[layer + "mlp.down_proj.weight"])
    return matmul(norm(x, LM + "norm.weight"), p["language_model.lm_head.weight"]).float()


# -------------------------------------------------------------------------------------- the data
class Scenes:
    """Endless pictures with questions from draw_scenes."""

    def __init__(self, args, part, seed, low, high, turns):
        vocabulary = os.path.join(args.model, "vocab.txt")
        command = [args.draw_scenes, args.mnist, part, vocabulary, seed, low, high, turns]
        self.turns = turns
        self.bytes = SIDE * SIDE * 4 + 24 + turns * 36
        self.process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, bufsize=1 << 20)

    def next(self, count):
        data = self.process.stdout.read(count * self.bytes)
        if len(data) != count * self.bytes:
            sys.exit("draw_scenes gave no more pictures")
        parts = np.split(np.frombuffer(data, np.uint8).reshape(count, -1), np.cumsum([SIDE * SIDE * 3, SIDE * SIDE, 24]), 1)
        return (torch.from_numpy(parts[0].reshape(count, SIDE, SIDE, 3).copy()), parts[1].reshape(count, SIDE, SIDE),
                parts[2].reshape(count, 6, 4).astype(np.int64), parts[3].reshape(count, self.turns, 36))

    def close(self):
        self.process.kill()
        self.process.wait()


def patch_labels(owner, digits):
    """What each patch [B, 144] shows. A patch belongs to the digit with most ink in it, if that is 5 of its
    64 pixels or more, and the patch with a digit's centre always belongs to that digit."""
    batch = owner.shape[0]
    tiles = owner.reshape(batch, GRID, PATCH, GRID, PATCH).transpose(0, 1, 3, 2, 4).reshape(batch, PATCHES, -1)
    ink = np.stack([(tiles == i + 1).sum(-1) for i in range(6)], -1)  # [B, 144, 6]
    who = np.where(ink.max(-1) >= 5, ink.argmax(-1), -1)
    real = digits[..., 0] < 255
    b, d = np.nonzero(real)
    x, y = digits[b, d, 2], digits[b, d, 3]
    centre = np.zeros((batch, PATCHES), bool)
    centre[b, y // PATCH * GRID + x // PATCH] = True
    who[b, y // PATCH * GRID + x // PATCH] = d
    own = who >= 0
    of = lambda values: np.take_along_axis(values, np.maximum(who, 0), 1)
    rank = (digits[:, None, :, 2] < digits[:, :, None, 2]).sum(-1)  # digits further left
    quadrant = (digits[..., 3] >= SIDE // 2) * 2 + (digits[..., 2] >= SIDE // 2)
    at = np.arange(PATCHES)
    offset = np.stack([of(digits[..., 2]) - (at % GRID * PATCH + 4), of(digits[..., 3]) - (at // GRID * PATCH + 4)], -1)
    count = np.repeat(real.sum(1)[:, None] - 1, PATCHES, 1)
    labels = {"digit": np.where(own, of(digits[..., 0]), 10), "colour": np.where(own, of(digits[..., 1]), 8),
              "quadrant": of(quadrant), "rank": of(rank), "count": count, "centre": centre, "own": own,
              "offset": (offset / 8).astype(np.float32)}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in labels.items()}


def pack_turns(turns):
    """turns [B, T, 36] -> the picture's different turns, one behind the other, as decoder() wants them.

    target [B, L]: the token to say next where an answer is due, else -100; turn [B, L]: which turn, else -1."""
    batch, count, _ = turns.shape
    same = (turns[:, :, None] == turns[:, None]).all(-1)  # [B, T, T]
    fresh = ~(same & np.tri(count, k=-1, dtype=bool)).any(-1)
    question, answer = turns[..., 1].astype(np.int64), turns[..., 2].astype(np.int64)
    inputs = np.where(fresh, question + answer - 1, 0)  # </s> is said, never read
    start = np.cumsum(inputs, 1) - inputs
    length = int(inputs.sum(1).max())
    b, t, i = np.nonzero(np.arange(32) < inputs[..., None])
    at = start[b, t] + i
    tokens, positions = np.full((batch, length), 3, np.int64), np.full((batch, length), PREFIX, np.int64)
    target, turn = np.full((batch, length), -100, np.int64), np.full((batch, length), -1, np.int64)
    tokens[b, at] = turns[b, t, 4 + i]
    positions[b, at] = PREFIX + i
    turn[b, at] = t
    due = i >= question[b, t] - 1
    target[b[due], at[due]] = turns[b[due], t[due], 5 + i[due]]
    own = (turn[:, :, None] == turn[:, None]) & np.tri(length, dtype=bool)
    return [torch.from_numpy(a) for a in (tokens, positions, own, target, turn)]


# ------------------------------------------------------------------------------------ the losses
def patch_loss(p, features, image, owner, digits):
    """The ViT's own loss: from its features [B, 144, 128] and its class token [B, 128]."""
    labels = patch_labels(owner, digits)
    head = lambda x, where, name: matmul(x, p[f"head.{where}.{name}.weight"], p[f"head.{where}.{name}.bias"])
    own, centre = labels["own"].float(), labels["centre"].float()
    # The patch at a digit's centre counts most: there the decoder will find all about the digit.
    everywhere = 0.2 + 0.8 * own + 3 * centre
    inside = own + 3 * centre
    said, loss = {}, 0
    for name, weight, scale in (("digit", everywhere, 1), ("colour", everywhere, 0.3), ("quadrant", inside, 0.3),
                                ("rank", inside, 0.5), ("count", torch.ones_like(own), 0.5)):
        said[name] = head(features, "patch", name)
        nll = F.cross_entropy(said[name].flatten(0, 1), labels[name].flatten(), reduction="none").view_as(own)
        loss = loss + scale * (nll * weight).sum() / weight.sum()
    flag = head(features, "patch", "centre")[..., 0]
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(flag, centre, weight=1 + 5 * centre)
    miss = F.smooth_l1_loss(head(features, "patch", "offset"), labels["offset"], reduction="none").mean(-1)
    loss = loss + 0.5 * (miss * own).sum() / own.sum()
    # The class token: which digits and colours there are, and how many.
    real = digits[..., 0] < 255
    b, d = np.nonzero(real)
    for name, column, classes in (("digits", 0, 10), ("colours", 1, 8)):
        present = torch.zeros(len(digits), classes)
        present[b, digits[b, d, column]] = 1
        loss = loss + 0.3 * F.binary_cross_entropy_with_logits(head(image, "class", name), present)
    loss = loss + 0.1 * F.cross_entropy(head(image, "class", "count"), torch.from_numpy(real.sum(1) - 1))
    with torch.no_grad():
        at = labels["centre"]
        right = {n: (said[n].argmax(-1) == labels[n])[at] for n in ("digit", "colour", "quadrant", "rank")}
        right["count"] = said["count"].mean(1).argmax(-1) == labels["count"][:, 0]
        right["centre"] = ((flag > 0) == at).all(1)  # every patch of the picture right
        present = torch.zeros(len(digits), 10)
        present[b, digits[b, d, 0]] = 1
        right["class"] = (head(image, "class", "digits") > 0) == (present > 0)
    return loss, right


def answer_loss(p, features, turns, dtype, weights=None):
    """Also how often the whole answer is right: if every token is the most likely one behind the right ones
    before it, then the model, answering word by word, says just this answer."""
    tokens, positions, own, target, turn = pack_turns(turns)
    logits = decoder(p, projector(p, features, dtype), tokens, positions, own, dtype)
    due = target >= 0
    b = due.nonzero()[:, 0]
    logits, target, turn = logits[due], target[due], turn[due]
    kind = torch.from_numpy(turns[..., 0].astype(np.int64))[b, turn]
    nll = F.cross_entropy(logits, target, reduction="none")
    weight = torch.tensor(weights or [1.0] * 5)[kind]
    wrong = torch.zeros(turns.shape[:2]).index_put_((b, turn), (logits.argmax(-1) != target).float(), accumulate=True)
    asked = torch.zeros(turns.shape[:2]).index_put_((b, turn), torch.ones(len(b)), accumulate=True) > 0
    kinds = torch.from_numpy(turns[..., 0].astype(np.int64))
    right = {name: (wrong == 0)[asked & (kinds == i)] for i, name in enumerate(KINDS)}
    return (nll * weight).sum() / weight.sum(), right


# ------------------------------------------------------------------------------------- optimiser
class Optimiser:
    """Muon (momentum, made orthogonal by Newton-Schulz steps) for the matrices inside the layers, AdamW for the rest.

    vit_scale: the ViT's learning rates are this much of the others'."""

    def __init__(self, p, muon, lr, muon_lr, vit_scale=1.0):
        inside = lambda n, w: muon and w.dim() == 2 and ".layers." in n
        self.p, self.lr, self.muon_lr, self.step_count = p, lr, muon_lr, 0
        self.scale = {n: vit_scale if n.startswith(VIT) else 1.0 for n in p}
        self.groups = {}  # Muon handles all matrices of one shape in one batched product
        for n, w in p.items():
            if inside(n, w):
                self.groups.setdefault(tuple(w.shape), []).append(n)
        self.adam = [n for n, w in p.items() if not inside(n, w)]
        self.state = {n: [torch.zeros_like(w), torch.zeros_like(w)] if n in self.adam else [torch.zeros_like(w)]
                      for n, w in p.items()}

    @torch.no_grad()
    def step(self, factor):
        self.step_count += 1
        for n in self.adam:
            w, (m, v) = self.p[n], self.state[n]
            m.mul_(0.9).add_(w.grad, alpha=0.1)
            v.mul_(0.98).addcmul_(w.grad, w.grad, value=0.02)
            lr = self.lr * factor * self.scale[n]
            if w.dim() > 1:
                w.mul_(1 - 0.01 * lr)
            up = (v / (1 - 0.98 ** self.step_count)).sqrt_().add_(1e-8)
            w.addcdiv_(m, up, value=-lr / (1 - 0.9 ** self.step_count))
        for shape, names in self.groups.items():
            g = torch.stack([self.p[n].grad for n in names])
            m = torch.stack([self.state[n][0] for n in names])
            m.mul_(0.95).add_(g)
            for n, value in zip(names, m):
                self.state[n][0].copy_(value)
            x = g.add_(m, alpha=0.95)  # Nesterov
            tall = shape[0] > shape[1]
            x = x.transpose(1, 2) if tall else x
            x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16().contiguous()
            for _ in range(5):
                a = torch.bmm(x, x.transpose(1, 2))
                x = 3.4445 * x + torch.bmm(-4.7750 * a + 2.0315 * torch.bmm(a, a), x)
            x = (x.transpose(1, 2) if tall else x).float() * max(1, shape[0] / shape[1]) ** 0.5
            for n, update in zip(names, x):
                lr = self.muon_lr * factor * self.scale[n]
                self.p[n].mul_(1 - 0.02 * lr).add_(update, alpha=-lr)


# ---------------------------------------------------------------------------------------- files
def write_atomically(path, write):
    write(path + ".part")
    os.replace(path + ".part", path)


def save_safetensors(path, p):
    """8 bytes length of the header, the header (JSON), the values (F16), all little-endian."""
    header, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name in sorted(n for n in p if not n.startswith("head.")):
        data = p[name].detach().numpy().astype("<f2")
        header[name] = {"dtype": "F16", "shape": list(data.shape), "data_offsets": [at, at + data.nbytes]}
        parts.append(data.tobytes())
        at += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(path):
        with open(path, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text + b"".join(parts))

    write_atomically(path, write)


def load_safetensors(path):
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    header, p = json.loads(data[8:start]), {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (start + o for o in entry["data_offsets"])
            p[name] = torch.from_numpy(np.frombuffer(data[begin:end], "<f2").astype(np.float32).reshape(entry["shape"]))
    return p


def save_config(folder):
    text = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": MLP,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD,
            "hidden_act": "silu", "rms_norm_eps": EPS, "rope_theta": THETA, "max_position_embeddings": 1024,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "attention_bias": False, "tie_word_embeddings": False}
    eyes = {"model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": VIT_MLP,
            "num_hidden_layers": VIT_LAYERS, "num_attention_heads": HEADS, "num_channels": 3, "image_size": SIDE,
            "patch_size": PATCH, "hidden_act": "quick_gelu", "layer_norm_eps": EPS}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text,
              "vision_config": eyes, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
              "vision_feature_select_strategy": "default", "image_seq_length": PATCHES, "torch_dtype": "float16",
              "tie_word_embeddings": False}
    pictures = {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": False,
                "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3, "size": {"height": SIDE, "width": SIDE}}
    for name, content in (("config.json", config), ("preprocessor_config.json", pictures)):
        def write(path):
            with open(path, "w") as out:
                out.write(json.dumps(content, indent=2) + "\n")
        write_atomically(os.path.join(folder, name), write)


# ---------------------------------------------------------------------------------------- stages
def evaluate(args, p, stage, pictures, dtype, seed=2):
    """What was right on pictures of 2 to 6 digits that were never trained on. "vit": the digit at a digit's centre."""
    scenes, all_right, chunk = Scenes(args, "t10k", seed, 2, 6, 10), {}, 32
    with torch.no_grad():
        for _ in range(-(-pictures // chunk)):
            pixels, owner, digits, turns = scenes.next(chunk)
            features, image = vision(p, pixels, dtype, whole=True)
            right = answer_loss(p, features, turns, dtype)[1] if stage != "vit" else {}
            if stage != "evaluate":  # the exported model has no training heads
                seen = patch_loss(p, features, image, owner, digits)[1]
                right.update(seen if stage == "vit" else {"vit": seen["digit"]})
            for name, value in right.items():
                all_right.setdefault(name, []).append(value.flatten().float())
    scenes.close()
    return {name: torch.cat(values) for name, values in all_right.items()}


def show(right):
    return " ".join(f"{name} {100 * float(value):.1f}" for name, value in right.items())


def start_weights(args):
    p = initial_weights(args.seed)
    path = os.path.join(args.model, "model.safetensors")
    if not args.fresh and os.path.exists(path):
        p.update(load_safetensors(path))
    return p


def train(rank, args):
    torch.set_num_threads(1)
    if args.processes > 1:
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{args.port}", rank=rank,
                                             world_size=args.processes)
    dtype = torch.float32 if args.float32 else torch.bfloat16
    checkpoint = os.path.join(args.work, args.stage + ".pt")
    saved = torch.load(checkpoint) if os.path.exists(checkpoint) and not args.fresh else None
    if saved:
        p = saved["p"]
    else:
        p = start_weights(args)
        vit = os.path.join(args.work, "vit.pt")  # the training heads are only there
        if args.stage == "decoder" and os.path.exists(vit):
            p.update({n: w for n, w in torch.load(vit)["p"].items() if n.startswith((VIT, "head."))})
    vit_learns = args.stage == "vit" or args.vit_lr > 0
    parts = ((VIT, "head.") if vit_learns else ()) + (("language_model.", PROJECTOR) if args.stage == "decoder" else ())
    learn = {name: w.requires_grad_() for name, w in p.items() if name.startswith(parts)}
    optimiser = Optimiser(learn, not args.adam, args.lr, args.muon_lr, args.vit_lr if args.stage == "decoder" else 1.0)
    step, seconds, level, smooth = 0, 0.0, 0, {}
    if saved:
        step, seconds, level = saved["step"], saved["seconds"], saved["level"]
        optimiser.step_count = saved["steps_of_optimiser"]
        for name in learn:
            if name in saved["state"]:
                optimiser.state[name] = saved["state"][name]

    def say(text):
        if rank == 0:
            line = f"{time.strftime('%H:%M:%S', time.gmtime())} {args.stage} {step} {text}"
            print(line, flush=True)
            with open(args.log, "a") as log:
                log.write(line + "\n")

    def save():
        if rank == 0:
            state = {"p": {n: w.detach() for n, w in p.items()}, "state": optimiser.state, "step": step, "level": level,
                     "seconds": seconds, "steps_of_optimiser": optimiser.step_count}
            write_atomically(checkpoint, lambda path: torch.save(state, path))
            if not args.no_export:
                save_safetensors(os.path.join(args.model, "model.safetensors"), p)

    # Curriculum of the decoder: with six digits from the start it would learn nothing but to count.
    levels = [(1, 6)] if args.stage == "vit" else [(1, 2), (1, 4), (1, 6)]
    level = min(level, len(levels) - 1)
    turns = 0 if args.stage == "vit" else args.turns
    extra = args.vit_pictures if args.stage == "decoder" and vit_learns else 0
    stream = lambda: Scenes(args, "train", args.seed * 1000003 + step * 1009 + level * 101 + rank, *levels[level], turns)
    scenes = stream()
    say(f"{'goes on' if saved else 'starts'}: {sum(w.numel() for w in learn.values())} weights learn, "
        f"{args.processes} x {args.batch} pictures a step")
    last_save = last_say = time.time()
    said_step, said_seconds, level_start = step, seconds, seconds
    while True:
        begin = time.time()
        pixels, owner, digits, turn_bytes = scenes.next(args.batch + extra)
        with torch.set_grad_enabled(vit_learns):
            features, image = vision(p, pixels, dtype, whole=True)
            loss, right = patch_loss(p, features, image, owner, digits)
        if args.stage == "decoder":
            seen = features[:args.batch] if args.end_to_end else features[:args.batch].detach()
            answers, answered = answer_loss(p, seen, turn_bytes[:args.batch], dtype, args.kind_weights)
            loss = args.patch_loss * loss + answers
            right = {**answered, "vit": right["digit"]}
        loss.backward()
        right = {name: float(value.float().mean()) for name, value in right.items()}
        # One flat vector for all gradients and for what the processes must agree on.
        shared = [float(answers if args.stage == "decoder" else loss), seconds] + list(right.values())
        flat = torch.cat([w.grad.flatten() for w in learn.values()] + [torch.tensor(shared)])
        if args.processes > 1:
            torch.distributed.all_reduce(flat)
            flat /= args.processes
        loss_mean, clock, *values = flat[-len(shared):].tolist()
        norm = float(flat[:-len(shared)].norm())
        flat *= min(1.0, 1.0 / (norm + 1e-6))
        at = 0
        for w in learn.values():
            w.grad = flat[at:at + w.numel()].view_as(w)
            at += w.numel()
        for name, value in zip(["loss"] + list(right), [loss_mean] + values):
            smooth[name] = value if name not in smooth or math.isnan(smooth[name]) else 0.97 * smooth[name] + 0.03 * value
        progress = clock / (60 * args.minutes)
        if progress >= 1:
            break
        factor = min(1.0, (step + 1) / args.warmup) * (1 - progress if args.decay == "linear" else
                                                       0.5 + 0.5 * math.cos(math.pi * progress))
        optimiser.step(max(factor, 0.01))
        for w in learn.values():
            w.grad = None
        step += 1
        seconds += time.time() - begin
        if level + 1 < len(levels):
            easy = min(smooth[k] for k in KINDS) > (0.9, 0.8)[level]
            if easy or progress > (0.15, 0.3)[level]:
                level += 1
                scenes.close()
                scenes = stream()
                say(f"curriculum: {levels[level][0]} to {levels[level][1]} digits from now on ({show({k: smooth[k] for k in right})})")
        if rank == 0 and step % 50 == 0:
            rate = (seconds - said_seconds) / (step - said_step)
            said_step, said_seconds = step, seconds
            say(f"loss {smooth['loss']:.4f} {show({k: smooth[k] for k in right})} | {rate:.3f} s/step, "
                f"{args.minutes - seconds / 60:.1f} min left")
        if step % args.evaluate_every == 0:  # every process its own pictures
            before = time.time()
            with torch.no_grad():
                right = evaluate(args, p, args.stage, args.eval_pictures // args.processes, dtype, seed=2 + rank)
            values = torch.stack([value.mean() for value in right.values()])
            if args.processes > 1:
                torch.distributed.all_reduce(values)
            say("held out, 2-6 digits: " + show(dict(zip(right, (values / args.processes).tolist()))))
            seconds += time.time() - before
        if time.time() - last_save > 100:
            last_save = time.time()
            save()
    save()
    say("done")


def parity(args):
    """Reference values for one picture, in float32 from the exported F16 weights."""
    folder = os.path.join(args.work, "parity")
    os.makedirs(folder, exist_ok=True)
    weights = os.path.join(folder, "model.safetensors")  # a copy, for training goes on exporting
    shutil.copyfile(os.path.join(args.model, "model.safetensors"), weights)
    p = load_safetensors(weights)
    scenes = Scenes(args, "t10k", 7, 4, 4, 5)
    pixels, _, _, turns = scenes.next(1)
    scenes.close()
    question, answer = int(turns[0, 0, 1]), int(turns[0, 0, 2])
    tokens = torch.from_numpy(turns[0, :1, 4:4 + question].astype(np.int64))
    with torch.no_grad():
        features = vision(p, pixels, torch.float32)
        visual = projector(p, features, torch.float32)
        own = torch.ones(1, question, question, dtype=torch.bool).tril()
        logits = decoder(p, visual, tokens, PREFIX + torch.arange(question)[None], own, torch.float32)[0, -1]
    ids = np.array(BEFORE + [-1] * PATCHES + tokens[0].tolist(), "<i4")
    files = {"pixels.u8": pixels.numpy(), "features.f32": features[0].numpy(), "visual.f32": visual[0].numpy(),
             "prompt.i32": ids, "logits.f32": logits.numpy()}
    for name, data in files.items():
        write_atomically(os.path.join(folder, name), lambda path: data.tofile(path))
    with open(os.path.join(args.model, "vocab.txt")) as file:
        words = file.read().split("\n")
    text = " ".join(words[t] for t in tokens[0].tolist())
    truth = " ".join(words[t] for t in turns[0, 0, 4 + question:4 + question + answer].tolist())
    with open(os.path.join(folder, "README.md"), "w") as out:
        out.write(f"""Reference values of model.safetensors (the copy beside this file), computed by PyTorch in float32. Raw little-endian files.

- pixels.u8     [96, 96, 3]  the picture, RGB bytes
- features.f32  [144, 128]   the ViT's features (layer -2, without the class token)
- visual.f32    [144, 128]   the same behind the projector: the visual tokens
- prompt.i32    [{len(ids)}]        token ids; -1 stands for a visual token
- logits.f32    [53]         at the prompt's last token; the largest is {int(logits.argmax())} ({words[int(logits.argmax())]})

Question: {text}
Right answer: {truth}
""")
    print(text, "->", words[int(logits.argmax())], "| right:", truth)


def main():
    examples = os.path.dirname(HERE)
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("stage", choices=["vit", "decoder", "evaluate", "export", "parity"])
    a.add_argument("--mnist", default="mnist", help="folder of the four MNIST files (default: %(default)s)")
    a.add_argument("--draw-scenes", default="draw_scenes", help="the program draw_scenes (default: found in PATH)")
    a.add_argument("--model", default=os.path.join(examples, "model"), help="folder of vocab.txt and the exported model")
    a.add_argument("--work", default="work", help="folder of the checkpoints (default: %(default)s)")
    a.add_argument("--log", default=None, help="log file (default: train.log in --work)")
    a.add_argument("--processes", type=int, default=2, help="processes that share every step (default: %(default)s)")
    a.add_argument("--port", type=int, default=29541, help="port the processes meet at (default: %(default)s)")
    a.add_argument("--minutes", type=float, default=30, help="length of the stage; the learning rate ends at 0 (default: %(default)s)")
    a.add_argument("--batch", type=int, default=32, help="pictures a step and process (default: %(default)s)")
    a.add_argument("--turns", type=int, default=15, help="questions drawn for a picture; equal ones are asked once (default: %(default)s)")
    a.add_argument("--lr", type=float, default=1e-3, help="AdamW's learning rate (default: %(default)s)")
    a.add_argument("--muon-lr", type=float, default=0.01, help="Muon's learning rate (default: %(default)s)")
    a.add_argument("--adam", action="store_true", help="AdamW for everything")
    a.add_argument("--vit-lr", type=float, default=0, help="decoder stage: the ViT's part of the learning rate (default: 0, frozen)")
    a.add_argument("--vit-pictures", type=int, default=0, help="decoder stage with --vit-lr: further pictures a step for the ViT alone, which\n"
                   "is cheap and needs many (default: %(default)s)")
    a.add_argument("--patch-loss", type=float, default=1.0, help="decoder stage: weight of the ViT's own loss (default: %(default)s)")
    a.add_argument("--end-to-end", action="store_true", help="decoder stage: the answers teach the ViT too, not only its own loss")
    a.add_argument("--kind-weights", type=float, nargs=5, default=[1, 1, 1, 1, 1], metavar="W", help="loss weight of " + ", ".join(KINDS))
    a.add_argument("--decay", choices=["linear", "cosine"], default="linear")
    a.add_argument("--warmup", type=int, default=100, help="steps of warm-up (default: %(default)s)")
    a.add_argument("--evaluate-every", type=int, default=300, help="steps (default: %(default)s)")
    a.add_argument("--eval-pictures", type=int, default=256, help="pictures of an evaluation (default: %(default)s)")
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--fresh", action="store_true", help="ignore checkpoint and exported weights")
    a.add_argument("--no-export", action="store_true", help="do not overwrite model.safetensors")
    a.add_argument("--float32", action="store_true", help="compute in float32 rather than bfloat16")
    args = a.parse_args()
    os.makedirs(args.work, exist_ok=True)
    args.log = args.log or os.path.join(args.work, "train.log")
    torch.set_num_threads(1)
    if args.stage in ("vit", "decoder"):
        save_config(args.model)
        if args.processes == 1:
            train(0, args)
        else:
            torch.multiprocessing.spawn(train, (args,), args.processes)
    elif args.stage == "export":
        paths = [os.path.join(args.work, s + ".pt") for s in ("decoder", "vit")]
        found = [path for path in paths if os.path.exists(path)]
        save_config(args.model)
        save_safetensors(os.path.join(args.model, "model.safetensors"), torch.load(found[0])["p"] if found else start_weights(args))
    elif args.stage == "parity":
        parity(args)
    else:
        p = load_safetensors(os.path.join(args.model, "model.safetensors"))
        dtype = torch.float32 if args.float32 else torch.bfloat16
        for name, right in evaluate(args, p, args.stage, args.eval_pictures, dtype, args.seed).items():
            print(f"{name:6} {100 * float(right.mean()):5.1f} % of {len(right)} answers exactly right")


if __name__ == "__main__":
    main()
