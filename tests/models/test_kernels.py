"""GPU kernels compute the same as torch's own operations; without a GPU they run in Triton's interpreter."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from canter.models.fastconformer import _shift
from canter.models.features import length_mask

pytest.importorskip("triton", reason="Triton is not there")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
HERE = DEVICE.type == "cuda" or INTERPRETED
runs_here = pytest.mark.skipif(not HERE, reason="test_in_the_interpreter runs it")

if HERE:
    from canter.models.kernels import conformer, subsampling

POINTERS = {"lengths": "*i64", "valid": "*i1"} | dict.fromkeys(("firsts", "seconds", "tables"), "*fp32")
HALVES = "x y z first second gradient table for_y weight bias mean variance gain shift scores out"
POINTERS |= dict.fromkeys(HALVES.split(), "*bf16")
CHOICES = {"BIAS": True, "FLIPPED": False, "NORMED": True, "LEAST": -1e9, "K": 9, "TAPS": 16, "R": 16, "S": 128}


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", ["subsampling", "conformer"])
def test_they_compile_for_a_gpu_that_is_not_there(name):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime import JITFunction

    module = importlib.import_module(f"canter.models.kernels.{name}")
    kernels = [one for one in vars(module).values() if isinstance(one, JITFunction)]
    assert kernels
    for kernel in kernels:
        if kernel.__name__ in ("_place", "_window"):  # which others call
            continue
        constants = {n: CHOICES.get(p.name, 64) for n, p in enumerate(kernel.params) if p.is_constexpr}
        types = {
            p.name: "constexpr"
            if p.is_constexpr
            else POINTERS.get(p.name) or ("fp32" if p.name == "epsilon" else "i32")
            for p in kernel.params
        }
        source = ASTSource(kernel, types, {(n,): value for n, value in constants.items()})
        assert compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]


@pytest.mark.skipif(HERE, reason="this is the interpreter, or a GPU")
def test_in_the_interpreter():
    """The test needs a separate process, because Triton reads the variable when it is imported."""
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(pytest_, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout


def random(*shape):
    return torch.randn(*shape, device=DEVICE).to(DTYPE).requires_grad_()


def same(ours, theirs, given):
    """Both functions give the same and the same gradients; theirs computes in float32."""
    found = []
    for function, inputs in ((ours, given), (theirs, [one.detach().float().requires_grad_() for one in given])):
        y = function(*inputs)
        weights = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape)  # neither constant nor drawn twice
        found.append([y, *torch.autograd.grad(y, inputs, weights.to(y.dtype))])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        assert one.dtype == DTYPE
        assert (one - other).float().norm() <= (1e-5 if INTERPRETED else 2e-2) * other.norm()


# more rows than a tile holds, an odd number of frames, channels that fill no tile
@pytest.mark.parametrize(("frames", "mels", "channels"), [(37, 16, 8), (9, 13, 70)])
@runs_here
def test_subsampling(frames, mels, channels):
    torch.manual_seed(0)
    x = torch.randn(2, frames, mels, device=DEVICE).to(DTYPE)
    lengths = torch.tensor([frames, frames // 2], device=DEVICE)
    weights = [random(channels, 1, 3, 3) for _ in range(3)]
    biases = [random(channels) for _ in range(3)]

    def masked(y, lengths):
        return y * length_mask(lengths, y.shape[2])[:, None, :, None]

    def start(weight1, bias1, weight2, bias2):
        y = F.conv2d(masked(x.float()[:, None], lengths), weight1, bias1, stride=2, padding=1)
        y = F.relu(masked(y, halved))
        return F.conv2d(y, weight2, bias2, stride=2, padding=1, groups=channels).permute(0, 2, 3, 1)

    def halve(y, weight, bias):
        z = F.relu(masked(y.permute(0, 3, 1, 2), quartered))
        return F.conv2d(z, weight, bias, stride=2, padding=1, groups=channels).permute(0, 2, 3, 1)

    halved = (lengths + 1) // 2
    quartered = (halved + 1) // 2
    given = [weights[0], biases[0], weights[1], biases[1]]
    same(lambda *given: subsampling.start(x, lengths, *given), start, given)
    y = random(2, (frames + 3) // 4, (mels + 3) // 4, channels)
    same(lambda y, *given: subsampling.halve(y, quartered, *given), halve, [y, weights[2], biases[2]])


@pytest.mark.parametrize(("frames", "width", "taps", "bias"), [(37, 16, 9, True), (9, 70, 31, False)])
@runs_here
def test_depthwise_convolution(frames, width, taps, bias):
    torch.manual_seed(0)
    given = [random(2, frames, width), random(width, 1, taps), *([random(width)] if bias else [])]
    valid = length_mask(torch.tensor([frames, frames // 2], device=DEVICE), frames)

    def ours(x, weight, bias=None):
        return conformer.depthwise(x, valid, weight, bias)

    def theirs(x, weight, bias=None):
        return F.conv1d((x * valid[:, :, None]).mT, weight, bias, padding=taps // 2, groups=width).mT

    same(ours, theirs, given)


@runs_here
def test_depthwise_convolution_with_its_norm():
    torch.manual_seed(0)
    x, weight, bias, gain, shift = random(2, 21, 16), random(16, 1, 9), random(16), random(16), random(16)
    mean, variance = (torch.rand(16, device=DEVICE) for _ in range(2))
    valid = length_mask(torch.tensor([21, 7], device=DEVICE), 21)
    with torch.no_grad():
        y = conformer.depthwise_normed(x, valid, weight, bias, mean, variance, gain, shift, 1e-5)
        masked = (x * valid[:, :, None]).float().mT
        z = F.conv1d(masked, weight.float(), bias.float(), padding=4, groups=16)
        z = F.silu(F.batch_norm(z, mean, variance, gain.float(), shift.float(), eps=1e-5)).mT
    assert y.dtype == DTYPE
    assert (y - z).norm() <= (1e-5 if INTERPRETED else 2e-2) * z.norm()


@runs_here
def test_relative_bias():
    torch.manual_seed(0)
    valid = length_mask(torch.tensor([21, 7], device=DEVICE), 21)

    def theirs(scores):
        return _shift(scores.transpose(0, 1)).masked_fill(~valid[:, None, None, :], -9.0)

    def ours(scores):
        return conformer.relative_bias(scores, valid).clamp(min=-9.0)  # for the least number has no finite square

    same(ours, theirs, [random(3, 2, 21, 48)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@runs_here
def test_torch_may_compile_what_calls_them():
    valid = length_mask(torch.tensor([3], device=DEVICE), 4)
    torch.library.opcheck(conformer.relative_bias, (random(1, 1, 4, 8), valid))
    torch.library.opcheck(conformer.depthwise, (random(1, 4, 8), valid, random(8, 1, 3), random(8)))
