"""Language models that others have released, beside those of Mamba and Mamba-2's authors: their layers and sizes.

Multipliers that some have beside their weights are multiplied into these (convert/hybrid.py), so that here they only
make the norms' epsilon smaller.
"""

from .attention import AttentionConfig, Llama3RopeScaling
from .mamba1 import Mamba1Config
from .mamba2 import Mamba2Config
from .mlp import MLPConfig
from .moe import MoEConfig
from .parallel import ParallelConfig
from .shared_attention import SharedAttentionConfig, SharedBlockConfig
from .stack import LMConfig


def _falcon_mamba(norm_eps: float) -> LMConfig:
    mamba = Mamba1Config(d_inner=8192, dt_rank=256, inner_norms="plain", norm_eps=norm_eps)
    return LMConfig(d_model=4096, vocab_size=65024, layers=(mamba,) * 64, tie_word_embeddings=False)


def _bamba_9b() -> LMConfig:
    mamba = Mamba2Config(d_inner=8192)
    attention = AttentionConfig(num_heads=32, num_kv_heads=8, headdim=128, rotary_dim=64)
    mixers = [attention if index in (9, 18, 27) else mamba for index in range(32)]
    layers = tuple(layer for mixer in mixers for layer in (mixer, MLPConfig(d_ff=14336)))
    return LMConfig(d_model=4096, vocab_size=128256, layers=layers, tie_word_embeddings=False)


def _granite_h_micro() -> LMConfig:
    eps = 1e-5
    mamba = Mamba2Config(d_inner=4096, norm_eps=eps)
    attention = AttentionConfig(num_heads=32, num_kv_heads=8, headdim=64, rope_theta=None)
    mixers = [attention if index in (5, 15, 25, 35) else mamba for index in range(40)]
    layers = tuple(layer for mixer in mixers for layer in (mixer, MLPConfig(d_ff=8192)))
    return LMConfig(d_model=2048, vocab_size=100352, layers=layers, norm_eps=eps / 12**2)


def _nemotron_h_8b() -> LMConfig:
    kinds = {
        "M": Mamba2Config(d_inner=8192, ngroups=8, chunk_size=128),
        "-": MLPConfig(d_ff=21504, activation="relu2", gated=False),
        "*": AttentionConfig(num_heads=32, num_kv_heads=8, headdim=128, rope_theta=None),
    }
    layers = tuple(kinds[letter] for letter in "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-")
    return LMConfig(d_model=4096, vocab_size=131072, layers=layers, tie_word_embeddings=False)


def _falcon_h1_500m() -> LMConfig:
    mamba = Mamba2Config(d_inner=1536, chunk_size=128, rmsnorm=False)
    attention = AttentionConfig(num_heads=8, num_kv_heads=2, headdim=64, rope_theta=1e11)
    layers = (ParallelConfig(mixers=(mamba, attention)), MLPConfig(d_ff=2048)) * 36
    eps = 1e-5 / 5.656854249492381**2
    return LMConfig(d_model=1024, vocab_size=32784, layers=layers, norm_eps=eps, tie_word_embeddings=False)


def _codestral_mamba() -> LMConfig:
    mamba = Mamba2Config(ngroups=8)
    return LMConfig(d_model=4096, vocab_size=32768, layers=(mamba,) * 64, tie_word_embeddings=False)


def _llamba_3b() -> LMConfig:
    mamba = Mamba2Config(
        d_state=64, headdim=96, d_inner=3072, ngroups=32, chunk_size=128, rmsnorm=False, z_bias=True,
        conv_activation=None, discrete=True,
    )  # fmt: skip
    return LMConfig(d_model=3072, vocab_size=128256, layers=(mamba, MLPConfig(d_ff=8192)) * 28)


def _llama31_mamba_8b() -> LMConfig:
    slowed = Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    attention = AttentionConfig(num_heads=32, num_kv_heads=8, headdim=128, rope_theta=500000.0, rope_scaling=slowed)
    mamba = Mamba1Config(d_inner=4096, d_xb=1024)
    layers = (mamba, MLPConfig(d_ff=14336), attention, MLPConfig(d_ff=14336)) * 16
    return LMConfig(d_model=4096, vocab_size=128256, layers=layers, tie_word_embeddings=False)


def _jamba(feed_forward: MLPConfig | MoEConfig) -> LMConfig:
    """Jamba v0.1, whose experts stand behind every other mixer, or something else in their place."""
    mamba = Mamba1Config(dt_rank=256, inner_norms="learned")
    attention = AttentionConfig(num_heads=32, num_kv_heads=8, headdim=128, rope_theta=None)
    mixers = [attention if index % 8 == 4 else mamba for index in range(32)]
    behind = MLPConfig(d_ff=14336), feed_forward
    layers = tuple(layer for index, mixer in enumerate(mixers) for layer in (mixer, behind[index % 2]))
    return LMConfig(d_model=4096, vocab_size=65536, layers=layers, norm_eps=1e-6, tie_word_embeddings=False)


def _zamba2(
    layer: Mamba2Config, depth: int, hybrid: tuple[int, ...], num_blocks: int, rope_theta: float | None, rank: int = 0
) -> LMConfig:
    """So many of a layer, of which those of `hybrid` use the blocks in turn, with an attention_rank of `rank`."""
    d_model = (layer.d_inner or 0) // 2
    shared = SharedBlockConfig(
        attention=AttentionConfig(num_heads=32, num_kv_heads=32, headdim=2 * d_model // 32, rope_theta=rope_theta),
        mlp=MLPConfig(d_ff=4 * d_model, activation="gelu"),
    )
    layers: list[Mamba2Config | SharedAttentionConfig] = [layer] * depth
    for use, index in enumerate(hybrid):
        layers[index] = SharedAttentionConfig(
            block=use % num_blocks, shared=shared, mamba=layer, attention_rank=rank, mlp_rank=128
        )
    return LMConfig(d_model=d_model, vocab_size=32000, layers=tuple(layers))


RELEASED: dict[str, LMConfig] = {
    "falcon-mamba-7b": _falcon_mamba(1e-6),
    "falcon3-mamba-7b": _falcon_mamba(1e-5),
    "codestral-mamba-7b": _codestral_mamba(),
    "bamba-9b": _bamba_9b(),
    "granite-4.0-h-micro": _granite_h_micro(),
    "nemotron-h-8b": _nemotron_h_8b(),
    "falcon-h1-0.5b": _falcon_h1_500m(),
    "jamba-v0.1": _jamba(MoEConfig(num_experts=16, top_k=2, d_ff=14336, norm_topk=False)),
    "jamba-9b": _jamba(MLPConfig(d_ff=14336)),  # LongLLaVA's, its experts merged into one
    "llamba-3b": _llamba_3b(),
    "llama3.1-mamba-8b-distill": _llama31_mamba_8b(),
    "zamba2-1.2b": _zamba2(Mamba2Config(d_inner=4096), 38, tuple(range(5, 38, 6)), 1, 10000.0, rank=128),
    "zamba2-2.7b": _zamba2(Mamba2Config(d_inner=5120, d_state=64), 54, (*range(6, 43, 6), 47, 51), 2, None),
    "zamba2-7b": _zamba2(Mamba2Config(d_inner=7168, d_state=64, ngroups=2), 81, (6, *range(11, 78, 6)), 2, 10000.0),
}
