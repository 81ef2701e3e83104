"""Measure decoding of SeamlessM4T v2 against `transformers` on a CPU or GPU, with the same random weights.

Audio is noise of real lengths, and every row stops at the same given length in both. Batches of `transformers` are
sorted by length and get Canter's features, which are faster; its own extractor is timed separately. Runs are
interleaved, after one that warms up; on a CPU the speed-up is one of CPU time, which other processes do not change.

    CANTER_SHARED=... python benchmarks/seamless.py --threads 1 --json benchmarks/results/DATE-seamless.json
    python benchmarks/seamless.py --smoke          # small shapes, to see that it runs
"""

import json
import platform
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from decoder_shift import ForcedLengths
from gpu_inference import build, draw_lengths, synchronize

from canter.inference.engine.requests import EngineConfig, Request, encoder_batches
from canter.models.decoder import DecoderConfig
from canter.models.features import KaldiFeatureConfig, length_mask
from canter.models.formats.seamless import KIND_OF_DECODER, write_seamless
from canter.models.model import ModelConfig, SpeechModel
from canter.models.w2v_bert import STACKED, W2vBertConfig
from canter.runtime import choose_device

END = 3
PROMPT = (END, 5)


@dataclass(frozen=True)
class Options:
    encoder_layers: int = 6
    decoder_layers: int = 6
    width: int = 512
    vocabulary: int = 32_000
    """Tokens; the released model has 256,102."""
    clips: int = 64
    """Utterances, drawn from real lengths up to 30 s."""
    batch: int = 16
    """Batch size of `transformers`, and slots of Canter's decoder."""
    threads: int | None = None
    """Threads of torch (default: torch's choice)."""
    repeats: int = 3
    """Number of timed runs of each; the median counts."""
    smoke: bool = False
    """Use small shapes and few clips."""
    json: Path | None = None
    """Write the result to this file."""


def seamless_config(options: Options) -> ModelConfig:
    """Return the shape of seamless-m4t-v2-large with other numbers of layers, another width and vocabulary."""
    width, heads = options.width, max(1, options.width // 64)
    encoder = W2vBertConfig(layers=options.encoder_layers, width=width, heads=heads, feedforward=4 * width)
    decoder = DecoderConfig(
        layers=options.decoder_layers, width=width, heads=heads, feedforward=8 * width,
        vocabulary=options.vocabulary, positions=4096, **KIND_OF_DECODER,
    )  # fmt: skip
    return ModelConfig(KaldiFeatureConfig(), encoder, decoder)


def ours(model: SpeechModel, clips: list[np.ndarray], tokens: list[int], batch: int) -> float:
    """Return the seconds that Canter's engine takes."""
    engine = ForcedLengths(model, EngineConfig(rows=batch, max_repeats=0))
    batches = encoder_batches([model.encoder_frames(len(clip) / 16000) for clip in clips], engine.frames, engine.rows)
    begun = time.perf_counter()
    found = engine.run([Request(clips[i], PROMPT, (i, tokens[i])) for i in places] for places in batches)
    assert sum(len(one.tokens) for one in found) == sum(tokens)
    return time.perf_counter() - begun


@torch.inference_mode()
def theirs(model: SpeechModel, hf, clips: list[np.ndarray], tokens: list[int], batch: int) -> float:
    """Return the seconds that `generate` of transformers takes."""
    from transformers import GenerationConfig, LogitsProcessor
    from transformers.generation.utils import GenerationMixin

    class Forced(LogitsProcessor):
        def __init__(self, counts: torch.Tensor):
            self.counts = counts

        def __call__(self, input_ids, scores):
            stops = self.counts == input_ids.shape[1] - len(PROMPT) + 1
            scores[:, END] = torch.where(stops, torch.inf, -torch.inf).to(scores.dtype)
            return scores

    device = next(hf.parameters()).device
    begun = time.perf_counter()
    order = sorted(range(len(clips)), key=lambda place: -len(clips[place]))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        audio, lengths = padded([clips[place] for place in part], device)
        features, frames = model.features(audio, lengths)
        features = F.pad(features, (0, 0, 0, -features.shape[1] % STACKED)).unflatten(1, (-1, STACKED)).flatten(2)
        counts = torch.tensor([tokens[place] for place in part], device=device)
        GenerationMixin.generate(
            hf,
            input_features=features.to(hf.dtype),
            attention_mask=length_mask(frames // STACKED, features.shape[1]).long(),
            decoder_input_ids=torch.tensor([PROMPT] * len(part), device=device),
            generation_config=GenerationConfig(
                max_new_tokens=int(counts.max()) + 1, eos_token_id=END, pad_token_id=0, decoder_start_token_id=END,
                do_sample=False, num_beams=1,
            ),
            logits_processor=[Forced(counts)],
        ).tolist()  # fmt: skip
    synchronize()
    return time.perf_counter() - begun


def padded(clips: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the clips as one tensor (B, S), and their lengths (B,)."""
    audio = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)
    return audio.to(device), torch.tensor(list(map(len, clips)), device=device)


@torch.inference_mode()
def largest_difference(model: SpeechModel, hf, clip: np.ndarray) -> float:
    """Return the largest difference of log-probabilities for a batch of one."""
    device = next(hf.parameters()).device
    features, frames = model.features(*padded([clip], device))
    stacked = F.pad(features, (0, 0, 0, -features.shape[1] % STACKED)).unflatten(1, (-1, STACKED)).flatten(2)
    mask = length_mask(frames // STACKED, stacked.shape[1]).long()
    ids = torch.arange(3, 23, device=device)[None]
    expected = hf(input_features=stacked.to(hf.dtype), attention_mask=mask, decoder_input_ids=ids).logits
    found = model.log_probs(*model.encode(features, frames), ids)
    return float((found - expected.float().log_softmax(-1)).abs().max())


def run(options: Options) -> dict[str, object]:
    if options.smoke:
        options = replace(
            options, encoder_layers=1, decoder_layers=1, width=64, vocabulary=100, clips=4, batch=2, repeats=1
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    import tempfile

    import transformers

    transformers.logging.set_verbosity_error()
    gpu = torch.cuda.is_available()
    device, dtype = choose_device("auto"), torch.bfloat16 if gpu else torch.float32
    torch.manual_seed(0)
    model = build(seamless_config(options), device, dtype)
    with tempfile.TemporaryDirectory() as work:
        folder = write_seamless(model, Path(work) / "model")
        hf = transformers.SeamlessM4Tv2ForSpeechToText.from_pretrained(folder, dtype=dtype).to(device).eval()
    random = np.random.default_rng(1)
    lengths = draw_lengths(options.clips)
    clips = [(0.1 * random.normal(size=round(16000 * seconds))).astype(np.float32) for seconds, _ in lengths]
    tokens = [min(count, 12) if options.smoke else count for _, count in lengths]
    difference = largest_difference(model, hf, clips[0])
    systems = {"canter": lambda: ours(model, clips, tokens, options.batch),
               "transformers": lambda: theirs(model, hf, clips, tokens, options.batch)}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in systems}
    for repeat in range(options.repeats + 1):
        for name, measure in systems.items():
            begun = time.process_time()
            taken = measure()
            if repeat:
                seconds[name].append(taken)
                cpu_seconds[name].append(time.process_time() - begun)
    extractor, begun = transformers.SeamlessM4TFeatureExtractor(), time.perf_counter()
    for clip in clips:
        extractor(clip, sampling_rate=16000, return_tensors="pt")
    extracting = time.perf_counter() - begun
    audio = sum(map(len, clips)) / 16000
    timed = seconds if gpu else cpu_seconds  # other processes of a busy machine do not count
    ratios = [other / one for one, other in zip(timed["canter"], timed["transformers"])]
    result: dict[str, object] = {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "shape": f"{options.encoder_layers}/{options.decoder_layers} x {options.width}, {options.vocabulary} tokens",
        "clips": len(clips),
        "audio_seconds": audio,
        "tokens": sum(tokens),
        "batch": options.batch,
        "log_probability_difference": difference,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rtfx": {name: audio / median(taken) for name, taken in seconds.items()},
        "faster": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
        "their_extractor_seconds": extracting,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    run(tyro.cli(Options, description=__doc__))
