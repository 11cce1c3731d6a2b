"""Progress: a live bar on a terminal, few plain lines without one."""

import io
from pathlib import Path

import pytest

from tuner.config import SFT, Chat, Model
from tuner.display.durations import duration
from tuner.display.progress import ProgressWatcher, on_terminal, progress_bar
from tuner.display.smoothing import RunningMean
from tuner.stages.rl.figures import figures
from tuner.stages.sft.figures import FIGURES
from tuner.training.watchers import Sample

CONFIG = SFT(name="tiny_run", model=Model(path="tuner:tiny"), data=Chat(files=("rows.jsonl",)))
FOLDER = Path("runs/tiny_run")


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    """Counts flushes; a terminal if asked to be one."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.flushes = 0
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def flush(self) -> None:
        self.flushes += 1


def _lines(total: int, seconds_per_step: float, first: int = 0, **more: float | None) -> list[str]:
    stream, clock = Stream(), Clock()
    watcher = ProgressWatcher(FIGURES, stream, clock)
    watcher.begin(FOLDER, CONFIG, first, total)
    for step in range(first + 1, total + 1):
        clock.now += seconds_per_step
        watcher.step({"step": step, "tokens": 10 * step, "loss": 2.0, "lr": 1e-3} | more)
    watcher.end("finished")
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert stream.flushes == stream.getvalue().count("\n"), "every line is written at once"
    return stream.getvalue().splitlines()


def test_a_long_run_gets_a_line_for_each_twentieth() -> None:
    lines = _lines(total=1000, seconds_per_step=1.0)
    assert [int(line.split()[1].split("/")[0].replace(",", "")) for line in lines[:4]] == [1, 51, 101, 151]
    assert len(lines) == 22  # the first step, nineteen twentieths, the last step, the summary


def test_a_very_long_run_is_heard_of_every_minute() -> None:
    assert len(_lines(total=1000, seconds_per_step=60.0)) == 1001


def test_a_fast_run_gets_a_line_in_two_seconds_at_most() -> None:
    assert len(_lines(total=1000, seconds_per_step=0.01)) == 7  # 10 seconds: first, four, last, summary


def test_lines_say_what_matters() -> None:
    first, *_, summary = _lines(total=4, seconds_per_step=1.0, tokens_per_second=5123.4, memory_gib=1.26)
    assert first == (
        "step 1/4   25%  loss 2.0000 (mean 2.0000)  lr 1.00e-03  5,123 tokens/s  1.3 GiB  3.0 s left"
    )
    assert summary == f"finished after step 4 of 4 in 4.0 s · 40 tokens · mean loss 2.0000 · {FOLDER}"


def test_going_on_counts_time_from_where_it_went_on() -> None:
    resumed, first, *_ = _lines(total=110, seconds_per_step=1.0, first=100)
    assert resumed == "resumed after step 100 of 110"
    assert first.startswith("step 101/110")
    assert first.endswith("9.0 s left")


def test_a_skipped_step_is_no_number() -> None:
    stream = Stream()
    watcher = ProgressWatcher(FIGURES, stream, Clock())
    watcher.begin(FOLDER, CONFIG, 0, 2)
    watcher.step({"step": 1, "loss": None, "bad_steps": 1})
    watcher.step({"step": 2, "loss": 1.5, "bad_steps": 1, "eval_loss": 1.75})
    watcher.end("finished")
    first, second, _ = stream.getvalue().splitlines()
    assert "loss not finite" in first
    assert "1 skipped" in first
    assert "loss 1.5000 (mean 1.5000)  eval loss 1.7500" in second


def test_messages_and_samples_are_readable_and_cannot_command_the_terminal() -> None:
    stream = Stream()
    watcher = ProgressWatcher(FIGURES, stream, Clock())
    watcher.message("before it begins")
    watcher.begin(FOLDER, CONFIG, 0, 2)
    watcher.samples(1, [Sample("two\nlines", "\x1b[2J" + "x" * 700, "right", 0.25)])
    watcher.message("held-out loss rises")
    watcher.end("failed")
    text = stream.getvalue()
    assert text.startswith("before it begins\nstep 1, sample 1 of 1, score 0.25\n")
    assert "  prompt:    two\n             lines\n" in text
    assert "\x1b" not in text
    assert "\\x1b[2J" in text
    assert "… (+107 characters)" in text
    assert "held-out loss rises\n" in text
    assert text.splitlines()[-1].startswith("failed after step 0 of 2")


def test_a_terminal_gets_a_bar_with_all_else_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Stream(terminal=True)
    watcher = ProgressWatcher(FIGURES, stream)
    watcher.begin(FOLDER, CONFIG, 0, 3)
    for step in (1, 2, 3):
        watcher.step({"step": step, "loss": 2.0, "lr": 1e-3, "tokens_per_second": 5e3})
        with progress_bar("Answering", 2, stream) as advance:  # bars within bars
            advance(1)
        watcher.samples(step, [Sample("[bold]prompt[/bold]", "wrong", "right", 0.0)])
    watcher.message("[red]a fact[/red]")
    watcher.end("finished")
    text = stream.getvalue()
    assert "\x1b[?25h" in text, "the cursor is back"
    for part in (
        "tiny_run",
        "3/3",
        "[bold]prompt[/bold]",
        "[red]a fact[/red]",
        "5,000 tokens/s",
        "finished after",
    ):
        assert part in text
    assert "finished after step 3 of 3" in text.splitlines()[-1]


def test_the_description_of_a_bar_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Stream(terminal=True)
    with progress_bar("Reading [/red]\x9b2J", 1, stream) as advance:
        advance(1)
    assert r"Reading [/red]\x9b2J" in stream.getvalue()


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_is_none(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    assert not on_terminal(Stream(terminal=True))


def test_plain_lines_import_no_rich(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys; from tuner.display.progress import progress_bar\n"
        "with progress_bar('Reading', 3) as advance: advance(3)\n"
        "sys.exit('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("Reading: 3 in 0.")


def test_nothing_is_counted_when_the_work_fails() -> None:
    """What went wrong is one sentence, and stands alone."""
    stream = Stream()

    def work() -> None:
        with progress_bar("Reading", 5, stream) as advance:
            advance(2)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        work()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (8.26, "8.3 s"), (59, "59 s"), (245, "4:05"), (7384, "2:03:04"), (273_600, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_mean_is_exact_from_the_first_value_on_and_passes_over_missing_ones() -> None:
    # horizon 2: weights 1, 1/2, 1/4, ... from the newest back
    mean = RunningMean(horizon=2)
    assert [mean.add(value) for value in (4.0, None, 1.0, float("nan"), 3.0)] == [
        4.0,
        4.0,
        (1 + 4 / 2) / 1.5,
        (1 + 4 / 2) / 1.5,
        (3 + 1 / 2 + 4 / 4) / 1.75,
    ]
    assert RunningMean().value is None


# PPO

PPO = figures("ppo", critic=True)


def _policy(step: int, **more: float | None) -> dict[str, float | None]:
    record = {"step": step, "tokens": 10 * step, "loss": 0.4, "policy_loss": -0.01, "value_loss": 0.8}
    record |= {"score": 0.5, "kl": 0.0123, "length": 212.4, "ended": 0.97, "explained_variance": 0.41}
    return {**record, "seconds": 12.3, "tokens_per_second": 420.0, "lr": 1e-6, **more}


def _policy_lines(*records: dict[str, float | None]) -> list[str]:
    stream, clock = Stream(), Clock()
    watcher = ProgressWatcher(PPO, stream, clock)
    watcher.begin(FOLDER, CONFIG, 0, len(records))
    for record in records:
        clock.now += 60.0
        watcher.step(record)
    watcher.end("finished")
    return stream.getvalue().splitlines()


def test_of_ppo_the_score_and_the_health_are_said_and_no_loss() -> None:
    first, _, summary = _policy_lines(_policy(1, eval_gold=0.75, eval_score=0.6), _policy(2, score=1.5))
    assert first == (
        "step 1/2   50%  score 0.500 (mean 0.500)  gold 0.750  kl 0.0123  length 212  ended 97%"
        "  explained 0.41  12 s a step  1:00 left"
    )
    # horizon 3: weights 1 and 2/3
    mean = (1.5 + 0.5 * 2 / 3) / (1 + 2 / 3)
    assert summary == (
        f"finished after step 2 of 2 in 2:00 · 20 tokens · mean score {mean:.3f} · gold 0.750 · kl 0.0123"
        f" · {FOLDER}"
    )


def test_without_a_rule_the_learned_score_of_held_out_prompts_is_said() -> None:
    first, second, _ = _policy_lines(_policy(1, eval_score=0.6), _policy(2))
    assert "  eval score 0.600  " in first
    assert "  eval score 0.600  " in second, "the last known"


def test_the_warm_up_of_the_critic_is_said() -> None:
    first, second, _ = _policy_lines(_policy(1, policy_loss=None), _policy(2))
    assert "critic warm-up" in first
    assert "critic warm-up" not in second


def test_a_skipped_step_of_ppo_keeps_the_mean() -> None:
    nothing = dict.fromkeys(("loss", "policy_loss", "value_loss", "score", "kl", "length", "ended"))
    _, second, _ = _policy_lines(_policy(1), _policy(2, **nothing, bad_steps=1))
    assert second.startswith("step 2/2  100%  score (mean 0.500)  ended 97%")
    assert "1 skipped" in second
    assert "warm-up" not in second


def test_an_evaluation_of_ppo_gets_a_line_of_its_own() -> None:
    stream, clock = Stream(), Clock()
    watcher = ProgressWatcher(PPO, stream, clock)
    watcher.begin(FOLDER, CONFIG, 0, 100)
    for step in (1, 2, 3):
        watcher.step(_policy(step, **({"eval_gold": 0.5} if step == 2 else {})))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/100", "2/100"]


def test_a_bar_of_ppo_has_its_facts_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Stream(terminal=True)
    watcher = ProgressWatcher(PPO, stream)
    watcher.begin(FOLDER, CONFIG, 0, 1)
    watcher.step(_policy(1, eval_gold=0.75))
    watcher.samples(1, [Sample("p", "a", "", 1.0, "polite")])
    watcher.end("finished")
    for part in ("score 0.500 (mean 0.500)", "gold 0.750", "explained 0.41", "condition", "polite"):
        assert part in stream.getvalue()


def test_a_sample_says_its_condition_where_it_has_one() -> None:
    stream = Stream()
    watcher = ProgressWatcher(PPO, stream, Clock())
    watcher.begin(FOLDER, CONFIG, 0, 1)
    watcher.samples(1, [Sample("p", "a", "", None, "polite"), Sample("p", "a", "", None)])
    first, second = stream.getvalue().split("step 1, sample ")[1:]
    assert "  condition: polite\n" in first
    assert "condition" not in second
