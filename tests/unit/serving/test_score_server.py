"""A reward model behind /classify: the scores of `tuner score`, and no text."""

from __future__ import annotations

import pytest
import torch
from starlette.testclient import TestClient

from tuner.models.scorer import RewardInputs, Scorer, ScoreRequest, open_scorer, prompt_of
from tuner.models.tiny import tiny_model_folder
from tuner.serving.score_app import ScoreApp

MESSAGES = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well, thank you."}]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = tiny_model_folder("meta-llama/Llama-3", tmp_path_factory.mktemp("reward") / "m", score=True)
    scorer = open_scorer(folder, precision="fp32")
    with torch.no_grad():  # a fresh head is zero, and so would all scores be
        scorer.loaded.transformer.get_submodule("score").get_parameter("weight").normal_()
    return scorer


@pytest.fixture(scope="module")
def client(scorer: Scorer) -> TestClient:
    app = ScoreApp(scorer, "judge", "t").app
    return TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": "Bearer t"})


def test_scores_are_those_of_tuner_score(client: TestClient, scorer: Scorer) -> None:
    (expected,) = scorer.score([{"messages": MESSAGES}]).tolist()
    assert abs(expected) > 1e-3
    body = client.post("/classify", json={"messages": MESSAGES, "model": "judge"}).json()
    assert body["data"] == [{"index": 0, "label": "LABEL_0", "probs": [expected], "num_classes": 1}]
    from tuner.data.conversation import Conversation, Turn

    conversation = Conversation((Turn("user", "How are you?"), Turn("assistant", "Well, thank you.")))
    inputs = RewardInputs(scorer.loaded.tokenizer, scorer.record, scorer.template)
    (ids,) = inputs.make([ScoreRequest(conversation, None, prompt_of(conversation))])
    assert body["usage"]["prompt_tokens"] == len(ids)
    text = scorer.loaded.tokenizer.decode(ids)
    both = client.post("/classify", json={"input": [ids.tolist(), text]}).json()["data"]
    # rows packed with others are summed in another order
    assert [item["probs"][0] for item in both] == pytest.approx([expected] * 2, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "input is a text"),
        ({"input": []}, "from 1 to 256"),
        ({"input": [10**6]}, "token ids of input"),
        ({"messages": []}, "at least one message"),
        ({"messages": MESSAGES, "condition": "brief"}, "brief"),
        ({"input": "a", "activation": "sigmoid"}, "activation"),
    ],
)
def test_what_cannot_be_scored_is_refused(client: TestClient, body: dict, words: str) -> None:
    response = client.post("/classify", json=body)
    assert (response.status_code, words in response.json()["error"]["message"]) == (400, True), response.text


@pytest.mark.parametrize("content", [rb'{"input": "a\ud800"}', b'{"input": "a\xed\xa0\x80"}'])
def test_half_of_a_character_is_refused(client: TestClient, content: bytes) -> None:
    response = client.post("/classify", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "has \\ud800, half of a character" in response.json()["error"]["message"]


def test_it_writes_no_text(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert response.status_code == 404
    assert "is a reward model: it scores at /classify" in response.json()["error"]["message"]
    assert client.get("/v1/models").json()["data"][0]["id"] == "judge"
    assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
