import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "split_by_speaker.py"


def test_no_speaker_is_on_both_sides(tmp_path):
    rows = [{"audio_filepath": f"{i}.wav", "duration": 1.0, "text": "a", "speaker": f"s{i % 30}"} for i in range(90)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, SCRIPT, tmp_path / "all.jsonl", tmp_path / "out", "0.3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "valid")
    }
    speakers = {name: {row["speaker"] for row in part} for name, part in parts.items()}
    assert printed == f"{len(parts['train'])} train, {len(parts['valid'])} valid\n"
    assert len(parts["train"]) + len(parts["valid"]) == 90
    assert speakers["train"]
    assert speakers["valid"]
    assert not speakers["train"] & speakers["valid"]
    assert Path(parts["train"][0]["audio_filepath"]).is_absolute()
