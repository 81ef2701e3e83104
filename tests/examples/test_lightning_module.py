import logging

import pytest
from safetensors.torch import load_file

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed (extra 'lightning')")
torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory .* not empty"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have"),
    pytest.mark.filterwarnings("ignore:.*TF32|.*isinstance.*LeafSpec", "ignore::DeprecationWarning"),
]
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def test_resumes_where_it_stopped(run, canary, manifest, tmp_path):
    def model(name, steps):
        given = ["--model", canary, "--manifest", manifest, "--output", tmp_path / name, "--batch-seconds", 30]
        run("lightning_module.py", *given, "--steps", steps, "--save-every", 2, "--micro-batches", 2)
        return load_file(tmp_path / name / "model" / "model.safetensors")

    whole = model("whole", 5)
    model("cut", 3)
    again = model("cut", 5)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert int(whole["encoder.layers.0.conv.batch_norm.num_batches_tracked"]) == 10
    before = load_file(canary / "model.safetensors")
    assert not torch.equal(before["decoder.embedding.weight"], whole["decoder.embedding.weight"])
