"""Ways of reading the same text, for law 1, over a stack of every kind of layer.

A way takes the model and rows of unequal length, and returns for each row the logits of its tokens and its
state afterwards. Every way must agree with one shot.
"""


import copy
import functools
from dataclasses import fields, replace

import torch
from torch import Tensor

from cobra.lm import LAYERS, LanguageModel, LMConfig, State
from cobra.lm.attention import AttentionConfig, Llama3RopeScaling
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mamba3 import Mamba3Config
from cobra.lm.mlp import MLPConfig
from cobra.lm.moe import MoEConfig
from cobra.lm.shared_attention import SharedBlockConfig
from tests.tolerance import assert_close

D_MODEL, VOCAB = 16, 29
LENGTHS = [23, 9, 2]  # longer and shorter than the window, the convolution and the chunks below
MORE = 6  # tokens read afterwards, from the state that a way of reading left

# The name of a field of a layer's Config decides its small size: a further kind is tested by being in LAYERS.
SIZES = {
    "d_state": 5, "headdim": 8, "chunk_size": 4, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24, "num_experts": 5,
    "top_k": 2, "num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 5, "head_v_dim": 6,
    "mixers": (
        Mamba2Config(d_state=5, headdim=8, chunk_size=4),
        AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8),
        MLPConfig(d_ff=10),
    ),
    "shared": SharedBlockConfig(
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8), mlp=MLPConfig(d_ff=24, activation="gelu")
    ),
    "mamba": Mamba2Config(d_state=5, headdim=8, chunk_size=4), "attention_rank": 3, "mlp_rank": 2,
}  # fmt: skip


# Of the three pairs of channels below, the first stays, the second is blended, the third is slowed.
SCALING = Llama3RopeScaling(
    factor=4.0, low_freq_factor=0.05, high_freq_factor=1.0, original_max_position_embeddings=10
)


def small(kind: str):
    config = LAYERS[kind].Config
    return config(**{field.name: SIZES[field.name] for field in fields(config) if field.name in SIZES})


def stacks() -> dict[str, tuple]:
    """Two layers of each kind in LAYERS, and mixtures."""
    mamba2 = Mamba2Config(d_state=5, headdim=8, chunk_size=4)
    grouped = Mamba2Config(
        d_state=3, headdim=4, ngroups=2, d_conv=3, chunk_size=7, norm_before_gate=True, dt_limit=(0.1, 0.9)
    )
    mimo = Mamba3Config(d_state=6, headdim=4, rank=4, ngroups=2, rope_fraction=1.0, is_outproj_norm=True, chunk_size=8)
    gqa = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8)
    window = AttentionConfig(num_heads=2, num_kv_heads=1, headdim=6, window=5, rope_theta=100.0)
    nope = AttentionConfig(num_heads=3, num_kv_heads=3, headdim=5, rope_theta=None)
    biased = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8, qkv_bias=True)
    scaled = AttentionConfig(num_heads=2, num_kv_heads=1, headdim=6, window=7, rope_scaling=SCALING)
    gated = AttentionConfig(
        num_heads=4, num_kv_heads=2, headdim=8, rotary_dim=4, qk_norm=True, gated=True, o_bias=True, qkv_bias=True
    )
    options = Mamba2Config(
        d_state=5, headdim=4, d_inner=40, d_ssm=24, chunk_size=4, rmsnorm=False, bias=True, conv_bias=False,
        D_has_hdim=True,
    )  # fmt: skip
    normed = Mamba2Config(d_state=5, headdim=8, d_inner=24, d_ssm=16, ngroups=2, chunk_size=4, norm_before_gate=True)
    linear = replace(grouped, conv_activation=None)
    discrete = Mamba2Config(
        d_state=5, headdim=4, ngroups=8, expand=2, chunk_size=4, rmsnorm=False, conv_activation=None, z_bias=True,
        discrete=True, dt_limit=(0.0, 0.4),
    )  # fmt: skip
    heads = Mamba2Config(d_state=6, headdim=6, d_inner=24, ngroups=4, d_xb=12, chunk_size=4)
    plain = Mamba1Config(d_state=5, d_inner=20, inner_norms="plain", bias=True, conv_bias=False)
    shared = Mamba1Config(d_state=4, d_inner=24, d_xb=8)
    learned = Mamba1Config(d_state=5, dt_rank=3, inner_norms="learned", norm_eps=1e-3)
    relu2 = MLPConfig(d_ff=24, activation="relu2", gated=False, bias=True)
    experts = MoEConfig(
        num_experts=6, top_k=2, d_ff=10, gated=False, activation="relu2", scores="sigmoid", routed_scale=1.7,
        num_groups=3, top_groups=2, shared_d_ff=7, shared_gate=True, d_latent=12,
    )  # fmt: skip
    mlp = MLPConfig(d_ff=24)
    use = small("shared_attention")
    wide = SharedBlockConfig(attention=window, mlp=replace(mlp, bias=True), norm_eps=1e-3)
    other = replace(use, block=1, shared=wide, attention_rank=0)
    return {
        **{kind: (small(kind),) * 2 for kind in LAYERS},
        "mamba2 ngroups 2": (grouped,) * 2,
        "mamba3 rank 4": (mimo,) * 2,
        "transformer": (gqa, mlp) * 2,
        "window": (window, mlp, window),
        "nope": (nope, mlp, nope),
        "biases and scaled positions": (biased, mlp, scaled),
        "gated attention": (gated, relu2, gated),
        "mamba2 options": (options, normed, options),
        "mamba2 without an activation": (linear,) * 2,
        "discrete mamba2": (discrete, replace(normed, discrete=True, D_has_hdim=True)),
        "mamba1 norms": (plain, learned),
        "mamba1 heads": (shared, replace(shared, inner_norms="learned", d_xb=24, bias=True)),
        "mamba2 heads": (heads, replace(heads, discrete=True, dt_limit=(0.0, 0.4), d_xb=6)),
        "experts": (mamba2, experts, replace(experts, scores="softmax", norm_topk=False)),
        "two shared blocks": (use, other, replace(use, attention_rank=0, mlp_rank=0), other),
        "hybrid": (mamba2, mlp, gqa, grouped, window, mlp, nope, mamba2),
    }


STACKS = stacks()


@functools.cache
def build(stack: str) -> LanguageModel:
    """A model whose random weights make every logit depend on every token that it may see."""
    return lively(stacks()[stack])


def lively(layers) -> LanguageModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = LMConfig(d_model=D_MODEL, vocab_size=VOCAB, layers=layers, tie_word_embeddings=False)
        model = LanguageModel(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_bias", "A_log")):
                parameter.uniform_(-3, 1)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif "layers" in name:
                parameter.mul_(2)
    return model.requires_grad_(False)


@functools.cache
def cast(stack: str, dtype: torch.dtype) -> LanguageModel:
    return copy.deepcopy(build(stack)).to(dtype)


@functools.cache
def texts() -> tuple[Tensor, ...]:
    """Rows of LENGTHS[row] + MORE tokens."""
    noise = torch.Generator().manual_seed(1)
    return tuple(torch.randint(VOCAB, (length + MORE,), generator=noise) for length in LENGTHS)


def prompts() -> list[Tensor]:
    return [text[:-MORE] for text in texts()]


Reading = list[tuple[Tensor, State | None]]  # per row: logits (length, vocab), its state of batch 1


def one_shot(model, rows) -> Reading:
    return [(logits[0], state) for logits, state in (model(row[None]) for row in rows)]


def in_chunks(sizes=(1,), overwrite=False, capacity=None):
    """Each row alone, in chunks whose lengths go round."""

    def read(model, rows) -> Reading:
        reading = []
        for row in rows:
            state = None if capacity is None else model.allocate_state(1, capacity)
            logits, start, index = [], 0, 0
            while start < len(row):
                chunk = row[None, start : start + sizes[index % len(sizes)]]
                part, state = model(chunk, state=state, overwrite_state=overwrite)
                logits.append(part[0])
                start, index = start + chunk.shape[1], index + 1
            reading.append((torch.cat(logits), state))
        return reading

    return read


def padded(side: str):
    """All rows in one batch, in another order; what stands at the pads must not matter."""

    def read(model, rows) -> Reading:
        order, longest = [2, 0, 1], max(map(len, rows)) + 2
        noise = torch.Generator().manual_seed(2)
        ids = torch.randint(VOCAB, (len(rows), longest), generator=noise)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(order):
            spare = longest - len(rows[index])
            start = {"left": spare, "right": 0, "middle": 0, "both": spare // 2}[side]
            where = torch.arange(start, start + len(rows[index]))
            if side == "middle":  # a gap behind the first token, and one at the end
                where = torch.cat([where[:1], where[1:] + spare - 1])
            ids[place, where], mask[place, where] = rows[index], 1
        logits, state = model(ids, attention_mask=mask)
        places = [order.index(index) for index in range(len(rows))]
        return [(logits[p, mask[p].bool()], state.select(torch.tensor([p]))) for p in places]

    return read


def packed(model, rows) -> Reading:
    """Each row once behind both others, with pads at the seams; the state is that of the last segment."""
    reading = []
    for index in range(len(rows)):
        order = [*(other for other in range(len(rows)) if other != index), index]
        ids, segments = [], []
        for place, member in enumerate(order):
            ids += [torch.zeros(place, dtype=torch.int64), rows[member]]
            segments += [torch.full((place,), -1 - place), torch.full((len(rows[member]),), 3 * (2 - place))]
        seq_idx = torch.cat(segments)[None]
        logits, state = model(torch.cat(ids)[None], seq_idx=seq_idx)
        reading.append((logits[0, seq_idx[0] == 0], state))
    return reading


def packed_behind_a_state(model, rows) -> Reading:
    """Another row begun alone, then its rest from the state, with each row behind it."""
    reading = []
    for index, row in enumerate(rows):
        other = rows[index - 1]
        _, state = model(other[None, :1])
        ids = torch.cat([other[1:], row])[None]
        seq_idx = (torch.arange(ids.shape[1]) >= len(other) - 1).long()[None]
        logits, state = model(ids, seq_idx=seq_idx, state=state)
        reading.append((logits[0, -len(row) :], state))
    return reading


def packed_in_front(model, rows) -> Reading:
    """Each row begun alone, then its rest from the state, with the other rows behind it."""
    reading = []
    for index, row in enumerate(rows):
        others = [rows[other] for other in range(len(rows)) if other != index]
        begun, state = model(row[None, :1])
        ids = torch.cat([row[1:], *others])
        seq_idx = torch.cat([torch.full((len(part),), i) for i, part in enumerate([row[1:], *others])])
        logits, _ = model(ids[None], seq_idx=seq_idx[None], state=state)
        reading.append((torch.cat([begun[0], logits[0, : len(row) - 1]]), None))
    return reading


def scattered(overwrite: bool):
    """All rows in one batch, pads anywhere, read in chunks of 1 to 7 places: some hold nothing but pads."""

    def read(model, rows) -> Reading:
        noise = torch.Generator().manual_seed(3)
        total = 40
        ids = torch.randint(VOCAB, (len(rows), total), generator=noise)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for index, row in enumerate(rows):
            where = torch.randperm(total, generator=noise)[: len(row)].sort().values
            ids[index, where], mask[index, where] = row, True
        logits, state, start = [], None, 0
        while start < total:
            size = int(torch.randint(1, 8, (), generator=noise))
            chunk = slice(start, start + size)
            part, state = model(
                ids[:, chunk], attention_mask=mask[:, chunk], state=state, overwrite_state=overwrite
            )
            logits.append(part)
            start += size
        logits = torch.cat(logits, dim=1)
        return [(logits[i, mask[i]], state.select(torch.tensor([i]))) for i in range(len(rows))]

    return read


def ragged_steps(capacity: int):
    """All rows in one batch, each begun with another number of tokens, then decoded together in place; a row
    that has come to its end is padding from there on."""

    def read(model, rows) -> Reading:
        begun = [3, 1, 2]
        steps = max(len(row) - count for row, count in zip(rows, begun, strict=True))
        noise = torch.Generator().manual_seed(5)
        ids = torch.randint(VOCAB, (len(rows), 3 + steps), generator=noise)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for index, (row, count) in enumerate(zip(rows, begun, strict=True)):
            ids[index, 3 - count : 3 - count + len(row)] = row
            mask[index, 3 - count : 3 - count + len(row)] = True
        state = model.allocate_state(len(rows), capacity) if capacity else None
        logits, state = model(ids[:, :3], attention_mask=mask[:, :3], state=state)
        parts = [logits]
        for t in range(3, ids.shape[1]):
            one = slice(t, t + 1)
            logits, state = model(ids[:, one], attention_mask=mask[:, one], state=state, overwrite_state=True)
            parts.append(logits)
        logits = torch.cat(parts, dim=1)
        return [(logits[i, mask[i]], state.select(torch.tensor([i]))) for i in range(len(rows))]

    return read


WAYS = {
    "steps": in_chunks(),
    "steps overwritten": in_chunks(overwrite=True),
    "steps in reserved room": in_chunks(overwrite=True, capacity=12),
    "chunks 1 2 3": in_chunks((1, 2, 3)),
    "chunks 3 1 19": in_chunks((3, 1, 19)),
    "chunks 17 6 overwritten": in_chunks((17, 6), overwrite=True),
    "chunks 2 1 overwritten": in_chunks((2, 1), overwrite=True),
    "chunks in reserved room": in_chunks((2, 5), capacity=40),
    "padded left": padded("left"),
    "padded right": padded("right"),
    "padded on both sides": padded("both"),
    "padded in the middle": padded("middle"),
    "packed": packed,
    "packed behind a state": packed_behind_a_state,
    "packed in front": packed_in_front,
    "ragged steps overwritten": ragged_steps(0),
    "ragged steps in reserved room": ragged_steps(25),
    "scattered": scattered(False),
    "scattered overwritten": scattered(True),
}


def read_on(model, reading: Reading, stepwise: bool) -> Tensor:
    """The logits of all rows end to end, those of MORE tokens read from the states included."""
    parts = []
    for text, (logits, state) in zip(texts(), reading, strict=True):
        rest = text[None, -MORE:]
        if state is None:
            tail = model(text[None], logits_to_keep=MORE)[0]
        elif stepwise:
            steps, state = [], state.clone()
            for token in rest.split(1, dim=1):
                step, state = model(token, state=state, overwrite_state=True)
                steps.append(step)
            tail = torch.cat(steps, dim=1)
        else:
            tail, _ = model(rest, state=state)
        parts += [logits, tail[0]]
    return torch.cat(parts)


def truth(model) -> Tensor:
    return torch.cat([logits for logits, _ in one_shot(model, texts())])


@torch.no_grad()
def check(model: LanguageModel, way: str, ratio: float) -> None:
    reading = WAYS[way](model, prompts())
    for text, (_, state) in zip(texts(), reading, strict=True):
        assert state is None or state.lengths.tolist() == [len(text) - MORE]
    expected = truth(model)
    for stepwise in (False, True):
        assert_close(f"{way}, steps behind: {stepwise}", read_on(model, reading, stepwise), expected, ratio)
