"""Analytic budgets of known models, for planning before `canter tune` has measured one.

The counts are for mixed-precision training that keeps activations. They tell which batch is larger and by how much, and
do not guarantee that a batch fits. Per utterance, with E encoder layers of width d and D decoder layers of
width w: bytes held for the backward pass are about 76 d a frame and encoder layer (Conformer: two feed-forwards,
attention, convolution) or 34 d (Transformer), 61 w a token and decoder layer, 2 bytes a head and attention cell
three times over; multiply-adds are three times the forward pass.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from canter.errors import BudgetError
from canter.planning.budget import Budget, Polynomial


@dataclass(frozen=True, slots=True)
class BudgetShape:
    """Sizes of a model that decide the cost of a step; `frame_seconds` is an encoder frame after subsampling."""

    parameters: float
    encoder_layers: int
    encoder_width: int
    decoder_layers: int
    decoder_width: int
    vocabulary: int
    heads: int = 8
    conformer: bool = True
    frame_seconds: float = 0.08


SHAPES = {
    "canary-1b": BudgetShape(1018e6, 24, 1024, 24, 1024, 5248),
    "canary-1b-flash": BudgetShape(883e6, 32, 1024, 4, 1024, 5248),
    "canary-180m-flash": BudgetShape(182e6, 17, 512, 4, 1024, 5248),
    "whisper-tiny": BudgetShape(38e6, 4, 384, 4, 384, 51865, 6, False, 0.02),
    "whisper-base": BudgetShape(73e6, 6, 512, 6, 512, 51865, 8, False, 0.02),
    "whisper-small": BudgetShape(242e6, 12, 768, 12, 768, 51865, 12, False, 0.02),
    "whisper-medium": BudgetShape(764e6, 24, 1024, 24, 1024, 51865, 16, False, 0.02),
    "whisper-large-v3": BudgetShape(1543e6, 32, 1280, 32, 1280, 51866, 20, False, 0.02),
    "whisper-large-v3-turbo": BudgetShape(809e6, 32, 1280, 4, 1280, 51866, 20, False, 0.02),
}
STATE_BYTES = 16  # a parameter: weight, gradient and two moments in float32
FLOPS = 250e12  # a second, of a current data-centre GPU in bf16; all times scale with it
RESERVE = 0.08  # fraction of the device for the context, buffers and fragmentation


def known_shape(model: str) -> BudgetShape:
    """Return the shape of a model. Raises BudgetError with the nearest known name."""
    if model not in SHAPES:
        near = difflib.get_close_matches(model, SHAPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise BudgetError(f"no shape named {model!r}; {hint}known: {', '.join(SHAPES)}")
    return SHAPES[model]


def check_shape(budget: Budget, model: str) -> None:
    """Raise BudgetError where the budget was made for another model."""
    shape = known_shape(model)
    named = str(budget.measured_on.get("model", "")).removeprefix("analytic ")
    if named in SHAPES and named != model:
        raise BudgetError(f"the budget is of {named}, not of {model}: name that model, or no model, or another budget")
    if budget.frame_seconds != shape.frame_seconds:
        raise BudgetError(
            f"the budget counts frames of {budget.frame_seconds:g} s and {model} has frames of "
            f"{shape.frame_seconds:g} s: it was measured on another model; run 'canter tune' for this one"
        )


def analytic_budget(model: str = "canary-1b", gigabytes: float = 80.0) -> Budget:
    """Return the budget of a known model on a device of `gigabytes` (10^9 bytes).

    Raises BudgetError for an unknown name, or where the weights leave no room for a batch.
    """
    shape = known_shape(model)
    state = shape.parameters * STATE_BYTES
    limit = gigabytes * 1e9 * (1 - RESERVE)
    if limit <= state:
        raise BudgetError(
            f"{model} needs {state / 1e9:.0f} GB for weights, gradients and optimiser state; "
            f"{gigabytes:g} GB leave no room for a batch: choose a smaller model or a larger device"
        )
    enc, d, dec, w, heads = (
        shape.encoder_layers, shape.encoder_width, shape.decoder_layers, shape.decoder_width, shape.heads,
    )  # fmt: skip
    frame_bytes, frame_products = (76 * d, 24 * d * d) if shape.conformer else (34 * d, 12 * d * d)
    front_bytes, front_flops = (0.4e6, 0.4e9) if shape.conformer else (16 * d, 6 * 4 * d * d)
    memory = Polynomial(
        T=enc * frame_bytes + front_bytes + dec * 4 * w,
        TT=enc * heads * 12.0,
        U=dec * 61 * w + 14 * shape.vocabulary,
        TU=dec * heads * 8.0,
        UU=dec * heads * 8.0,
    )
    flops = Polynomial(
        T=6 * frame_products * enc + front_flops + 12 * d * w * dec,
        TT=18.0 * d * enc,
        U=6 * (14.0 * w * w * dec + shape.vocabulary * w),
        TU=12.0 * w * dec,
        UU=6.0 * w * dec,
    )
    return Budget(
        limit_bytes=limit,
        fixed_bytes=state,
        memory=memory,
        time=Polynomial(*(getattr(flops, term) / FLOPS for term in ("T", "TT", "U", "TU", "UU"))),
        fixed_seconds=shape.parameters * 8e-11,
        frame_seconds=shape.frame_seconds,
        measured_on={"model": f"analytic {model}", "device": f"{gigabytes:g} GB"},
    )
