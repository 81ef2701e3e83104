"""Run the tests that use a GPU, and count their outcomes; the counts are written after every test.

    python benchmarks/gpu_tests.py [--json FILE]

They are the files below tests/ that ask whether there is one. Without a GPU, most of their tests are skipped. The exit
status is 0 once the tests have run, whatever their outcomes.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from canter.files import write_text

ROOT = Path(__file__).parents[1]
ASKS = "cuda.is_available"
RAN = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)


class Outcomes:
    """Plugin of pytest that counts the outcomes of tests and names those that failed."""

    def __init__(self, path: Path | None):
        self.path, self.counts, self.failed = path, Counter[str](), list[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
            if report.failed:
                self.failed.append(report.nodeid)
            self.save()

    def save(self) -> None:
        counts = {name: self.counts[name] for name in ("passed", "failed", "skipped")}
        if self.path:
            write_text(self.path, json.dumps(counts | {"failed_tests": self.failed}) + "\n", durable=False)


def gpu_tests() -> list[Path]:
    """Return the files of tests that ask whether there is a GPU."""
    return sorted(path for path in ROOT.glob("tests/**/test_*.py") if ASKS in path.read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    # not tyro, which imports a plugin of pytest before pytest does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, nargs="*", help="files of tests (default: those that ask for a GPU)")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args(arguments)
    outcomes = Outcomes(options.json)
    files = options.tests or gpu_tests()
    status = pytest.main(["-p", "no:cacheprovider", "--rootdir", str(ROOT), *map(str, files)], plugins=[outcomes])
    outcomes.save()
    return 0 if status in RAN else int(status)


if __name__ == "__main__":
    sys.exit(main())
