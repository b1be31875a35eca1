"""Language models distilled from Llama as their authors publish them, tiny and random: token by token and head by head
in float64, from the published formulas, with nothing of ours in it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

D_MODEL, ROWS, D_FF = 64, 288, 44
Step = Callable[[Tensor], Tensor]  # a token's vector -> what the layer makes of it; it remembers the tokens before


class Distilled:
    """A checkpoint, and what it computes.

    Attributes:
        tensors: by published name, float32.
        files: name -> the settings in it.
        names: of the embeddings, the last norm and the block.
        mixers: of each block, (its tensors) -> a mixer that has read nothing.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], files: dict[str, dict], names: tuple[str, str, str],
        mixers: list[tuple[str, Callable[[dict[str, Tensor]], Step]]], eps: float,
    ) -> None:  # fmt: skip
        self.files, self.names, self.mixers, self.eps = files, names, mixers, eps
        noise = torch.Generator().manual_seed(5)
        self.tensors = {name: _random(name, shape, noise) for name, shape in shapes.items()}

    def save(self, path: Path) -> None:
        path.mkdir()
        for name, settings in self.files.items():
            (path / name).write_text(json.dumps(settings))
        torch.save(self.tensors, path / "pytorch_model.bin")

    def begin(self) -> Step:
        """Token ids -> logits, one after another."""
        wide = {name: tensor.double() for name, tensor in self.tensors.items()}
        embedding, last, block = self.names
        mixers = [
            make(_part(wide, f"{block.format(index)}.{own}.")) for index, (own, make) in enumerate(self.mixers)
        ]

        def step(token: Tensor) -> Tensor:
            x = wide[embedding][token]
            for index, mixer in enumerate(mixers):
                p = _part(wide, f"{block.format(index)}.")
                x = x + mixer(rms(x, self.eps) * p["input_layernorm.weight"])
                inside = rms(x, self.eps) * p["post_attention_layernorm.weight"]
                inside = silu(p["mlp.gate_proj.weight"] @ inside) * (p["mlp.up_proj.weight"] @ inside)
                x = x + p["mlp.down_proj.weight"] @ inside
            return wide.get("lm_head.weight", wide[embedding]) @ (rms(x, self.eps) * wide[last])

        return step

    def __call__(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """(batch, seqlen) -> logits."""
        rows = [torch.stack(list(map(self.begin(), row))) for row in ids]
        return SimpleNamespace(logits=torch.stack(rows))

    def generate(self, ids: Tensor, max_new_tokens: int, **settings: Any) -> Tensor:
        """(1, seqlen) -> (1, seqlen + max_new_tokens), the likeliest token each time."""
        (row,), step = ids.tolist(), self.begin()
        for token in row:
            logits = step(token)
        for _ in range(max_new_tokens):
            row.append(int(logits.argmax()))
            logits = step(row[-1])
        return torch.tensor([row])


def _random(name: str, shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    random = torch.randn(shape, generator=noise)
    if "embed" in name:
        return random
    if name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
        return random - 1
    if len(shape) == 1:
        return 0.3 * random + (0.0 if name.endswith("bias") else 1.0)
    return 2 * random / math.prod(shape[1:]) ** 0.5


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


class Convolution:
    """Of each channel with its own last inputs."""

    def __init__(self, p: dict[str, Tensor], act: Callable[[Tensor], Tensor]) -> None:
        self.weight, self.act = p["conv1d.weight"][:, 0], act
        self.bias = p.get("conv1d.bias", torch.zeros(len(self.weight)))
        self.seen = [torch.zeros(len(self.weight), dtype=torch.float64)] * self.weight.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        self.seen = [*self.seen[1:], x]
        return self.act(sum(tap * x for tap, x in zip(self.weight.T, self.seen, strict=True)) + self.bias)


def blocks(layers: str, mixers: list[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Shapes of blocks of a mixer and a feed-forward layer."""
    shapes = {}
    for index, mixer in enumerate(mixers):
        own = {
            **mixer, "input_layernorm.weight": (D_MODEL,), "post_attention_layernorm.weight": (D_MODEL,),
            "mlp.gate_proj.weight": (D_FF, D_MODEL), "mlp.up_proj.weight": (D_FF, D_MODEL),
            "mlp.down_proj.weight": (D_MODEL, D_FF),
        }  # fmt: skip
        shapes |= {f"{layers.format(index)}.{name}": shape for name, shape in own.items()}
    return shapes


def discrete_mamba2(p: dict[str, Tensor], n_v_heads: int, n_qk_heads: int, d_state: int, act: Callable) -> Step:
    """The mixer of Llamba: the decay of a head is exp(-softplus(a)) = sigmoid(-a)."""
    d_inner, conv = p["out_proj.weight"].shape[1], Convolution(p, act)
    headdim, keys = d_inner // n_v_heads, n_qk_heads * d_state
    states = [torch.zeros(headdim, d_state, dtype=torch.float64)] * n_v_heads

    def step(u: Tensor) -> Tensor:
        projected = p["in_proj.weight"] @ u + p.get("in_proj.bias", 0.0)
        xBC, z, a = projected.split([d_inner + 2 * keys, d_inner, n_v_heads])
        x, B, C = conv(xBC).split([d_inner, keys, keys])
        y = []
        for head, own in enumerate(x.split(headdim)):
            group = head // (n_v_heads // n_qk_heads)
            key, query = (t[group * d_state : (group + 1) * d_state] for t in (B, C))
            states[head] = torch.sigmoid(-a[head]) * states[head] + torch.outer(own, key)
            y.append(states[head] @ query + p["D"][head] * own)
        gated = torch.cat(y) * silu(z + p.get("z_bias", 0.0))
        return p["out_proj.weight"] @ gated + p.get("out_proj.bias", 0.0)

    return step


def llamba(**options) -> Distilled:
    ssm = {
        "d_state": 6, "n_v_heads": 8, "n_qk_heads": 8, "expand": 1, "chunk_size": 16, "activation": "identity",
        "bias": False, **options.pop("ssm_cfg", {}),
    }  # fmt: skip
    settings = {
        "model_type": "llamba", "architectures": ["LlambaLMHeadModel"], "vocab_size": ROWS - 3, "d_model": D_MODEL,
        "tie_embeddings": True, "pad_vocab_size_multiple": 8, "lm_head_bias": False, "n_layer": 2,
        "resid_dropout": 0.0, "norm_epsilon": 1e-5, "ssm_cfg": ssm,
        "mlp_cfg": {"intermediate_size": D_FF, "bias": False, "act_fn": "silu"}, **options,
    }  # fmt: skip
    d_inner = ssm["expand"] * D_MODEL
    channels = d_inner + 2 * ssm["n_qk_heads"] * ssm["d_state"]
    rows = channels + d_inner + ssm["n_v_heads"]
    mixer = {
        "in_proj.weight": (rows, D_MODEL), "conv1d.weight": (channels, 1, ssm.get("d_conv", 4)),
        "D": (ssm["n_v_heads"],), "out_proj.weight": (D_MODEL, d_inner),
    }  # fmt: skip
    mixer |= {"in_proj.bias": (rows,), "out_proj.bias": (D_MODEL,)} if ssm["bias"] else {"z_bias": (d_inner,)}
    mixer |= {"conv1d.bias": (channels,)} if ssm.get("conv_bias", True) else {}
    mixer = {f"mixer.{name}": shape for name, shape in mixer.items()}
    block = "backbone.layers.{}"
    shapes = {
        "backbone.embedding.weight": (ROWS, D_MODEL), "backbone.final_layernorm.weight": (D_MODEL,),
        **blocks(block, [mixer] * settings["n_layer"]),
    }  # fmt: skip
    if not settings["tie_embeddings"]:
        shapes["lm_head.weight"] = (ROWS, D_MODEL)
    act = {"identity": lambda x: x, "silu": silu}[ssm["activation"]]

    def make(p: dict[str, Tensor]) -> Step:
        return discrete_mamba2(p, ssm["n_v_heads"], ssm["n_qk_heads"], ssm["d_state"], act)

    names = "backbone.embedding.weight", "backbone.final_layernorm.weight", block
    return Distilled(shapes, {"config.json": settings}, names, [("mixer", make)] * settings["n_layer"], 1e-5)


def attention(p: dict[str, Tensor], heads: int, kv_heads: int, theta: float) -> Step:
    """Llama's, over all tokens so far."""
    headdim = len(p["q_proj.weight"]) // heads
    turns = theta ** -(torch.arange(0, headdim, 2, dtype=torch.float64) / headdim)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def rotated(x: Tensor, place: int) -> Tensor:
        one, other = x.unflatten(0, (-1, headdim)).chunk(2, dim=-1)
        cos, sin = (place * turns).cos(), (place * turns).sin()
        return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)

    def step(u: Tensor) -> Tensor:
        place = len(keys)
        query = rotated(p["q_proj.weight"] @ u, place)
        keys.append(rotated(p["k_proj.weight"] @ u, place))
        values.append((p["v_proj.weight"] @ u).unflatten(0, (-1, headdim)))
        read = []
        for head in range(heads):
            own = head // (heads // kv_heads)
            scores = torch.stack([key[own] @ query[head] for key in keys]) / math.sqrt(headdim)
            read.append(sum(w * value[own] for w, value in zip(scores.softmax(0), values, strict=True)))
        return p["o_proj.weight"] @ torch.cat(read)

    return step


def mamba1_heads(p: dict[str, Tensor], d_state: int) -> Step:
    """The mixer of MambaInLlama with Mamba: heads of d_state channels, several of C to one of x and B."""
    conv, A = Convolution(p, silu), -p["A_log"].exp()
    share = len(p["C_proj.weight"]) // len(p["B_proj.weight"])
    state = torch.zeros_like(A)

    def spread(t: Tensor) -> Tensor:
        """(heads of x, d_state) -> (heads of C, d_state), a row for each."""
        rows = [row for row in t.unflatten(0, (-1, d_state)) for _ in range(share)]
        return torch.stack(rows)

    def step(u: Tensor) -> Tensor:
        x = conv(spread(p["in_proj_x.weight"] @ u).flatten())
        B, C = spread(p["B_proj.weight"] @ u), (p["C_proj.weight"] @ u).unflatten(0, (-1, d_state))
        dt = torch.log1p(torch.exp(p["dt_proj.weight"] @ (p["dt_proj_down.weight"] @ u) + p["dt_proj.bias"]))
        y = torch.empty_like(x)
        for channel in range(len(x)):
            head = channel // d_state
            state[channel] = (dt[channel] * A[channel]).exp() * state[channel] + dt[channel] * x[channel] * B[head]
            y[channel] = state[channel] @ C[head] + p["D"][channel] * x[channel]
        return p["out_proj.weight"] @ (y * silu(p["in_proj_z.weight"] @ u))

    return step


def mamba2_heads(p: dict[str, Tensor], heads: int, d_xb: int, norm: str) -> Step:
    """The mixer of MambaInLlama with Mamba-2.

    Args:
        norm: none, first or behind the gate.
    """
    d_inner, conv, A = p["out_proj.weight"].shape[1], Convolution(p, silu), -p["A_log"].exp()
    size = d_inner // heads
    states = [torch.zeros(size, size, dtype=torch.float64)] * heads

    def step(u: Tensor) -> Tensor:
        z, xBC, dt = (p["in_proj.weight"] @ u).split([d_inner, d_inner + 2 * d_xb, heads])
        x, B, C = conv(xBC).split([d_xb, d_xb, d_inner])
        dt = torch.log1p(torch.exp(dt + p["dt_bias"]))
        y = []
        for head in range(heads):
            start = head // (d_inner // d_xb) * size
            own, key, query = x[start : start + size], B[start : start + size], C[head * size : (head + 1) * size]
            states[head] = (dt[head] * A[head]).exp() * states[head] + torch.outer(dt[head] * own, key)
            y.append(states[head] @ query + p["D"][head] * own)
        y, gates = torch.stack(y), silu(z).unflatten(0, (heads, size))
        y = {"none": lambda: y * gates, "first": lambda: rms(y, 1e-5) * gates, "behind": lambda: rms(y * gates, 1e-5)}[
            norm
        ]()
        return p["out_proj.weight"] @ (y.flatten() * p.get("norm.weight", 1.0))

    return step


LLAMA_HEADS, LLAMA_KV_HEADS, LLAMA_EPS = 4, 2, 1e-3


def _in_llama(mixer: dict, make: Callable[[dict[str, Tensor]], Step], mamba: dict, attends: list[int]) -> Distilled:
    depth, keys = 3, LLAMA_KV_HEADS * D_MODEL // LLAMA_HEADS
    attend = {"q_proj": D_MODEL, "k_proj": keys, "v_proj": keys, "o_proj": D_MODEL}
    attend = {f"self_attn.{name}.weight": (rows, D_MODEL) for name, rows in attend.items()}
    mixer = {f"mamba.{name}": shape for name, shape in mixer.items()}
    shapes = {
        "model.embed_tokens.weight": (ROWS, D_MODEL), "model.norm.weight": (D_MODEL,),
        "lm_head.weight": (ROWS, D_MODEL),
        **blocks("model.layers.{}", [attend if index in attends else mixer for index in range(depth)]),
    }  # fmt: skip
    files = {
        "config.json": {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": D_MODEL, "vocab_size": ROWS,
            "intermediate_size": D_FF, "num_hidden_layers": depth, "num_attention_heads": LLAMA_HEADS,
            "num_key_value_heads": LLAMA_KV_HEADS, "rms_norm_eps": LLAMA_EPS, "rope_theta": 300.0, "hidden_act": "silu",
            "tie_word_embeddings": False, "_name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
        },
        "mamba_config.json": {
            "d_model": D_MODEL, "rms_norm_eps": LLAMA_EPS, "vocab_size": None, "intermediate_size": D_FF,
            "hidden_act": "silu", "n_layer": depth, "attn_layers": attends, **mamba,
        },
    }  # fmt: skip

    def attention_of(p: dict[str, Tensor]) -> Step:
        return attention(p, LLAMA_HEADS, LLAMA_KV_HEADS, 300.0)

    mixers = [("self_attn", attention_of) if index in attends else ("mamba", make) for index in range(depth)]
    names = "model.embed_tokens.weight", "model.norm.weight", "model.layers.{}"
    return Distilled(shapes, files, names, mixers, LLAMA_EPS)


def mamba1_in_llama(attends=(1,), d_xb: int = 32, **ssm) -> Distilled:
    d_state, rank = ssm.get("d_state", 16), ssm.get("dt_rank", D_MODEL // 16)
    mixer = {
        "in_proj_x.weight": (d_xb, D_MODEL), "in_proj_z.weight": (D_MODEL, D_MODEL), "B_proj.weight": (d_xb, D_MODEL),
        "C_proj.weight": (D_MODEL, D_MODEL), "dt_proj_down.weight": (rank, D_MODEL), "dt_proj.weight": (D_MODEL, rank),
        "dt_proj.bias": (D_MODEL,), "conv1d.weight": (D_MODEL, 1, 4), "conv1d.bias": (D_MODEL,),
        "A_log": (D_MODEL, d_state), "D": (D_MODEL,), "out_proj.weight": (D_MODEL, D_MODEL),
    }  # fmt: skip
    mamba = {"d_xb": d_xb, "ssm_cfg": {"expand": 1, **ssm}}
    return _in_llama(mixer, lambda p: mamba1_heads(p, d_state), mamba, list(attends))


def mamba2_in_llama(attends=(0, 2), d_xb: int = 32, **ssm) -> Distilled:
    heads = 4
    channels = D_MODEL + 2 * d_xb
    mixer = {
        "in_proj.weight": (D_MODEL + channels + heads, D_MODEL), "conv1d.weight": (channels, 1, 4),
        "conv1d.bias": (channels,), "dt_bias": (heads,), "A_log": (heads,), "D": (heads,),
        "out_proj.weight": (D_MODEL, D_MODEL),
    }  # fmt: skip
    norm = ("first" if ssm.get("norm_before_gate") else "behind") if ssm.get("rmsnorm", True) else "none"
    mixer |= {} if norm == "none" else {"norm.weight": (D_MODEL,)}
    settings = {"expand": 1, "ngroups": heads, "d_state": D_MODEL // heads, **ssm}
    mamba = {"d_xb": d_xb, "d_inner": D_MODEL, "ssm_cfg": settings}
    return _in_llama(mixer, lambda p: mamba2_heads(p, heads, d_xb, norm), mamba, list(attends))
