import pytest
import torch

from canter.training.muon import Muon, orthogonalise


def test_singular_values_come_close_to_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(5, 24, 64)).double())
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_equals_torch_muon(shape):
    torch.manual_seed(0)
    start = torch.randn(3, *shape)
    ours = [torch.nn.Parameter(start[i].clone()) for i in range(3)]
    theirs = [torch.nn.Parameter(start[i].clone()) for i in range(3)]
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    moved = (theirs[0] - start[0]).abs().max()
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() < 0.05 * moved  # the iteration runs in bfloat16


def test_wide_matrices_take_the_same_iteration_on_their_gram_matrices():
    torch.manual_seed(0)
    wide = torch.randn(3, 24, 64)
    narrow = torch.cat([wide, torch.zeros(3, 20, 64)], dim=1)  # 44 rows: the plain iteration
    assert torch.allclose(orthogonalise(wide), orthogonalise(narrow)[:, :24], atol=1e-4)
