"""Mamba-3's layer: as its equations say, token by token; its parameters, its state, and what it refuses."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from cobra.lm import LanguageModel, LMConfig
from cobra.lm.mamba3 import Mamba3, Mamba3Config
from cobra.lm.mixer import Segments
from cobra.lm.sequence_parallel import check_shardable
from tests.tolerance import assert_as_good_as, assert_close
from train.optim import parameter_groups
from train.settings import OptimSettings
from vision_scan.errors import UserError

D_MODEL, LENGTH = 12, 13
CONFIGS = {
    "siso": {},
    "siso, all states turn": {"rope_fraction": 1.0, "d_state": 7},
    "siso, norm, groups": {"is_outproj_norm": True, "ngroups": 3},
    "mimo": {"rank": 4},
    "mimo, all states turn": {"rank": 2, "rope_fraction": 1.0, "d_state": 7, "ngroups": 2},
    "mimo, norm, groups": {"rank": 3, "is_outproj_norm": True, "ngroups": 2, "d_state": 9},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sizes here are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(dtype=torch.float64, **options) -> Mamba3:
    """A mixer in which every parameter counts."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        mixer = Mamba3(Mamba3Config(**{"d_state": 6, "headdim": 4, "chunk_size": 4, **options}), D_MODEL)
        for name, parameter in mixer.named_parameters():
            if name == "in_proj.weight":
                parameter.mul_(3)
            elif name == "dt_bias":
                parameter.uniform_(-3, 1)
            elif name != "out_proj.weight":
                parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return mixer.to(dtype)


def tokens(batch: int = 2, length: int = LENGTH, dtype=torch.float64) -> Tensor:
    noise = torch.Generator().manual_seed(5)
    return torch.randn(batch, length, D_MODEL, generator=noise, dtype=torch.float64).to(dtype)


def read(mixer: Mamba3, x: Tensor, state=None, seq_idx=None, overwrite=False):
    return mixer(x, state, Segments(torch.zeros(len(x), dtype=torch.int64), seq_idx, overwrite))


def slow_mixer(mixer: Mamba3, x: Tensor) -> tuple[Tensor, Tensor]:
    """The published equations for x (batch, seqlen, d_model), head by head, states that turn as complex numbers:
    the output, and the state in the end."""
    config, rows = mixer.config, x @ mixer.in_proj.weight.T
    ranks, nheads, d_state, headdim = config.rank, mixer.nheads, config.d_state, config.headdim
    d_inner, keys = nheads * headdim, config.rank * config.ngroups * config.d_state
    pairs = int(d_state * config.rope_fraction) // 2
    sizes = [d_inner, d_inner, keys, keys, nheads, nheads, nheads, pairs]
    z, v, B, C, dt, A, trap, angle = rows.split(sizes, dim=-1)
    B, C = (
        (t / (t.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight)
        for t, norm in ((B.unflatten(-1, (ranks, config.ngroups, d_state)), mixer.B_norm),
                        (C.unflatten(-1, (ranks, config.ngroups, d_state)), mixer.C_norm))
    )  # fmt: skip
    dt = nn.functional.softplus(dt + mixer.dt_bias)
    A = -((1 + A.relu()) / (1 + (-A).relu())).maximum(torch.tensor(config.A_floor, dtype=x.dtype))
    share = 1 / (1 + torch.exp(-trap))
    ones = torch.ones(nheads, 1, headdim, dtype=x.dtype)
    mimo = [getattr(mixer, name, ones) for name in ("mimo_x", "mimo_z", "mimo_o")]
    output, states = [], []
    for h in range(nheads):
        place, group = slice(h * headdim, (h + 1) * headdim), h // (nheads // config.ngroups)
        S, phi = torch.zeros(len(x), headdim, d_state, dtype=x.dtype), torch.zeros(len(x), pairs, dtype=x.dtype)
        k_before = torch.zeros(len(x), ranks, d_state, dtype=x.dtype)
        v_before, steps = torch.zeros(len(x), headdim, dtype=x.dtype), []
        for t in range(x.shape[1]):
            step, lam = dt[:, t, h, None, None], share[:, t, h, None, None]
            phi = phi + math.pi * torch.tanh(angle[:, t]) * dt[:, t, h, None]
            alpha = torch.exp(A[:, t, h, None, None] * step)
            k = rotate(B[:, t, :, group] + mixer.B_bias[h], phi)
            q = rotate(C[:, t, :, group] + mixer.C_bias[h], phi)
            value = v[:, t, place]
            S = alpha * S
            for r in range(ranks):
                S = S + (1 - lam) * step * alpha * (v_before * mimo[0][h, r])[..., None] * k_before[:, r, None]
                S = S + lam * step * (value * mimo[0][h, r])[..., None] * k[:, r, None]
            total = torch.zeros_like(value)
            for r in range(ranks):
                y = (S * q[:, r, None]).sum(-1) + mixer.D[h] * value * mimo[0][h, r]
                if config.is_outproj_norm:
                    y = y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * mixer.norm.weight[place]
                gate = z[:, t, place] * mimo[1][h, r]
                total = total + y * gate / (1 + torch.exp(-gate)) * mimo[2][h, r]
            steps.append(total)
            k_before, v_before = k, value
        output.append(torch.stack(steps, 1))
        states.append(S)
    return torch.cat(output, -1) @ mixer.out_proj.weight.T, torch.stack(states, 1)


def rotate(t: Tensor, phi: Tensor) -> Tensor:
    """t (batch, rank, d_state): pairs (2i, 2i + 1) if the rank is 1, else (i, i + d_state // 2), times exp(i phi)."""
    d_state, pairs = t.shape[-1], phi.shape[-1]
    first = [2 * i if t.shape[1] == 1 else i for i in range(pairs)]
    second = [2 * i + 1 if t.shape[1] == 1 else i + d_state // 2 for i in range(pairs)]
    turned = torch.complex(t[..., first], t[..., second]) * torch.polar(torch.ones_like(phi), phi)[:, None]
    columns = list(t.unbind(-1))
    for i in range(pairs):
        columns[first[i]], columns[second[i]] = turned[..., i].real, turned[..., i].imag
    return torch.stack(columns, -1)


@pytest.mark.parametrize("length", [1, 2, LENGTH])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_outputs_and_states_are_those_of_the_equations(name, length):
    mixer, x = build(**CONFIGS[name]), tokens(length=length)
    expected, ssm = slow_mixer(mixer, x)
    y, state = read(mixer, x)
    assert_close("a sequence", y, expected, 1e-10)
    assert_close("its state", state["ssm"], ssm, 1e-10)
    state, parts = mixer.allocate(2, 0, "cpu", torch.float64), []
    for token in x.split(1, dim=1):
        y, state = read(mixer, token, state, overwrite=True)
        parts.append(y)
    assert_close("token by token", torch.cat(parts, 1), expected, 1e-10)
    assert_close("the state of steps", state["ssm"], ssm, 1e-10)


def gradients(run, mixer: Mamba3, x: Tensor) -> dict[str, Tensor]:
    """Of everything that comes out, with random weights, for the parameters and the input."""
    noise = torch.Generator().manual_seed(8)
    x = x.clone().requires_grad_()
    y, ssm = run(mixer, x)
    total = sum((t * torch.randn(t.shape, generator=noise, dtype=torch.float64).to(t.dtype)).sum() for t in (y, ssm))
    names = [name for name, _ in mixer.named_parameters()]
    return dict(zip([*names, "x"], torch.autograd.grad(total, [*mixer.parameters(), x]), strict=True))


def fast_mixer(mixer: Mamba3, x: Tensor) -> tuple[Tensor, Tensor]:
    y, state = read(mixer, x)
    return y, state["ssm"]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_equations(name):
    mixer, x = build(**CONFIGS[name]), tokens()
    found, expected = gradients(fast_mixer, mixer, x), gradients(slow_mixer, mixer, x)
    assert all(gradient.any() for gradient in found.values())
    for part, gradient in found.items():
        assert_close(f"gradient of {part}", gradient, expected[part], 1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_as_good_as_the_equations_in_it(name):
    mixer, x = build(torch.float32, **CONFIGS[name]), tokens(dtype=torch.float32)
    wide = copy.deepcopy(mixer).double()
    assert_as_good_as("y", fast_mixer(mixer, x)[0], slow_mixer(mixer, x)[0], slow_mixer(wide, x.double())[0])
    found, plain = gradients(fast_mixer, mixer, x), gradients(slow_mixer, mixer, x)
    for part, gradient in gradients(slow_mixer, wide, x.double()).items():
        assert_as_good_as(f"gradient of {part}", found[part], plain[part], gradient)


@pytest.mark.parametrize("rank", [1, 2])
def test_extreme_projections_give_numbers_and_gradients(rank):
    """Steps from 1e-20 to 50, -A from 0.02 to 50, shares of 0 and 1; in float32 nothing overflows either."""
    mixer, x = build(rank=rank), tokens(length=33)
    with torch.no_grad():
        sizes = mixer.config.in_proj_sizes(D_MODEL)
        scale = torch.cat([torch.full((size,), 1.0 if i < 4 else 12.0) for i, size in enumerate(sizes)])
        mixer.in_proj.weight.mul_(scale.double()[:, None])
        for rows in mixer.in_proj(x).split(sizes, dim=-1)[4:7]:
            assert rows.min() < -45 and rows.max() > 45
        assert_close("a sequence", read(mixer, x)[0], slow_mixer(mixer, x)[0], 1e-10)
    found, expected = gradients(fast_mixer, mixer, x), gradients(slow_mixer, mixer, x)
    for part, gradient in found.items():
        assert_close(f"gradient of {part}", gradient, expected[part], 1e-10)
    narrow = copy.deepcopy(mixer).float()
    assert torch.isfinite(read(narrow, x.float())[0]).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(fast_mixer, narrow, x.float()).values())


def test_the_floor_of_the_decay_and_its_map():
    mixer = build(A_floor=0.3)
    values = torch.tensor([-9.0, -3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    rows = mixer.config.in_proj_sizes(D_MODEL)
    inputs = [torch.zeros(8, 1, size, dtype=torch.float64) for size in rows[1:]]
    inputs[4] = values[:, None, None].expand(8, 1, mixer.nheads)
    A = mixer._scan_inputs(*inputs)["A"][:, 0, 0]
    expected = [0.3, 0.3, 1 / 3, 0.5, 1.0, 1.5, 2.0, 5.0]
    assert A.tolist() == pytest.approx([-a for a in expected])
    (gradient,) = torch.autograd.grad(A.sum(), values)
    assert gradient.tolist() == pytest.approx([0, 0, -1 / 9, -1 / 4, -1, -1, -1, -1])


@pytest.mark.parametrize(("rank", "rows"), [(1, 3432), (4, 4200)])
def test_parameters_are_those_of_the_published_module(rank, rows):
    with torch.device("meta"):
        mixer = Mamba3(Mamba3Config(rank=rank, is_outproj_norm=True), 768)
    mimo = {name: (24, rank, 64) for name in ("mimo_x", "mimo_z", "mimo_o")} if rank > 1 else {}
    expected = {
        "in_proj.weight": (rows, 768), "dt_bias": (24,), "B_bias": (24, rank, 128), "C_bias": (24, rank, 128),
        "B_norm.weight": (128,), "C_norm.weight": (128,), "D": (24,), **mimo, "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }  # fmt: skip
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == expected
    assert mixer.config.in_proj_sizes(768) == [1536, 1536, 128 * rank, 128 * rank, 24, 24, 24, 32]
    state = mixer.allocate(5, 0, "meta", torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "ssm": (5, 24, 64, 128), "angle": (5, 24, 32), "k": (5, rank, 24, 128), "v": (5, 24, 64)
    }  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2])
def test_values_at_the_start_are_the_published_ones(rank):
    mixer = Mamba3(Mamba3Config(rank=rank, dt_min=0.01, dt_max=0.02, headdim=4), 64)
    dt = nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 0.0099 and dt.max() <= 0.0201 and dt.std() > 0.001
    for name in ("B_bias", "C_bias", "D"):
        assert (getattr(mixer, name) == 1).all()
    if rank > 1:
        assert (mixer.mimo_x == 0.5).all() and (mixer.mimo_z == 1).all() and (mixer.mimo_o == 0.5).all()


FLOAT32 = {"dt_bias", "B_bias", "C_bias", "D", "B_norm.weight", "C_norm.weight", "norm.weight"}
FLOAT32 |= {"mimo_x", "mimo_z", "mimo_o"}


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_recurrence_stays_float32_in_half_precision(dtype, rank):
    mixer = build(torch.float32, rank=rank, is_outproj_norm=True)
    before = {name: parameter.detach().clone() for name, parameter in mixer.named_parameters()}
    mixer.to(dtype)
    for name, parameter in mixer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in FLOAT32 else dtype), name
        assert name not in FLOAT32 or torch.equal(parameter, before[name])
    state = mixer.allocate(2, 0, "cpu", dtype)
    _, after = read(mixer, tokens(dtype=dtype))
    wide = {"ssm": torch.float32, "angle": torch.float32, "k": torch.float32, "v": dtype}
    assert {name: t.dtype for name, t in state.items()} == {name: t.dtype for name, t in after.items()} == wide
    assert {parameter.dtype for parameter in mixer.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_recurrence_gets_no_weight_decay(kind):
    lm = LMConfig(d_model=D_MODEL, vocab_size=7, layers=(Mamba3Config(headdim=4, rank=2),))
    model = nn.ModuleDict({"lm": LanguageModel(lm)})
    groups = parameter_groups(model, OptimSettings(kind=kind, weight_decay=0.1))
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in model["lm"].layers[0].mixer.named_parameters():
        is_spared = name in FLOAT32 and not name.startswith("mimo_")  # those are projections
        group = group_of[id(parameter)]
        assert group["weight_decay"] == (0.0 if is_spared else 0.1), name
        assert group["muon"] == (kind == "muon" and "_proj" in name), name


@pytest.mark.parametrize(("rank", "length", "is_update"), [(1, 16, True), (1, 17, False), (3, 5, True), (3, 6, False)])
@torch.no_grad()
def test_a_few_tokens_are_written_into_the_state_that_is_there(rank, length, is_update):
    """Rather than scanned."""
    mixer = build(torch.float32, rank=rank)
    state = mixer.allocate(2, 0, "cpu", torch.float32)
    before = {name: tensor.data_ptr() for name, tensor in state.items()}
    _, after = read(mixer, tokens(length=length, dtype=torch.float32), state, overwrite=True)
    assert [tensor.data_ptr() == before[name] for name, tensor in after.items()] == [is_update] * 4


def test_pieces_of_rows_in_other_processes_are_refused():
    with pytest.raises(UserError, match=r"layer 0 \(mamba3\) needs whole rows") as caught:
        check_shardable([build()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state"),
        ({"rank": 0}, "rank"),
        ({"rope_fraction": 0.0}, "rope_fraction"),
        ({"rope_fraction": 1.5}, "rope_fraction"),
        ({"d_state": 3}, "at least one pair"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min"),
        ({"A_floor": 0.0}, "A_floor"),
    ],
)
def test_impossible_sizes_are_the_callers_mistake(options, message):
    with pytest.raises(UserError, match=message):
        Mamba3Config(**options)


@pytest.mark.parametrize("options", [{"headdim": 5}, {"headdim": 4, "ngroups": 5}])
def test_heads_that_do_not_fit_are_the_callers_mistake(options):
    with pytest.raises(UserError, match="multiple of"):
        Mamba3(Mamba3Config(**options), D_MODEL)
