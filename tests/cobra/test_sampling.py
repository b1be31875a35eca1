import math

import pytest
import torch

from cobra.sampling import Sampler, draw, greedy, probabilities
from vision_scan.errors import UserError

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.5, 0.3, 0.1, 0.1]]).log()


def test_greedy_takes_the_largest():
    assert greedy(LOGITS).tolist() == [1, 0]


def test_probabilities_without_options_is_softmax():
    torch.testing.assert_close(probabilities(LOGITS), LOGITS.exp())


def test_probabilities_temperature_sharpens_and_flattens():
    expected = LOGITS.exp() ** 2
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(probabilities(LOGITS, temperature=0.5), expected)
    assert probabilities(LOGITS, temperature=100.0).max() < 0.26


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.1}, [1]),
        ({"top_p": 0.65}, [1, 3]),
        ({"top_p": 0.75}, [1, 2, 3]),
        ({"top_k": 2, "top_p": 0.5}, [1]),  # of the two kept, 4/7 reaches a half
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),
    ],
)
def test_probabilities_keeps_the_top(options, kept):
    chances = probabilities(LOGITS[:1], **options)[0]
    expected = torch.zeros(4)
    expected[kept] = LOGITS[0].exp()[kept]
    torch.testing.assert_close(chances, expected / expected.sum())


def test_probabilities_top_k_breaks_ties_to_exactly_k():
    assert (probabilities(torch.zeros(1, 5), top_k=2) > 0).sum() == 2


def test_probabilities_in_bf16_are_float32():
    assert probabilities(LOGITS.bfloat16(), top_p=0.9).dtype == torch.float32


def test_draw_follows_the_distribution():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(LOGITS[:1].exp(), [generator]).item() for _ in range(2000)]
    for token, chance in enumerate([0.1, 0.4, 0.2, 0.3]):
        spread = math.sqrt(chance * (1 - chance) / 2000)
        assert abs(drawn.count(token) / 2000 - chance) < 4 * spread


def test_draw_never_takes_an_impossible_token():
    chances = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    generator = torch.Generator().manual_seed(0)
    assert {draw(chances, [generator]).item() for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("seed", [7, [7, 8, 9]])
def test_sampler_rows_do_not_depend_on_neighbours(seed):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    batch, alone = Sampler(3, do_sample=True, seed=seed), Sampler(1, do_sample=True, seed=8)
    for _ in range(5):
        assert batch(logits)[1] == alone(logits[1:2])[0]


def test_sampler_seed_repeats_and_none_follows_torch():
    logits = torch.zeros(1, 10_000)
    assert Sampler(1, True, seed=1)(logits) == Sampler(1, True, seed=1)(logits)
    assert Sampler(1, True, seed=1)(logits) != Sampler(1, True, seed=2)(logits)
    assert Sampler(1, True)(logits) != Sampler(1, True)(logits)
    torch.manual_seed(3)
    first = Sampler(1, True)(logits)
    torch.manual_seed(3)
    assert Sampler(1, True)(logits) == first


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0}])
def test_sampler_is_greedy_unless_told_otherwise(options):
    assert Sampler(2, **options)(LOGITS).tolist() == [1, 0]


def test_sampler_tolerates_none():
    Sampler(1, True, temperature=None, top_k=None, top_p=None, seed=0)(LOGITS[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"seed": [1], "do_sample": True}, "1 seeds for 2 rows"),
    ],
)
def test_sampler_names_the_bad_option(options, message):
    with pytest.raises(UserError, match=message):
        Sampler(2, **options)
