"""Config of feedback: who says which of two answers is better."""

import re
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ConfigDict, Field, field_validator

from tuner.config.base import ConfigBase
from tuner.config.functions import Function, is_function_reference


class People(ConfigBase):
    """People, who label on the page of `tuner label RUN`."""

    kind: Literal["people"] = "people"
    """Kind of labeler, in JSON."""

    overlap: int = Field(default=1, ge=1)
    """Number of people who label each pair."""

    order: Literal["random", "nearest", "disagreement"] = "random"
    """Order of pairs: at random, or those first that reward models score most alike or dispute most."""

    repeats: float = Field(default=0.1, ge=0, le=1)
    """Share of pairs that come to the same person a second time, as a check of their consistency."""

    wait: bool = True
    """Whether a round stops until people have labeled its pairs; false: it goes on with the labels there are, and later
    ones count in the next round."""


class _Machine(ConfigBase):
    """A labeler that is a program."""

    name: str | None = Field(default=None, min_length=1, max_length=200)
    """Name under which its labels are stored, behind its kind; None: the model's or the function's."""


class Judge(_Machine):
    """A language model behind an OpenAI-style API, asked about both orders of each pair.

    Where the orders disagree, the pair is stored as undecided.
    """

    # an address or a name that is refused may hold the key
    model_config = ConfigDict(hide_input_in_errors=True)

    kind: Literal["judge"] = "judge"
    """Kind of labeler, in JSON."""

    url: str
    """Address of the API, as in http://localhost:8000/v1; requests go to URL/chat/completions."""

    model: str = Field(min_length=1)
    """Name of the model, as the API knows it."""

    api_key_env: str | None = None
    """Name of the environment variable that holds the API key, never the key; None: none is sent."""

    temperature: float | None = Field(default=0.0, ge=0)
    """Sampling temperature; None: the API's default."""

    max_tokens: int | None = Field(default=1024, ge=1)
    """Maximum number of tokens of a reply, reasoning included; None: the API's default."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, such as {"reasoning_effort": "low"}."""

    guidelines: dict[str, str] = Field(default_factory=dict)
    """Condition -> what the judge is told of it, in place of the guideline of the candidate."""

    default_guideline: str = "The better answer is the more helpful, correct and honest one."
    """What the judge is told where neither `guidelines` nor the candidate has a guideline."""

    system_role: bool = True
    """Send the task as a system message; false: at the head of the user's, for models without that role."""

    concurrency: int = Field(default=8, ge=1, le=1024)
    """Requests at the same time."""

    requests_per_minute: float | None = Field(default=None, gt=0)
    """Maximum number of requests a minute; None: no limit."""

    timeout: float = Field(default=120.0, gt=0)
    """Seconds until a reply must be complete."""

    retries: int = Field(default=6, ge=0)
    """Times that a request is sent again after a failure of the server or the network, with exponential backoff."""

    prompt_price: float | None = Field(default=None, ge=0)
    """Price of a million prompt tokens; with it or `completion_price`, the cost is shown."""

    completion_price: float | None = Field(default=None, ge=0)
    """Price of a million completion tokens."""

    @property
    def annotator(self) -> str:
        """The name under which its labels are stored; see `is_machine_name`."""
        return f"judge:{self.name or self.model}"

    @field_validator("url")
    @classmethod
    def _is_an_address_without_secrets(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            parts, has_host = None, False
        if parts is None or parts.scheme not in ("http", "https") or not has_host:
            raise ValueError(f"{url!r:.80} is no address: write it as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            # not repeated here: it may hold the key
            raise ValueError(
                "the address must hold neither a user nor a query: a key belongs in an environment variable, "
                "which api_key_env names"
            )
        return url.rstrip("/").removesuffix("/chat/completions")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            # not repeated here: it may be the key
            raise ValueError("is the name of an environment variable, as in OPENAI_API_KEY, and not the key")
        return name

    @field_validator("options")
    @classmethod
    def _leaves_our_fields_alone(cls, options: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "messages", "temperature", "max_tokens", "stream", "n"} & set(options)
        if ours:
            raise ValueError(f"{min(ours)} cannot be set here: it has a field of its own, or none")
        return options


class RuleFeedback(_Machine):
    """A function that scores answers: of each pair, that with the higher score is better; equal scores are a tie."""

    kind: Literal["rule"] = "rule"
    """Kind of labeler, in JSON."""

    function: Function
    """`file.py:name` of a module-level function (answer, row) -> float, where row (dict) holds the fields of the
    candidate's row."""

    @property
    def annotator(self) -> str:
        """The name under which its labels are stored; see `is_machine_name`."""
        return f"rule:{self.name or str(self.function).rpartition(':')[2]}"


def _as_rule(value: Any) -> Any:
    """Accept a function in place of a rule."""
    if is_function_reference(value) or (callable(value) and not isinstance(value, ConfigBase)):
        return {"kind": "rule", "function": value}
    return cast("Any", value)


Feedback = Annotated[
    Annotated[People | Judge | RuleFeedback, Field(discriminator="kind")], BeforeValidator(_as_rule)
]
"""Who labels pairs of answers: people, a judge, or a rule, which may also be written as a bare function."""


def is_machine_name(annotator: str) -> bool:
    """Whether a name could be that of a labeler that is a program; people may not have such a name."""
    return re.match(r"\s*(judge|rule)\s*:", annotator, re.IGNORECASE) is not None
