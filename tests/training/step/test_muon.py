import pytest
import torch

from canter.training.step.optimizers import Muon, orthogonalise


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


def test_matrices_take_turns_and_keep_their_last_direction():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 24, 64), torch.randn(5, 3, 24, 64)

    def moves(every: int, stop: int | None = None) -> list[torch.Tensor]:
        matrices = [torch.nn.Parameter(m.clone()) for m in start]
        muon, found = Muon(matrices, lr=0.1, every=every), []
        for step, some in enumerate(gradients):
            if step == stop:
                state, muon = muon.state_dict(), Muon(matrices, lr=0.1, every=every)
                muon.load_state_dict(state)
            before = torch.stack([m.detach().clone() for m in matrices])
            for matrix, gradient in zip(matrices, some):
                matrix.grad = gradient.clone()
            muon.step()
            found.append(torch.stack([m.detach() for m in matrices]) - before)
        return found

    each, second = moves(1), moves(2)
    for step in range(5):
        for n in range(3):
            last = step if step == 0 or step % 2 == n % 2 else step - 1
            assert torch.allclose(second[step][n], each[last][n], atol=1e-6)
    assert not torch.allclose(each[1], each[0], atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(second, moves(2, stop=3), strict=True))
