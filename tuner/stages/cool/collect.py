"""Labels of a round's candidates: by rules and judges at once, by people when they have the time."""

from __future__ import annotations

from tuner.config import COOL, People
from tuner.display.progress import progress_bar
from tuner.errors import UserError
from tuner.feedback.candidates import read_candidates
from tuner.feedback.labelers import labeler_of, unlabeled, waiting_for_people
from tuner.feedback.store import LabelStore
from tuner.stages.context import Context
from tuner.stages.cool.rounds import RoundPlace


def collect_labels(config: COOL, context: Context, place: RoundPlace) -> None:
    """Have a round's candidates labeled, as far as labels are missing.

    Raises UserError where people have not labeled all of them and the config waits for that; nothing is lost then.
    """
    has_pairs = (
        place.candidates.stat().st_size > 0
    )  # policies may have given the same answers, and no pattern
    if context.devices.is_main and has_pairs:
        place.labels.parent.mkdir(parents=True, exist_ok=True)
        store = LabelStore(place.labels)
        try:
            _collect(config, context, place, store)
        finally:
            store.close()
    context.devices.wait()


def _collect(config: COOL, context: Context, place: RoundPlace, store: LabelStore) -> None:
    candidates = read_candidates(place.candidates)
    store.add(candidates.values())
    for feedback in config.feedback:
        if isinstance(feedback, People):
            continue
        labeler = labeler_of(feedback)
        missing = len(unlabeled(candidates, store, labeler.annotator))
        if missing:
            with progress_bar(f"{labeler.annotator} labels", missing) as advance:
                labeling = labeler.label(candidates, store, advance)
            context.say_all(f"round {place.number}: {sentence}" for sentence in labeling.sentences)
    for people in config.feedback:
        if isinstance(people, People):
            waiting = waiting_for_people(people, candidates, store)
            for sentence in waiting.sentences(str(place.run)):
                if waiting.pairs and people.wait:
                    raise UserError(
                        f"{place.folder}: {sentence}; feedback with wait=false goes on without them, and uses them in "
                        "the round after"
                    )
                context.say(f"round {place.number}: {sentence}")
