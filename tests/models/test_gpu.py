"""Models compute the same on a GPU as on a CPU."""

import copy

import pytest
import torch

from canter.models.norm import merge_pending
from canter.training.step.gradient import Bf16Weights
from canter.training.step.weights import compile_layers

from .conftest import small_model, small_whisper
from .test_invariance import make_batch

SIZES = [16000, 12345, 4000]  # samples

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.usefixtures("without_tf32"),
]


def loss_of(model, batch):
    loss = model.loss(batch.to(next(model.parameters()).device))
    return loss.attention / loss.attention_count + loss.ctc / loss.ctc_count.clamp(min=1)


@pytest.mark.parametrize("build", [small_model, small_whisper])
def test_features_loss_and_gradients_are_those_of_a_cpu(build):
    ours = build().train()
    theirs = copy.deepcopy(ours).cuda()
    batch = make_batch(SIZES, 1000, 1)
    on_cpu, lengths = ours.features(batch.audio, batch.audio_lengths)
    on_gpu, same = theirs.features(batch.audio.cuda(), batch.audio_lengths.cuda())
    assert same.tolist() == lengths.tolist()
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-3)
    losses = [loss_of(model, batch) for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-4, atol=1e-5)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(other.grad.cpu(), one.grad, rtol=1e-3, atol=1e-4, msg=name)
    for model in (ours, theirs):
        merge_pending(model)
    for (name, one), other in zip(ours.named_buffers(), theirs.buffers()):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-4, atol=1e-4, msg=name)


def test_padding_changes_nothing():
    model = small_model().cuda()
    batch = make_batch(SIZES, 1000, 1).to(torch.device("cuda"))
    with torch.inference_mode():
        encoded, lengths = model.encode(*model.features(batch.audio, batch.audio_lengths))
        for row in range(len(lengths)):
            size = batch.audio_lengths[row : row + 1]
            alone, _ = model.encode(*model.features(batch.audio[row : row + 1, : int(size)], size))
            frames = int(lengths[row])  # there are a few more, which fill a multiple of eight
            torch.testing.assert_close(alone[0, :frames], encoded[row, :frames], rtol=1e-3, atol=1e-4)


def test_bf16_comes_close_and_compiled_layers_come_to_the_same():
    model, batch = small_model().cuda().train(), make_batch(SIZES, 1000, 1)
    loss_of(model, batch).backward()
    exact = {name: one.grad for name, one in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with Bf16Weights(model) as half:
        rounded = loss_of(model, batch)
        rounded.backward()
        half.collect()
    with torch.no_grad():
        whole = float(loss_of(model, batch))
    assert float(rounded.detach()) == pytest.approx(whole, rel=0.05)
    for name, one in model.named_parameters():
        assert one.dtype == one.grad.dtype == torch.float32
        assert (one.grad - exact[name]).norm() <= 0.2 * exact[name].norm() + 1e-4, name
    compiled = copy.deepcopy(model)
    compiled.zero_grad(set_to_none=True)
    compile_layers(compiled)
    loss = loss_of(compiled, batch)
    assert float(loss.detach()) == pytest.approx(whole, rel=1e-3)
    loss.backward()
    for name, one in compiled.named_parameters():
        torch.testing.assert_close(one.grad, exact[name], rtol=1e-2, atol=1e-3, msg=name)
