"""Run all stages on a synthesised corpus: speech -> index -> budget -> plan -> training -> transcripts -> report.

The demo takes at most ten minutes on two cores. Everything is written to one folder; open `report.html` there,
`summary.json` has the figures. An interrupted demo resumes.
"""

from canter.demo.config import DemoConfig as Options


def run(options: Options) -> None:
    from canter.cli.progress import TerminalEvents, console, say
    from canter.demo.pipeline import run_demo

    options.output.mkdir(parents=True, exist_ok=True)
    summary = run_demo(options, TerminalEvents())
    console.rule()
    say(
        f"WER {summary.get('wer', 1):.1%} on unseen sentences, {summary.get('times', {})['total'] / 60:.1f} minutes in "
        f"all. Look at {options.output / 'report.html'}"
    )
