"""Any of transformers' speech encoder-decoders under Canter's planning, tuning, training and batched decoding.

B: utterances, S: samples, T: encoder frames, U: tokens, V: vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer
from transformers.generation.utils import GenerationMixin

from canter.corpus.manifest import Utterance
from canter.inference.engine import encoder_batches
from canter.models.model import Batch, Loss, attention_loss
from canter.tuning.probe import TrainingStep

POSITIONS = ("max_target_positions", "max_position_embeddings")  # a decoder's, by architecture


class TransformersTokenizer:
    """A tokenizer of transformers with what the length index and `MicroBatches` ask of one.

    ``prompt_tokens`` are the decoder's first ones, the same for every utterance.
    """

    def __init__(self, tokenizer: Any, prompt_tokens: Sequence[int]):
        self.tokenizer, self.prompt_tokens = tokenizer, list(prompt_tokens)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
        self.end = int(tokenizer.eos_token_id)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        return f"{self.tokenizer.name_or_path}:{len(self.tokenizer)}"

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Ids of ``text``, without the special tokens that the tokenizer would put around it."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special).strip()

    def prompt(self, utterance: Utterance) -> list[int]:
        return list(self.prompt_tokens)


class TransformersModel(nn.Module):
    """A model of transformers and its feature extractor.

    ``prompt`` are the decoder's first tokens where an utterance brings none: the model's start token, and after
    it languages and tasks as its family writes them.
    """

    def __init__(
        self,
        model: Any,
        extractor: Any,
        tokenizer: Any = None,
        prompt: Sequence[int] | None = None,
    ):
        """Raises ValueError where neither ``prompt`` nor the model's settings tell with what decoding starts."""
        super().__init__()
        self.model: Any = model
        self.extractor: Any = extractor
        start = self._setting("decoder_start_token_id")
        if prompt is None and start is None:
            raise ValueError(f"{type(model).__name__} has no decoder_start_token_id; give a prompt")
        self.prompt = list(prompt) if prompt is not None else [start]
        self.tokenizer = None if tokenizer is None else TransformersTokenizer(tokenizer, self.prompt)

    @classmethod
    def from_pretrained(cls, name: str | Path, prompt: Sequence[int] | None = None, **kwargs: Any):
        """Model, feature extractor and tokenizer of a folder or a name on the hub; ``kwargs`` (dtype, ...) are the
        model's."""
        model = AutoModelForSpeechSeq2Seq.from_pretrained(name, **kwargs)
        extractor = AutoFeatureExtractor.from_pretrained(name)
        return cls(model, extractor, AutoTokenizer.from_pretrained(name), prompt)

    def _setting(self, name: str) -> Any:
        value = getattr(self.model.generation_config, name, None)
        return getattr(self.model.config, name, None) if value is None else value

    @property
    def sample_rate(self) -> int:
        """Samples a second that the extractor wants."""
        return self.extractor.sampling_rate

    @cached_property
    def padded_seconds(self) -> float:
        """To how many seconds every utterance is padded; 0: to the longest of its batch."""
        return self.extractor.n_samples / self.sample_rate if self._pads_to_length() else 0.0

    @cached_property
    def frame_seconds(self) -> float:
        """Seconds of audio for each encoder frame."""
        if self.padded_seconds:
            return self.padded_seconds / self.encoder_frames(self.padded_seconds)
        return round(10.0 / (self.encoder_frames(20.0) - self.encoder_frames(10.0)), 6)

    @cached_property
    def _shapes(self) -> Any:
        """The model without storage: what it returns has the right shape, and costs nothing."""
        with torch.device("meta"):
            return type(self.model)(self.model.config).eval()

    def encoder_frames(self, seconds: float) -> int:
        """T of an utterance of so many seconds: the length of what the encoder returns."""
        noise = np.random.default_rng(0).standard_normal(max(1, round(seconds * self.sample_rate)))
        inputs = self.inputs([noise.astype(np.float32)])
        features = inputs[self.model.main_input_name].to("meta", self._shapes.dtype)
        with torch.no_grad():
            encoded = self._shapes.get_encoder()(features)
        return encoded.last_hidden_state.shape[1]

    def planned_seconds(self, seconds: np.ndarray) -> np.ndarray:
        """Lengths (N,) as planning must see them: where every utterance is padded to 30 s, all are 30 s."""
        return np.full_like(seconds, self.padded_seconds) if self.padded_seconds else seconds

    def _pads_to_length(self) -> bool:
        return inspect.signature(self.extractor.__call__).parameters["padding"].default == "max_length"

    def inputs(self, audio: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Mono audio (S,) of B utterances -> the encoder's inputs, padded, on the model's device.

        ValueError for audio longer than the model's fixed length, which the extractor would cut without a word.
        """
        most = self.extractor.n_samples if self._pads_to_length() else math.inf
        longest = max(map(len, audio))
        if longest > most:
            raise ValueError(
                f"an utterance of {longest / self.sample_rate:.2f} s is longer than the model's "
                f"{most / self.sample_rate:g} s; cut it first"
            )
        extracted = self.extractor(
            list(audio),
            sampling_rate=self.sample_rate,
            return_tensors="pt",
            padding="max_length" if self._pads_to_length() else "longest",
            return_attention_mask=True,
        )
        inputs = {name: extracted[name] for name in (self.model.main_input_name, "attention_mask")}
        inputs[self.model.main_input_name] = inputs[self.model.main_input_name].to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def logits(self, batch: Batch) -> Tensor:
        """(B, U - 1, V): of every token after the first."""
        rows = batch.audio.cpu().numpy()
        audio = [row[:size] for row, size in zip(rows, batch.audio_lengths.tolist(), strict=True)]
        tokens = batch.tokens[:, :-1].to(self.model.device)
        return self.model(**self.inputs(audio), decoder_input_ids=tokens, use_cache=False).logits

    def loss(self, batch: Batch, *, label_smoothing: float = 0.0) -> Loss:
        """Sums of cross-entropy over text and end tokens and their count; prompt and padding bear none, and there
        is no CTC."""
        total, count = attention_loss(self.logits(batch), batch.to(self.model.device), label_smoothing)
        zero = total.new_zeros(())
        return Loss(total, count, zero, zero)

    def training_step(
        self, learning_rate: float = 1e-5, precision: str = "float32", *, copied: bool = True
    ) -> TrainingStep:
        """A whole step with AdamW on a synthetic batch (B, T, U), on a copy of the model unless ``copied`` is false:
        what `canter tune` probes. ``precision`` 'bf16' has float32 weights and bf16 arithmetic."""
        model = (copy.deepcopy(self) if copied else self).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        device = model.model.device.type

        def step(batch: int, frames: int, tokens: int) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss = model.loss(model.synthetic_batch(batch, frames, tokens))
                (loss.attention / loss.attention_count).backward()
            optimizer.step()
            optimizer.zero_grad()

        return TrainingStep(model, [optimizer], step)

    def synthetic_batch(self, batch: int, frames: int, tokens: int) -> Batch:
        """Noise of B utterances that the encoder turns into about T frames each, with U random tokens."""
        samples = max(1, round(frames * self.frame_seconds * self.sample_rate))
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        none = torch.zeros(batch, dtype=torch.long)
        return Batch(
            audio=torch.randn(batch, samples) * 0.1,
            audio_lengths=torch.full((batch,), samples),
            tokens=torch.randint(0, vocabulary, (batch, tokens)),
            token_lengths=torch.full((batch,), tokens),
            prompt_lengths=torch.ones(batch, dtype=torch.long),
            characters=none[:, None],
            character_lengths=none,
            rows=none,
        )

    @torch.inference_mode()
    def transcribe(
        self,
        audio: Sequence[np.ndarray],
        prompts: Sequence[Sequence[int]] | None = None,
        *,
        batch_seconds: float = 120.0,
        tokens_per_second: float = 12.5,
        extra_tokens: int = 10,
        **generation: Any,
    ) -> list[list[int]]:
        """Token ids of each clip (S,), in the order given, without prompt and end; greedy, unless ``generation``
        (num_beams, ...) says otherwise.

        Clips of like length are decoded together, up to ``batch_seconds`` of padded audio; those in a batch have
        prompts of one length, because transformers has no place for padding on a prompt's left. A clip gets at most
        ``tokens_per_second`` for each of its seconds and ``extra_tokens`` more, whatever the batch.
        """
        prompts = [self.prompt] * len(audio) if prompts is None else prompts
        results: list[list[int]] = [[] for _ in audio]
        training = self.model.training
        self.model.eval()
        for size in sorted({len(prompt) for prompt in prompts}):
            chosen = [place for place, prompt in enumerate(prompts) if len(prompt) == size]
            seconds = [self.padded_seconds or len(audio[place]) / self.sample_rate for place in chosen]
            for batch in encoder_batches(seconds, batch_seconds):
                places = [chosen[number] for number in batch]
                room = self._positions() - size
                limits = [
                    min(
                        room,
                        math.ceil(tokens_per_second * len(audio[place]) / self.sample_rate) + extra_tokens,
                    )
                    for place in places
                ]
                found = self._generate(
                    [audio[place] for place in places],
                    [prompts[place] for place in places],
                    max(limits),
                    generation,
                )
                for place, limit, tokens in zip(places, limits, found, strict=True):
                    results[place] = tokens[:limit]
        self.model.train(training)
        return results

    def _positions(self) -> int:
        config = self.model.get_decoder().config
        found = (getattr(config, name, None) for name in POSITIONS)
        return next((value for value in found if value is not None), 10**9)

    def _generate(
        self,
        audio: Sequence[np.ndarray],
        prompts: Sequence[Sequence[int]],
        limit: int,
        generation: Mapping[str, Any],
    ) -> list[list[int]]:
        """Sequences without prompt, end and what follows it. The mixin's own ``generate``: what some families put
        around it (languages, tasks, chunks of 30 s) is in the prompts already."""
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": limit, **generation}
        sequences = GenerationMixin.generate(  # pyright: ignore[reportAttributeAccessIssue]
            self.model,
            **self.inputs(audio),
            decoder_input_ids=torch.tensor([list(prompt) for prompt in prompts], device=self.model.device),
            decoder_start_token_id=[prompt[0] for prompt in prompts],
            **settings,
        )
        ends = self._setting("eos_token_id")
        ends = set(ends) if isinstance(ends, list | tuple) else {ends}
        found = []
        for row in sequences[:, len(prompts[0]) :].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row))
            found.append(row[:stop])
        return found
