"""The command line: puts the commands together, and turns errors into exit codes.

What a user can fix ends in one line on stderr and exit code 2; results go to stdout, progress to
stderr, so that `--json` can be piped.
"""

from __future__ import annotations

import sys

import typer

from subbyte.commands.bench import bench
from subbyte.commands.demo import demo
from subbyte.commands.evaluate import evaluate
from subbyte.commands.experiment import experiment
from subbyte.commands.export import export
from subbyte.commands.inspect import inspect
from subbyte.commands.quantize import quantize
from subbyte.commands.report import report
from subbyte.commands.train import train
from subbyte.commands.verify import verify
from subbyte.errors import SubbyteError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Neural networks at 1 to 4 bits per weight: train them, convert them, run them.",
)
for command in (demo, train, quantize, evaluate, inspect, report, verify, export, bench):
    app.command()(command)
app.add_typer(experiment, name="experiment")


def main() -> None:
    """Entry point of the `subbyte` command."""
    try:
        app()
    except (SubbyteError, OSError) as error:  # OSError: a folder in the way, no permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
