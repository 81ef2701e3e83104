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
"""First words of a docstring that is a fragment of a sentence."""
OPTION_CLASS = re.compile(r"\w*Options|TrainConfig|ModelShape|DemoConfig|(Optimizer|Loss|Augment)Config")
COMMAND_NAMES = {"Options", "run", "parse"}
"""Names that every command defines: the interface of the command line."""
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


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring of a module, its functions and its classes."""
    for node in [tree, *functions_and_classes(tree)]:
        text = ast.get_docstring(node)
        if text:
            yield getattr(node, "lineno", 1), text


def option_names(tree: ast.Module) -> list[str]:
    """Return the flags of a command: fields of its classes of options that are neither positional, nor a
    group, nor settings of configuration files only."""
    return [
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and OPTION_CLASS.fullmatch(node.name)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if not re.search("Positional|FileOnly", ast.unparse(field.annotation))
        if not OPTION_CLASS.fullmatch(ast.unparse(field.annotation))
    ]


def public_any(tree: ast.Module) -> list[int]:
    """Return the lines of public functions and methods with ``Any`` in their signature, one for each annotation."""
    lines = []
    for node in functions_and_classes(tree):
        if isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        notes = [one.annotation for one in arguments if one is not None] + [node.returns]
        for note in notes:
            if note is not None and "Any" in re.findall(r"\w+", ast.unparse(note)):
                lines.append(node.lineno)
    return lines


def findings(source: Path) -> dict[str, list[str]]:
    """Return what the rules of the house count in the sources, each as ``file:line: text`` or as a name."""
    root = source / "canter"
    result: dict[str, list[str]] = collections.defaultdict(list)
    names: dict[str, set[str]] = collections.defaultdict(set)
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        place = str(path.relative_to(root))
        for number, line in enumerate(text.splitlines(), 1):
            result["Any"] += [f"{place}:{number}"] * len(re.findall(r"\bAny\b", line))
        result["Any in public signatures"] += [f"{place}:{line}" for line in public_any(tree)]
        result["isinstance(..., SpeechModel)"] += [
            f"{place}: {found}" for found in re.findall(r"isinstance\([^()]*SpeechModel", text)
        ]
        result["atomic writes (os.replace, rename of a partial file)"] += [
            f"{place}: {found}"
            for found in re.findall(r"os\.replace\(|(?:partial|fresh|unfinished)\.(?:replace|rename)\(", text)
        ]
        for line, found in docstrings(tree):
            first = f"{place}:{line}: {found.splitlines()[0]}"
            result["docstrings"].append(first)
            if FRAGMENT.match(found):
                result["docstrings that are fragments"].append(first)
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and node.name not in COMMAND_NAMES:
                names[node.name].add(place)
        if {"cli", "training", "serving", "demo"} & set(path.parts):
            result["options of all commands"] += option_names(tree)
    result["options (distinct)"] = sorted(set(result["options of all commands"]))
    result["public names that stand twice"] = [
        f"{name}: {', '.join(sorted(places))}" for name, places in sorted(names.items()) if len(places) > 1
    ]
    return result


def count(source: Path) -> dict[str, int]:
    """Count files, lines and findings in the sources."""
    files = [path.read_text() for path in (source / "canter").rglob("*.py")]
    sizes = {"files": len(files), "lines": sum(text.count("\n") for text in files)}
    return sizes | {name: len(found) for name, found in findings(source).items()}


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
