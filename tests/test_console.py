"""What the console shows, on a terminal and in a log."""

import io

import pytest

from vlm_jax.console import Console, format_duration

METRICS = {
    "loss": 1.23456,
    "examples_per_second": 5123.4,
    "seconds_per_step": 0.048,
    "data_wait": 0.02,
    "mfu": 0.413,
    "lr": 1e-3,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_one_plain_line_an_update():
    log = io.StringIO()
    console = Console(800, log)
    console.update(120, METRICS)
    console.message("saved step 120 [ok]")
    console.update(140, {"loss": 1.0})
    console.close()
    assert log.getvalue() == (
        "step 120/800  loss 1.2346  examples/s 5123  step 48 ms  data 2%  mfu 41.3%  eta 0:33\n"
        "saved step 120 [ok]\n"
        "step 140/800  loss 1.0000\n"
    )


def test_a_terminal_gets_a_live_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    console = Console(800, terminal)
    console.update(120, METRICS)
    console.message("saved step 120 [ok]")
    console.close()
    console.close()
    shown = terminal.getvalue()
    assert "\x1b[?25l" in shown, "the cursor is hidden while the line is live"
    assert shown.rstrip().endswith("\x1b[?25h"), "and given back at the end"
    assert "120/800" in shown
    assert "loss 1.2346" in shown
    assert "eta 0:33" in shown
    assert "saved step 120 [ok]" in shown


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    Console(10, terminal).update(1, {"loss": 2.0})
    assert terminal.getvalue() == "step 1/10  loss 2.0000\n"


def test_other_processes_are_silent():
    log = io.StringIO()
    console = Console(10, log, is_primary=False)
    console.update(1, METRICS)
    console.message("hello")
    console.close()
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (32, "0:32"), (3599, "59:59"), (11229, "3:07:09"), (189000, "2d 04:30:00")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_a_duration_that_is_not_known():
    assert format_duration(float("nan")) == "?"
    assert format_duration(float("inf")) == "?"
