import pytest

from hyperdflash.settings import boolean, natural_int, number_between, one_of, positive_int, positive_number


@pytest.mark.parametrize(
    ("check", "sentence"),
    [
        (lambda: positive_int("drafter.num_heads", 0), "drafter.num_heads must be a positive integer, got 0"),
        (lambda: natural_int("kl.positions", -1), "kl.positions must be an integer of at least 0, got -1"),
        (lambda: natural_int("seed", 2**63), f"seed must be at most 1,099,511,627,776, got {2**63}"),
        (lambda: positive_int("num_resamples", 1001, 1000), "num_resamples must be at most 1,000, got 1001"),
        (lambda: number_between("kl.alpha", 1.5, 0, 1), "kl.alpha must be in [0, 1], got 1.5"),
        (lambda: number_between("kl.alpha", float("nan"), 0, 1), "kl.alpha must be in [0, 1], got nan"),
        (lambda: boolean("reducer.path_norm", 1), "reducer.path_norm must be true or false, got 1"),
        (lambda: one_of("kl.teacher", "mean", ("a", "b")), "kl.teacher must be a or b, got 'mean'"),
        (
            lambda: positive_number("kl.temperature", "3e-4"),
            "kl.temperature must be a number above 0, got the string '3e-4' (YAML takes it for text: write 0.0003)",
        ),
        (
            lambda: positive_number("x", "1e-6"),
            "x must be a number above 0, got the string '1e-6' (YAML takes it for text: write 1.0e-06)",
        ),
    ],
)
def test_sentences(check, sentence):
    with pytest.raises(ValueError) as error:
        check()
    assert str(error.value) == sentence


def test_values_pass_through():
    assert positive_int("n", 3) == 3 and natural_int("n", 0) == 0 and boolean("b", False) is False
    assert number_between("x", 1, 0, 1) == 1.0 and positive_number("x", 2) == 2.0 and one_of("x", "a", ("a",)) == "a"
