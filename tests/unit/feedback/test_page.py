"""The page by its requests: blind, escaped, and closed to whoever lacks the token or comes from elsewhere."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.unit.feedback.conftest import candidates, row
from tuner.feedback.page import LabelPage
from tuner.feedback.queue import Queue
from tuner.feedback.store import LabelStore

PORT, TOKEN = 8017, "the-token"
HOME = f"http://127.0.0.1:{PORT}"


def browser(store: LabelStore, *rows: dict[str, Any], annotator: str = "ann", **settings: Any) -> TestClient:
    """A browser that has opened nothing yet."""
    pairs = candidates(*rows)
    store.add(pairs.values())
    page = LabelPage(Queue(store, pairs, **settings), annotator, TOKEN, PORT)
    return TestClient(page.app, base_url=HOME, headers={"Origin": HOME})


@pytest.fixture
def visitor(store: LabelStore) -> Iterator[TestClient]:
    """A browser that has opened the printed address."""
    with browser(store, row(1), row(2), row(3)) as client:
        assert client.get(f"/?token={TOKEN}").status_code == 200
        yield client


def fields(text: str, form: str) -> dict[str, str]:
    """The hidden fields of a form of the page."""
    (inner,) = re.findall(rf'<form id="{form}".*?</form>', text, re.DOTALL)
    return dict(re.findall(r'name="(\w+)" value="([^"]*)"', inner))


def send(client: TestClient, choice: str, text: str | None = None, **values: str) -> Any:
    form = fields(text or client.get("/").text, "label")
    return client.post("/label", data={**form, "choice": choice, **values})


def test_a_pair_is_labeled(visitor: TestClient, store: LabelStore) -> None:
    response = send(visitor, "left", comment=" because ")
    assert response.status_code == 200
    assert "<b>1</b> labeled, 2 left" in response.text
    (label,) = store.labels()
    assert (label.choice, label.comment, label.annotator) == ("left", "because", "ann")


@pytest.mark.parametrize("choice", ["left", "right", "tie", "skip", "unsure"])
def test_every_choice_has_its_button_and_key(choice: str, visitor: TestClient, store: LabelStore) -> None:
    button = re.search(rf'value="{choice}" data-key="(.)".*?<kbd>(.)</kbd>', visitor.get("/").text)
    assert button is not None
    assert button[1] == button[2]
    send(visitor, choice)
    assert [label.choice for label in store.labels()] == [choice]


def test_what_is_shown_is_blind(store: LabelStore) -> None:
    planted = row(
        4,
        gold=0,
        guideline="Shorter is better.",
        condition="brief",
        answers=[{"text": "yes", "origin": "milestone_early"}, {"text": "no", "origin": "milestone_late"}],
    )
    text = browser(store, planted).get(f"/?token={TOKEN}").text.replace(TOKEN, "")
    assert "Guideline: brief" in text
    assert "Shorter is better." in text
    for secret in ("milestone", "gold", "planted", "random", "repeat", "swapped"):
        assert secret not in text


def test_the_left_answer_is_the_one_that_the_store_calls_left(store: LabelStore) -> None:
    client = browser(store, *(row(n) for n in range(4, 14)))
    text = client.get(f"/?token={TOKEN}").text
    orders = set()
    for _ in range(10):
        left, right = re.findall(r"<article>.*?<div class=\"text\">(\w+) \d+</div>", text)
        text = send(client, "left", text).text
        label = store.labels()[-1]
        assert {"first": "early", "second": "late"}[str(label.decision)] == left != right
        orders.add(left)
    assert orders == {"early", "late"}
    assert "All done" in text


def test_no_script_of_a_row_runs(store: LabelStore) -> None:
    attack = '</div><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7 * 7 }}\u202egnp'
    client = browser(
        store,
        row(
            4,
            prompt=[{"role": "user", "content": attack}],
            condition=attack,
            guideline=attack,
            answers=[attack, "b" + attack],
        ),
        annotator=attack,
    )
    response = client.get(f"/?token={TOKEN}")
    assert response.text.count("<script") == 1  # our own
    assert "<img" not in response.text
    assert "\u202e" not in response.text
    assert response.text.count("&lt;script&gt;alert(1)") == 6
    assert "{{ 7 * 7 }}" in response.text
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    send(client, "left")
    figures = client.get("/figures").text
    assert figures.count("<script") == 1
    assert "<img" not in figures


def test_a_wrong_token_opens_nothing(store: LabelStore) -> None:
    client = browser(store, row(1))
    for path in ("/", "/?token=wrong", "/figures", "/page.js", "/?token=%ff"):
        assert client.get(path).status_code == 403
    assert client.post("/label", data={"token": TOKEN, "showing": "1", "choice": "left"}).status_code == 403
    assert store.open_showing("ann") is None


def test_the_token_leaves_the_address(store: LabelStore) -> None:
    response = browser(store, row(1)).get(f"/?token={TOKEN}", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9999", ""])
def test_a_forged_form_stores_nothing(origin: str, visitor: TestClient, store: LabelStore) -> None:
    form = fields(visitor.get("/").text, "label")
    headers = {"Origin": origin}
    for path in ("/label", "/undo"):
        response = visitor.post(path, data={**form, "choice": "left", "label": "1"}, headers=headers)
        assert response.status_code == 403
    assert store.labels() == []


def test_a_form_needs_the_token_beside_the_cookie(visitor: TestClient, store: LabelStore) -> None:
    form = fields(visitor.get("/").text, "label")
    for token in ("", "wrong"):
        assert visitor.post("/label", data={**form, "choice": "left", "token": token}).status_code == 403
    assert store.labels() == []


def test_another_host_name_is_refused(visitor: TestClient) -> None:
    assert visitor.get(f"/?token={TOKEN}", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"choice": "best"}, 400),
        ({"choice": "left", "showing": "x"}, 400),
        ({"choice": "left", "showing": "9" * 30}, 400),
        ({"choice": "left", "showing": "77"}, 409),
        ({"choice": "left", "comment": "x" * 70_000}, 413),
        ({"choice": "left", **{f"f{n}": "" for n in range(20)}}, 400),
    ],
)
def test_forms_that_are_none(
    values: dict[str, str], code: int, visitor: TestClient, store: LabelStore
) -> None:
    form = fields(visitor.get("/").text, "label")
    response = visitor.post("/label", data={**form, **values})
    assert (response.status_code, store.labels()) == (code, [])
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_form_sent_twice_stores_one_and_says_so(visitor: TestClient, store: LabelStore) -> None:
    text = visitor.get("/").text
    assert "labeled already" not in send(visitor, "left", text).text
    assert "its first label stands" in send(visitor, "right", text).text
    assert [label.choice for label in store.labels()] == ["left"]


def test_a_reload_keeps_the_pair_and_its_order(visitor: TestClient) -> None:
    assert visitor.get("/").text == visitor.get("/").text


def test_undo_takes_back_one_label(visitor: TestClient, store: LabelStore) -> None:
    before = visitor.get("/").text
    assert 'id="undo"' not in before
    after = send(visitor, "left", before).text
    again = visitor.post("/undo", data=fields(after, "undo")).text
    assert store.labels() == []
    assert re.findall("<article>.*</article>", again) == re.findall("<article>.*</article>", before)
    assert "taken back already" in visitor.post("/undo", data=fields(after, "undo")).text
    send(visitor, "right", again)
    assert [label.choice for label in store.labels()] == ["right"]
    assert visitor.post("/undo", data={**fields(after, "undo"), "label": "x"}).status_code == 400


def test_a_tab_of_before_an_undo_stores_nothing_and_says_that_the_pair_waits(
    visitor: TestClient, store: LabelStore
) -> None:
    tab = visitor.get("/").text
    first = send(visitor, "left").text
    visitor.post("/undo", data=fields(first, "undo"))
    assert "its pair waits to be labeled again" in send(visitor, "right", tab).text
    assert store.labels() == []


def test_undo_keeps_the_comment(visitor: TestClient) -> None:
    after = send(visitor, "left", comment="<b>hm").text
    assert "hm" not in after
    assert "&lt;b&gt;hm</textarea>" in visitor.post("/undo", data=fields(after, "undo")).text


def test_a_store_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.feedback.store._WAIT", 0.05)
    store = LabelStore(tmp_path / "own.sqlite")
    client = browser(store, row(1))
    text = client.get(f"/?token={TOKEN}").text
    with closing(sqlite3.connect(tmp_path / "own.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        response = send(client, "left", text)
        assert (response.status_code, store.labels()) == (409, [])
        assert "nothing was stored (database is locked); try again" in response.text
    assert send(client, "left", text).status_code == 200
    assert len(store.labels()) == 1
    store.close()


def test_the_last_label_can_be_undone_when_all_is_done(store: LabelStore) -> None:
    client = browser(store, row(1))
    client.get(f"/?token={TOKEN}")
    done = send(client, "left").text
    assert "All done" in done
    assert 'id="undo"' in done


def test_a_tools_arguments_are_shown(store: LabelStore) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": "<b>"}'}}
    turns = [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
    ]
    text = browser(store, row(4, prompt=turns)).get(f"/?token={TOKEN}").text
    assert "add({&#34;a&#34;: &#34;&lt;b&gt;&#34;})" in text


def test_the_figures_are_those_of_all_annotators(visitor: TestClient, store: LabelStore) -> None:
    send(visitor, "left")
    store.submit("bob", store.show("bob", store.labels()[0].item, "random", False).id, "tie")
    text = visitor.get("/figures").text
    assert '<meta http-equiv="refresh"' in text
    assert re.search(r"<td>all</td><td>bob</td><td>1</td>", text)
    assert "ann, bob" in text


def test_the_figures_have_programs_beside_people(visitor: TestClient, store: LabelStore) -> None:
    store.record("judge:m<b>", "item1", "first")
    send(visitor, "left")
    figures = visitor.get("/figures").text
    assert "judge:m&lt;b&gt;" in figures
    assert "<b>1</b> labeled, 2 left" in visitor.get("/").text  # the program's label is nobody's
