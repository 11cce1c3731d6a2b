"""The loss of TRL's trainers is taken on the learned tokens of answers alone, by both of its collators."""

from typing import Any

from tuner.training.trl_trainer import LearnedTokens

# isort: split
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference


def test_of_both_answers_of_pairs() -> None:
    columns = {"completion_mask": ("chosen_learned", "rejected_learned")}
    rows: list[dict[str, Any]] = [
        {
            "prompt_ids": [1, 2],
            "chosen_ids": [3, 4, 5],
            "rejected_ids": [6],
            "chosen_learned": [True, False, True],
            "rejected_learned": [True],
        },
        {
            "prompt_ids": [7],
            "chosen_ids": [8],
            "rejected_ids": [9, 10, 11],
            "chosen_learned": [True],
            "rejected_learned": [False, True, True],
        },
    ]
    batch = LearnedTokens(DataCollatorForPreference(pad_token_id=0), columns)(rows)
    assert batch["completion_mask"].tolist() == [
        [0, 0, 1, 0, 1],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 2, 3, 4]  # what is not learned is read


def test_of_an_answer_and_of_the_other_that_kl_is_estimated_from() -> None:
    columns = {f"{part}completion_mask": (f"{part}completion_learned",) for part in ("", "KL_")}
    row: dict[str, Any] = {
        "prompt_ids": [1],
        "completion_ids": [2, 3],
        "completion_learned": [False, True],
        "label": True,
    }
    other = {"KL_completion_ids": [4, 5, 6], "KL_completion_learned": [True, False, True]}
    collate = LearnedTokens(DataCollatorForUnpairedPreference(pad_token_id=0), columns)
    assert collate([row | other])["completion_mask"].tolist() == [[0, 0, 1]]
    assert collate([row | other])["KL_completion_mask"].tolist() == [[0, 1, 0, 1]]
    assert "KL_completion_mask" not in collate([row])
