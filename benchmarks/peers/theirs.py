"""Times PyTorch for scripts/peers, with the words and on the numbers of ours.cpp.

    theirs.py case=full pass=forward tokens=1024 heads=1 dim=128 repetitions=5 threads=1 values=FILE variant=flash

There are several ways to write each case in PyTorch. variant=choose times them all and prints the name of the fastest one.
With ", compiled" after its name a way is given to torch.compile. Without a variant the first way is taken. tuned=yes takes the fused AdamW.
"""

import array
import json
import math
import statistics
import sys
import time
import warnings

warnings.filterwarnings("ignore", message=".*NumPy.*")

import torch
from torch.nn import functional as F

MASK = 2**32 - 1
TOP_K = 256
INDEX_HEADS = 4


# Numbers that both programs make


def uniform(name, count):
    """Numbers from 0 to below 1 that depend on a name and on their place, with the same bits in ours.cpp."""
    seed = 2166136261
    for byte in name.encode():
        seed = (seed ^ byte) * 16777619 & MASK
    h = torch.arange(count) * 0x9E3779B1 + seed & MASK
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK
    return ((h ^ (h >> 16)) >> 8).float() * 2**-24


def around_zero(name, shape, width):
    """Numbers from -width to width."""
    return (2 * uniform(name, math.prod(shape)) - 1).mul_(width).view(shape)


def unit(name, *shape):
    """Numbers with deviation 1."""
    return around_zero(name, shape, math.sqrt(3))


def by_heads(x):
    """[T, H, D] in one sequence becomes [H, T, D]."""
    return x.transpose(0, 1).contiguous()


# Full attention


def full_inputs(words):
    """q, k, v and the gradient of o."""
    shape = words["tokens"], words["heads"], words["dim"]
    return [by_heads(unit(name, *shape))[None] for name in ("q", "k", "v", "d_o")]


def attend(q, k, v):
    """Causal attention as PyTorch chooses it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_by(backend):
    """Causal attention by one of PyTorch's backends."""

    def attend_so(q, k, v):
        with torch.nn.attention.sdpa_kernel(backend):
            return attend(q, k, v)

    return attend_so


def full_variants(words):
    """What PyTorch has for causal attention."""
    backends = torch.nn.attention.SDPBackend
    return {
        "default": attend,
        "flash": attend_by(backends.FLASH_ATTENTION),
        "efficient": attend_by(backends.EFFICIENT_ATTENTION),
        "math": attend_by(backends.MATH),
    }


# Gated DeltaNet


def gdn_inputs(words):
    """q, k, v, g, beta and the gradient of o, with the heads first."""
    T, H, D = words["tokens"], words["heads"], words["dim"]
    signs = [torch.where(uniform(name, T * H * D) < 0.5, D**-0.5, -(D**-0.5)).view(T, H, D) for name in ("q", "k")]
    g = -0.1 * uniform("g", T * H).view(T, H)
    beta = uniform("beta", T * H).view(T, H)
    q, k, v, g, beta, d_o = (by_heads(x) for x in (*signs, unit("v", T, H, D), g, beta, unit("d_o", T, H, D)))
    return [q, k, v, g, beta, d_o]


def solve(lower, right):
    """(1 + lower)^-1 right, by a triangular solver."""
    return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)


def solve_by_rows(lower, right):
    """The same by an inverse that is computed row by row, as transformers and flash-linear-attention write it."""
    inverse = -lower
    for i in range(1, lower.shape[-1]):
        row = inverse[..., i, :i].clone()
        inverse[..., i, :i] = row + (row[..., None] * inverse[..., :i, :i].clone()).sum(-2)
    return (inverse + torch.eye(lower.shape[-1])) @ right


def delta_rule(chunk, solve=solve):
    """The gated delta rule by chunks: a triangular system for all of them at once, then a recurrence over their states."""

    def by_chunks(q, k, v, g, beta):
        H, T, K = q.shape
        scale = K**-0.5
        q, k, v = (x.view(H, T // chunk, chunk, -1) for x in (q, k, v))
        decay = g.view(H, T // chunk, chunk).cumsum(-1)
        beta = beta.view(H, T // chunk, chunk, 1)
        fade = (decay[..., :, None] - decay[..., None, :]).tril().exp().tril()
        since_start = decay.exp()[..., None]
        until_end = (decay[..., -1:] - decay).exp()[..., None]
        keys = k.transpose(-1, -2)
        lower = (beta * (k @ keys) * fade).tril(-1)
        right = torch.cat([beta * v, beta * since_start * k], -1)
        values, memory = solve(lower, right).split([v.shape[-1], K], -1)
        written = (k * until_end).transpose(-1, -2)
        state = torch.zeros(H, K, v.shape[-1])
        states, news = [], []
        for i in range(T // chunk):
            new = torch.baddbmm(values[:, i], memory[:, i], state, alpha=-1)
            states.append(state)
            news.append(new)
            state = torch.baddbmm(state * since_start[:, i, -1:], written[:, i], new)
        o = (scale * since_start * q) @ torch.stack(states, 1) + (scale * (q @ keys) * fade) @ torch.stack(news, 1)
        return o.reshape(H, T, -1)

    return by_chunks


def gdn_variants(words):
    """The sizes of a chunk; 64 is what other libraries take."""
    if words.get("way") == "rows":
        return {f"chunks of {chunk}": delta_rule(chunk, solve_by_rows) for chunk in (64, 32)}
    return {f"chunks of {chunk}": delta_rule(chunk) for chunk in (64, 32, 128, 16)}


# Sparse attention


def dsa_inputs(words):
    """q, k, v of the attention, queries, keys and weights of the indexer, and the gradient of o. See ours.cpp."""
    T, D = words["tokens"], words["dim"]
    q, k, v, d_o = full_inputs(words)
    first = torch.arange(D) == 0
    index_q = uniform("index_q", T * INDEX_HEADS * D).view(T, INDEX_HEADS, D)
    index_q[:, 0] = torch.where(first, 1.0, (2 * index_q[:, 0]).floor())
    index_q[:, 1:] = torch.where(first, 0.0, (3 * index_q[:, 1:]).floor() - 1)
    index_k = torch.where(first, torch.arange(T)[:, None] / 4096, (2 * uniform("index_k", T * D).view(T, D)).floor())
    index_w = torch.where(uniform("index_w", T * INDEX_HEADS).view(T, INDEX_HEADS) < 0.5, 1.0, -1.0)
    index_w[:, 0] = 1
    return [q, k, v, by_heads(index_q), index_k, by_heads(index_w[..., None]), d_o]


def chosen_keys(index_q, index_k, index_w, first=0):
    """The mask of the keys with the best scores that the queries first, first + 1, ... see."""
    scores = ((index_q @ index_k.T).relu_() * index_w).sum(0)
    seen = torch.ones_like(scores, dtype=torch.bool).tril_(first)
    best = scores.masked_fill_(~seen, -math.inf).topk(min(TOP_K, scores.shape[1]), sorted=False).indices
    return torch.zeros_like(seen).scatter_(1, best, True) & seen


def sparse_by_mask(q, k, v, index_q, index_k, index_w):
    """Dense attention with the mask of the chosen keys."""
    with torch.no_grad():
        mask = chosen_keys(index_q, index_k, index_w)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sparse_by_softmax(q, k, v, index_q, index_k, index_w):
    """The same, with the softmax written out."""
    with torch.no_grad():
        mask = chosen_keys(index_q, index_k, index_w)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def sparse_by_blocks(size):
    """The same for some queries at a time, and the keys that they see."""

    def by_blocks(q, k, v, index_q, index_k, index_w):
        parts = []
        for first in range(0, q.shape[2], size):
            rows = slice(first, first + size)
            with torch.no_grad():
                mask = chosen_keys(index_q[:, rows], index_k[: first + size], index_w[:, rows], first)
            seen = slice(first + size)
            parts.append(F.scaled_dot_product_attention(q[:, :, rows], k[:, :, seen], v[:, :, seen], attn_mask=mask))
        return torch.cat(parts, 2)

    return by_blocks


def dsa_variants(words):
    """Dense attention with a mask, or by blocks of queries where the case says so."""
    if words.get("way") == "blocks":
        return {f"blocks of {size}": sparse_by_blocks(size) for size in (512, 256, 128)}
    return {"mask": sparse_by_mask, "softmax": sparse_by_softmax}


# Study 1's model


def start(path, *shape):
    """First values of a parameter."""
    return around_zero(path, shape, shape[-1] ** -0.5)


def linear_layer(path, chunk):
    """Parameters and function of a layer with Gated DeltaNet: 2 heads of 64."""
    rows = {"w.q": 128, "w.k": 128, "w.v": 128, "w_gate": 128, "w.g": 2, "w.beta": 2}
    p = {
        "w": torch.cat([start(path + name, count, 128) for name, count in rows.items()]),
        "conv": torch.cat([start(f"{path}prepare.conv_{name}", 128, 4) for name in "qkv"]),
        "a_log": 2.7 * uniform(path + "prepare.a_log", 2),
        "dt_bias": torch.ones(2),
        "norm": torch.ones(64),
        "w_o": start(path + "w_o", 128, 128),
    }
    rule = delta_rule(chunk)

    def forward(p, x):
        B, T, C = x.shape
        qkv, z, a, b = F.linear(x, p["w"]).split([384, 128, 2, 2], -1)
        qkv = F.silu(F.conv1d(qkv.transpose(1, 2), p["conv"][:, None], padding=3, groups=384)[..., :T])
        q, k, v = qkv.view(B, 3, 2, 64, T).transpose(-1, -2).unbind(1)
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        g = -p["a_log"].exp() * F.softplus(a + p["dt_bias"])
        g, beta = (y.transpose(1, 2).reshape(B * 2, T) for y in (g, b.sigmoid()))
        o = rule(*(y.reshape(B * 2, T, 64) for y in (q, k, v)), g, beta).view(B, 2, T, 64).transpose(1, 2)
        o = F.rms_norm(o, (64,), p["norm"], 1e-6) * F.silu(z.view(B, T, 2, 64))
        return F.linear(o.reshape(B, T, C), p["w_o"])

    return p, forward


def full_layer(path, tokens):
    """Parameters and function of a layer with full attention: 4 heads of 32 over 2 heads of keys and values."""
    rows = {"w.q": 128, "w.k": 64, "w.v": 64, "w_gate": 128}
    p = {
        "w": torch.cat([start(path + name, count, 128) for name, count in rows.items()]),
        "q_norm": torch.ones(32),
        "k_norm": torch.ones(32),
        "w_o": start(path + "w_o", 128, 128),
    }
    angles = torch.outer(torch.arange(tokens).double(), 10000 ** (-torch.arange(0, 32, 2).double() / 32)).repeat(1, 2)
    cos, sin = angles.cos().float(), angles.sin().float()

    def turn(x):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    def forward(p, x):
        B, T, C = x.shape
        q, k, v, gate = F.linear(x, p["w"]).split([128, 64, 64, 128], -1)
        q, k, v = (y.view(B, T, -1, 32).transpose(1, 2) for y in (q, k, v))
        q, k = turn(F.rms_norm(q, (32,), p["q_norm"], 1e-6)), turn(F.rms_norm(k, (32,), p["k_norm"], 1e-6))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.linear(o.transpose(1, 2).reshape(B, T, C) * gate.sigmoid(), p["w_o"])

    return p, forward


def dense_layer(path):
    """Parameters and function of a SwiGLU of width 512."""
    p = {
        "w": torch.cat([start(path + name, 512, 128) for name in ("gate", "up")]),
        "down": start(path + "down", 128, 512),
    }

    def forward(p, x):
        gate, up = F.linear(x, p["w"]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, p["down"])

    return p, forward


def mixture_layer(path, loop):
    """Parameters and function of a mixture: the best 2 of 4 experts of width 256, one after the other or all of them for every token."""
    p = {
        "router": start(path + "router", 4, 128),
        "w": torch.cat([start(f"{path}experts.{name}", 4, 256, 128) for name in ("gate", "up")], 1),
        "down": start(path + "experts.down", 4, 128, 256),
    }

    def one_by_one(p, x, weights, chosen):
        y = torch.zeros_like(x)
        for expert in range(4):
            rows, place = torch.where(chosen == expert)
            gate, up = F.linear(x[rows], p["w"][expert]).chunk(2, -1)
            made = F.linear(F.silu(gate) * up, p["down"][expert])
            y = y.index_add(0, rows, made * weights[rows, place, None])
        return y

    def all_at_once(p, x, weights, chosen):
        gate, up = (x @ p["w"].transpose(1, 2)).chunk(2, -1)
        made = (F.silu(gate) * up) @ p["down"].transpose(1, 2)
        share = torch.zeros(len(x), 4).scatter(1, chosen, weights)
        return (made * share.T[..., None]).sum(0)

    def forward(p, x):
        rows = x.reshape(-1, 128)
        weights, chosen = F.linear(rows, p["router"]).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        return (one_by_one if loop else all_at_once)(p, rows, weights, chosen).view_as(x)

    return p, forward


class Model(torch.nn.Module):
    """The pattern LFFL, with the parameters that ours.cpp begins with. Matrices that read the same input are one matrix."""

    def __init__(self, vocab, tokens, chunk, loop):
        super().__init__()
        self.functions = []
        self.groups = torch.nn.ModuleList()
        for i, letter in enumerate("LFFL"):
            block = f"blocks.{i}."
            attention = linear_layer(block + "attention.", chunk) if letter == "L" else full_layer(block + "attention.", tokens)
            path = block + "feed_forward."
            feed_forward = mixture_layer(path, loop) if i % 2 else dense_layer(path + "dense.")
            for p, forward in (attention, feed_forward):
                self.groups.append(torch.nn.ParameterDict({"before": torch.zeros(128), **p}))
                self.functions.append(forward)
        self.embedding = torch.nn.Parameter(unit("embedding", vocab, 128))
        self.norm = torch.nn.Parameter(torch.zeros(128))
        self.head = torch.nn.Parameter(start("head", vocab, 128))

    def forward(self, tokens, targets):
        """The mean loss."""
        x = F.embedding(tokens, self.embedding)
        for p, function in zip(self.groups, self.functions):
            x = x + function(p, F.rms_norm(x, (128,), 1 + p["before"], 1e-6))
        x = F.rms_norm(x, (128,), 1 + self.norm, 1e-6)
        return F.cross_entropy(F.linear(x, self.head).flatten(0, 1), targets.flatten())


TRAINING = {
    f"{experts}, chunks of {chunk}": (chunk, experts == "experts in turn")
    for experts in ("experts in turn", "all experts")
    for chunk in (64, 128, 32)
}


def training_step(words, variant, compiled):
    """A function that makes a step and returns loss and norm of the gradients of all steps so far."""
    vocab, count, length = words["dim"], words["heads"], words["tokens"]
    model = Model(vocab, length, *TRAINING[variant])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=words.get("tuned") == "yes" or None
    )
    drawn = (uniform("tokens", count * length + 1) * vocab).long()
    tokens, targets = drawn[:-1].view(count, length), drawn[1:].view(count, length)
    loss_of = torch.compile(model) if compiled else model
    steps = []

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps.append((loss.item(), norm.item()))
        return steps

    return step


# Timing


def clock_of(words):
    """A function that gives seconds: with one thread those that the process was computing, as in ours.cpp."""
    return time.process_time if words["threads"] == 1 else time.perf_counter


def sample(words, repetitions, call):
    """Seconds of each of some calls, after at least two calls and a tenth of a second; and what the last one returned."""
    clock = clock_of(words)
    calls, warm_up = 0, clock()
    while calls < 2 or clock() - warm_up < 0.1:
        result = call()
        calls += 1
    seconds = []
    for _ in range(repetitions):
        begin = clock()
        result = call()
        seconds.append(clock() - begin)
    return seconds, result


def variants_of(words):
    """The names of the ways to compute a case, and their functions."""
    if words["case"] == "train":
        return {name: None for name in TRAINING}
    return {"full": full_variants, "gdn": gdn_variants, "dsa": dsa_variants}[words["case"]](words)


def kernel_call(words, function):
    """A function that computes one pass of a kernel."""
    *inputs, d_o = {"full": full_inputs, "gdn": gdn_inputs, "dsa": dsa_inputs}[words["case"]](words)
    if words["pass"] == "forward":
        return torch.no_grad()(lambda: (function(*inputs),))
    trained = [x.requires_grad_() for x in inputs[:3]]
    o = function(*inputs)
    return lambda: torch.autograd.grad(o, trained, d_o, retain_graph=True)


def compiled_form(function):
    """What torch.compile makes of a function whose backward is called again and again."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return torch.compile(function)


def measure(words, name, repetitions):
    """Seconds of some calls of a variant, the losses of training, and the numbers that were computed."""
    plain = name.removesuffix(", compiled")
    compiled = plain != name
    if words["case"] == "train":
        seconds, steps = sample(words, repetitions, training_step(words, plain, compiled))
        return seconds, [loss for loss, _ in steps], [number for step in steps for number in step]
    function = variants_of(words)[plain]
    seconds, results = sample(words, repetitions, kernel_call(words, compiled_form(function) if compiled else function))
    rows = [x.reshape(-1, *x.shape[-2:]).transpose(0, 1).flatten() for x in results]
    return seconds, [], torch.cat(rows).tolist()


def choose(words):
    """Times all variants: the fastest one, and why others do not work."""
    times, failures = {}, {}

    for name in variants_of(words):
        try:
            times[name] = statistics.median(measure(words, name, 3)[0])
        except RuntimeError as error:  # a backend that this build of PyTorch does not have
            failures[name] = (str(error).splitlines() or [type(error).__name__])[0]
    return {"variant": min(times, key=times.get), "times": times, "failures": failures}


def main():
    """Does what the words ask."""
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    for name in ("tokens", "heads", "dim", "repetitions", "threads"):
        words[name] = int(words[name])
    torch.set_num_threads(words["threads"])
    if words.get("variant") == "choose":
        print(json.dumps(choose(words)))
        return
    name = words.get("variant") or next(iter(variants_of(words)))
    seconds, losses, values = measure(words, name, words["repetitions"])
    with open(words["values"], "wb") as file:
        array.array("f", values).tofile(file)
    version, vectors = torch.__version__, torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"seconds": seconds, "losses": losses, "version": version, "vectors": vectors}))


if __name__ == "__main__":
    main()
