"""Weights in 8 and 4 bits: how far they are from the plain ones, and what is computed with them."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cobra
from cobra.lm import LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.decode import Decoder
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.quantize import GROUP_SIZES, QuantizedEmbedding, QuantizedLinear, quantize
from tests.tolerance import assert_close, rms_ratio
from vision_scan.errors import UserError
from vision_scan.ops.register import MISSING_KERNELS

pytestmark = pytest.mark.usefixtures("one_thread")
built = pytest.mark.skipif("cpu" in MISSING_KERNELS, reason=str(MISSING_KERNELS))
FORMATS = ["int8", "int4"]
SHAPES = [(8, 64), (1, 1), (7, 31), (9, 33), (20, 65), (16, 128), (37, 200)]  # out, in


def linear(out: int, columns: int, dtype=torch.float32, seed: int = 0) -> nn.Linear:
    """Rows of very different sizes, one of them of zeros, and some large weights."""
    noise = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=noise)
    weight *= 10.0 ** torch.randint(-3, 3, (out, 1), generator=noise)
    weight[:, ::29] *= 5
    weight[out // 2] *= 0 if out > 1 else 1
    module = nn.Linear(columns, out, bias=False, dtype=dtype)
    module.weight.data = weight.to(dtype)
    return module


def grouped(weight: Tensor, weights: str) -> Tensor:
    """(out, in) -> (out, groups, columns of a group), filled up with zeros."""
    group = GROUP_SIZES[weights]
    return nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))


def scales_of(quantized: QuantizedLinear) -> Tensor:
    """(out, groups) in float32."""
    return quantized.scales.transpose(1, 2).flatten(0, 1)[: quantized.out_features].float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", FORMATS)
def test_every_weight_is_within_half_a_step(weights, shape):
    plain = linear(*shape)
    quantized = QuantizedLinear.of(plain, weights)
    given, found = grouped(plain.weight.detach(), weights), grouped(quantized.weight, weights)
    scale = scales_of(quantized)[..., None]
    steps = given / torch.where(scale == 0, 1.0, scale)
    within = (found - given).abs() <= scale.abs() / 2 * (1 + 1e-5)
    clipped = (steps < -8.5) | (steps > 7.5) if weights == "int4" else steps.abs() > 127.5
    assert (within | clipped).all()
    assert not clipped.any() or weights == "int4"  # which trades the largest for the others
    largest = given.abs().amax(-1)
    assert ((scale[..., 0] == 0) == (largest == 0)).all()
    assert quantized.weight.shape == shape and (quantized.weight[plain.weight == 0] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_no_worse_than_rounding_to_the_nearest(shape):
    plain = linear(*shape)
    given = grouped(plain.weight.detach(), "int4")
    extreme = given.gather(-1, given.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).bfloat16().float()
    codes = (given / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)
    nearest = (codes * scale - given).square().sum(-1)
    found = (grouped(QuantizedLinear.of(plain, "int4").weight, "int4") - given).square().sum(-1)
    assert (found <= nearest * (1 + 1e-5)).all()
    assert shape[1] < 32 or (found < 0.99 * nearest).any()


@pytest.mark.parametrize("weights", FORMATS)
def test_codes_are_packed_and_unpacked_exactly(weights):
    """Weights that are codes already, every code in every row, in groups whose scale must be 1."""
    low = -127 if weights == "int8" else -8
    codes = torch.arange(low, 128 if weights == "int8" else 8)
    groups = codes.repeat(2)[: 2 * len(codes) // 31 * 31].view(-1, 31)
    groups = nn.functional.pad(groups, (0, GROUP_SIZES[weights] - 31))
    groups[:, -1] = low  # each group has the code that decides the scale
    noise = torch.Generator().manual_seed(1)
    rows = [groups[:, torch.randperm(groups.shape[1], generator=noise)].flatten() for _ in range(19)]
    plain = nn.Linear(groups.numel(), 19, bias=False)
    plain.weight.data = torch.stack(rows).float()
    quantized = QuantizedLinear.of(plain, weights)
    assert (scales_of(quantized) == 1).all()
    assert torch.equal(quantized.weight, plain.weight)
    assert torch.equal(quantized.weight.unique(), codes.float())
    index = torch.tensor([18, 0, 7, 8, 7])
    assert torch.equal(quantized.rows(index), plain.weight[index])


@pytest.mark.parametrize("weights", FORMATS)
def test_rows_of_no_index_are_none(weights):
    """As nn.Embedding's of no ids."""
    quantized = QuantizedLinear.of(linear(9, 33), weights)
    assert quantized.rows(torch.zeros(0, dtype=torch.int64)).shape == (0, 33)


@pytest.mark.parametrize("weights", FORMATS)
def test_large_matrices_are_quantized_in_parts_like_small_ones(weights):
    plain = linear(1100, 4096)  # more than are looked at in one go
    quantized = QuantizedLinear.of(plain, weights)
    for start in (0, 512, 1016, 1096):
        part = nn.Linear(4096, 4, bias=False)
        part.weight.data = plain.weight.data[start : start + 4]
        assert torch.equal(
            QuantizedLinear.of(part, weights).weight, quantized.rows(torch.arange(start, start + 4))
        )


def native_product(packed: list[Tensor], x: Tensor, out: int) -> Tensor:
    """x (rows, in), normed, times a matrix, by the compiled step of a model without layers."""
    norm = torch.ones(x.shape[1])
    native = torch.classes.vision_scan_cpu.Decoder(norm, 0.0, packed, out)
    starts = torch.zeros(len(x), dtype=torch.int64)
    return native.step(x[:, None].clone(), [], starts, None, 1)[:, 0]


def rounded(x: Tensor, weights: str) -> Tensor:
    """x (rows, in) float32 with 8 bits: a scale for each group, the largest becoming 127; float64."""
    groups = grouped(x, weights)
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, 127 / most, 0.0)
    codes = (groups.double() * inverse.double()).round()  # to even
    return (codes * (most / 127).double()).flatten(1)[:, : x.shape[1]]


@built
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", FORMATS)
def test_the_compiled_product_is_that_of_rounded_inputs(weights, shape):
    out, columns = shape
    quantized = QuantizedLinear.of(linear(*shape), weights)
    noise = torch.Generator().manual_seed(2)
    for rows in range(1, 10):
        x = torch.randn(rows, columns, generator=noise)
        x[0, :64] = 0 if columns > 64 else x[0, :64]  # a group of nothing
        normed = native_product([torch.eye(columns)], x, columns)
        expected = rounded(normed, weights) @ quantized.weight.double().T
        found = native_product(quantized.packed, x, out)
        for row in range(rows):
            assert_close(f"row {row} of {rows}", found[row].double(), expected[row], 1e-6)


@built
@pytest.mark.parametrize("weights", FORMATS)
def test_largest_codes_and_inputs_do_not_overflow(weights):
    """Sums of products of the largest codes and the largest inputs, of either sign."""
    for sign in (1, -1):
        plain = nn.Linear(256, 9, bias=False)
        plain.weight.data = torch.full((9, 256), float(sign))
        quantized = QuantizedLinear.of(plain, weights)
        x = torch.ones(1, 256)
        found = native_product(quantized.packed, x, 9)
        assert_close("sum", found.double(), torch.full((1, 9), 256.0 * sign).double(), 1e-2)
        assert_close("codes", found.double(), (x @ quantized.weight.T).double(), 1e-6)


@built
@pytest.mark.parametrize("weights", FORMATS)
def test_a_nan_shows_and_stays_in_its_row(weights):
    quantized = QuantizedLinear.of(linear(9, 70, seed=3), weights)
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(3))
    expected = native_product(quantized.packed, x, 9)
    x[2, 5] = torch.nan
    found = native_product(quantized.packed, x, 9)
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], expected[others])
    seen = quantized.weight.any(1)
    assert found[2, seen].isnan().all()


MAMBA2 = Mamba2Config(d_state=20, headdim=11, ngroups=2, chunk_size=16)
GQA = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=10)
STACKS = {
    "mamba2": (MAMBA2,) * 2,
    "mamba1": (Mamba1Config(dt_rank=5),) * 2,
    "hybrid": (MAMBA2, MLPConfig(d_ff=90), GQA, replace(GQA, window=3), MLPConfig(d_ff=33)),
}


def small(stack="hybrid", is_tied=True, d_model=44, vocab=269) -> cobra.Cobra:
    """A model whose answers depend on the prompt; sizes that are multiples of nothing."""
    tiny = cobra.PRESETS["tiny"]
    lm = LMConfig(d_model=d_model, vocab_size=vocab, layers=STACKS[stack], tie_word_embeddings=is_tied)
    connector = replace(tiny.connector, mixer=replace(tiny.connector.mixer, headdim=4))
    model = cobra.build(replace(tiny, connector=connector, lm=lm), seed=1)
    unit = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # begin larger than torch's by sqrt(3)
    for name, parameter in model.lm.named_parameters():
        if parameter.dim() == 2 and "layers" in name and "A_log" not in name:
            parameter.data *= 2 / 3**0.5 if name.split(".")[-2] in unit else 2
    return model


def inputs(lm) -> Tensor:
    """Embeddings of 3 rows of 8 tokens, not as they are: 4-bit ones lie half way between two 8-bit codes."""
    noise = torch.Generator().manual_seed(5)
    ids = torch.randint(lm.config.vocab_size, (3, 8), generator=noise)
    embeds = lm.embedding(ids)
    return embeds + 0.01 * torch.randn(embeds.shape, generator=noise).to(embeds.dtype)


@torch.no_grad()
def decode(lm) -> Tensor:
    state, parts = lm.allocate_state(3), []
    for embeds in inputs(lm).split(1, dim=1):
        logits, state = lm(inputs_embeds=embeds, state=state, overwrite_state=True)
        parts.append(logits)
    return torch.cat(parts, dim=1)


def simulate(monkeypatch) -> None:
    """From here on layers work one by one, on inputs rounded as the kernels round them."""

    def forward(self, x):
        inputs = rounded(x.float().flatten(0, -2), self.weights).unflatten(0, x.shape[:-1])
        return nn.functional.linear(inputs, self.weight.double()).to(x.dtype)

    monkeypatch.setattr(QuantizedLinear, "forward", forward)
    monkeypatch.setattr("cobra.lm.stack.decoder_for", lambda *call: None)


@built
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("weights", FORMATS)
def test_decoding_is_that_of_the_layers_with_rounded_inputs(weights, stack, is_tied, monkeypatch):
    calls, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args: calls.append(0) or step(*args))
    lm = quantize(small(stack, is_tied), weights).lm
    found = decode(lm)
    assert len(calls) == 8
    plain = lm(inputs_embeds=inputs(lm))[0]
    assert 1e-4 < rms_ratio(found, plain) < 5e-2  # rounding the inputs to 8 bits costs little
    half = decode(copy.deepcopy(lm).bfloat16())
    simulate(monkeypatch)
    expected = decode(lm)
    assert len(calls) == 16
    assert_close(stack, found, expected, 2e-3)  # some inputs fall to the other side of a half
    assert_close("bfloat16", half, expected, 5e-2)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("weights", FORMATS)
def test_casts_change_activations_and_neither_codes_nor_scales(weights, is_tied):
    model = quantize(small(is_tied=is_tied), weights)
    kept = {name: tensor.clone() for name, tensor in model.lm.state_dict().items() if is_packed(name)}
    assert kept
    expected = decode(model.lm)
    wide, full = torch.float64, torch.float32
    for cast, dtype in (("bfloat16", torch.bfloat16), ("float", full), ("double", wide), ("float", full)):
        getattr(model, cast)()
        tensors = model.lm.state_dict()
        for name, tensor in kept.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
        assert model.dtype == model.lm.dtype == model.lm.lm_head.dtype == dtype
        assert model.lm.lm_head.weight.dtype == model.lm.embedding(torch.tensor([3])).dtype == dtype
        logits = decode(model.lm)
        assert logits.dtype == (wide if dtype == wide else full)
        assert rms_ratio(logits, expected) < 5e-2


def is_packed(name: str) -> bool:
    return name.endswith((".codes", ".scales"))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("weights", FORMATS)
def test_copies_are_independent_and_embeddings_stay_tied(weights, is_tied):
    model = quantize(small(is_tied=is_tied), weights)
    expected, ids = decode(model.lm), torch.tensor([[5, 0], [268, 9]])
    assert isinstance(model.lm.embedding, QuantizedEmbedding) == is_tied
    twin = copy.deepcopy(model)
    assert torch.equal(decode(twin.lm), expected)
    before = model.lm.embedding(ids)
    twin.lm.lm_head.scales *= 2
    assert torch.equal(twin.lm.embedding(ids), before * (2 if is_tied else 1))
    assert torch.equal(model.lm.embedding(ids), before) and torch.equal(decode(model.lm), expected)
    assert not torch.equal(decode(twin.lm), expected)
    if is_tied:
        assert torch.equal(before, model.lm.lm_head.weight[ids])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("weights", FORMATS)
def test_a_quantized_model_answers(weights, stack):
    model = quantize(small(stack), weights)
    answers = model.answer_batch([("What is it?", []), ("x", [])], max_new_tokens=5)
    assert len(answers) == 2
    assert isinstance(model.answer("x", max_new_tokens=5), str)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("weights", FORMATS)
def test_save_and_load_keep_every_bit(weights, is_tied, tmp_path):
    model = quantize(small(is_tied=is_tied), weights)
    cobra.save(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["weights"] == weights
    for options in ({}, {"weights": weights}):
        loaded = cobra.load(tmp_path / "model", dtype="float32", **options)
        mine, theirs = model.state_dict(), loaded.state_dict()
        assert mine.keys() == theirs.keys() and any(map(is_packed, mine))
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
        assert loaded.config == model.config
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(*(m.generate(ids, max_new_tokens=9, stop_ids=[]) for m in (model, loaded)))
    half = cobra.load(tmp_path / "model", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.lm.lm_head.scales, model.lm.lm_head.scales)


@pytest.mark.parametrize("weights", FORMATS)
@torch.no_grad()
def test_biases_stay_as_they_are(weights, monkeypatch, tmp_path):
    monkeypatch.setitem(STACKS, "biased", (replace(GQA, qkv_bias=True),))
    plain = small("biased")
    for name, parameter in plain.lm.named_parameters():
        if name.endswith("bias"):
            parameter.uniform_(-1, 1)
    bias = plain.lm.layers[0].mixer.k_proj.bias.clone()
    model = quantize(copy.deepcopy(plain), weights)
    cobra.save(model, tmp_path / "model")
    loaded = cobra.load(tmp_path / "model", dtype="float32")
    for lm in (model.lm, loaded.lm):
        assert torch.equal(lm.layers[0].mixer.k_proj.bias, bias)
        assert rms_ratio(decode(lm), decode(plain.lm)) < (0.02 if weights == "int8" else 0.3)
    half = model.bfloat16().lm
    assert torch.equal(half.layers[0].mixer.k_proj.bias, bias.bfloat16())
    assert decode(half).isfinite().all()


@pytest.mark.parametrize("weights", FORMATS)
def test_a_plain_model_is_quantized_when_it_is_loaded(weights, tmp_path):
    model = small()
    cobra.save(model, tmp_path / "model")
    loaded = cobra.load(tmp_path / "model", dtype="float32", weights=weights)
    assert loaded.config.weights == weights
    assert torch.equal(decode(loaded.lm), decode(quantize(model, weights).lm))
    # From the stored digits, not from those of the dtype to compute in.
    half = cobra.load(tmp_path / "model", dtype="bfloat16", weights=weights)
    assert torch.equal(half.lm.lm_head.codes, loaded.lm.lm_head.codes)


NAMED = "lm.layers.1.mixer.up_proj"
DAMAGE = {
    "missing codes": lambda t: t.pop(f"{NAMED}.codes"),
    "missing scales": lambda t: t.pop(f"{NAMED}.scales"),
    "a plain weight": lambda t: t.update({f"{NAMED}.weight": torch.zeros(90, 44)}),
    "fewer codes": lambda t: t.update({f"{NAMED}.codes": t[f"{NAMED}.codes"][1:].clone()}),
    "codes as floats": lambda t: t.update({f"{NAMED}.codes": t[f"{NAMED}.codes"].float()}),
    "wide scales": lambda t: t.update({f"{NAMED}.scales": t[f"{NAMED}.scales"].float()}),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("weights", FORMATS)
def test_damaged_codes_are_named(weights, damage, tmp_path):
    cobra.save(quantize(small(), weights), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    DAMAGE[damage](tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=NAMED):
        cobra.load(tmp_path, dtype="float32")


def test_a_configuration_of_another_format_does_not_fit(tmp_path):
    cobra.save(quantize(small(), "int8"), tmp_path)
    file = tmp_path / "config.json"
    text = file.read_text()
    for weights, message in (("int4", "codes"), ("plain", "codes"), ("int9", "int9")):
        file.write_text(text.replace('"int8"', f'"{weights}"'))
        with pytest.raises(UserError, match=message):
            cobra.load(tmp_path, dtype="float32")


def test_formats_that_cannot_be():
    model = small()
    with pytest.raises(UserError, match="did you mean 'int8'"):
        quantize(model, "int_8")
    assert model.config.weights == "plain" and isinstance(model.lm.lm_head, nn.Linear)
    assert quantize(model, "plain") is model
    quantize(model, "int8")
    kept = model.lm.lm_head
    assert quantize(model, "int8").lm.lm_head is kept
    for weights in ("int4", "plain"):
        with pytest.raises(UserError, match="are int8"):
            quantize(model, weights)
    assert model.config.weights == "int8" and model.lm.lm_head is kept


@pytest.mark.parametrize(
    ("layer", "weights", "most"),
    [
        (Mamba2Config(), "int8", 0.55),
        (Mamba2Config(), "int4", 0.30),
        (Mamba1Config(), "int8", 0.55),
        (Mamba1Config(), "int4", 0.31),  # A_log is a matrix there, in float32
    ],
)
def test_stored_bytes_are_a_part_of_those_in_float16(layer, weights, most, monkeypatch):
    monkeypatch.setitem(STACKS, "large", (layer,) * 2)
    model = small("large", d_model=384, vocab=4096)
    half = sum(2 * parameter.numel() for parameter in model.lm.parameters())
    quantize(model.bfloat16(), weights)
    stored = sum(tensor.nbytes for tensor in model.lm.state_dict().values())
    assert stored <= most * half
