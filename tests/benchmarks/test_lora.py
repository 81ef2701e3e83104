"""LoRA beside full fine-tuning, on a small model."""

import json
import sys
from pathlib import Path

from canter.demo.synthesis import synthesise
from canter.loading import save_module
from canter.models.decoder import DecoderConfig
from canter.text import train_tokenizer

from ..models.conftest import small_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
try:
    import lora
finally:
    sys.path.remove(str(BENCHMARKS))


def test_the_figures_of_both_and_resuming(tmp_path, capsys):
    spoken = synthesise(tmp_path / "speech", utterances=20, test_utterances=4, workers=1)
    tokenizer = train_tokenizer(["yes no stop enter"] * 20, languages=["en"], vocab_size=40)
    decoder = DecoderConfig(layers=2, width=32, heads=4, feedforward=64, vocabulary=tokenizer.vocab_size, positions=256)
    model = small_model(decoder=decoder, ctc_vocabulary=0)
    model.tokenizer = tokenizer
    save_module(model, tmp_path / "model")
    options = lora.Options(
        tmp_path / "model",
        (spoken.train_manifest,),
        (spoken.test_manifest,),
        tmp_path / "runs",
        arms=("full", "lora"),
        steps=4,
        valid_utterances=2,
        pad_seconds=None,
        json=tmp_path / "figures.json",
    )
    lora.main(options)
    found = json.loads((tmp_path / "figures.json").read_text())["arms"]
    full, adapted = found["full"]["0"], found["lora"]["0"]
    assert full["trained_parameters"] == full["parameters"]
    assert adapted["trained_parameters"] < adapted["parameters"]
    assert adapted["step_seconds"] > 0
    assert "trained_parameters" in capsys.readouterr().out
    lora.main(options)
    assert json.loads((tmp_path / "figures.json").read_text())["arms"] == found  # no run was repeated
