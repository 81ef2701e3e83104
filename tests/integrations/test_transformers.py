"""Small random models of each family: planned for, tuned, trained and transcribed through the adapter."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from canter.corpus.build import index_sources
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Utterance, write_manifest
from canter.inference.engine.requests import EngineConfig, Request
from canter.inference.recording import TranscribeConfig
from canter.inference.transcribe import transcribe
from canter.models.batch import SoftTargets
from canter.planning.budget import Budget
from canter.planning.plan import Plan
from canter.training.config import OptimizerConfig, TrainConfig
from canter.training.feed.data import Address, Example, MicroBatches, collate
from canter.training.measure import SyntheticStep, planned_frame_seconds, synthetic_batch
from canter.tuning.fit import fit_budget
from canter.tuning.probe import Prober

transformers = pytest.importorskip("transformers")

from canter.integrations.transformers import TransformersModel, TransformersTokenizer  # noqa: E402

from .small_transformers import END, FAMILIES, PAD, START, built, canary, clips, make, word_tokenizer  # noqa: E402

# the others read padding (Moonshine's GroupNorm, Speech2Text's and SeamlessM4T's convolutions)
PADDING_CHANGES_NOTHING = ("whisper", "canary")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def adapted(family):
    return built(family)


def batch_of(audio, tokens, prompt=1):
    return collate([Example(a, t, prompt, [], row) for row, (a, t) in enumerate(zip(audio, tokens))], PAD)


TOKENS = [[START, 7, 8, 9, END], [START, 7, 12, 13, 14, 15, END], [START, 7, 20, END]]
SECONDS = (1.3, 2.0, 0.6)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.21])
def test_frames_are_those_of_the_encoder(adapted, seconds):
    inputs = adapted.inputs(clips([seconds]))
    with torch.no_grad():
        encoded = adapted.model.get_encoder()(**inputs).last_hidden_state
    assert adapted.exact_frames(seconds) == encoded.shape[1]
    assert abs(adapted.encoder_frames(seconds) - encoded.shape[1]) <= 1


def test_info(family, adapted):
    layers, cost = adapted.layers(), adapted.cost(1.0, 5)
    assert layers["encoder"]["layers"] == layers["decoder"]["layers"] == 2
    assert layers["encoder"]["width"] == layers["decoder"]["width"] == 16
    assert sum(adapted.parts().values()) == sum(p.numel() for p in adapted.parameters())
    assert cost.frames == adapted.exact_frames(1.0)
    assert cost.encoder_flops > 0
    assert cost.decoder_flops > 0
    assert cost.cache_values == 2 * 2 * 16 * (cost.frames + 5)


def test_half_precision(family):
    adapted = TransformersModel(copy.deepcopy(built(family).model).bfloat16(), built(family).extractor)
    assert adapted.frame_seconds == built(family).frame_seconds
    loss = adapted.loss(batch_of(clips(SECONDS), TOKENS))
    assert loss.attention.dtype == torch.float32
    assert torch.isfinite(loss.attention)


def test_frame_seconds(family, adapted):
    expected = {"whisper": 0.02, "speech_to_text": 0.04, "moonshine": 0.024, "seamless": 0.16, "canary": 0.08}
    assert adapted.frame_seconds == pytest.approx(expected[family], rel=1e-2)
    assert planned_frame_seconds(adapted) == (4.0 if family == "whisper" else adapted.frame_seconds)


def test_loss_is_that_of_transformers(adapted):
    """Prompt and padding masked by hand with -100."""
    audio = clips([1.0] * 3)
    loss = adapted.loss(batch_of(audio, TOKENS, prompt=2))
    labels = torch.full((3, 6), -100)
    for row, tokens in enumerate(TOKENS):
        labels[row, 1 : len(tokens) - 1] = torch.tensor(tokens[2:])
    inputs = batch_of(audio, TOKENS).tokens[:, :-1]
    expected = adapted.model(**adapted.inputs(audio), decoder_input_ids=inputs, labels=labels).loss
    assert int(loss.attention_count) == 3 + 5 + 2
    assert (loss.attention / loss.attention_count).item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(loss.ctc_count) == 0
    smoothed = adapted.loss(batch_of(audio, TOKENS, prompt=2), label_smoothing=0.1)
    assert smoothed.attention != loss.attention


def test_it_teaches_and_learns(adapted):
    """Logits are those of transformers, and the divergence is that of torch."""
    audio = clips([1.0] * 3)
    batch = batch_of(audio, TOKENS, prompt=2)
    with torch.no_grad():
        logits = adapted.token_logits(batch)
        torch.testing.assert_close(
            logits, adapted.model(**adapted.inputs(audio), decoder_input_ids=batch.tokens[:, :-1]).logits
        )
    noisy = SoftTargets(logits + torch.randn_like(logits), temperature=2.0)
    expected = 0.0
    for row, tokens in enumerate(TOKENS):
        targets, ours = ((one[row, 1 : len(tokens) - 1] / 2).log_softmax(-1) for one in (noisy.logits, logits))
        expected += 4 * nn.functional.kl_div(ours, targets, reduction="sum", log_target=True)
    loss = adapted.loss(batch, teacher=noisy)
    loss.distillation.backward()
    assert loss.distillation.item() == pytest.approx(expected.item(), rel=1e-4)
    assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())
    adapted.zero_grad()


@pytest.mark.parametrize("name", PADDING_CHANGES_NOTHING)
def test_losses_of_micro_batches_add_up(name):
    adapted, audio = built(name), clips(SECONDS)
    together = adapted.loss(batch_of(audio, TOKENS)).attention
    apart = sum(adapted.loss(batch_of([a], [t])).attention for a, t in zip(audio, TOKENS))
    assert together.item() == pytest.approx(apart.item(), rel=1e-4)


def test_trains(family):
    torch.manual_seed(0)
    adapted = TransformersModel(*make(family)).train()
    batch = batch_of(clips(SECONDS), TOKENS)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = adapted.loss(batch)
        (loss.attention / loss.attention_count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.attention / loss.attention_count).item())
    assert losses[-1] < 0.7 * losses[0]


def test_tuned_and_planned(family, adapted):
    before = {name: x.clone() for name, x in adapted.state_dict().items()}
    batch = synthetic_batch(adapted, 2, 1 if family == "whisper" else 30, 5, prompt=1)
    assert batch.tokens.shape == (2, 5)
    seconds = batch.audio.shape[1] / adapted.sample_rate
    assert seconds == 4.0 if family == "whisper" else abs(adapted.encoder_frames(seconds) - 30) <= 2
    seconds, tokens = np.linspace(0.5, 1.5, 30).astype(np.float32), np.arange(30) % 8 + 3
    unit = planned_frame_seconds(adapted)
    frames = Budget.from_batch_seconds(unit, frame_seconds=unit).frames(seconds)
    step = SyntheticStep(TrainConfig(optimizer=OptimizerConfig(name="adamw")), adapted, "float32")
    budget = fit_budget(
        Prober(step, 2e9, {"model": family}),
        LengthIndex(seconds, tokens, ["x"]),
        most_probes=8,
        most_frames=2 * int(frames.max()),
    )
    assert all(torch.equal(x, before[name]) for name, x in adapted.state_dict().items())
    assert budget.step_seconds(2, int(frames.max()), 10) > 0
    plan = Plan(LengthIndex(seconds, tokens, ["x"]), replace(budget, limit_bytes=budget.bytes(4, frames.max(), 11)))
    rows = [row for step in plan for micro_batch in step for row in micro_batch.tolist()]
    assert sorted(rows) == list(range(30))


def alone(adapted, audio, prompt, limit, **settings):
    """Return the output of the family's own ``generate`` for one clip."""
    sequences = transformers.generation.GenerationMixin.generate(
        adapted.model,
        **adapted.inputs([audio]),
        decoder_input_ids=torch.tensor([prompt]),
        max_new_tokens=limit,
        do_sample=False,
        **settings,
    )
    row = sequences[0, len(prompt) :].tolist()
    return row[: row.index(END)] if END in row else row


def test_transcripts_are_those_of_generate_in_input_order(adapted):
    audio = clips([0.6, 2.0, 1.1, 1.7])
    prompts = [[START], [START, 5], [START, 6], [START, 5]]
    expected = [alone(adapted, a, p, 12) for a, p in zip(audio, prompts)]
    assert adapted.transcribe(audio, prompts, batch_seconds=0.1, limits=[12] * 4) == expected
    assert any(tokens != expected[0] for tokens in expected)


@pytest.mark.parametrize("name", PADDING_CHANGES_NOTHING)
def test_transcripts_do_not_depend_on_the_batch(name):
    adapted, audio = built(name), clips([0.6, 2.0, 1.1, 1.7, 1.0], seed=3)
    alone = adapted.transcribe(audio, batch_seconds=0.1)
    assert adapted.transcribe(audio, batch_seconds=1000.0) == alone
    assert all(len(tokens) <= np.ceil(12.5 * len(a) / 16000) + 10 for tokens, a in zip(alone, audio))


def test_beams(adapted):
    audio = clips([0.8])
    found = adapted.transcribe(audio, limits=[8], num_beams=3)
    assert found == [alone(adapted, audio[0], [START], 8, num_beams=3)]


def test_audio_that_would_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"5.00 s is longer than the model's 4 s"):
        built("whisper").transcribe(clips([5.0]))


def test_layers_inside_of_other_modules_are_counted():
    adapted = built("speecht5")
    layers, audio = adapted.layers(), clips([0.8])
    assert (layers["encoder"]["layers"], layers["decoder"]["layers"], adapted.positions) == (2, 2, 40)
    assert adapted.cost(1.0, 5).cache_values == 2 * 2 * 16 * (adapted.exact_frames(1.0) + 5)
    assert adapted.transcribe(audio, limits=[8]) == [alone(adapted, audio[0], [START], 8)]


def engine_of(adapted, **settings):
    return adapted.engine(END, EngineConfig(**settings))


def test_audio_that_the_library_cannot_take_fails_by_itself():
    """Speech2Text's filterbank needs 25 ms."""
    adapted, audio = built("speech_to_text"), clips([1.0, 0.005, 0.7])
    engine = engine_of(adapted.train())
    found = {one.key: one for one in engine.run([[Request(clip, [START], n) for n, clip in enumerate(audio)]])}
    assert adapted.training
    adapted.eval()
    assert [found[number].tokens for number in (0, 2)] == [adapted.transcribe([audio[n]])[0] for n in (0, 2)]
    assert "Speech2TextForConditionalGeneration fails on 0.01 s of this audio: " in found[1].error
    assert (found[0].error, found[2].error, found[1].tokens) == (None, None, [])
    assert engine.counters.utterances == 3


def test_lack_of_memory_divides_a_batch_and_is_nobodys_fault(monkeypatch):
    adapted, audio, sizes = built("moonshine"), clips([0.7, 0.6]), []
    plain, room = type(adapted).transcribe, [1]

    def limited(self, audio, *arguments, **settings):
        sizes.append(len(audio))
        if len(audio) > room[0]:
            raise RuntimeError("CUDA out of memory")
        return plain(self, audio, *arguments, **settings)

    monkeypatch.setattr(type(adapted), "transcribe", limited)
    requests = [Request(clip, [START]) for clip in audio]
    assert [one.error for one in engine_of(adapted).decode(requests)] == [None, None]
    assert sizes == [2, 1, 1]
    room[0] = 0
    with pytest.raises(RuntimeError, match="out of memory"):
        engine_of(adapted).decode(requests)


@pytest.mark.parametrize(("family", "longest"), [("whisper", 4.0), ("cohere", 30.0)])
def test_long_audio_is_cut_to_what_the_extractor_takes(family, longest, tmp_path):
    """Whisper's extractor truncates, Cohere's divides: both windows are shorter than the usual 40 s."""
    if family == "whisper":
        model, extractor = built("whisper").model, built("whisper").extractor
    else:
        model, extractor = built("canary").model, transformers.CohereAsrFeatureExtractor(feature_size=32)
    tokenizer = word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    adapted = TransformersModel(model, extractor, tokenizer)
    assert adapted.longest_seconds == longest
    soundfile.write(tmp_path / "long.wav", clips([38.0])[0], 16000)
    config = TranscribeConfig(timestamps="segment")
    engine = engine_of(adapted)
    (found,) = transcribe(engine, adapted.tokenizer, [Utterance(str(tmp_path / "long.wav"), 38.0, "")], config=config)
    assert found.error is None
    assert engine.counters.utterances >= 38 / longest
    assert max(segment.end - segment.start for segment in found.segments) <= longest + 0.01
    with pytest.raises(ValueError, match=f"38.00 s is longer than the model's {longest:g} s"):
        adapted.transcribe(clips([38.0]))


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match="no end token"):
        TransformersTokenizer(word_tokenizer(), [START])


def test_from_a_folder(tmp_path):
    tokenizer = word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    model = built("moonshine")
    for part in (model.model, model.extractor, tokenizer):
        part.save_pretrained(tmp_path)
    again = TransformersModel.from_pretrained(tmp_path, prompt=[START, 5])
    assert again.tokenizer.encode("w7 w9") == [7, 9]
    assert again.tokenizer.decode([7, 9, END]) == "w7 w9"
    assert (again.tokenizer.end, again.tokenizer.pad) == (END, PAD)
    audio = clips([1.0])
    assert again.transcribe(audio) == model.transcribe(audio, [[START, 5]])


def test_what_decoding_starts_with_must_be_known():
    model, extractor = canary()
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="give a prompt"):
        TransformersModel(model, extractor)


def test_index_and_micro_batches_of_a_manifest(tmp_path):
    texts = ["w7 w9", "w5", "w8 w8 w8"]
    rows = []
    for number, (audio, text) in enumerate(zip(clips(SECONDS), texts)):
        soundfile.write(tmp_path / f"{number}.wav", audio, 16000)
        rows.append({"audio_filepath": f"{number}.wav", "duration": SECONDS[number], "text": text})
    write_manifest(tmp_path / "train.jsonl", rows)
    tokenizer = TransformersTokenizer(word_tokenizer(pad_token="<pad>", eos_token="</s>"), [START, 5])
    index = index_sources(
        [tmp_path / "train.jsonl"], tmp_path / "lengths.arrow", tokenizer, prompt_tokens=2, progress=False
    )
    assert index.tokens.tolist() == [5, 4, 6]
    data = MicroBatches(index, tokenizer, None, 16000)
    batch = data[Address(0, 0, True, np.arange(3))].batch
    assert batch.tokens[0, :5].tolist() == [START, 5, 7, 9, END]
    assert int(built("canary").loss(batch).attention_count) == 3 + 2 + 4
