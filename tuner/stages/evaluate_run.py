"""Evaluation of a finished run, on its own held-out rows or on others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuner.config import StageConfig, override
from tuner.errors import UserError
from tuner.stages.memory_choice import as_trained
from tuner.stages.registry import stage_of
from tuner.stages.run import Run
from tuner.stages.run_models import MODEL_FOLDER, run_folder_of, usable_path, with_usable_models
from tuner.stages.stage import Evaluation
from tuner.stages.trust import code_named_by, refuse_code
from tuner.training.code_fingerprint import functions_of, replace_functions


def evaluate_run(
    folder: Path,
    files: tuple[str, ...] = (),
    against: Sequence[str] = (),
    *,
    page: bool = False,
    trust: bool = False,
) -> Evaluation:
    """Evaluate a run's model on its test rows, or on `files`; a policy also against other models.

    against: runs, model folders or hub names, which answer the same prompts. page: the caller wants
    `Evaluation.page`, so a stage without one is refused before anything is measured. Of a run that has not
    finished the newest checkpoint is measured, or the one that `folder` is. Raises UserError when there is none,
    nothing to measure on, or no policy to compare.
    """
    run = Run(run_folder_of(folder))
    if not trust:
        refuse_code(folder, code_named_by(run.config))
    config = _with_existing_functions(run)
    stage = stage_of(config)
    if against and not stage.compares_policies:
        raise UserError(
            f"{folder}: only a policy run (PPO, GRPO or RLOO) names the prompts, reward model and rule to compare "
            f"by, and this is a run of {type(config).__name__}; name a policy run first, and this one with --against"
        )
    if page and not stage.has_page:
        raise UserError(
            f"{folder}: only reward models and policy runs (PPO, GRPO or RLOO) have a page; leave --html out"
        )
    run = Run(run.folder, Path(usable_path(str(folder), trust=trust)) / MODEL_FOLDER)
    config = with_usable_models(config)
    if files:
        field = stage.rows_field
        # split.test=0: else the rows split off the training files would be measured as well.
        config = override(config, {f"{field}.test_files": list(files), f"{field}.split.test": 0.0})
    return stage.evaluate(run, config, [usable_path(path, trust=trust) for path in against])


def _with_existing_functions(run: Run) -> StageConfig:
    """The run's config; functions whose file is gone are those of the run's copy of it."""
    config, copies = as_trained(run), (run.read_json("functions") or {}).get("copies", {})
    replacements: dict[str, str] = {}
    for reference in functions_of(config):
        # From the right: a path may contain a colon.
        file, _, name = reference.rpartition(":")
        if not Path(file).is_file() and file in copies:
            replacements[reference] = f"{run.folder / copies[file]}:{name}"
    return replace_functions(config, replacements)
