"""Rows cut over processes: the numbers of one process, whatever the number of processes."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import cobra
from cobra.config import PRESETS
from cobra.connector import LinearConfig
from cobra.lm import LMConfig
from cobra.lm.gated_conv import GatedConvConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.lm.moe import MoEConfig
from cobra.lm.parallel import ParallelConfig
from cobra.lm.sequence_parallel import SequenceShard, check_shardable
from tests.cobra.lm_ways import VOCAB, build, lively
from tests.cobra.ranks import Ranks
from tests.tolerance import assert_close
from vision_scan.errors import UserError

SIZES = (2, 4, 8)
MIXED = (
    Mamba2Config(d_state=5, headdim=8, chunk_size=4, ngroups=2, dt_limit=(0.05, 0.9)),
    MLPConfig(d_ff=24),
    Mamba1Config(d_state=5, d_conv=3),
    Mamba2Config(d_state=5, headdim=8, chunk_size=4, d_conv=1),
)
OTHERS = (
    ParallelConfig(mixers=(Mamba2Config(d_state=5, headdim=8, chunk_size=4, rmsnorm=False), GatedConvConfig(d_conv=4))),
    MoEConfig(num_experts=2, top_k=2, d_ff=7),
    Mamba1Config(d_state=5, inner_norms="learned"),
    Mamba1Config(d_state=4, d_inner=24, d_xb=8),
    Mamba2Config(d_state=5, headdim=4, d_inner=24, d_ssm=16, chunk_size=4, bias=True, conv_bias=False, D_has_hdim=True),
    Mamba2Config(d_state=5, headdim=8, chunk_size=4, conv_activation=None),
    Mamba2Config(d_state=5, headdim=8, chunk_size=4, discrete=True, z_bias=True),
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("ranks"), SIZES)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Beside eight processes."""


def language_model(layers, dtype: torch.dtype):
    model = build(layers) if isinstance(layers, str) else lively(layers)
    return copy.deepcopy(model).to(dtype).requires_grad_()


def segments(kind: str, batch: int, seqlen: int) -> Tensor | None:
    """Padding and resets: at random, or so that whole pieces are padding or many segments long."""
    if kind == "none":
        return None
    noise = torch.Generator().manual_seed(seqlen)
    draw = torch.rand(batch, seqlen, generator=noise)
    runs = (draw < {"few": 0.08, "many": 0.4, "pads": 0.02}[kind]).long().cumsum(1)
    padding = torch.rand(batch, seqlen, generator=noise) < {"few": 0.2, "many": 0.3, "pads": 0.9}[kind]
    return torch.where(padding, -1 - draw.round().long(), runs)


def read(model, ids: Tensor, weights: Tensor, seq_idx: Tensor | None = None, shard=None):
    """Logits, the sum of them by weights, and the state."""
    hidden, state = model.read(ids, shard=shard, seq_idx=None if shard else seq_idx)
    logits = model.logits(hidden)
    if seq_idx is not None:
        logits = torch.where((seq_idx >= 0)[..., None], logits, 0.0)
    return logits, (logits * weights).sum(), state


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def read_shard(group, layers, dtype, ids, weights, seq_idx):
    model = language_model(layers, dtype)
    shard = SequenceShard.cut(*ids.shape, group, seq_idx)
    logits, loss, state = read(model, shard.take(ids), shard.take(weights), shard.seq_idx, shard)
    loss.backward()
    return logits.detach(), loss.detach(), gradients(model), state.detach()


def read_whole(layers, dtype, ids, weights, seq_idx):
    model = language_model(layers, dtype)
    logits, loss, state = read(model, ids, weights, seq_idx)
    loss.backward()
    return logits.detach(), loss.detach(), gradients(model), state.detach()


def assert_same(found: list, whole, ratio: float, name: str) -> None:
    """Logits side by side, the sums of losses and gradients, the last rank's state."""
    logits, losses, grads, states = zip(*found, strict=True)
    assert_close(f"{name}: logits", torch.cat(logits, 1), whole[0], ratio)
    assert_close(f"{name}: loss", sum(losses), whole[1], ratio)
    for parameter, expected in whole[2].items():
        total = sum(one[parameter] for one in grads)
        assert_close(f"{name}: gradient of {parameter}", total, expected, ratio)
    assert states[-1].lengths.tolist() == whole[3].lengths.tolist()
    for index, layer in enumerate(whole[3].layers):
        for key, expected in layer.items():
            assert_close(f"{name}: state {index} {key}", states[-1].layers[index][key], expected, ratio)


def inputs(batch: int, seqlen: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCAB, (batch, seqlen), generator=noise)
    return ids, torch.randn(batch, seqlen, VOCAB, generator=noise, dtype=dtype)


# 61: pieces of unequal length; 13: some with one token, fewer than the convolution's taps.
@pytest.mark.parametrize("seqlen", [61, 13])
@pytest.mark.parametrize("kind", ["none", "few", "many", "pads"])
@pytest.mark.parametrize("layers", ["mamba1", "mamba2", MIXED, OTHERS], ids=["mamba1", "mamba2", "mixed", "others"])
def test_any_number_of_processes_gives_the_numbers_of_one(ranks, layers, kind, seqlen):
    ids, weights = inputs(2, seqlen, torch.float64)
    arguments = (layers, torch.float64, ids, weights, segments(kind, *ids.shape))
    whole = read_whole(*arguments)
    assert all(gradient.any() for gradient in whole[2].values())
    for size in SIZES:
        assert_same(ranks(size, read_shard, *arguments), whole, 1e-10, f"{size} processes")


def test_float32_is_as_close_as_its_roundings(ranks):
    ids, weights = inputs(2, 203, torch.float32)
    arguments = (MIXED, torch.float32, ids, weights, segments("few", *ids.shape))
    whole = read_whole(*arguments)
    for size in SIZES:
        assert_same(ranks(size, read_shard, *arguments), whole, 1e-5, f"{size} processes")


def read_in_bfloat16(group, ids, weights):
    with torch.autocast("cpu", torch.bfloat16):
        return read_shard(group, MIXED, torch.float32, ids, weights, None)


def test_autocast_is_as_good_as_in_one_process(ranks):
    ids, weights = inputs(1, 64, torch.float32)
    exact = read_whole(MIXED, torch.float64, ids, weights.double(), None)
    with torch.autocast("cpu", torch.bfloat16):
        plain = read_whole(MIXED, torch.float32, ids, weights, None)
    found = ranks(4, read_in_bfloat16, ids, weights)

    def error(logits: Tensor) -> float:
        return (logits.double() - exact[0]).norm().item()

    assert error(torch.cat([logits for logits, *_ in found], 1)) < 1.5 * error(plain[0])


def test_later_tokens_change_nothing_in_earlier_pieces(ranks):
    ids, weights = inputs(1, 40, torch.float64)
    changed = ids.clone()
    changed[0, 22] = (changed[0, 22] + 1) % VOCAB  # in the third of four pieces
    before, after = (ranks(4, read_shard, MIXED, torch.float64, i, weights, None) for i in (ids, changed))
    for rank, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one[0], other[0]) == (rank < 2)


class Traffic:
    """Counts what is sent; anything but a gather from all to all is an error."""

    def __enter__(self):
        self.sent: list[int] = []
        self.patch = pytest.MonkeyPatch()
        gather = dist.all_gather_into_tensor

        def count(output, own, group=None):
            self.sent.append(own.nbytes)
            return gather(output, own, group=group)

        def refuse(*_, **__):
            raise AssertionError("only all_gather_into_tensor is to be called")

        others = (
            "send recv isend irecv batch_isend_irecv broadcast all_reduce reduce scatter gather all_gather "
            "reduce_scatter_tensor all_to_all"
        )
        for name in others.split():
            self.patch.setattr(dist, name, refuse)
        self.patch.setattr(dist, "all_gather_into_tensor", count)
        return self

    def __exit__(self, *_):
        self.patch.undo()


def measure(group, layers, ids, weights):
    """Bytes of each message in the forward and in the backward pass, bytes kept in between, and the largest
    tensor of them. A tensor that several operations keep counts once."""
    model = language_model(layers, torch.float32)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    shard = SequenceShard.cut(*ids.shape, group)
    own, own_weights = shard.take(ids).clone(), shard.take(weights).clone()
    with Traffic() as traffic:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _, loss, _ = read(model, own, own_weights, shard=shard)
        forward = list(traffic.sent)
        loss.backward()
    return forward, traffic.sent[len(forward) :], sum(kept.values()), max(kept.values())


def test_what_is_sent_depends_on_neither_length_nor_number_of_processes(ranks):
    layers = Mamba2Config(d_state=5, headdim=8, chunk_size=4), MLPConfig(d_ff=24), Mamba1Config(d_state=5)
    # Window and its shift, state and its decay; d_model 16, so d_inner 32: 4 heads of 8.
    expected = [4 * (42 * 3 + 9), 4 * (32 * 5 + 4), 4 * (32 * 3 + 9), 4 * (32 * 5 + 32 * 5)]
    for size in SIZES:
        for seqlen in (24, 240):
            for forward, backward, *_ in ranks(size, measure, layers, *inputs(1, seqlen, torch.float32)):
                assert forward == expected, (size, seqlen)
                assert backward == expected[::-1], (size, seqlen)


@pytest.mark.parametrize("layers", ["mamba1", "mamba2"])
def test_memory_of_a_process_follows_its_own_tokens(ranks, layers):
    def most(size: int, seqlen: int) -> list[int]:
        found = ranks(size, measure, layers, *inputs(1, seqlen, torch.float32))
        return [max(one[place] for one in found) for place in (2, 3)]

    kept, largest = zip(*(most(size, 48 * size) for size in SIZES), strict=True)
    assert max(kept) <= 1.01 * min(kept)
    assert max(largest) == min(largest)
    assert most(2, 48 * 4)[0] > 1.5 * kept[0]  # so it is tokens that the numbers above count


def model_with_images(frozen: tuple[str, ...] = ()):
    """A small model with 16 tokens a tile, in float64."""
    preset = PRESETS["tiny"]
    lm = LMConfig(d_model=32, vocab_size=preset.lm.vocab_size, layers=MIXED)
    image = dataclasses.replace(preset.image, height=32, width=32)
    encoder = dataclasses.replace(preset.vision_encoder, d_model=16, depth=1)
    config = dataclasses.replace(preset, lm=lm, image=image, vision_encoder=encoder, connector=LinearConfig())
    model = cobra.build(config, seed=3).double()
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    return model


def batch_with_images(model) -> dict[str, Tensor]:
    """Two rows of 64 places with five tiles that no cut respects; the second is short; the last eighth has no
    tile, and only a few tokens have labels."""
    noise = torch.Generator().manual_seed(11)
    size = model.config.tokens_per_tile
    tile = [model.tokenizer.image_id] * size
    rows = [[5, 6, *tile, 7, *tile, *tile, *range(20, 33)], [*tile, 13, 14, *tile, 15, 16]]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[model.tokenizer.pad_id] * (longest - len(row))] for row in rows])
    labels = torch.full_like(ids, -100)
    labels[0, [1, 19]], labels[0, -5:] = ids[0, [1, 19]], ids[0, -5:]
    labels[1, 2 * size + 2 : 2 * size + 4] = ids[1, 2 * size + 2 : 2 * size + 4]
    pixels = torch.rand(5, 3, 32, 32, generator=noise)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def loss_of(group, frozen=(), **changes):
    model = model_with_images(frozen)
    encoded: list[int] = []
    model.vision_encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    loss, count = model.loss({**batch_with_images(model), **changes}, group)
    loss.backward()
    return loss.detach(), count, gradients(model), sum(encoded)


@pytest.mark.parametrize("frozen", [(), ("lm",), ("vision_encoder", "connector"), ("vision_encoder", "lm")])
def test_losses_and_gradients_add_up_to_those_of_one_process(ranks, frozen):
    """With frozen parts some processes have nothing that learns, and must go backward all the same."""
    loss, count, expected, _ = loss_of(None, frozen)
    assert count == 9
    for size in SIZES:
        losses, counts, found, encoded = zip(*ranks(size, loss_of, frozen), strict=True)
        assert 0 in counts or size < 8  # some have no label at all
        assert sum(counts) == count
        assert_close(f"{size} processes: loss", sum(losses), loss, 1e-10)
        for name, gradient in expected.items():
            total = sum(one[name] for one in found)
            assert_close(f"{size} processes: {name}", total, gradient, 1e-10)
        # A tile is encoded by those that have a token of it: once more for each cut through each row.
        assert 5 < sum(encoded) <= 5 + 2 * (size - 1)
        assert max(encoded) < 5
        assert 0 in encoded or size < 8


def test_packed_rows_share_one_loss(ranks):
    seq_idx = torch.tensor([[0] * 30 + [1] * 34, [0] * 16 + [4] * 20 + [-1] * 28])
    loss, _, expected, _ = loss_of(None, seq_idx=seq_idx)
    assert not math.isclose(loss, loss_of(None)[0])
    losses, _, found, _ = zip(*ranks(8, loss_of_packed, seq_idx), strict=True)
    assert_close("loss", sum(losses), loss, 1e-10)
    for name, gradient in expected.items():
        assert_close(name, sum(one[name] for one in found), gradient, 1e-10)


def loss_of_packed(group, seq_idx):
    return loss_of(group, seq_idx=seq_idx)


def message_of(group, layers, seqlen: int, **options) -> str:
    model, ids = language_model(layers, torch.float32), torch.zeros(1, seqlen, dtype=torch.int64)
    try:
        shard = SequenceShard.cut(1, seqlen, group)
        model.read(shard.take(ids) if not options else ids, shard=shard)
    except UserError as error:
        return str(error)
    return ""


def whole_rows(group) -> str:
    return message_of(group, "mamba2", 9, whole=True)


def test_mistakes_are_told_in_one_line_by_every_process(ranks):
    messages = {
        r"layer 2 \(attention\) needs whole rows.*mamba1, mamba2 and mlp": ranks(2, message_of, "hybrid", 9),
        r"rows of 3 tokens cannot be cut over 4 processes": ranks(4, message_of, "mamba2", 3),
        r"shard has 1 rows of \d tokens, got \(1, 9\)": ranks(2, whole_rows),
    }
    for pattern, told in messages.items():
        for message in told:
            with pytest.raises(UserError, match=pattern):
                raise UserError(message)
            assert "\n" not in message


def test_a_shard_is_read_without_a_state(ranks):
    model = build("mamba2")
    shard = SequenceShard(None, 0, 2, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(UserError, match="without a state"):
        model.read(torch.zeros(1, 2, dtype=torch.int64), shard=shard, state=model.allocate_state(1))


def test_a_kind_that_does_not_say_that_it_reads_shards_is_refused():
    """It would read its piece as if nothing came before."""

    class Silent(nn.Module):
        pass

    with pytest.raises(UserError, match=r"layer 1 \(Silent\) needs whole rows"):
        check_shardable([build("mlp").layers[0].mixer, Silent()])
