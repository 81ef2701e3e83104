"""Split a NeMo manifest by its `speaker` field, so that no speaker is on both sides.

python examples/split_by_speaker.py MANIFEST FOLDER [FRACTION]     writes FOLDER/train.jsonl and FOLDER/valid.jsonl
"""

import hashlib
import json
import sys
from pathlib import Path


def split(manifest: Path, folder: Path, fraction: float = 0.15) -> tuple[int, int]:
    """Write about ``fraction`` of the speakers, selected by hash, to valid.jsonl and the others to train.jsonl.

    Returns the numbers of rows (train, valid).
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "valid": 0}
    with (folder / "train.jsonl").open("w") as train, (folder / "valid.jsonl").open("w") as valid:
        for line in manifest.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row["audio_filepath"] = str((manifest.parent / row["audio_filepath"]).resolve())
            held_out = int(hashlib.sha256(row["speaker"].encode()).hexdigest(), 16) % 1000 < 1000 * fraction
            file, name = (valid, "valid") if held_out else (train, "train")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[name] += 1
    return counts["train"], counts["valid"]


if __name__ == "__main__":
    manifest, folder, *fraction = sys.argv[1:]
    train, valid = split(Path(manifest), Path(folder), *map(float, fraction))
    print(f"{train} train, {valid} valid")
