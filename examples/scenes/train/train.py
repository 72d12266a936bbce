#!/usr/bin/env python3
"""Trains the scenes model: a small LLaVA (CLIP-style ViT, projector, LLaMA) that answers questions about pictures of
coloured digits, with 576 visual tokens behind a system prompt of 35.

  train.py MNIST_FOLDER OUT_FOLDER [--seconds 320] [--batch 256] [--seed 1]

Draws its pictures itself, on the GPU where there is one, by the rules of ../scene.hpp. First the ViT learns to say of each
patch which digit and which colour it shows, then all learn from the answers to six questions a picture; pictures of up to 3
digits, later 6 and 12. Learning rate and difficulty follow the clock. Writes config.json's companion model.safetensors:
matrices in blocks of 32 whole numbers of 8 bits with a scale in half precision, all else in half precision.

--small trains a model of toy size, to see whether the script runs. Needs PyTorch 1.13 or newer, and numpy.
"""
import argparse
import contextlib
import gzip
import json
import math
import os
import struct
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDE, PATCH, GRID = 192, 8, 24           # pixels, pixels, patches
PATCHES = GRID * GRID                    # 576
CELL, CELLS = 32, 6                      # pixels; cells in a row, and rows
MAX_DIGITS = 12
EPS, THETA = 1e-5, 10000.0
TURN = 22                                # tokens of a question and its answer, at most
KINDS = ["at", "where", "count", "row", "right of"]
COLOURS = [[230, 40, 40], [40, 200, 60], [60, 90, 240], [240, 220, 40], [200, 60, 220], [40, 210, 220], [245, 245, 245],
           [250, 140, 30]]

WORDS = open(os.path.join(HERE, "..", "model", "vocab.txt")).read().split("\n")[:-1]
ID = {word: i for i, word in enumerate(WORDS)}
NUMBER, COLOUR = ID["0"], ID["red"]      # of "0" to "12", and of the eight colours
BEFORE = [ID["<s>"]] + [ID[f"<sys{i}>"] for i in range(33)] + [ID["user"]]
PREFIX = len(BEFORE) + PATCHES           # tokens that stand before the question


class Size:
    width, heads, vit_layers, layers, mlp, vit_mlp = 256, 8, 6, 12, 704, 768


def say(*words):
    print(f"{time.time() - say.start:6.1f}", *words, flush=True)


say.start = time.time()


# --------------------------------------------------------------------------------------- the data
def read_idx(folder, name):
    path = os.path.join(folder, name)
    if os.path.exists(path + ".gz"):
        data = np.frombuffer(gzip.open(path + ".gz").read(), np.uint8)
    else:
        data = np.fromfile(path, np.uint8)
    return data[16:].reshape(-1, 28, 28) if "images" in name else data[8:]


class DigitBox:
    """MNIST images sorted by their digit."""

    def __init__(self, folder, part):
        images, labels = read_idx(folder, part + "-images-idx3-ubyte"), read_idx(folder, part + "-labels-idx1-ubyte")
        self.images = torch.from_numpy(images.copy()).to(DEVICE).float() / 255
        of_digit = [np.nonzero(labels == digit)[0] for digit in range(10)]
        longest = max(map(len, of_digit))
        self.count = torch.tensor([len(indices) for indices in of_digit], device=DEVICE)
        self.index = torch.from_numpy(np.stack([np.resize(indices, longest) for indices in of_digit])).to(DEVICE)

    def draw(self, digits):
        chosen = (torch.rand(digits.shape, device=DEVICE) * self.count[digits]).long()
        return self.images[self.index[digits, chosen]]


class Scenes:
    """`batch` pictures [b, 3, 192, 192] in [-1, 1], what each cell and patch holds, and where the digits are."""

    def __init__(self, box, batch, max_digits):
        random = lambda *shape: torch.rand(*shape, device=DEVICE)
        digits = torch.randint(1, max_digits + 1, (batch, 1), device=DEVICE)
        self.real = torch.arange(MAX_DIGITS, device=DEVICE)[None] < digits          # [b, 12]
        self.cell = random(batch, CELLS * CELLS).argsort(1)[:, :MAX_DIGITS]
        name = random(batch, 80).argsort(1)[:, :MAX_DIGITS]                          # no two alike
        digit, colour = name // 8, name % 8

        # Each digit's 28 x 28 pixels, moved by 0 to 4 pixels within its cell of 32 x 32.
        glyphs = box.draw(digit)
        down, right = (torch.randint(0, 5, (batch, MAX_DIGITS), device=DEVICE) for _ in range(2))
        at = torch.arange(CELL, device=DEVICE)
        y, x = at - down[..., None], at - right[..., None]
        b, d = torch.arange(batch, device=DEVICE)[:, None, None, None], torch.arange(MAX_DIGITS, device=DEVICE)[:, None, None]
        inside = ((y >= 0) & (y < 28))[..., :, None] & ((x >= 0) & (x < 28))[..., None, :] & self.real[..., None, None]
        ink = glyphs[b, d, y.clamp(0, 27)[..., :, None], x.clamp(0, 27)[..., None, :]] * inside
        alpha = torch.zeros(batch, CELLS * CELLS, CELL, CELL, device=DEVICE)
        alpha.scatter_(1, self.cell[..., None, None].expand(-1, -1, CELL, CELL), ink)
        alpha = alpha.view(batch, CELLS, CELLS, CELL, CELL).permute(0, 1, 3, 2, 4).reshape(batch, 1, SIDE, SIDE)

        empty = torch.full((batch, CELLS * CELLS), -1, device=DEVICE)
        self.digit = empty.scatter(1, self.cell, torch.where(self.real, digit, -1))   # [b, 36], -1: none
        self.colour = empty.scatter(1, self.cell, torch.where(self.real, colour, -1))

        rgb = (torch.tensor(COLOURS, device=DEVICE) / 255)[self.colour.clamp(0)].view(batch, CELLS, CELLS, 3)
        rgb = rgb.permute(0, 3, 1, 2).repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
        background = 0.12 * random(batch, 3, SIDE, SIDE) + 0.25 * F.interpolate(random(batch, 3, 7, 7), SIDE, mode="bilinear")
        self.pixels = (background * (1 - alpha) + rgb * alpha).clamp(0, 1) * 2 - 1

        has_ink = F.avg_pool2d(alpha, PATCH)[:, 0].reshape(batch, PATCHES) > 0.06
        of_patch = lambda cells: cells.view(batch, CELLS, CELLS).repeat_interleave(CELL // PATCH, 1).repeat_interleave(
            CELL // PATCH, 2).reshape(batch, PATCHES)
        self.patch_digit = torch.where(has_ink, of_patch(self.digit), 10)
        self.patch_colour = torch.where(has_ink, of_patch(self.colour), 8)


def ask(kind, scenes):
    """One question of a kind about each scene: tokens [b, 22], question's length, answers' lengths with </s> [b]."""
    batch = scenes.digit.shape[0]
    rows = torch.arange(batch, device=DEVICE)
    word = lambda text: torch.full((batch,), ID[text], device=DEVICE)
    chance = lambda share: torch.rand(batch, device=DEVICE) < share
    grid = lambda cells: cells.view(batch, CELLS, CELLS)
    one = scenes.cell[rows, (torch.rand(batch, device=DEVICE) * scenes.real.sum(1)).long()]  # a digit's cell
    digit, colour, row, column = scenes.digit[rows, one], scenes.colour[rows, one], one // CELLS, one % CELLS
    answer = torch.zeros(batch, 8, dtype=torch.long, device=DEVICE)

    def name_or_nothing(there, colour, digit):
        answer[:, 0] = torch.where(there, COLOUR + colour.clamp(0), ID["nothing"])
        answer[:, 1] = torch.where(there, NUMBER + digit.clamp(0), ID["</s>"])
        answer[:, 2] = torch.where(there, ID["</s>"], 0)
        return torch.where(there, 3, 2)

    if kind == "at":
        cell = torch.where(chance(0.75), one, torch.randint(0, CELLS * CELLS, (batch,), device=DEVICE))
        question = [word("what"), word("is"), word("at"), word("row"), NUMBER + 1 + cell // CELLS, word("column"),
                    NUMBER + 1 + cell % CELLS, word("?")]
        length = name_or_nothing(scenes.digit[rows, cell] >= 0, scenes.colour[rows, cell], scenes.digit[rows, cell])
    elif kind == "where":
        question = [word("where"), word("is"), word("the"), COLOUR + colour, NUMBER + digit, word("?")]
        for i, tokens in enumerate([word("row"), NUMBER + 1 + row, word("column"), NUMBER + 1 + column, word("</s>")]):
            answer[:, i] = tokens
        length = torch.full((batch,), 5, device=DEVICE)
    elif kind == "count":
        colour = torch.where(chance(0.7), colour, torch.randint(0, 8, (batch,), device=DEVICE))
        question = [word("how"), word("many"), COLOUR + colour, word("digits"), word("are"), word("there"), word("?")]
        answer[:, 0] = NUMBER + (scenes.colour == colour[:, None]).sum(1)
        answer[:, 1] = ID["</s>"]
        length = torch.full((batch,), 2, device=DEVICE)
    elif kind == "row":
        row = torch.where(chance(0.85), row, torch.randint(0, CELLS, (batch,), device=DEVICE))
        question = [word("list"), word("the"), word("digits"), word("in"), word("row"), NUMBER + 1 + row, word(".")]
        digits = grid(scenes.digit)[rows, row]
        there = digits >= 0
        count = there.sum(1)
        answer.scatter_(1, torch.where(there, there.cumsum(1) - 1, 7), NUMBER + digits.clamp(0))
        answer[:, 7] = 0
        answer[rows, count] = ID["</s>"]
        answer[:, 0] = torch.where(count == 0, ID["none"], answer[:, 0])
        answer[:, 1] = torch.where(count == 0, ID["</s>"], answer[:, 1])
        length = torch.where(count == 0, 2, count + 1)
    else:
        question = [word("what"), word("is"), word("right"), word("of"), word("the"), COLOUR + colour, NUMBER + digit, word("?")]
        digits = grid(scenes.digit)[rows, row]
        behind = (torch.arange(CELLS, device=DEVICE)[None] > column[:, None]) & (digits >= 0)
        first = behind.float().argmax(1)
        length = name_or_nothing(behind.any(1), grid(scenes.colour)[rows, row][rows, first], digits[rows, first])

    question = torch.stack(question + [word("assistant"), word(":")], 1)
    tokens = torch.zeros(batch, TURN, dtype=torch.long, device=DEVICE)
    tokens[:, :question.shape[1]] = question
    tokens[:, question.shape[1]:question.shape[1] + 8] = answer
    return tokens, question.shape[1], length


def due(question, length):
    """Where an answer's token is to be predicted, [b, 21]."""
    at = torch.arange(TURN - 1, device=DEVICE)[None]
    return (at >= question - 1) & (at < question - 1 + length[:, None])


# -------------------------------------------------------------------------------------- the model
def linear(inputs, outputs, bias, deviation):
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=deviation)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def attend(q, k, v, mask=None):
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask, -1e9)).softmax(-1) @ v


def heads(x):  # [b, s, d] -> [b, heads, s, 32]
    return x.view(x.shape[0], x.shape[1], Size.heads, -1).transpose(1, 2)


def unheads(x):
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], Size.width)


class VitLayer(nn.Module):
    def __init__(self):
        super().__init__()
        d, m, n = Size.width, Size.vit_mlp, Size.vit_layers
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d, EPS), nn.LayerNorm(d, EPS)
        self.self_attn = nn.ModuleDict({name + "_proj": linear(d, d, True, 0.6 / math.sqrt(d)) for name in "qkv"})
        self.self_attn["out_proj"] = linear(d, d, True, 0.6 / math.sqrt(d * 2 * n))
        self.mlp = nn.ModuleDict({"fc1": linear(d, m, True, 0.6 / math.sqrt(d)),
                                  "fc2": linear(m, d, True, 0.6 / math.sqrt(m * 2 * n))})

    def forward(self, x):
        y, a = self.layer_norm1(x), self.self_attn
        x = x + a["out_proj"](unheads(attend(heads(a["q_proj"](y)), heads(a["k_proj"](y)), heads(a["v_proj"](y)))))
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))  # quick_gelu


class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        d = Size.width
        self.patch_embedding = linear(3 * PATCH * PATCH, d, False, 1 / math.sqrt(3 * PATCH * PATCH))
        self.class_embedding = nn.Parameter(torch.randn(d) * 0.5)
        self.position_embedding = nn.Parameter(torch.randn(PATCHES + 1, d) * 0.3)
        self.pre_layrnorm = nn.LayerNorm(d, EPS)  # sic
        self.layers = nn.ModuleList(VitLayer() for _ in range(Size.vit_layers))

    def forward(self, pixels):
        batch = pixels.shape[0]
        x = pixels.view(batch, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(batch, PATCHES, -1)
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), self.patch_embedding(x)], 1) + self.position_embedding
        x = self.pre_layrnorm(x)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]


class RmsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(Size.width))

    def forward(self, x):
        if hasattr(F, "rms_norm"):
            return F.rms_norm(x, (Size.width,), self.weight.to(x.dtype), EPS)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.weight


class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        d, m, n = Size.width, Size.mlp, Size.layers
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(), RmsNorm()
        self.self_attn = nn.ModuleDict({name + "_proj": linear(d, d, False, 0.6 / math.sqrt(d)) for name in "qkv"})
        self.self_attn["o_proj"] = linear(d, d, False, 0.6 / math.sqrt(d * 2 * n))
        self.mlp = nn.ModuleDict({"gate_proj": linear(d, m, False, 0.6 / math.sqrt(d)),
                                  "up_proj": linear(d, m, False, 0.6 / math.sqrt(d)),
                                  "down_proj": linear(m, d, False, 0.6 / math.sqrt(m * 2 * n))})

    def qkv(self, x, rotary):
        y = self.input_layernorm(x)

        def rotated(z):  # rotate-half layout
            half = z.shape[-1] // 2
            return (z * rotary[0] + torch.cat([-z[..., half:], z[..., :half]], -1) * rotary[1]).to(x.dtype)

        a = self.self_attn
        return rotated(heads(a["q_proj"](y))), rotated(heads(a["k_proj"](y))), heads(a["v_proj"](y))

    def forward(self, x, rotary, mask):
        x = x + self.self_attn["o_proj"](unheads(attend(*self.qkv(x, rotary), mask)))
        y, mlp = self.post_attention_layernorm(x), self.mlp
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        d = Size.width
        self.vit = Vit()
        self.digit_head, self.colour_head = linear(d, 11, True, 0.02), linear(d, 9, True, 0.02)  # teach the ViT; not exported
        self.linear_1, self.linear_2 = linear(d, d, True, 0.3 / math.sqrt(d)), linear(d, d, True, 1 / math.sqrt(d))
        self.embed_tokens = nn.Embedding(len(WORDS), d)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(Size.layers))
        self.norm, self.lm_head = RmsNorm(), linear(d, len(WORDS), False, 0.02)

    def project(self, features):
        return self.linear_2(F.gelu(self.linear_1(features)))

    def rotary(self, positions):
        size = Size.width // Size.heads
        angle = positions.float()[..., None] * THETA ** (-torch.arange(0, size, 2, device=DEVICE).float() / size)
        angle = torch.cat([angle, angle], -1)[:, None]
        return angle.cos(), angle.sin()

    def decode(self, visual, tokens, positions, mask):
        """Logits of what follows each of tokens [b, t], which stand behind the system prompt and the picture."""
        before = self.embed_tokens(torch.tensor(BEFORE, device=DEVICE)).expand(visual.shape[0], -1, -1)
        x = torch.cat([before.to(visual.dtype), visual, self.embed_tokens(tokens).to(visual.dtype)], 1)
        if DEVICE == "cuda":
            x = x.bfloat16()
        rotary = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, rotary, mask)
        return self.lm_head(self.norm(x[:, PREFIX:])).float()


# ----------------------------------------------------------------------------------- the training
class Optimiser:
    """Muon for the matrices inside layers, AdamW for all else."""

    def __init__(self, model):
        inside = [p for name, p in model.named_parameters() if "layers." in name and p.dim() == 2]
        rest = [p for p in model.parameters() if all(p is not q for q in inside)]
        self.parameters = list(model.parameters())
        self.adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01,
                                      **({"fused": True} if DEVICE == "cuda" else {}))
        self.groups, self.momentum = {}, {}
        for p in inside:
            self.groups.setdefault(tuple(p.shape), []).append(p)

    @torch.no_grad()
    def step(self, rate):
        for group in self.adam.param_groups:
            group["lr"] = 1e-3 * rate
        self.adam.step()
        for shape, group in self.groups.items():
            group = [p for p in group if p.grad is not None]
            if not group:
                continue
            grad = torch.stack([p.grad for p in group])
            momentum = self.momentum.setdefault((shape, len(group)), torch.zeros_like(grad))
            momentum.mul_(0.95).add_(grad)
            x = grad + 0.95 * momentum
            tall = shape[0] > shape[1]
            x = x.transpose(1, 2) if tall else x
            x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
            for _ in range(5):  # Newton-Schulz: towards the nearest orthogonal matrix
                a = x @ x.transpose(1, 2)
                x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
            x = (x.transpose(1, 2) if tall else x).float() * max(1, shape[0] / shape[1]) ** 0.5
            for p, update in zip(group, x):
                p.mul_(1 - 0.02 * 0.01 * rate).add_(update, alpha=-0.01 * rate)
        for p in self.parameters:
            p.grad = None


def patch_loss(model, features, scenes):
    weight = torch.where(scenes.patch_digit < 10, 1.0, 0.15)

    def loss(head, labels):
        nll = F.cross_entropy(head(features).flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(weight)
        return (nll * weight).sum() / weight.sum()

    return loss(model.digit_head, scenes.patch_digit) + 0.5 * loss(model.colour_head, scenes.patch_colour)


def turns_mask(turns):
    """Every turn sees the prefix and itself, as if it were the picture's only one; and the positions of all tokens."""
    length = PREFIX + turns * TURN
    mask = torch.zeros(length, length, dtype=torch.bool, device=DEVICE)
    mask[:PREFIX, :PREFIX] = torch.ones(PREFIX, PREFIX, dtype=torch.bool, device=DEVICE).tril()
    mask[PREFIX:, :PREFIX] = True
    for turn in range(turns):
        at = slice(PREFIX + turn * TURN, PREFIX + (turn + 1) * TURN)
        mask[at, at] = torch.ones(TURN, TURN, dtype=torch.bool, device=DEVICE).tril()
    positions = torch.cat([torch.arange(PREFIX, device=DEVICE), PREFIX + torch.arange(TURN, device=DEVICE).repeat(turns)])
    return mask[None, None], positions[None]


def train(model, box, args):
    amp = (lambda: torch.autocast(DEVICE, torch.bfloat16)) if DEVICE == "cuda" else contextlib.nullcontext
    optimiser, levels, level = Optimiser(model), [3, 6, 12], 0
    mask, positions = turns_mask(6)
    right, step, start, last = [0.0] * 5, 0, time.time(), time.time()
    while time.time() - start < args.seconds and step < args.steps:
        progress = (time.time() - start) / args.seconds
        joint = progress > 0.18 or step >= args.steps // 2  # the first part is the ViT's alone
        rate = min(1, (step + 1) / 60) * (1 - max(0, progress - 0.3) / 0.7)
        most = levels[level] if joint else MAX_DIGITS
        with amp():
            scenes = Scenes(box, args.batch, most)
            features = model.vit(scenes.pixels)
            loss = patch_loss(model, features, scenes)
            if joint:
                turns = [ask(kind, scenes) for kind in KINDS + [KINDS[np.random.randint(5)]]]
                tokens = torch.cat([turn[0] for turn in turns], 1)
                logits = model.decode(model.project(features), tokens, positions, mask).view(args.batch, 6, TURN, -1)
                nll, count = 0, 0
                for i, (words, question, length) in enumerate(turns):
                    wanted, said, asked = words[:, 1:], logits[:, i, :-1], due(question, length)
                    error = F.cross_entropy(said.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
                    nll, count = nll + (error * asked).sum(), count + asked.sum()
                    if i < 5 and step % 10 == 0:
                        whole = ((said.argmax(-1) == wanted) | ~asked).all(1).float().mean()
                        right[i] = 0.8 * right[i] + 0.2 * float(whole)
                loss = 0.3 * loss + nll / count
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step(max(rate, 0.02))
        step += 1
        if joint and level < 2 and (min(right) > (0.85, 0.8)[level] or progress > (0.4, 0.55)[level]):
            level += 1
            say("digits up to", levels[level], [round(r, 3) for r in right])
        if time.time() - last > 8 or step == args.steps:
            last = time.time()
            say(f"step {step} loss {float(loss):.3f} max digits {most} acc", [round(r, 3) for r in right])
    say("trained", step, "steps")


@torch.no_grad()
def evaluate(model, box, pictures):
    """Whole answers right, by kind, without pruning; ../evaluate.cpp does the rest."""
    amp = (lambda: torch.autocast(DEVICE, torch.bfloat16)) if DEVICE == "cuda" else contextlib.nullcontext
    mask, positions = turns_mask(1)
    batch, right, asked = min(pictures, 256), [0.0] * 5, 0
    for _ in range(max(1, pictures // batch)):
        with amp():
            scenes = Scenes(box, batch, MAX_DIGITS)
            visual = model.project(model.vit(scenes.pixels))
            for i, kind in enumerate(KINDS):
                tokens, question, length = ask(kind, scenes)
                said = model.decode(visual, tokens, positions, mask).argmax(-1)
                right[i] += float(((said[:, :-1] == tokens[:, 1:]) | ~due(question, length)).all(1).sum())
        asked += batch
    say("unseen digits, whole answers right:", {k: round(100 * r / asked, 1) for k, r in zip(KINDS, right)})


# ------------------------------------------------------------------------------------- the export
def exported(model):
    """Weights by their Hugging Face names, each with whether it is stored in blocks."""
    tower, language = "vision_tower.vision_model.", "language_model.model."
    weights = {}
    for name, p in model.named_parameters():
        p = p.detach().float().cpu()
        matrix = "layers." in name and p.dim() == 2 or name in ("linear_1.weight", "linear_2.weight")
        if name.startswith("vit.layers."):
            name = tower + "encoder." + name[4:]
        elif name == "vit.patch_embedding.weight":
            name, p = tower + "embeddings.patch_embedding.weight", p.view(Size.width, 3, PATCH, PATCH)
        elif name == "vit.position_embedding":
            name = tower + "embeddings.position_embedding.weight"
        elif name == "vit.class_embedding":
            name = tower + "embeddings.class_embedding"
        elif name.startswith("vit."):
            name = tower + name[4:]
        elif name.startswith("linear_"):
            name = "multi_modal_projector." + name
        elif name == "lm_head.weight":
            name = "language_model.lm_head.weight"
        elif name.startswith(("digit_head", "colour_head")):
            continue
        else:
            name = language + name
        weights[name] = (p, matrix)
    # CLIP has a norm behind the last layer, for the class token alone; the features do not pass it.
    weights[tower + "post_layernorm.weight"] = (torch.ones(Size.width), False)
    weights[tower + "post_layernorm.bias"] = (torch.zeros(Size.width), False)
    return weights


def write_safetensors(path, weights):
    header, parts, end = {}, [], 0

    def add(name, dtype, tensor):
        nonlocal end
        data = tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + len(data)]}
        parts.append(data)
        end += len(data)

    for name, (weight, in_blocks) in weights.items():
        if not in_blocks:
            add(name, "F16", weight.half())
            continue
        blocks = weight.view(weight.shape[0], -1, 32)
        scale = (blocks.abs().amax(-1) / 127).half()
        add(name + "_scale", "F16", scale)
        whole = (blocks / scale.float().clamp(min=1e-12)[..., None]).round().clamp(-127, 127)
        add(name, "I8", whole.to(torch.int8).view_as(weight))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(parts))


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("mnist", help="folder of MNIST's four IDX files, as get_mnist.sh makes it")
    a.add_argument("out", help="folder for model.safetensors")
    a.add_argument("--seconds", type=float, default=320)
    a.add_argument("--steps", type=int, default=sys.maxsize, help="at most; half of them are the ViT's alone")
    a.add_argument("--batch", type=int, default=256, help="pictures a step")
    a.add_argument("--pictures", type=int, default=1024, help="to evaluate on")
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--small", action="store_true", help="a toy size: width 64, 2 and 4 layers")
    args = a.parse_args()
    if args.small:
        Size.width, Size.heads, Size.vit_layers, Size.layers, Size.mlp, Size.vit_mlp = 64, 2, 2, 4, 160, 128
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = Model().to(DEVICE)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights on {DEVICE}")
    train(model, DigitBox(args.mnist, "train"), args)
    evaluate(model.eval(), DigitBox(args.mnist, "t10k"), args.pictures)
    write_safetensors(os.path.join(args.out, "model.safetensors"), exported(model))


if __name__ == "__main__":
    main()
