"""Progress: how long is left is told from when what is under way began, the last time it did."""

import pytest

from ancestral.apps import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_what_is_done_a_second_time_is_told_from_its_second_beginning(clock, capsys):
    shown = progress.Progress()
    for seconds, done in [(0, 0), (100, 10), (200, 20), (1000, 0), (1010, 10)]:
        clock[0] = seconds
        shown.update("measuring", done, 20)
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 10 of 20, 1 min 40 s left",
        "measuring: 20 of 20, 0 s left",
        "measuring: 10 of 20, 10 s left",
    ]


def test_no_more_than_a_line_in_ten_seconds_and_none_where_another_process_speaks(clock, capsys):
    loud, quiet = progress.Progress(), progress.Progress(quiet=True)
    for seconds in range(101):
        clock[0] = seconds
        loud.update("training", seconds, 100)
        quiet.update("training", seconds, 100)
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_on_a_terminal_a_task_has_one_bar_however_often_it_begins(clock, monkeypatch):
    shown = progress.Progress()
    monkeypatch.setattr(type(shown.console), "is_terminal", property(lambda _: True))
    for done in (0, 20, 0, 5):
        shown.update("measuring", done, 20)
    (task,) = shown.bar.tasks
    assert (task.completed, task.total, task.finished) == (5, 20, False)
