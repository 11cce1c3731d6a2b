"""What the record of a step says about its stage, for all who show it."""

from collections.abc import Iterable, Mapping
from typing import Any


def of_policy(record: Mapping[str, Any]) -> bool:
    """Whether this is a step of PPO: a policy was scored, and compared with its reference."""
    return "kl" in record and "score" in record


def warming_up(record: Mapping[str, Any]) -> bool:
    """Whether this step of PPO taught the critic alone; of a skipped step nothing is known."""
    return record.get("policy_loss") is None and record.get("value_loss") is not None


def conditions(records: Iterable[Mapping[str, Any]], of: str = "score") -> list[str]:
    """Names of the conditions with a number of their own ("score/polite"), in the order they first came."""
    prefix = of + "/"
    named = (name for record in records for name in record if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in dict.fromkeys(named)]
