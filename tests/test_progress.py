"""Long steps say how far they are: bars on a terminal, lines in a log."""

import io

import torch
from rich.console import Console
from torch import nn

import subbyte as sb
from subbyte.train.progress import Lines, Live


class Heard:
    def __init__(self):
        self.steps = {}

    def note(self, text):
        pass

    def progress(self, step, done, total):
        self.steps.setdefault(step, []).append((done, total))


def test_every_long_step_is_heard_from_its_first_part_to_its_last():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    heard = Heard()
    x = torch.randn(200, 8)
    sb.quantize(net, sb.CoRa(target_bits=5, tune=7), calibration=[x], listener=heard)
    assert set(heard.steps) == {
        "statistics of inputs", "effects of errors", "search", "solving layers",
        "solving in order", "tuning",
    }  # fmt: skip
    for step, parts in heard.steps.items():
        total = parts[0][1]
        assert parts == [(i + 1, total) for i in range(total)], step
    assert heard.steps["tuning"][-1] == (7, 7)
    assert heard.steps["search"][-1] == (2, 2)


def test_a_log_gets_a_line_every_ten_seconds_with_the_time_left():
    now = [0.0]
    out = io.StringIO()
    lines = Lines(Console(file=out), clock=lambda: now[0])
    for i in range(1, 41):
        lines.progress("solving", i, 40)
        now[0] += 1.0
    said = out.getvalue().splitlines()
    assert len(said) == 3
    assert said[0] == "solving: 11 of 40, about 29 s left"


def test_a_bar_comes_and_goes():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    live = Live(console)
    for i in range(1, 4):
        live.progress("solving", i, 3)
    live.progress("tuning", 1, 2)
    live.note("a decision")
    live.progress("tuning", 2, 2)
    live.close()
    assert "a decision" in out.getvalue()
    assert "solving" in out.getvalue()
