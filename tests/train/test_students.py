"""Students as they begin: what they have of their teacher."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cobra
from cobra.checkpoint import named_tensors
from cobra.config import PRESETS, CobraConfig
from cobra.lm.attention import Attention, AttentionConfig
from cobra.lm.mixer import Segments
from cobra.lm.mlp import MLPConfig
from cobra.lm.stack import LAYERS
from train.settings import DistillSettings
from train.students import SEEDS, build_student, replaced_layers, student_lm, student_sections
from vision_scan.errors import UserError

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8, rope_theta=None)
FORMS = {
    "plain": {},
    "bias": {"qkv_bias": True, "o_bias": True},
    "one key head": {"num_kv_heads": 1},
    "as many key heads": {"num_kv_heads": 4},
}


def small(*layers: object) -> CobraConfig:
    tiny = PRESETS["transformer-tiny"]
    return replace(tiny, lm=replace(tiny.lm, d_model=64, layers=layers or (ATTENTION, MLPConfig(d_ff=24)) * 3))


def save_teacher(path: Path, config: CobraConfig | None = None) -> Path:
    model = cobra.build(config or small(), seed=3)
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)  # they begin as zeros
    cobra.save(model, path)
    return path


def make(path: Path, **changes: object) -> cobra.model.Cobra:
    settings = DistillSettings(teacher=str(path), **changes)
    sections = student_sections(settings)
    return build_student(settings, CobraConfig(**sections), seed=0)


def scores(attention: Attention, x: Tensor) -> Tensor:
    """q . k / sqrt(headdim) of the tokens that a token sees, else 0: (batch, num_heads, seqlen, seqlen)."""
    config = attention.config
    q, k = (proj(x).view(*x.shape[:2], -1, config.headdim) for proj in (attention.q_proj, attention.k_proj))
    k = k.repeat_interleave(config.num_heads // config.num_kv_heads, dim=2)
    return torch.einsum("blhd,bshd->bhls", q, k).tril() / config.headdim**0.5


@pytest.mark.parametrize("form", FORMS)
def test_seeded_mamba2_is_the_attention_without_softmax(form: str) -> None:
    attention = Attention(replace(ATTENTION, **FORMS[form]), 32).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seed = SEEDS["mamba2"]
    mixer = LAYERS["mamba2"](seed.config(attention.config), 32).double()
    seed.sow(mixer, attention)
    with torch.no_grad():
        mixer.A_log.fill_(-40.0)  # forgets nothing
        mixer.dt_bias.fill_(0.541324854612918)  # softplus of it is 1
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    segments = Segments(torch.zeros(2, dtype=torch.int64))
    values = torch.eye(11, dtype=torch.float64).expand(2, 11, 11)
    with torch.no_grad():
        found = mixer.mix(x, values, segments)  # (batch, l, heads, s)
    torch.testing.assert_close(found.transpose(1, 2), scores(attention, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_seeded_mamba2_reads_the_values_and_speaks_as_the_attention_does(form: str) -> None:
    attention = Attention(replace(ATTENTION, **FORMS[form]), 32)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seed = SEEDS["mamba2"]
    mixer = LAYERS["mamba2"](seed.config(attention.config), 32)
    seed.sow(mixer, attention)
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        *_, z, xBC, dt = mixer.in_proj(x).split(mixer.projected, dim=-1)
        values = attention.v_proj(x).view(1, 5, -1, 8).repeat_interleave(
            attention.config.num_heads // attention.config.num_kv_heads, dim=2
        )
    torch.testing.assert_close(xBC[..., :32], values.flatten(2))
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    if attention.o_proj.bias is not None:
        assert torch.equal(mixer.out_proj.bias, attention.o_proj.bias)
    assert not dt.any()  # the decay depends on no token
    open_at_first = torch.nn.functional.silu(z)
    assert 0.5 < float(open_at_first.mean()) < 1.5


def test_norms_of_queries_and_keys_scale_what_they_normed() -> None:
    attention = Attention(replace(ATTENTION, qk_norm=True), 32)
    torch.nn.init.normal_(attention.q_norm.weight)
    seed = SEEDS["gated_deltanet"]
    mixer = LAYERS["gated_deltanet"](seed.config(attention.config), 32)
    seed.sow(mixer, attention)
    expected = attention.q_proj.weight.view(4, 8, 32) * attention.q_norm.weight[:, None] / 8**0.5
    torch.testing.assert_close(mixer.in_proj.weight[:32], expected.flatten(0, 1))


@pytest.mark.parametrize("kind", sorted(SEEDS))
def test_everything_but_the_replaced_layers_is_the_teachers(tmp_path: Path, kind: str) -> None:
    teacher = cobra.load(save_teacher(tmp_path / "teacher"), dtype="float32")
    student = make(tmp_path / "teacher", student=kind, keep=(1,))
    assert [layer.kind for layer in student.config.lm.layers] == [kind, "mlp", "attention", "mlp", kind, "mlp"]
    assert replaced_layers(student, teacher) == [0, 4]
    own, given = named_tensors(student), named_tensors(teacher)
    same = [name for name in given if not name.startswith(("lm.layers.0.mixer.", "lm.layers.4.mixer."))]
    assert len(same) > 20
    for name in same:
        assert torch.equal(own[name], given[name]), name
    assert student.tokenizer.to_json() == teacher.tokenizer.to_json()
    cobra.save(student, tmp_path / "student")
    logits = [model.lm(torch.tensor([[1, 2, 3]]))[0] for model in (student, cobra.load(tmp_path / "student"))]
    torch.testing.assert_close(*logits)


def test_layers_that_are_asked_for_begin_at_random(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    settings = DistillSettings(teacher=str(tmp_path / "teacher"))
    config = CobraConfig(**student_sections(settings))
    narrower = replace(config.lm.layers[0], d_state=4)
    mamba1 = cobra.lm.mamba1.Mamba1Config(d_state=4)
    layers = (narrower, config.lm.layers[1], mamba1, *config.lm.layers[3:])
    config = replace(config, lm=replace(config.lm, layers=layers))
    student, plain = build_student(settings, config, seed=5), cobra.build(config, seed=5)
    own, random = named_tensors(student), named_tensors(plain)
    for name in own:
        if name.startswith(("lm.layers.0.mixer.", "lm.layers.2.mixer.")):
            assert torch.equal(own[name], random[name])
    assert not own["lm.layers.4.mixer.D"].any()  # the last is sown


def test_the_same_seed_makes_the_same_student(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher")
    one, two = (named_tensors(make(tmp_path / "teacher")) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_be_a_student_is_said(tmp_path: Path) -> None:
    settings = DistillSettings(teacher="here")
    lm = small().lm
    with pytest.raises(UserError, match="counted from 0 to 2"):
        student_lm(lm, replace(settings, keep=(3,)))
    with pytest.raises(UserError, match="all 3 attention layers are kept"):
        student_lm(lm, replace(settings, keep=(0, 1, 2)))
    with pytest.raises(UserError, match="here has no attention layers"):
        student_lm(PRESETS["tiny"].lm, settings)
    with pytest.raises(UserError, match="each layer once"):
        DistillSettings(keep=(1, 1))
    with pytest.raises(UserError, match=r"distill.teacher=.*: no such model directory"):
        student_sections(replace(settings, teacher=str(tmp_path / "none")))
    config = replace(small(), weights="int8")
    cobra.save(cobra.build(config), tmp_path / "int8")
    with pytest.raises(UserError, match="stored in int8"):
        student_sections(replace(settings, teacher=str(tmp_path / "int8")))


def test_layers_are_compared_in_models_of_one_shape(tmp_path: Path) -> None:
    one, two = cobra.build(small()), cobra.build(small(ATTENTION))
    with pytest.raises(UserError, match="6 layers of width 64, the teacher 1 of 64"):
        replaced_layers(one, two)
    with pytest.raises(UserError, match="the teacher's own layers"):
        replaced_layers(one, one)
