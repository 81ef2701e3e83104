import json
import re

from safetensors.torch import load_file


def steps(printed):
    return re.findall(r"step (\d+): \d+ utterances, loss ([\d.]+)", printed)


def test_resumes_where_it_stopped(run, whisper, manifest, tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = steps(run("plain_loop.py", whisper, manifest, tmp_path / "whole", 14))
    cut = steps(run("plain_loop.py", whisper, manifest, tmp_path / "cut", 5))
    cut += steps(run("plain_loop.py", whisper, manifest, tmp_path / "cut", 14))
    assert [step for step, _ in whole] == [str(n) for n in range(1, 15)]
    assert cut == whole
    losses = [float(loss) for _, loss in whole]  # of two epochs
    assert sum(losses[7:]) < sum(losses[:7])


def test_what_cannot_be_taken_is_left_out(run, whisper, manifest, tmp_path):
    rows = manifest.read_text().splitlines()
    rows[3] = json.dumps(json.loads(rows[3]) | {"text": "aia " * 60})  # more than the model's 50 positions
    rows[5] = json.dumps(json.loads(rows[5]) | {"lang": "kab"})
    manifest.write_text("\n".join(rows) + "\n")
    (manifest.parent / "9.wav").write_bytes(b"no audio")
    printed = run("plain_loop.py", whisper, manifest, tmp_path, 9)
    assert "left out: row 3: more tokens than the model has positions for" in printed
    assert "9.wav is not audio" in printed
    assert len(steps(printed)) == 9


def test_running_statistics_move(run, canary, manifest, tmp_path):
    run("plain_loop.py", canary, manifest, tmp_path, 3)
    moved = load_file(tmp_path / "model" / "model.safetensors")
    assert int(moved["encoder.layers.0.conv.batch_norm.num_batches_tracked"]) == 3
