"""Whisper fine-tuned by Canter and by transformers' Seq2SeqTrainer as its documentation sets it up: seconds an update,
and WER after the same number of updates.

    python benchmarks/finetune.py MODEL --train MANIFEST ... --valid MANIFEST ... [--steps 60] [--json FILE]

Every arm is a process of its own, and one works at a time: they take an update in turns, so that whatever else the
machine does meets all of them. Same weights, threads, float32, AdamW, learning rate, clipping, and utterances an
update (on average, where lengths decide); audio decoded and turned into features in the arm's own process.

transformers      Seq2SeqTrainer, features computed beforehand, clips padded to 30 s, batches drawn at random
trainer_30s       the same Trainer under a plan (canter.integrations.transformers_trainer), padded to 30 s
trainer           likewise, at the clips' lengths
canter_30s        `canter train --init MODEL`, padded to 30 s
canter            `canter train --init MODEL --pad-seconds 0`, at the clips' lengths
"""

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from canter.corpus.audio import load_utterance
from canter.corpus.build import index_sources
from canter.corpus.index import LengthIndex
from canter.corpus.manifest import Utterance
from canter.corpus.sources import open_source
from canter.evaluation.wer import Score, paired_difference, score_texts
from canter.inference.engine.engine import Engine
from canter.inference.engine.requests import Request
from canter.loading import load_model
from canter.planning import Budget, Plan

LONGEST = 30.0
UNTIMED = 3  # first updates of an arm, in which memory is first touched
FRAME = 0.02


@dataclass(frozen=True)
class Options:
    model: tyro.conf.Positional[Path]
    """Folder of a Whisper in Hugging Face's layout."""
    train: tuple[Path, ...]
    """Manifests to fine-tune on."""
    valid: tuple[Path, ...]
    """Manifests to measure WER on."""
    arms: tuple[str, ...] = ("transformers", "trainer_30s", "canter_30s", "trainer", "canter")
    """Arms to run; the first is the baseline."""
    steps: int = 60
    """Number of updates of each arm."""
    batch: int = 8
    """Utterances per update."""
    learning_rate: float = 1e-5
    """Learning rate, constant, since the arms have different schedules."""
    threads: int = 2
    """Threads of the arm that is computing."""
    valid_utterances: int = 120
    """Utterances to transcribe for WER, evenly spaced; padded as in training."""
    lang: str = "en"
    """Language; utterances of other languages are left out."""
    split: str | None = None
    """Where rows have a 'split', train only on this one, and measure on the others."""
    held_out: int = 4
    """Every nth row is for measuring, of a manifest that is in both lists and has no 'split'."""
    seed: int = 0
    json: Path | None = None
    """Where to write the figures."""


# -- arms: each trains in a process of its own, calls ``turn(loss)`` after every update and leaves FOLDER/model --

Turn = Callable[[float], None]


def transformers_arm(options: Options, data: Path, folder: Path, turn: Turn) -> None:
    """Train as transformers' examples and course do: a dataset with features and labels, a collator that pads both."""
    from canter.integrations.transformers_trainer import SpeechDataset

    processor, model = _whisper(options)
    clips = SpeechDataset(LengthIndex.open(data / "train.arrow"), processor.tokenizer)

    def prepared(row: int) -> dict[str, Any]:
        clip = clips[row]
        features = processor.feature_extractor(clip["audio"], sampling_rate=16000).input_features[0]
        return {"input_features": features, "labels": clip["labels"]}

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{"input_features": feature["input_features"]} for feature in features]
        batch = processor.feature_extractor.pad(inputs, return_tensors="pt")
        padded = processor.tokenizer.pad([{"input_ids": f["labels"]} for f in features], return_tensors="pt")
        labels = padded["input_ids"].masked_fill(padded.attention_mask.ne(1), -100)
        if (labels[:, 0] == model.config.decoder_start_token_id).all():
            labels = labels[:, 1:]
        return {**batch, "labels": labels}

    from transformers import Seq2SeqTrainer

    trainer = Seq2SeqTrainer(
        model=model,
        args=_arguments(options, folder, per_device_train_batch_size=options.batch),
        train_dataset=[prepared(row) for row in range(len(clips))],  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[_turns(turn)],
    )
    trainer.train()
    _keep(trainer.model, options, folder)


def trainer_arm(options: Options, data: Path, folder: Path, turn: Turn, padded: bool = False) -> None:
    from canter.integrations.transformers_trainer import (
        PlannedSeq2SeqTrainer,
        SpeechCollator,
        SpeechDataset,
        accept_short_audio,
    )

    processor, model = _whisper(options)
    index = LengthIndex.open(data / "train.arrow")
    strategy, budget = _batches(options, index, padded)
    trainer = PlannedSeq2SeqTrainer(
        model=model if padded else accept_short_audio(model),
        args=_arguments(options, folder, remove_unused_columns=False),
        plan=Plan(index, budget, strategy, seed=options.seed),
        train_dataset=SpeechDataset(index, processor.tokenizer),
        data_collator=SpeechCollator(processor.feature_extractor, model.config.decoder_start_token_id, padded),
        callbacks=[_turns(turn)],
    )
    trainer.train()
    _keep(trainer.model, options, folder)


def canter_arm(options: Options, data: Path, folder: Path, turn: Turn, padded: bool = False) -> None:
    from canter.events import Events
    from canter.training.config import LossConfig, OptimizerConfig, TrainConfig
    from canter.training.recipe import run_training
    from canter.training.run.reports import StepReport

    index = LengthIndex.open(data / "train.arrow")
    strategy, budget = _batches(options, index, padded)
    budget.save(data / f"{folder.name}.json")

    class Turns(Events[StepReport]):
        def step(self, report: StepReport) -> None:
            turn(report.loss)

    config = TrainConfig(
        manifest=(data / "train.jsonl",),
        output=folder,
        init=options.model,
        pad_seconds=LONGEST if padded else 0.0,
        budget=data / f"{folder.name}.json",
        batch_seconds=None,
        strategy=strategy,
        steps=options.steps,
        seed=options.seed,
        threads=options.threads,
        precision="float32",
        device="cpu",
        workers=0,
        valid_every=10**9,
        track=(),
        loss=LossConfig(ctc_weight=0.0, ctc_warmup=0.0, label_smoothing=0.0),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=options.learning_rate, weight_decay=0.0, warmup=0.0, schedule="constant"
        ),
    )
    finished = run_training(config, Turns())
    finished.prepared.run.folder.joinpath("model").symlink_to(max(folder.glob("checkpoints/step-*")))


ARMS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "transformers": (transformers_arm, {}),
    "trainer_30s": (trainer_arm, {"padded": True}),
    "trainer": (trainer_arm, {}),
    "canter_30s": (canter_arm, {"padded": True}),
    "canter": (canter_arm, {}),
}


def pads(arm: str) -> bool:
    return arm == "transformers" or arm.endswith("_30s")


def _whisper(options: Options) -> tuple[Any, Any]:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    return WhisperProcessor.from_pretrained(options.model), model


def _arguments(options: Options, folder: Path, **more: Any) -> Any:
    from transformers import Seq2SeqTrainingArguments

    return Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=options.seed,
        **more,
    )


def _turns(turn: Turn) -> Any:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                turn(float(logs["loss"]))

    return Turns()


def _keep(model: Any, options: Options, folder: Path) -> None:
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        if (options.model / name).exists():
            shutil.copy(options.model / name, folder / "model" / name)


def _batches(options: Options, index: LengthIndex, padded: bool) -> tuple[str, Budget]:
    """Return (strategy, budget) that give about ``options.batch`` utterances per update."""
    if padded:  # all cost the same: T is 1
        return "random", Budget.from_batch_seconds(LONGEST * options.batch, frame_seconds=LONGEST)
    wanted = -(-len(index) // options.batch)
    low, high = float(index.seconds.max()), float(index.seconds.sum())
    while high - low > 0.02 * low:
        middle = (low + high) / 2
        plan = Plan(index, Budget.from_batch_seconds(middle, frame_seconds=FRAME), seed=options.seed)
        low, high = (middle, high) if len(plan) > wanted else (low, middle)
    return "balanced", Budget.from_batch_seconds(high, frame_seconds=FRAME)


# -- the parent: data, turns, WER --


def work(arm: str, options: Options, data: Path, folder: Path, pipe: Connection) -> None:
    """Process of an arm, which reports every update and then waits for its next turn."""
    torch.set_num_threads(options.threads)
    function, settings = ARMS[arm]
    began = [0.0]

    def wait() -> None:
        pipe.recv()
        began[0] = time.perf_counter()

    def turn(loss: float) -> None:
        pipe.send((time.perf_counter() - began[0], loss))
        wait()

    wait()
    function(options, data, folder, turn, **settings)
    pipe.send(None)


def utterances_of(manifests: tuple[Path, ...], options: Options, training: bool) -> list[dict[str, Any]]:
    """Return manifest rows of the language, up to 30 s, for training or for measuring, with absolute paths."""
    found = []
    for manifest in manifests:
        rows = map(json.loads, manifest.read_text(encoding="utf-8").splitlines())
        ours = (row for row in rows if row.get("lang", options.lang) == options.lang)
        for number, row in enumerate(ours):
            if options.split and "split" in row:
                trains = row["split"] == options.split
            else:
                both = manifest in options.train and manifest in options.valid
                trains = number % options.held_out > 0 if both else training
            if trains != training or row["duration"] > LONGEST:
                continue
            found.append(row | {"audio_filepath": str((manifest.parent / row["audio_filepath"]).resolve())})
    return found


def write_data(options: Options, data: Path) -> LengthIndex:
    """Write train.jsonl, valid.jsonl and train.arrow."""
    for name, manifests in (("train", options.train), ("valid", options.valid)):
        rows = utterances_of(manifests, options, name == "train")
        if name == "valid":
            rows = [rows[i] for i in sorted(set(np.linspace(0, len(rows) - 1, options.valid_utterances, dtype=int)))]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = load_model(options.model).tokenizer
    prompt = len(tokenizer.prompt_ids({"source_lang": options.lang, "target_lang": options.lang}))
    return index_sources([data / "train.jsonl"], data / "train.arrow", tokenizer, prompt_tokens=prompt)


def in_turns(options: Options, data: Path) -> dict[str, list[tuple[float, float]]]:
    """Return (seconds, loss) of every update of every arm."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for arm in options.arms:
        pipes[arm], theirs = context.Pipe()
        folder = data / arm
        processes[arm] = context.Process(target=work, args=(arm, options, data, folder, theirs))
        processes[arm].start()
        theirs.close()
    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in options.arms}
    for step in range(options.steps + 1):
        shift = step % len(options.arms)
        for arm in options.arms[shift:] + options.arms[:shift]:
            pipes[arm].send("go")
            try:
                said = pipes[arm].recv()
            except EOFError:
                raise SystemExit(f"the arm {arm} ended with an error, see above") from None
            if said is not None:
                taken[arm].append(said)
        if step and step % 10 == 0:
            print(f"{step} of {options.steps} updates", flush=True)
    for process in processes.values():
        process.join()
    return taken


def wer_of(model_folder: Path, data: Path, padded: bool, lang: str) -> Score:
    model = load_model(model_folder)
    model.set_features(pad_seconds=LONGEST if padded else 0.0)
    rows = [row for row in open_source(data / "valid.jsonl") if isinstance(row, Utterance)]
    requests = [Request(load_utterance(row, 16000), model.tokenizer.prompt(row)) for row in rows]
    with torch.inference_mode():
        hypotheses = Engine(model, model.tokenizer.end).decode(requests)
    texts = [model.tokenizer.decode(hypothesis.tokens) for hypothesis in hypotheses]
    return score_texts([row.text for row in rows], texts, [lang] * len(rows))


def summary(options: Options, data: Path, index: LengthIndex) -> dict[str, Any]:
    taken = in_turns(options, data)
    torch.set_num_threads(options.threads)
    first, scores = options.arms[0], {}
    arms: dict[str, Any] = {}
    for arm in options.arms:
        scores[arm] = wer_of(data / arm / "model", data, pads(arm), options.lang)
        seconds = [one for one, _ in taken[arm]]
        theirs = [one for one, _ in taken[first]]
        ratios = [a / b for a, b in zip(theirs[UNTIMED:], seconds[UNTIMED:], strict=True)]
        difference = paired_difference(scores[arm], scores[first])
        arms[arm] = {
            "seconds_an_update": statistics.median(seconds[UNTIMED:]),
            "seconds_in_all": sum(seconds[UNTIMED:]),
            "faster": sum(theirs[UNTIMED:]) / sum(seconds[UNTIMED:]),
            "faster_quartiles": statistics.quantiles(ratios, n=4),
            "loss_first_ten": statistics.mean(loss for _, loss in taken[arm][:10]),
            "loss_last_ten": statistics.mean(loss for _, loss in taken[arm][-10:]),
            "wer": scores[arm].total.wer,
            "wer_difference": asdict(difference),
            "losses": [loss for _, loss in taken[arm]],
            "seconds": seconds,
        }
    before = {name: wer_of(options.model, data, padded, options.lang).total.wer
              for name, padded in (("30s", True), ("own", False))}  # fmt: skip
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "utterances": len(index),
        "hours": float(index.seconds.sum() / 3600),
        "updates": options.steps,
        "batch": options.batch,
        "threads": options.threads,
        "wer_before": before,
        "arms": arms,
    }


def main(options: Options) -> None:
    unknown = set(options.arms) - set(ARMS)
    if unknown or options.steps <= UNTIMED + 1:
        raise SystemExit(f"no arm {', '.join(unknown)}" if unknown else f"--steps must be over {UNTIMED + 1}")
    with tempfile.TemporaryDirectory() as held:
        data = Path(held)
        index = write_data(options, data)
        print(f"{len(index)} utterances, {index.seconds.sum() / 60:.1f} minutes", flush=True)
        result = summary(options, data, index)
    before = result["wer_before"]
    print(f"\nbefore: WER {before['30s']:.1%} padded to 30 s, {before['own']:.1%} at the clips' lengths\n")
    print("| arm | s an update | faster | loss, first and last ten | WER |\n|---|---:|---:|---:|---:|")
    for name, arm in result["arms"].items():
        print(
            f"| {name} | {arm['seconds_an_update']:.2f} | {arm['faster']:.2f}x | {arm['loss_first_ten']:.2f} "
            f"{arm['loss_last_ten']:.2f} | {arm['wer']:.1%} |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
