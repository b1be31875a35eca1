"""What only a GPU can show: the sizes that are timed, calls without waiting, CUDA graphs."""

import contextlib

import pytest
import torch

import vision_scan
from eval.gpu import decoding, operators, rivals, scans, small_shapes
from eval.gpu.targets import PASSES
from tests.tolerance import RATIO, assert_close
from tests.vision_scan.samples import OPERATORS, cotangents_of, sample_gated_delta_rule, with_gradients
from tests.vision_scan.test_fla import through_fla, through_us, with_resets
from vision_scan.ops.cuda import gated_delta_rule
from vision_scan.ops.register import KERNELS

pytestmark = pytest.mark.cuda

SETTINGS = scans.Settings(batch=2, ssd_batch=2, nheads=8, checked_rows=2)
UPDATES = {
    "ssd": (vision_scan.ssd_update, {"nheads": 4, "headdim": 64, "d_state": 128}),
    "selective_scan": (vision_scan.selective_scan_update, {"d": 64, "d_state": 16}),
    "causal_conv1d": (vision_scan.causal_conv1d_update, {"d": 64}),
}


def needs_kernel(name: str) -> None:
    if (name, "cuda") not in KERNELS:
        pytest.skip(f"no CUDA kernel of {name}")


@contextlib.contextmanager
def without_waiting():
    """The CPU must not wait for the GPU inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def contest_of(operator: str, d_state: int) -> operators.Contest:
    device = torch.device("cuda")
    if operator == "ssd":
        return scans.ssd_contest(device, SETTINGS)
    if operator == "gated_delta_rule":
        return scans.delta_contest(device, SETTINGS)
    return scans.scan_2d_contest(device, SETTINGS, d_state)


@pytest.mark.parametrize(
    ("operator", "d_state"),
    [("selective_scan_2d", 1), ("selective_scan_2d", 16), ("ssd", 0), ("gated_delta_rule", 0)],
)
def test_results_at_the_sizes_that_are_timed(operator, d_state):
    contest = contest_of(operator, d_state)
    for passes in PASSES:
        expected = contest.expected(passes)
        check = operators.check_ours(contest, passes, contest.ours.work(passes), expected, 1e-2)
        assert check["passed"], (passes, check)


@pytest.mark.parametrize(("operator", "d_state"), [("selective_scan_2d", 16), ("ssd", 0)])
def test_the_cpu_does_not_wait_in_a_scan(operator, d_state):
    needs_kernel(f"{operator}_backward")
    contest = contest_of(operator, d_state)
    for passes in PASSES:
        contest.ours.work(passes)
        with without_waiting():
            contest.ours.work(passes)


@pytest.mark.parametrize("dtype", gated_delta_rule.DTYPES, ids=str)
@pytest.mark.parametrize("segments", [False, True], ids=["rows", "segments"])
def test_fla_gives_what_the_reference_gives(segments, dtype):
    try:
        rivals.entry("chunk_gated_delta_rule")
    except rivals.MissingRivalError as error:
        pytest.skip(str(error))
    rows = ["0" * 150 + "." * 20 + "0112" + "3" * 26, "." * 200, "0.1" + "2" * 190 + "." * 7] if segments else None
    tensors, options = sample_gated_delta_rule(
        batch=3, seqlen=200, num_k_heads=2, num_v_heads=4, head_k_dim=128, head_v_dim=64, least_g=-0.5, dtype=dtype,
        seq_idx=rows,
    )  # fmt: skip
    tensors = {key: t.cuda() for key, t in tensors.items()}
    if segments:
        options["seq_idx"] = options["seq_idx"].cuda()
    sample = with_resets((tensors, options))
    exact = ({key: t.float() for key, t in tensors.items()}, options)  # fla does not serve it
    cotangents = [c.cuda() for c in cotangents_of(through_us(**exact[0], **options))]
    expected, expected_grads = with_gradients(through_us, exact, cotangents)
    try:
        found, grads = with_gradients(through_fla, sample, cotangents)
    except RuntimeError as error:  # fla knows versions of Triton that are wrong on this card
        if "incorrect results" not in str(error):
            raise
        pytest.skip(str(error))
    for actual, true in zip(found, expected, strict=True):
        assert_close("output", actual, true, RATIO[dtype])
    for key, grad in grads.items():
        assert_close(f"gradient of {key}", grad, expected_grads[key], RATIO[dtype])


def sampled(name: str, tokens: int):
    """Inputs of an update in bfloat16, float32 states of five slots, and three rows, one of them skipped."""
    sizes = UPDATES[name][1]
    tensors, options = OPERATORS[name].sample(batch=3, seqlen=tokens, dtype=torch.bfloat16, **sizes)
    state = OPERATORS[name].sample(batch=5, seqlen=1, dtype=torch.bfloat16, **sizes)[0]["initial_state"]
    del tensors["initial_state"]
    options.pop("chunk_size", None)
    on_gpu = {key: tensor.cuda() for key, tensor in tensors.items()}
    return on_gpu, {**options, "state_indices": torch.tensor([3, -1, 0], device="cuda")}, state.cuda()


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", UPDATES)
def test_the_cpu_does_not_wait_in_an_update(name, tokens):
    needs_kernel(f"{name}_update")
    tensors, options, state = sampled(name, tokens)
    UPDATES[name][0](state, **tensors, **options)
    with without_waiting():
        UPDATES[name][0](state, **tensors, **options)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_can_be_captured_in_a_graph(name, tokens):
    """Replayed, it reads its inputs anew and goes on from the state that it has left."""
    needs_kernel(f"{name}_update")
    update = UPDATES[name][0]
    tensors, options, state = sampled(name, tokens)
    start, key = state.clone(), next(iter(tensors))
    first = tensors[key].clone()
    update(state.clone(), **tensors, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = update(state, **tensors, **options)
    state.copy_(start)
    expected_state = start.clone()
    for factor in (1.0, -0.5):
        tensors[key].copy_(first * factor)
        graph.replay()
        expected = update(expected_state, **tensors, **options)
        assert torch.equal(y, expected) and torch.equal(state, expected_state)


@pytest.mark.parametrize("preset", ["tiny", "transformer-tiny"])
def test_decoding_with_a_graph_gives_the_tokens_of_decoding_without(preset):
    with torch.no_grad():
        lm = decoding.build_lm(preset, torch.device("cuda"))
        ids = decoding.random_ids(lm, 2, 12, 0)
        logits, state = lm(ids, logits_to_keep=1)
        expected, _ = lm(logits.argmax(-1), state=state.clone(), logits_to_keep=1)
        stepper = decoding.Stepper(lm, logits.argmax(-1), state)
        _, how, error = decoding.stepping(stepper)
        assert "no CUDA graph" not in how and error < 1e-4, how
        found, _ = lm(logits.argmax(-1), state=lm(ids)[1], overwrite_state=True, logits_to_keep=1)
    assert_close("one step", found, expected, 1e-4)


def test_every_operator_runs_forward_and_backward(capsys):
    assert small_shapes.main("cuda") == 0
