"""Greedy tokens of the real NeMo (2.7.3) on its own archives, clip by clip and in batches.

NeMo's batches of prompts of unequal length, and its batches of beams, are wrong (its CAVEATS, 12 and 14): ours must
equal its single-clip results.
"""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

import canter
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Request

SHARED = os.environ.get("CANTER_SHARED")
pytestmark = pytest.mark.skipif(not SHARED, reason="CANTER_SHARED names no folder with NeMo fixtures")
VARIANTS = ("a", "b", "d_switches")


@pytest.fixture(scope="module", params=VARIANTS)
def nemo(request):
    """model, clips (S,) and decoding cases of one fixture."""
    folder = Path(SHARED or "") / "fixtures" / "nemo" / request.param
    arrays = load_file(folder / "arrays.safetensors")
    clips = [row[:size].numpy() for row, size in zip(arrays["audio"], arrays["audio_len"].tolist(), strict=True)]
    cases = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["decode"]
    return canter.load_model(folder / "model.nemo"), clips, cases


def limit(case) -> int:
    """Return the maximum number of tokens that NeMo generates for a case, including the end token.

    Its "beam" of size 1 allows one more than its "greedy" (its CAVEATS, 11).
    """
    most = case["max_seq_length_used"]
    if case["max_delta_len_used"] >= 0:
        most = min(most, case["src_len"] + case["max_delta_len_used"])
    return most - len(case["prompt_ids"][0]) + (case["strategy"] == "beam")


def decoded(model, clips, prompts, tokens: int, **engine) -> list[list[int]]:
    config = EngineConfig(tokens_per_frame=0.0, extra_tokens=tokens, max_repeats=0, **engine)
    requests = [Request(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]
    return [found.tokens for found in Engine(model, model.tokenizer.end, config).decode(requests)]


def greedy_cases(cases) -> list[str]:
    left_out = ("beam4", "greedy_30_ragged")
    return [name for name in cases if not name.startswith(left_out) and "trunc_enc" not in name]


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_greedy_tokens(nemo, rows):
    model, clips, cases = nemo
    names = greedy_cases(cases)
    assert len(names) >= 8
    for name in names:
        case = cases[name]
        found = decoded(model, clips, case["prompt_ids"], limit(case), rows=rows, frames=60)
        assert found == case["hyp_ids"], name


@pytest.mark.parametrize("strategy", ["greedy", "strategy_greedy"])
def test_limit_from_a_shorter_encoder_output(nemo, monkeypatch, strategy):
    model, clips, cases = nemo
    case = cases[f"{strategy}_delta0_trunc_enc"]
    encode, size = model.encode, case["src_len"]

    def truncated(features, lengths, **_):
        encoded, frames = encode(features, lengths)
        return encoded[:, :size], frames.clamp(max=size)

    monkeypatch.setattr(model, "encode", truncated)
    assert decoded(model, clips, case["prompt_ids"], limit(case)) == case["hyp_ids"]


def test_prompts_of_unequal_length_in_one_batch(nemo):
    model, clips, cases = nemo
    singles = [cases[name] for name in sorted(cases) if name.startswith("greedy_30_ragged_single")]
    if not singles:
        pytest.skip("this fixture has no such case")
    prompts = [case["prompt_ids"][0] for case in singles]
    assert len({len(prompt) for prompt in prompts}) > 1
    expected = [case["hyp_ids"][0] for case in singles]
    assert {limit(case) for case in singles} == {30}
    assert decoded(model, clips, prompts, 30) == expected
    for clip, prompt, tokens in zip(clips, prompts, expected, strict=True):
        assert decoded(model, [clip], [prompt], 30) == [tokens]


@pytest.mark.parametrize("rows", [1, 64])
def test_beams(nemo, rows):
    """The four best, in order, with their scores. NeMo's length penalty changes nothing in these (all hypotheses of a
    step count as equally long there); ours does, but the best stays the best."""
    model, clips, cases = nemo
    names = [name for name in cases if name.startswith("beam4") and "_single_" in name]
    assert len(names) >= 4
    for name in names:
        case, clip = cases[name], clips[int(name.rpartition(".")[2])]
        prompt, penalty = case["prompt_ids"][0], case["beam_cfg"]["len_pen"]
        config = EngineConfig(rows=rows, beams=4, length_penalty=penalty, tokens_per_frame=0, extra_tokens=limit(case))
        request = Request(clip, prompt)
        found = Engine(model, model.tokenizer.end, config).decode([request] * 3)
        assert [one.tokens for one in found] == [case["hyp_ids"][0]] * 3
        if penalty:
            continue
        special = (model.tokenizer.pad, model.tokenizer.end)
        beams = [
            [token for token in tokens[len(prompt) :] if token not in special] for tokens in case["beam_sequences"][0]
        ]
        for one in found:
            assert [list(beam.tokens) for beam in one.alternatives] == beams, name
            assert [beam.logprob for beam in one.alternatives] == pytest.approx(case["beam_scores"][0], abs=1e-3)
