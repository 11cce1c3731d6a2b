"""The one door to Weights & Biases: a run's numbers, config and sampled answers; offline without a key."""

from __future__ import annotations

import math
import netrc
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tuner.config.stage_config import StageConfig
from tuner.config.training import Wandb
from tuner.errors import UserError
from tuner.printable import echo
from tuner.training.figures import Charts, StageFigures
from tuner.training.watchers import Outcome, Record, Sample, Tables

EXIT_CODES = {"finished": 0, "interrupted": 130, "failed": 1}
SECONDS_TO_CONNECT = 30.0
"""How long the start of a run may wait for the network: many compute nodes have a key but no route to it."""
SECONDS_TO_UPLOAD = 60.0
"""How long the end of a run may wait for the network; what is left stays on disk for `wandb sync`."""


class WandbTracker:
    """The watcher that logs to W&B. All its files lie in the run folder; it prints nothing of its own.

    report: called with a sentence where the network fails; by default it is printed to stderr.
    """

    def __init__(
        self, tracking: Wandb, figures: StageFigures, report: Callable[[str], None] | None = None
    ) -> None:
        self._tracking = tracking
        self._charts: Charts = figures.charts
        self._report = report or _print_line
        self._run: Any = None
        self._borrowed: list[str] = []  # environment variables set for the duration of the run

    def begin(self, run_folder: Path, config: StageConfig, first_step: int, total_steps: int) -> None:
        (run_folder / "wandb").mkdir(parents=True, exist_ok=True)  # without it W&B would write to /tmp
        self._keep_files_in(run_folder / "wandb")
        mode = self._mode()
        try:
            self._run = self._start(run_folder, config, mode)
        except Exception as error:
            if mode == "offline":
                raise
            self._report(
                f"W&B cannot be reached ({type(error).__name__}: {error}); logging offline, "
                f"`wandb sync {run_folder / 'wandb'}/offline-run-*` uploads it later"
            )
            _forget_failure()
            self._run = self._start(run_folder, config, "offline")
        self._define_axes()

    def step(self, record: Record) -> None:
        if self._run is None:
            return
        numbers = {
            name: value for name, value in record.items() if value is not None and math.isfinite(value)
        }
        row = {"step": numbers["step"], "tokens": numbers.get("tokens", 0)}
        row |= {self._charts.chart_of(name): value for name, value in numbers.items() if name != "step"}
        self._run.log(row, step=int(numbers["step"]))

    def samples(self, step: int, samples: list[Sample]) -> None:
        if self._run is None or not samples:
            return
        import wandb

        rows: list[Any] = [
            [step, sample.prompt, sample.answer, sample.reference, sample.score] for sample in samples
        ]
        columns: list[Any] = ["step", "prompt", "answer", "reference", "score"]
        if any(sample.condition for sample in samples):
            columns.insert(1, "condition")
            for row, sample in zip(rows, samples, strict=True):
                row.insert(1, sample.condition)
        table = wandb.Table(columns=columns, data=rows)
        self._run.log({"samples": table}, step=step)  # becomes one row with the record of the same step

    def report(self, tables: Tables) -> None:
        if self._run is None:
            return
        import wandb

        logged: dict[str, Any] = {}
        for name, (columns, rows) in tables.items():
            table = wandb.Table(columns=list[Any](columns), data=list[Any](rows))
            logged[f"report/{name}"] = table
            if "accuracy" in columns:
                title = f"accuracy by {columns[0]}"
                logged[f"report/{name}_chart"] = wandb.plot.bar(table, columns[0], "accuracy", title)
                for row in rows:
                    self._run.summary[f"report/{name}/{row[0]}"] = row[columns.index("accuracy")]
        self._run.log(logged)

    def message(self, text: str) -> None:
        if self._run is not None:
            self._run.summary["message"] = text

    def end(self, outcome: Outcome) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        run.summary["outcome"] = outcome
        if outcome == "interrupted":
            run.mark_preempting()  # shown as preempted, not as crashed: it can be resumed
        run.finish(exit_code=EXIT_CODES[outcome])
        for name in self._borrowed:
            os.environ.pop(name, None)

    def _keep_files_in(self, folder: Path) -> None:
        """W&B's staged tables and logs would otherwise go to the home folder, which may not be writable."""
        self._borrowed = [name for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if name not in os.environ]
        os.environ |= dict.fromkeys(self._borrowed, str(folder.resolve()))

    def _mode(self) -> str:
        """W&B's mode; where the config says "auto", the environment decides."""
        mode = self._tracking.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if mode == "online" and not has_key():  # W&B would stop and prompt for one on the terminal
            raise UserError(
                "W&B is set to online, but there is no key: run `wandb login`, set WANDB_API_KEY, "
                'or write tracking.mode="offline"'
            )
        return mode

    def _start(self, run_folder: Path, config: StageConfig, mode: str) -> Any:
        import wandb

        tracking = self._tracking
        return wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group,
            job_type=tracking.job_type,
            tags=list(tracking.tags),
            notes=tracking.notes,
            name=config.name or run_folder.name,
            id=run_id(run_folder),
            resume="allow",
            dir=str(run_folder),
            config=config.model_dump(mode="json"),
            mode=mode,  # type: ignore[arg-type]
            settings=_settings(),
        )

    def _define_axes(self) -> None:
        """Every chart runs along the axis of the config; W&B's own step is our step as well."""
        axis = self._tracking.x_axis
        for name in ("step", "tokens"):
            self._run.define_metric(name, hidden=True)
        for group in self._charts.all_groups():
            self._run.define_metric(f"{group}/*", step_metric=axis)
        for chart, summary in self._charts.summaries.items():
            self._run.define_metric(chart, step_metric=axis, summary=summary)


def _forget_failure() -> None:
    """W&B's background process remembers the id of a run that could not start; a new process does not."""
    import wandb

    wandb.teardown()


def _settings() -> Any:
    """Nothing printed, no console output uploaded, no endless wait for the network."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        disable_job_creation=True,
        init_timeout=SECONDS_TO_CONNECT,
        finish_timeout=SECONDS_TO_UPLOAD,
        # a resumed run's config may differ in the fields that are free on resume
        allow_val_change=True,
    )


def run_id(run_folder: Path) -> str:
    """The run's id on W&B, drawn once and stored in the run folder, so that a resumed run continues its charts."""
    path = run_folder / "wandb_id"
    if not path.is_file():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def has_key() -> bool:
    """Whether there is a W&B key: in the environment, or in ~/.netrc where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        entries = netrc.netrc(file).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in entries for host in _hosts())


def _hosts() -> list[str]:
    """Names under which ~/.netrc may hold the server's key; the public server has two."""
    import wandb

    host = urlsplit(wandb.setup().settings.base_url).netloc
    return [host, "api.wandb.ai"] if host == "api.forge.coreweave.com" else [host]


def _print_line(text: str) -> None:
    echo(text, sys.stderr)
