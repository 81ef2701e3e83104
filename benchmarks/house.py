"""Measure how the code reads: duplicated ideas, types, names, docstrings, options, lines, and files to open.

    python benchmarks/house.py [SOURCE ...] [-o RESULT.json]

SOURCE is a checkout's ``src`` folder (default: this one's); several are shown side by side. Everything is counted from
the sources or by running the training command of that checkout, so that two checkouts are measured in the same way.
"""

import argparse
import ast
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FRAGMENT = re.compile(
    r"(Of|What|Whether|Where|As|How|Those|Which|Who|Whose|When|Why|That|With|Without|For|From|In|On|By|At|To|And|Or"
    r"|Not|More|Less|Until|While|So|If)\b"
)
"""First words of a docstring that is not a complete sentence."""
COMMAND_NAMES = {"Options", "run", "parse"}
"""Names that the module of every command has."""
TRAINING = """
import collections, json, sys, threading, wave
from pathlib import Path
import numpy as np
import canter
folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
rows = []
for number in range(40):
    seconds = 1 + number % 4
    with wave.open(str(folder / f"{number}.wav"), "wb") as file:
        file.setnchannels(1); file.setsampwidth(2); file.setframerate(16000)
        file.writeframes((1000 * rng.standard_normal(16000 * seconds)).astype(np.int16).tobytes())
    rows.append({"audio_filepath": f"{number}.wav", "duration": seconds, "text": "one two three"[: 3 + number % 9]})
(folder / "train.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
shape = canter.TrainConfig.__dataclass_fields__["model"].default_factory
shape = type(shape())(width=32, heads=2, encoder_layers=1, decoder_layers=1, subsampling_channels=8)
def calls(steps, name):
    counts = collections.Counter()
    def count(frame, event, _):
        if event == "call":
            counts[frame.f_code.co_filename] += 1
    config = canter.TrainConfig(manifest=(folder / "train.jsonl",), output=folder / name, model=shape, steps=steps,
                                batch_seconds=8, workers=0, device="cpu", precision="float32", threads=1)
    sys.setprofile(count); threading.setprofile(count)
    canter.train(config, progress=False)
    sys.setprofile(None); threading.setprofile(None)
    return counts
root = Path(canter.__file__).parent
few, many = calls(3, "few"), calls(9, "many")
step = sorted(str(Path(name).relative_to(root)) for name in many
              if name.startswith(str(root)) and many[name] - few[name] >= 6)
loaded = [name for name, module in sys.modules.items()
          if name.split(".")[0] == "canter" and getattr(module, "__file__", None)]
print("RESULT" + json.dumps({"step": step, "loaded": len(loaded)}))
"""


def functions_and_classes(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def is_option_class(node: ast.ClassDef) -> bool:
    return isinstance(node, ast.ClassDef) and (
        node.name in ("Options", "TrainConfig", "ModelShape", "DemoConfig")
        or re.fullmatch(r"(Optimizer|Loss|Augment)Config", node.name)
    )


def public_any(tree: ast.Module) -> int:
    """Count annotations with ``Any`` in signatures of public functions and methods."""
    count = 0
    for node in functions_and_classes(tree):
        if isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        notes = [one.annotation for one in arguments if one is not None] + [node.returns]
        count += sum("Any" in re.findall(r"\w+", ast.unparse(note)) for note in notes if note is not None)
    return count


def count(source: Path) -> dict[str, int]:
    """Count everything that can be read from the sources."""
    root = source / "canter"
    result: collections.Counter[str] = collections.Counter()
    names: dict[str, set[str]] = collections.defaultdict(set)
    options: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        result["files"] += 1
        result["lines"] += text.count("\n")
        result["Any"] += len(re.findall(r"\bAny\b", text))
        result["Any in public signatures"] += public_any(tree)
        result["isinstance(..., SpeechModel)"] += len(re.findall(r"isinstance\([^()]*SpeechModel", text))
        result["atomic writes (os.replace, rename of a partial file)"] += len(
            re.findall(r"os\.replace\(|(?:partial|fresh|unfinished)\.(?:replace|rename)\(", text)
        )
        for node in [tree, *functions_and_classes(tree)]:
            docstring = ast.get_docstring(node)
            if docstring:
                result["docstrings"] += 1
                result["docstrings that are fragments"] += bool(FRAGMENT.match(docstring))
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and node.name not in COMMAND_NAMES:
                names[node.name].add(str(path))
            if (
                isinstance(node, ast.ClassDef)
                and is_option_class(node)
                and {"cli", "training", "demo"} & set(path.parts)
            ):
                fields = [
                    one.target.id
                    for one in node.body
                    if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
                ]
                result["options of all commands"] += len(fields)
                options |= set(fields)
    result["options (distinct)"] = len(options)
    result["public names that stand twice"] = sum(len(places) > 1 for places in names.values())
    return dict(result)


def follow(source: Path) -> dict[str, int | list[str]]:
    """Train a tiny model, and count the files that a step runs through and those that training loads."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", TRAINING, folder],
            env={**os.environ, "PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        raise SystemExit(f"{source}: training did not run\n{done.stderr[-3000:]}")
    found = json.loads(line.removeprefix("RESULT"))
    network = ("models/", "corpus/", "text/")
    outside = [name for name in found["step"] if not name.startswith(network)]
    return {
        "files that a training step runs through": len(found["step"]),
        "of them outside of model and audio": len(outside),
        "files that training loads": found["loaded"],
        "their names": outside,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, default=[Path(__file__).parents[1] / "src"])
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    columns = [count(source) | follow(source) for source in options.sources]
    for name in columns[0]:
        if name != "their names":
            print(f"{name:54}" + "".join(f"{column.get(name, 0):>10}" for column in columns))
    for column in columns:
        print("a step runs through:", ", ".join(column["their names"]))
    if options.output:
        options.output.write_text(json.dumps(dict(zip(map(str, options.sources), columns)), indent=2) + "\n")


if __name__ == "__main__":
    main()
