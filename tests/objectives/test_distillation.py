import pytest
import torch

from hyperdflash.objectives.distillation import Distillation, kl_loss, teacher_states

PAPER = dict(alpha=0.15, positions=2, temperature=1.0, teacher="mean_pool")


def test_the_loss_worked_by_hand():
    kl_sum, kl_count = torch.tensor([0.130812, 0.130812]), torch.tensor([2, 1])
    # 2^2 / 2 * (0.130812 / 2 + 0.130812 / 1)
    torch.testing.assert_close(kl_loss(kl_sum, kl_count, 2.0), torch.tensor(0.392436), atol=1e-5, rtol=0)


def test_positions_without_rows_add_nothing():
    assert kl_loss(torch.tensor([0.6, 0.0]), torch.tensor([3, 0]), 1.0).item() == pytest.approx(0.1)
    assert kl_loss(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 1.0).item() == 0.0


@pytest.mark.parametrize("teacher", ["mean_pool", "hc_head"])
def test_teacher_states_collapse_the_gathered_rows(heads, residual, teacher):
    documents, positions = torch.tensor([[[0]], [[1]]]), torch.tensor([[[2, 3], [7, 8]], [[0, 1], [5, 6]]])
    states = teacher_states(residual, documents, positions, heads, teacher)  # [B, A, P, D]
    whole = heads.collapse(residual, teacher)
    assert states.shape == (2, 2, 2, heads.hidden_size)
    for b in range(2):
        torch.testing.assert_close(states[b], whole[b, positions[b]])
    nothing = torch.zeros(0, dtype=torch.int64)
    assert teacher_states(residual, nothing, nothing, heads, teacher).shape == (0, heads.hidden_size)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(alpha=1.5), r"kl\.alpha must be in \[0, 1\], got 1\.5"),
        (dict(alpha="3e-4"), r"kl\.alpha must be in \[0, 1\], got the string '3e-4' .*write 0\.0003"),
        (dict(positions=-1), r"kl\.positions must be an integer of at least 0, got -1"),
        (dict(positions=1.5), r"kl\.positions must be an integer of at least 0, got 1\.5"),
        (dict(temperature=0), r"kl\.temperature must be a number above 0, got 0"),
        (dict(teacher="mean"), r"kl\.teacher must be mean_pool or hc_head, got 'mean'"),
    ],
)
def test_wrong_settings(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Distillation(**{**PAPER, **change})


def test_settings_against_the_drafter_and_without_effect():
    Distillation(**PAPER).check(6)
    with pytest.raises(ValueError, match=r"kl\.positions must be in 0\.\.6 .* got 7"):
        Distillation(**{**PAPER, "positions": 7}).check(6)
    with pytest.warns(UserWarning, match="no effect"):
        Distillation(**{**PAPER, "positions": 0})
