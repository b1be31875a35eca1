"""Models that others wrote, with random weights, must compute what ours compute: transformers' Mamba-2, Llama
and Bamba (Mamba-2, attention and MLP in one stack), and timm's vision transformers. Nothing is downloaded."""

import copy

import pytest
import torch
from torch import Tensor

from cobra.image import ImageConfig
from cobra.lm import LanguageModel, LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.vision_encoder import FusedEncoder, FusedEncoderConfig, TimmEncoder, TimmEncoderConfig
from tests.tolerance import assert_close
from vision_scan.errors import UserError

VOCAB = 61


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far from their start, where norms are 1, biases 0 and a wrong mapping goes unnoticed."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn(parameter.shape, generator=noise)
            if name.endswith("A_log"):
                parameter.copy_(random)
            elif name.endswith("dt_bias"):
                parameter.copy_(random - 1)
            elif parameter.dim() == 1:
                parameter.add_(random, alpha=0.3)
            elif "embed" in name:
                parameter.copy_(random)
            else:
                parameter.copy_(random * 2 / parameter[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)


def convert(source: torch.nn.Module, ours: LanguageModel, renames: dict[str, str]) -> LanguageModel:
    """Copies every tensor of `source` under its new name; both sides must be used up."""
    tensors = {}
    for name, tensor in source.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        assert name not in tensors
        tensors[name] = tensor.clone()
    ours.load_state_dict(tensors, strict=True)
    return ours.eval().requires_grad_(False)


MAMBA2 = {
    "plain": {},
    "two groups, chunks of 4": {"n_groups": 2, "chunk_size": 4},
    "dt clamped, short convolution": {"time_step_limit": (0.15, 0.6), "conv_kernel": 2, "chunk_size": 7},
    "tied, many heads": {"tie_word_embeddings": True, "head_dim": 8, "num_heads": 12, "expand": 3},
}


def mamba2_pair(options: dict):
    from transformers import Mamba2Config as TheirConfig
    from transformers import Mamba2ForCausalLM

    settings = {
        "hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 10, "n_groups": 1, "expand": 2,
        "num_hidden_layers": 3, "vocab_size": VOCAB, "chunk_size": 16, "layer_norm_epsilon": 1e-3,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options,
    }  # fmt: skip
    theirs = randomise(Mamba2ForCausalLM(TheirConfig(**settings)))
    layer = Mamba2Config(
        d_state=settings["state_size"],
        headdim=settings["head_dim"],
        expand=settings["expand"],
        ngroups=settings["n_groups"],
        d_conv=settings.get("conv_kernel", 4),
        chunk_size=settings["chunk_size"],
        norm_eps=1e-3,
        dt_limit=settings.get("time_step_limit", (0.0, float("inf"))),
    )
    ours = LanguageModel(
        LMConfig(
            d_model=settings["hidden_size"],
            vocab_size=VOCAB,
            layers=(layer,) * 3,
            norm_eps=1e-3,
            tie_word_embeddings=settings["tie_word_embeddings"],
        )
    )
    return theirs, convert(theirs, ours, {"backbone.embeddings.": "embedding.", "backbone.": ""})


TRANSFORMER_NAMES = {
    "model.embed_tokens.": "embedding.",
    "model.norm.": "norm_f.",
    "model.final_layernorm.": "norm_f.",
    "model.": "",
}


def interleaved(num_layers: int, firsts: list[str], mlp: str, norm: str) -> dict[str, str]:
    """Names of blocks of a mixer and an MLP as those of a stack of twice as many layers."""
    renames = dict(TRANSFORMER_NAMES)
    for index in reversed(range(num_layers)):
        old, first, second = f"layers.{index}.", f"layers.{2 * index}.", f"layers.{2 * index + 1}."
        renames |= {
            f"{old}input_layernorm.": f"@{first}norm.",
            f"{old}{firsts[index]}.": f"@{first}mixer.",
            f"{old}{norm}.": f"@{second}norm.",
            f"{old}{mlp}.": f"@{second}mixer.",
        }
    return {**renames, "@": ""}


LLAMA = {
    "grouped queries": {},
    "tied, another theta": {
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}
    },
    "one key head, wide heads": {"num_key_value_heads": 1, "head_dim": 20},
    "as many keys as queries": {"num_key_value_heads": 4},
}  # fmt: skip


def llama_pair(options: dict):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 44, "num_hidden_layers": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **options,
    }  # fmt: skip
    theirs = randomise(LlamaForCausalLM(LlamaConfig(**settings)))
    attention = AttentionConfig(
        num_heads=4,
        num_kv_heads=settings["num_key_value_heads"],
        headdim=settings["head_dim"],
        rope_theta=settings["rope_parameters"]["rope_theta"],
    )
    ours = LanguageModel(
        LMConfig(
            d_model=32,
            vocab_size=VOCAB,
            layers=(attention, MLPConfig(d_ff=44)) * 2,
            norm_eps=1e-3,
            tie_word_embeddings=settings["tie_word_embeddings"],
        )
    )
    names = interleaved(2, ["self_attn"] * 2, "mlp", "post_attention_layernorm")
    return theirs, convert(theirs, ours, names)


def bamba_pair(options: dict):
    from transformers import BambaConfig, BambaForCausalLM

    config = BambaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=44,
        num_hidden_layers=3, attn_layer_indices=[1], rms_norm_eps=1e-3, vocab_size=VOCAB,
        mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=6, mamba_chunk_size=8,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.rope_parameters["partial_rotary_factor"] = 1.0  # theirs turns half of each head by default
    theirs = randomise(BambaForCausalLM(config))
    mlp = MLPConfig(d_ff=44)
    mamba2 = Mamba2Config(d_state=6, headdim=8, ngroups=2, chunk_size=8, norm_eps=1e-3)
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8)
    ours = LanguageModel(
        LMConfig(
            d_model=32,
            vocab_size=VOCAB,
            layers=(mamba2, mlp, attention, mlp, mamba2, mlp),
            norm_eps=1e-3,
            tie_word_embeddings=False,
        )
    )
    names = interleaved(3, ["mamba", "self_attn", "mamba"], "feed_forward", "pre_ff_layernorm")
    return theirs, convert(theirs, ours, names)


PAIRS = {
    **{f"mamba2: {name}": (mamba2_pair, options) for name, options in MAMBA2.items()},
    **{f"llama: {name}": (llama_pair, options) for name, options in LLAMA.items()},
    "bamba": (bamba_pair, {}),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    pytest.importorskip("transformers")
    make, options = PAIRS[request.param]
    return *make(options), request.param


@torch.no_grad()
def test_logits(pair):
    theirs, ours, _ = pair
    ids = tokens(3, 37)
    expected = theirs(ids, use_cache=False).logits
    assert_close("float32", ours(ids)[0], expected, 1e-4)
    # Theirs computes norms and scans in float32 even so, which is all the difference that may be left.
    expected = copy.deepcopy(theirs).double()(ids, use_cache=False).logits
    assert_close("float64", copy.deepcopy(ours).double()(ids)[0], expected, 3e-6)


@torch.no_grad()
def test_every_tensor_counts(pair):
    """The comparison of logits would notice any wrong tensor: each of them moves the logits."""
    _, ours, _ = pair
    ids = tokens(1, 37)
    before = ours(ids)[0]
    for name, parameter in ours.named_parameters():
        kept = parameter.clone()
        parameter.mul_(1.05)
        moved = ((ours(ids)[0] - before).norm() / before.norm()).item()
        parameter.copy_(kept)
        assert moved > 3e-4, (name, moved)


def greedy(ours: LanguageModel, ids: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    logits, state = ours(ids, attention_mask=mask)
    new = []
    for _ in range(count):
        new.append(logits[:, -1].argmax(-1, keepdim=True))
        logits, state = ours(new[-1], state=state, overwrite_state=True)
    return torch.cat(new, dim=1)


def their_greedy(theirs, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": None}
    return theirs.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


@torch.no_grad()
def test_greedy_generation(pair):
    theirs, ours, name = pair
    if "clamped" in name:
        pytest.skip("transformers' single step does not clamp dt, its prefill does")
    ids = tokens(1, 11, seed=2)
    expected = their_greedy(theirs, ids, torch.ones_like(ids), 24)
    assert greedy(ours, ids, 24).tolist() == expected.tolist()
    assert len(set(expected[0].tolist())) > 4  # not one token for ever


@torch.no_grad()
def test_greedy_generation_of_a_batch_with_left_padding(pair):
    """Each of their rows alone, as their handling of padded batches is not ours to rely on."""
    theirs, ours, name = pair
    if "clamped" in name:
        pytest.skip("transformers' single step does not clamp dt, its prefill does")
    rows = [tokens(length, seed=length) for length in (4, 13, 7)]
    ids, mask = torch.zeros(3, 13, dtype=torch.int64), torch.zeros(3, 13, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, -len(row) :], mask[index, -len(row) :] = row, 1
    alone = [their_greedy(theirs, row[None], torch.ones_like(row[None]), 16) for row in rows]
    assert greedy(ours, ids, 16, mask).tolist() == torch.cat(alone).tolist()


TOWERS = {
    "class token": ("vit_tiny_patch16_224", 64, 48),
    "class and register tokens": ("vit_small_patch14_reg4_dinov2.lvd142m", 56, 70),
    "no prefix": ("vit_medium_patch16_gap_240", 32, 48),
}


def timm_features(encoder: TimmEncoder, name: str, pixels: Tensor, block: int) -> Tensor:
    """timm's own features of a block of the whole model, (n, height, width, d), mean and std by hand."""
    import timm

    tower = encoder.tower
    whole = timm.create_model(name, pretrained=False, num_classes=0, img_size=tuple(pixels.shape[-2:])).eval()
    missing, unexpected = whole.load_state_dict(tower.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith(("blocks.", "norm.", "attn_pool.")) for key in missing)
    data = timm.data.resolve_model_data_config(whole)
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return whole.forward_intermediates(
        (pixels - mean) / std, norm=False, output_fmt="NLC", intermediates_only=True
    )[block]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("block", [-2, -1, 3])
@torch.no_grad()
def test_timm_features_are_those_of_the_block(tower, block):
    pytest.importorskip("timm")
    name, height, width = TOWERS[tower]
    config = TimmEncoderConfig(name=name, block=block)
    encoder = TimmEncoder(config, ImageConfig(height=height, width=width)).eval()
    torch.nn.init.normal_(encoder.tower.pos_embed)  # a mistaken place would go unnoticed otherwise
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3))
    features = encoder(pixels)
    rows, columns = config.grid(height, width)
    assert features.shape == (2, rows, columns, encoder.d_model)
    expected = timm_features(encoder, name, pixels, block)
    assert expected.shape[1] == rows * columns
    assert_close(tower, features.flatten(1, 2), expected, 1e-5)


@torch.no_grad()
def test_timm_features_do_not_contain_prefix_tokens():
    """Independently of timm's own reshaping: the tokens of the block by a hook, the first five dropped."""
    pytest.importorskip("timm")
    config = TimmEncoderConfig(name="vit_small_patch14_reg4_dinov2.lvd142m")
    encoder = TimmEncoder(config, ImageConfig(height=42, width=56)).eval()
    assert encoder.tower.num_prefix_tokens == 5
    caught = []
    encoder.tower.blocks[-1].register_forward_hook(lambda *args: caught.append(args[-1]))
    features = encoder(torch.rand(1, 3, 42, 56))
    assert len(encoder.tower.blocks) == 11  # the last of 12 is not needed for the last but one
    assert torch.equal(features.flatten(1, 2), caught[0][:, 5:])


@torch.no_grad()
def test_fused_towers_are_concatenated_in_their_order():
    pytest.importorskip("timm")
    first = TimmEncoderConfig(name="vit_tiny_patch16_224", block=1)
    second = TimmEncoderConfig(name="vit_wee_patch16_reg1_gap_256", block=0)
    image = ImageConfig(height=32, width=48)
    encoder = FusedEncoder(FusedEncoderConfig(towers=(first, second)), image).eval()
    pixels = torch.rand(2, 3, 32, 48)
    features = encoder(pixels)
    assert encoder.d_model == 192 + 256 and features.shape == (2, 2, 3, 448)
    for tower, config, part in zip(
        encoder.towers, (first, second), features.split([192, 256], dim=-1), strict=True
    ):
        expected = timm_features(tower, config.name, pixels, config.block)
        assert_close(config.name, part.flatten(1, 2), expected, 1e-5)


def test_towers_that_timm_does_not_have_or_that_lack_the_block():
    pytest.importorskip("timm")
    image = ImageConfig(height=32, width=32)
    with pytest.raises(UserError, match="vit_tinny_patch16_224"):
        TimmEncoder(TimmEncoderConfig(name="vit_tinny_patch16_224"), image)
    for block in (12, -13):
        with pytest.raises(UserError, match="12 blocks"):
            TimmEncoder(TimmEncoderConfig(name="vit_tiny_patch16_224", block=block), image)
    with pytest.raises(UserError, match="patchNN"):
        TimmEncoderConfig(name="resnet50").grid(32, 32)
