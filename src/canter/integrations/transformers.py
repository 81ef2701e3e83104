"""Adapter for the speech encoder-decoders of transformers: Canter plans, tunes, trains and decodes them.

B: utterances, S: samples, T: encoder frames, U: tokens, V: vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin

from canter.corpus.manifest import Utterance
from canter.errors import CheckpointError, ConfigError
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import EngineConfig, Hypothesis, Request, Underway, encoder_batches
from canter.integrations.transformers_files import load_parts
from canter.models.batch import Batch, Loss, SoftTargets, attention_loss, distillation_loss, targets_of
from canter.models.cost import UtteranceCost, measure_cost
from canter.models.formats.files import read_tensors, replacing_model
from canter.models.lora import LoraAdapter
from canter.models.protocol import Capability
from canter.runtime import is_out_of_memory
from canter.text.languages import find
from canter.text.prompts import utterance_slots

POSITIONS = ("max_target_positions", "max_text_positions", "max_position_embeddings")  # a decoder's, by architecture
TOKENS_PER_SECOND, EXTRA_TOKENS = 12.5, 10  # what a clip may be transcribed in
PREFIX = "model."  # of our names of their tensors
FRAME_SECONDS = 0.08  # the engine's settings count encoder frames of this duration


class TransformersModel(nn.Module):
    """A model of transformers and its feature extractor, with the interface of `AnyModel`.

    ``prompt`` are the decoder's first tokens for utterances that bring none: the model's start token, then languages
    and tasks as its family writes them. By default they are the start token and, if the model's settings or the
    tokenizer list languages (SeamlessM4T, multilingual Speech2Text), the utterance's.
    """

    ctc = None
    adapter: LoraAdapter | None = None

    def __init__(self, model: Any, extractor: Any, tokenizer: Any = None, prompt: Sequence[int] | None = None):
        """Wrap the parts; raise ValueError if neither ``prompt`` nor the model's settings have a start token."""
        super().__init__()
        self.model: Any = model
        self.extractor: Any = extractor
        self.recomputes = False
        self.generation: dict[str, Any] = {}  # for an engine of ours; their generate has its own
        start = self._setting("decoder_start_token_id")
        if prompt is None and start is None:
            raise ValueError(f"{type(model).__name__} has no decoder_start_token_id; give a prompt")
        self.prompt = list(prompt) if prompt is not None else [start]
        self.tokenizer: Any = None
        if tokenizer is not None:
            languages = {} if prompt is not None else self._languages(tokenizer)
            self.tokenizer = TransformersTokenizer(tokenizer, self.prompt, languages)

    @classmethod
    def from_pretrained(cls, name: str | Path, prompt: Sequence[int] | None = None, **kwargs: object):
        """Return the model of a folder, or of a name on the hub, from safetensors only.

        ``kwargs`` (dtype, ...) are the model's. Raises CheckpointError where transformers cannot load it, or tensors
        are missing or misshapen.
        """
        model, extractor, tokenizer = load_parts(name, **kwargs)
        try:
            found = cls(model, extractor, tokenizer, prompt)
            _ = found.frame_seconds  # of the model without storage: that the encoder takes what the extractor gives
        except Exception as error:  # whatever transformers raises in a forward pass with such settings
            raise CheckpointError(f"{name}: its parts do not belong together ({error})") from None
        return found

    def _languages(self, tokenizer: Any) -> dict[str, int]:
        """Return the token ids of languages that may follow the start token; none for a model of a single language."""
        found = self._setting("text_decoder_lang_to_code_id") or getattr(tokenizer, "lang_code_to_id", None)
        return {str(name): int(number) for name, number in (found or {}).items()}

    def _setting(self, name: str) -> Any:
        value = getattr(self.model.generation_config, name, None)
        return getattr(self.model.config, name, None) if value is None else value

    @property
    def format(self) -> str:
        """Name of the format that it is saved in (see `canter.loading`)."""
        return "transformers"

    @property
    def supports(self) -> Set[Capability]:
        """None of the features that need Canter's own modules; decoding is transformers' own ``generate``."""
        return frozenset()

    @property
    def sample_rate(self) -> int:
        """Samples per second of its input."""
        return self.extractor.sampling_rate

    @property
    def padded_seconds(self) -> float:
        """Seconds that every utterance is padded to; 0: to the longest of its batch."""
        return self.extractor.n_samples / self.sample_rate if self._pads_to_length else 0.0

    @property
    def longest_seconds(self) -> float:
        """Maximum seconds of an utterance: those that the extractor pads to, or up to which it does not divide it."""
        undivided = getattr(self.extractor, "max_audio_clip_s", math.inf)
        return self.padded_seconds or undivided - getattr(self.extractor, "overlap_chunk_second", 0.0)

    @property
    def frame_seconds(self) -> float:
        """Seconds of audio per encoder frame."""
        return self._frame_seconds

    @cached_property
    def _frame_seconds(self) -> float:
        if self.padded_seconds:
            return self.padded_seconds / self.exact_frames(self.padded_seconds)
        return round(10.0 / (self.exact_frames(20.0) - self.exact_frames(10.0)), 6)

    @property
    def positions(self) -> int:
        """Maximum number of tokens, prompt and end token included."""
        config = self.model.get_decoder().config
        found = (getattr(config, name, None) for name in POSITIONS)
        return next((value for value in found if value is not None), 10**9)

    @property
    def vocabulary(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def width(self) -> int:
        """D of the encoder."""
        return self.model.get_encoder().config.hidden_size

    @property
    def shape(self) -> str:
        return f"transformers {type(self.model).__name__}"

    def recompute_activations(self, on: bool = True) -> None:
        """Switch activation checkpointing, if the architecture supports it."""
        self.recomputes = on and self.model.supports_gradient_checkpointing
        if self.model.supports_gradient_checkpointing:
            what = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
            getattr(self.model, f"{what}_checkpointing_{'enable' if on else 'disable'}")()

    @cached_property
    def _shapes(self) -> Any:
        """The model without storage: its outputs have the right shape, at no cost."""
        with torch.device("meta"):
            return type(self.model)(self.model.config).eval()

    def _noise(self, seconds: float) -> Tensor:
        """Return the encoder's input for noise of ``seconds``, without storage."""
        noise = np.random.default_rng(0).standard_normal(max(1, round(seconds * self.sample_rate)))
        inputs = self.inputs([noise.astype(np.float32)])
        return inputs[self.model.main_input_name].to("meta", self._shapes.dtype)

    def exact_frames(self, seconds: float) -> int:
        """Return T of an utterance of ``seconds``: the length of the encoder's output."""
        with torch.no_grad():
            return self._shapes.get_encoder()(self._noise(seconds)).last_hidden_state.shape[1]

    @cached_property
    def _first_frames(self) -> float:
        """Frames beyond seconds divided by ``frame_seconds``."""
        return self.exact_frames(10.0) - 10.0 / self.frame_seconds

    def encoder_frames(self, seconds: float) -> int:
        """Return T of an utterance of ``seconds`` within one frame of ``exact_frames``, at no cost."""
        if self.padded_seconds:
            return round(self.padded_seconds / self.frame_seconds)
        return max(1, round(seconds / self.frame_seconds + self._first_frames))

    @cached_property
    def _pads_to_length(self) -> bool:
        return inspect.signature(self.extractor.__call__).parameters["padding"].default == "max_length"

    def inputs(self, audio: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Return the encoder's inputs, padded, on the model's device, for mono audio (S,) of B utterances.

        Raises ValueError for audio longer than `longest_seconds`, which the extractor would truncate silently, or
        divide.
        """
        longest = max(map(len, audio)) / self.sample_rate
        if longest > self.longest_seconds:
            raise ValueError(
                f"an utterance of {longest:.2f} s is longer than the model's {self.longest_seconds:g} s; cut it first"
            )
        extracted = self.extractor(
            list(audio),
            sampling_rate=self.sample_rate,
            return_tensors="pt",
            padding="max_length" if self._pads_to_length else "longest",
            return_attention_mask=True,
        )
        inputs = {name: extracted[name] for name in (self.model.main_input_name, "attention_mask")}
        inputs[self.model.main_input_name] = inputs[self.model.main_input_name].to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def features(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder's input and its attention mask for audio (B, S), lengths (B,)."""
        rows = audio.cpu().numpy()
        inputs = self.inputs([row[:size] for row, size in zip(rows, lengths.tolist(), strict=True)])
        return inputs[self.model.main_input_name], inputs["attention_mask"]

    def loss(
        self,
        batch: Batch,
        *,
        attention: bool = True,
        label_smoothing: float = 0.0,
        features: tuple[Tensor, Tensor] | None = None,
        teacher: SoftTargets | None = None,
    ) -> Loss:
        """Return the sum of cross-entropy over text and end tokens, and their number; there is no CTC.

        Prompt and padding bear no loss. Masks that the model draws in training follow torch's seed.
        """
        assert attention, "there is no CTC to train alone"
        if self.training:
            np.random.seed(int(torch.randint(2**32, ())))  # SpecAugment of transformers draws from NumPy
        logits, batch = self.token_logits(batch, features), batch.to(self.model.device)
        targets = targets_of(batch)
        total, count = attention_loss(logits, targets, label_smoothing)
        zero = total.new_zeros(())
        return Loss(total, count, zero, zero, distillation_loss(logits, teacher, targets) if teacher else None)

    def token_logits(self, batch: Batch, features: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return logits (B, U - 1, V) of the tokens after the first; ``features`` may be given, already computed."""
        inputs, mask = features or self.features(batch.audio, batch.audio_lengths)
        return self.model(
            **{self.model.main_input_name: inputs},
            attention_mask=mask,
            decoder_input_ids=batch.tokens[:, :-1].to(self.model.device),
            use_cache=False,
        ).logits

    # -- on disk --

    def save(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
        """Write a folder that ``from_pretrained`` reads, complete or not at all, and return it.

        ``weights`` may stand in for the state dict.
        """
        tied = self._tied()
        tensors = {
            name.removeprefix(PREFIX): tensor.detach().cpu().contiguous()
            for name, tensor in (weights or self.state_dict()).items()
            if name not in tied
        }
        with replacing_model(folder) as fresh:
            save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
            parts = (self.model.config, self.model.generation_config, self.extractor)
            for part in (*parts, *([self.tokenizer.tokenizer] if self.tokenizer else [])):
                part.save_pretrained(fresh)
        return Path(folder)

    def read_weights(self, folder: Path) -> dict[str, Tensor]:
        """Return the tensors that ``save`` wrote, by the names of the state dict."""
        tensors = {PREFIX + name: x for name, x in read_tensors(folder / "model.safetensors").items()}
        return tensors | {name: tensors[first] for name, first in self._tied().items() if first in tensors}

    def _tied(self) -> dict[str, str]:
        """Return the names of tensors that repeat others, and the names of those."""
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(x), name) for name, x in self.state_dict(keep_vars=True).items()}
        return {name: other for name, other in names.items() if name != other}

    # -- what it costs --

    def parts(self) -> dict[str, int]:
        """Return the number of parameters by part, each counted once, where it comes first."""
        inputs, heads = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        parts = {
            "embedding": inputs if isinstance(inputs, nn.Embedding) else heads,
            "encoder": self.model.get_encoder(),
            "decoder": self.model.get_decoder(),
            "others": self,
        }
        seen: set[int] = set()
        counts = {}
        for name, part in parts.items():
            new = {id(p): p.numel() for p in part.parameters() if id(p) not in seen}
            seen |= new.keys()
            counts[name] = sum(new.values())
        return {name: count for name, count in counts.items() if count}

    def layers(self) -> dict[str, dict[str, str | int]]:
        """Return kind, layers and width of encoder and decoder; of the latter the vocabulary too."""
        encoder, decoder = self.model.get_encoder(), self.model.get_decoder()
        return {
            "encoder": {"kind": type(encoder).__name__, "layers": _depth(encoder), "width": self.width},
            "decoder": {
                "kind": type(decoder).__name__,
                "layers": _depth(decoder),
                "width": decoder.config.hidden_size,
                "vocabulary": self.vocabulary,
            },
        }

    def cost(self, seconds: float, tokens: int) -> UtteranceCost:
        """Return FLOPs and memory of an utterance of ``seconds`` and ``tokens``, measured on noise."""
        noise = np.random.default_rng(0).standard_normal(round(seconds * self.sample_rate))
        inputs = self.inputs([noise.astype(np.float32)])
        ids = torch.zeros(1, tokens, dtype=torch.long, device=self.model.device)
        decoder = self.model.get_decoder()
        config = decoder.config
        heads = getattr(config, "num_key_value_heads", None)
        width = config.hidden_size * heads // config.num_attention_heads if heads else config.hidden_size

        return measure_cost(
            self,
            seconds,
            tokens,
            encode=lambda: self.model.get_encoder()(**inputs),
            decode=lambda states: self.model(encoder_outputs=states, decoder_input_ids=ids, use_cache=False).logits,
            cached=2 * _depth(decoder) * width,
        )

    # -- decoding --

    def engine(self, end: int, config: EngineConfig) -> GenerateEngine:
        """Return the engine that decodes this model in place of Canter's."""
        return GenerateEngine(self, end, config)

    def limit(self, audio: np.ndarray, prompt: Sequence[int]) -> int:
        """Return the maximum number of tokens of a clip's transcript; clip (S,)."""
        most = math.ceil(TOKENS_PER_SECOND * len(audio) / self.sample_rate) + EXTRA_TOKENS
        return min(self.positions - len(prompt), most)

    @torch.inference_mode()
    def transcribe(
        self,
        audio: Sequence[np.ndarray],
        prompts: Sequence[Sequence[int]] | None = None,
        *,
        batch_seconds: float = 120.0,
        limits: Sequence[int] | None = None,
        **generation: object,
    ) -> list[list[int]]:
        """Return the token ids of each clip (S,), in the order given, without prompt and end.

        Decoding is greedy, unless ``generation`` (num_beams, ...) says otherwise. Clips of similar length are decoded
        together, up to ``batch_seconds`` of padded audio; those in a batch have prompts of one length, because
        transformers does not take padding on a prompt's left. A clip gets at most its ``limits`` in tokens, by default
        12.5 for each of its seconds and 10 more, whatever the batch.
        """
        prompts = [self.prompt] * len(audio) if prompts is None else prompts
        if limits is None:
            limits = [self.limit(clip, prompt) for clip, prompt in zip(audio, prompts, strict=True)]
        results: list[list[int]] = [[] for _ in audio]
        for size in sorted({len(prompt) for prompt in prompts}):
            chosen = [place for place, prompt in enumerate(prompts) if len(prompt) == size]
            seconds = [self.padded_seconds or len(audio[place]) / self.sample_rate for place in chosen]
            for batch in encoder_batches(seconds, batch_seconds):
                places = [chosen[number] for number in batch]
                found = self._generate(
                    [audio[place] for place in places],
                    [prompts[place] for place in places],
                    max(limits[place] for place in places),
                    generation,
                )
                for place, tokens in zip(places, found, strict=True):
                    results[place] = tokens[: limits[place]]
        return results

    def _generate(
        self, audio: Sequence[np.ndarray], prompts: Sequence[Sequence[int]], limit: int, generation: Mapping[str, Any]
    ) -> list[list[int]]:
        """Return sequences without prompt, end and what follows it.

        It calls the mixin's own ``generate``: what some families add around it (languages, tasks, chunks of 30 s) is in
        the prompts already.
        """
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": limit, **generation}
        training = self.model.training
        try:
            sequences = GenerationMixin.generate(  # pyright: ignore[reportAttributeAccessIssue]
                self.model.eval(),
                **self.inputs(audio),
                decoder_input_ids=torch.tensor([list(prompt) for prompt in prompts], device=self.model.device),
                decoder_start_token_id=[prompt[0] for prompt in prompts],
                **settings,
            )
        finally:
            self.model.train(training)
        ends = self._setting("eos_token_id")
        ends = set(ends) if isinstance(ends, list | tuple) else {ends}
        found = []
        for row in sequences[:, len(prompts[0]) :].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row))
            found.append(row[:stop])
        return found


def _depth(part: nn.Module) -> int:
    """Return the number of layers of an encoder or decoder, whose stack may be inside of another module."""
    stacks = [name for name, _ in part.named_modules() if re.search(r"(^|\.)layers$", name)]
    return len(list(part.get_submodule(min(stacks, key=lambda name: name.count("."))).children()))


class GenerateEngine(Engine):
    """`Engine` over the model's own ``generate``: a batch is decoded as one, by beam search if there are several beams.

    Of the settings ``rows``, ``frames`` (of 80 ms), ``beams`` and ``length_penalty`` are used. Audio on which the
    library fails has a hypothesis with an ``error``; the other audio of its batch is decoded.
    """

    aligns = False

    def __init__(self, model: Any, end: int, config: EngineConfig):
        self.generation: dict[str, Any] = {}
        if config.beams > 1:
            self.generation = {"num_beams": config.beams, "length_penalty": config.length_penalty or 0.0}
        super().__init__(model, end, config)
        self.frames = round(self.frames * FRAME_SECONDS / model.frame_seconds)

    def events(
        self, batches: Iterable[list[Request]], cancelled: Callable[[Hashable], bool] | None = None
    ) -> Generator[Hypothesis | Underway]:
        model: Any = self.model
        for batch in batches:
            requests = [one for one in batch if cancelled is None or not cancelled(one.key)]
            if not requests:
                continue
            began = time.perf_counter()
            found = self._decoded(requests)
            seconds = time.perf_counter() - began
            steps = max(len(one.tokens) for one in found) + 1
            self.counters.seconds += seconds
            self.counters.decoder_seconds += seconds
            self.counters.utterances += len(requests)
            self.counters.audio_seconds += sum(len(one.audio) for one in requests) / model.sample_rate
            self.counters.tokens += sum(len(one.tokens) for one in found)
            self.counters.steps += steps
            self.counters.row_steps += steps * len(found)
            self.counters.useful_row_steps += sum(len(one.tokens) + 1 for one in found)
            yield from found

    def _decoded(self, requests: list[Request]) -> list[Hypothesis]:
        """Return the hypotheses of a batch; if the library fails on it, its requests are decoded one at a time.

        Raises what a single request raises for lack of memory, which is not the fault of its audio.
        """
        model: Any = self.model
        limits = [model.limit(one.audio, one.prompt) for one in requests]
        try:
            found = model.transcribe(
                [one.audio for one in requests],
                [one.prompt for one in requests],
                batch_seconds=math.inf,
                limits=limits,
                **self.generation,
            )
        except Exception as error:  # what a library raises for audio that it cannot take is not documented
            if len(requests) == 1:
                if is_out_of_memory(error):
                    raise
                said = " ".join(str(error).split())[:300] or type(error).__name__
                seconds = len(requests[0].audio) / model.sample_rate
                said = f"{model.shape} fails on {seconds:.2f} s of this audio: {said}"
                return [Hypothesis(requests[0].key, [], False, prompt=tuple(requests[0].prompt), error=said)]
        else:
            return [
                Hypothesis(one.key, tokens, len(tokens) < limit, prompt=tuple(one.prompt))
                for one, tokens, limit in zip(requests, found, limits)
            ]
        return [self._decoded([one])[0] for one in requests]


class TransformersTokenizer:
    """A tokenizer of transformers with the interface of `canter.text.Tokenizer`.

    ``prompt_tokens`` are the decoder's first ones, the same for every utterance; if ``language_ids`` are given, the one
    of the language that is written follows.
    """

    detects_language = False
    loss_after = None

    def __init__(self, tokenizer: Any, prompt_tokens: Sequence[int], language_ids: Mapping[str, int] | None = None):
        self.tokenizer, self.prompt_tokens = tokenizer, list(prompt_tokens)
        self.language_ids = dict(language_ids or {})
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
        self.end = int(tokenizer.eos_token_id)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.language_ids)

    @property
    def fingerprint(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        told = [type(self.tokenizer).__name__, rules, self.prompt_tokens, self.language_ids]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()

    def encode(self, text: str, lang: str | None = None) -> list[int]:
        """Return the ids of ``text``, without the special tokens that the tokenizer would put around it."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special).strip()

    def special_id(self, token: str) -> int:
        """Return the id of a special token; raise ConfigError if there is none."""
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise ConfigError(f"the tokenizer has no token {token!r}")
        return int(found)

    def prompt(self, utterance: Utterance) -> list[int]:
        return self.prompt_ids(utterance_slots(utterance))

    def prompt_ids(self, slots: Mapping[str, str]) -> list[int]:
        """Return the ids of the prompt; of the slots only ``target_lang`` matters, in a model of several languages."""
        if not self.language_ids:
            return list(self.prompt_tokens)
        language = slots.get("target_lang") or slots.get("source_lang")
        language = None if language is None else find(language, self.language_ids) or language
        if language not in self.language_ids:
            named = "names no language" if language is None else f"names the language '{language}'"
            raise ConfigError(
                f"an utterance {named}, and the model writes {', '.join(self.language_ids)}: give 'lang' in the "
                "manifest, or --language"
            )
        return [*self.prompt_tokens, self.language_ids[language]]

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
