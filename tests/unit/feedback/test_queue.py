"""The order in which pairs come to annotators."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.feedback.conftest import Clock, candidates, row
from tuner.feedback.queue import Queue, majority
from tuner.feedback.store import Choice, LabelStore, Policy, Showing

Add = Callable[..., Queue]


@pytest.fixture
def queue(store: LabelStore) -> Add:
    """A queue of that many pairs, with settings: queue(30, overlap=2)."""

    def build(count: int, gold: tuple[int, ...] = (), **settings: Any) -> Queue:
        rows = (row(number, **({"gold": 0} if number in gold else {})) for number in range(count))
        pairs = candidates(*rows)
        store.add(pairs.values())
        return Queue(store, pairs, **{"repeats": 0.0, **settings})

    return build


def work(queue: Queue, annotator: str, choice: Choice = "left", most: int = 1000) -> list[tuple[str, Policy]]:
    """(item, policy) of the pairs an annotator labels, until none comes or `most` are labeled."""
    shown: list[tuple[str, Policy]] = []
    while len(shown) < most and (showing := queue.next(annotator)):
        assert queue.store.submit(annotator, showing.id, choice)
        shown.append((showing.item, showing.policy))
    return shown


def items(shown: list[tuple[str, Policy]], policy: Policy = "random") -> list[str]:
    return [item for item, why in shown if why == policy]


def test_all_pairs_come_once_in_a_random_order(queue: Add) -> None:
    pairs = queue(30)
    shown = items(work(pairs, "ann"))
    assert sorted(shown) == sorted(pairs.candidates)
    assert shown != list(pairs.candidates)
    assert pairs.next("ann") is None
    assert pairs.remaining("ann") == 0
    assert items(work(queue(30), "bob")) == []


def test_sides_are_random_and_not_the_same_for_all(queue: Add) -> None:
    pairs = queue(200, overlap=2)

    def swapped(annotator: str) -> list[bool]:
        orders = []
        while (showing := pairs.next(annotator)) is not None:
            orders.append(showing.swapped)
            pairs.store.submit(annotator, showing.id, "tie")
        return orders

    first, second = swapped("ann"), swapped("bob")
    assert 75 < sum(first) < 125
    assert first != second


def test_the_same_pair_waits_after_a_reload_and_in_another_tab(queue: Add) -> None:
    pairs = queue(5)
    first, again = pairs.next("ann"), pairs.next("ann")
    assert first is not None
    assert again is not None
    assert first.id == again.id


def test_overlap_is_a_number_of_annotators(queue: Add) -> None:
    pairs = queue(20, overlap=2)
    first, second = (items(work(pairs, name, "tie", most=12)) for name in ("ann", "bob"))
    assert first == second  # one order for all, so that few labels overlap already
    assert len(items(work(pairs, "cai", "tie"))) == 8
    assert len(items(work(pairs, "ann", "tie"))) == 8
    assert pairs.next("dee") is None


def test_a_skipped_pair_is_left_to_others(queue: Add) -> None:
    pairs = queue(4)
    assert len(work(pairs, "ann", "skip")) == 4
    assert len(work(pairs, "bob", "unsure")) == 4
    assert pairs.next("cai") is None


def test_planted_pairs_come_to_everyone(queue: Add) -> None:
    pairs = queue(20, gold=(3, 7))
    work(pairs, "ann")
    assert sorted(items(work(pairs, "bob"))) == ["item3", "item7"]


def test_what_another_has_before_them_is_theirs_for_a_while(queue: Add, clock: Clock) -> None:
    pairs = queue(1)
    assert isinstance(pairs.next("ann"), Showing)
    assert pairs.next("bob") is None
    clock.now += 901  # ann went away
    assert isinstance(pairs.next("bob"), Showing)


def test_repeats_are_silent_and_late(queue: Add) -> None:
    pairs = queue(60, repeats=0.5, repeat_after=10)
    shown = work(pairs, "ann")
    repeated = items(shown, "repeat")
    assert 15 < len(repeated) < 45
    assert len(set(repeated)) == len(repeated)
    places = {item: place for place, (item, policy) in enumerate(shown) if policy == "random"}
    for place, (item, policy) in enumerate(shown):
        assert policy != "repeat" or place - places[item] > 10
    assert items(work(queue(60, repeats=1.0), "bob", "skip"), "repeat") == []


def test_disagreements_come_to_a_third_and_then_to_a_fourth(queue: Add) -> None:
    pairs = queue(3, overlap=2, gold=(2,))
    work(pairs, "ann", "tie")
    assert {policy for _, policy in work(pairs, "bob", "unsure")} == {"random"}
    assert items(work(pairs, "cai"), "adjudication") == []  # unsure is no disagreement

    pairs = queue(6, overlap=2, gold=(2,))
    work(pairs, "ann", "tie")
    for showing in iter(lambda: pairs.next("dan"), None):
        pairs.store.submit(
            "dan", showing.id, "right" if showing.swapped else "left"
        )  # always the first answer
    contested = pairs.remaining("eve") - 1  # and the planted pair
    third = work(pairs, "eve", "tie")
    assert len(items(third, "adjudication")) == contested > 0
    assert items(third) == ["item2"]
    assert items(work(pairs, "fay"), "adjudication") == []


def test_majority() -> None:
    assert majority({}) is None
    assert majority({"a": "first"}) == "first"
    assert majority({"a": "first", "b": "tie"}) is None
    assert majority({"a": "first", "b": "tie", "c": "tie"}) == "tie"
    assert majority({"a": "first", "b": "tie", "c": "second"}) is None


@pytest.mark.parametrize(("order", "expected"), [("nearest", "4325"), ("disagreement", "5342")])
def test_orders_by_the_scores_of_reward_models(order: Any, expected: str, store: LabelStore) -> None:
    """Differences, by hand: item2 2, 2; item3 1, -2; item4 0.1, 0.2; item5 9, -3."""
    scores = {2: [[3, 1], [2, 0]], 3: [[1, 0], [0, 2]], 4: [[0.1, 0], [0.2, 0]], 5: [[9, 0], [0, 3]]}
    pairs = candidates(*(row(n, scores=pair) for n, pair in scores.items()), row(6, gold=0))
    store.add(pairs.values())
    shown = work(Queue(store, pairs, order=order, repeats=0.0), "ann")
    assert {policy for _, policy in shown} == {order}
    assert [item[-1] for item, _ in shown if item != "item6"] == list(expected)
    assert len(shown) == 5


def test_planted_pairs_stand_anywhere_in_an_order(store: LabelStore) -> None:
    rows = [row(n, **({"gold": 0} if n % 10 == 0 else {"scores": [[n, 0]]})) for n in range(100)]
    pairs = candidates(*(values | {"id": f"new{n}"} for n, values in enumerate(rows)))
    store.add(pairs.values())
    shown = [item for item, _ in work(Queue(store, pairs, order="nearest", repeats=0.0), "ann")]
    places = [place for place, item in enumerate(shown) if pairs[item].gold is not None]
    assert min(places) < 40
    assert max(places) > 60
    assert len(places) == 10


def test_pairs_of_other_files_in_the_store_do_not_come(queue: Add, store: LabelStore) -> None:
    store.show("ann", "item3", "random", False)
    pairs = queue(2)
    showing = pairs.next("ann")
    assert showing is not None
    assert showing.item in ("item0", "item1")
