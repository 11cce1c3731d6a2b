"""From what a foreign config says to the config of a stage: batches, limits and losses in tuner's units."""

from __future__ import annotations

from collections.abc import Callable

from tuner.importers.part import Part
from tuner.importers.recipe import Recipe, Stage

_DATA_FIELDS = (
    *(
        "template",
        "system",
        "learn",
        "max_length",
        "too_long",
        "incomparable",
        "duplicates",
        "limit",
        "split",
    ),
)
"""Fields of data in the order of the file."""


def stage_part(recipe: Recipe) -> Part:
    """The config of a recipe's stage, with its comments."""
    config = _BUILDERS[recipe.stage](recipe)
    for path, comment in recipe.comments.items():
        config.explain(path, comment)
    return config.without_defaults()


def _sft(recipe: Recipe) -> Part:
    config = Part("SFT", **_model(recipe), data=_data(recipe, "Chat"), **_shared(recipe, "Evaluation"))
    _count_tokens(recipe, config, 1)
    return config


def _text(recipe: Recipe) -> Part:
    for field in ("template", "system", "learn", "drop"):
        recipe.data.pop(field, None)
    recipe.data["too_long"] = "split"
    config = Part("SFT", **_model(recipe), data=_data(recipe, "Text"), **_shared(recipe, "Evaluation"))
    _count_tokens(recipe, config, 1)
    return config


def _reward(recipe: Recipe) -> Part:
    config = Part(
        "RewardModel", **_model(recipe), data=_preferences(recipe), **_shared(recipe, "PairEvaluation")
    )
    _count_tokens(recipe, config, 2)
    return config


def _dpo(recipe: Recipe) -> Part:
    _no_dropout(recipe, "TRL's DPO here")
    config = Part("DPO", **_model(recipe), data=_preferences(recipe), **_shared(recipe))
    batch, pair = recipe.batch, 2 * recipe.data["max_length"]
    per_pack = max(1, (batch.pack or pair) // pair)
    if batch.pack:
        recipe.decide(
            "pairs_per_step",
            f"{batch.words}: pairs were packed into rows of {batch.pack:,} tokens, and here they are counted: this "
            "is the least that filled a step; raise it to the mean number",
        )
    else:
        recipe.decide("pairs_per_step", batch.words)
    config["pairs_per_step"] = batch.total * per_pack
    config["pairs_per_pass"] = batch.rows * per_pack
    return config


def _kto(recipe: Recipe) -> Part:
    _no_dropout(recipe, "TRL's KTO here")
    config = Part("KTO", **_model(recipe), data=_preferences(recipe), **_shared(recipe))
    rows = max(2, recipe.batch.rows)
    words = recipe.batch.words
    if rows != recipe.batch.rows:
        words += "; KL is estimated within a pass, from two answers at least"
    recipe.decide("answers_per_step", words)
    config["answers_per_step"] = max(rows, -(-recipe.batch.total // rows) * rows)
    config["answers_per_pass"] = rows
    return config


def _ppo(recipe: Recipe) -> Part:
    _no_dropout(recipe, "reinforcement learning")
    data = {
        name: value for name, value in recipe.data.items() if name in ("template", "system", "max_length")
    }
    split = recipe.data.get("split")
    if split is not None:
        data["split"] = Part("Split", test=split.fields.get("validation"))
    training = dict(recipe.training)
    sampling = training.pop("sampling")
    longest = data["max_length"] + sampling.fields["max_new_tokens"]
    recipe.decide("prompts_per_step", recipe.batch.words)
    recipe.decide("tokens_per_pass", "a prompt with its answer fits, and as many more as fill it")
    config = Part(
        "PPO",
        policy=recipe.model,
        adapter=recipe.adapter,
        reward=training.pop("reward"),
        prompts=Part("Prompts", files=tuple(recipe.files), **data),
        prompts_per_step=recipe.batch.total,
        sampling=sampling,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        checkpoint=recipe.checkpoint,
        tokens_per_pass=max(longest, 8_192),
    )
    for field, value in training.items():
        config[field] = value
    for reasons in (recipe.comments, recipe.report.decided):
        for path in list(reasons):
            owner, dot, field = path.partition(".")
            reasons[f"{_POLICY_FIELDS.get(owner, owner)}{dot}{field}"] = reasons.pop(path)
    return config


_POLICY_FIELDS = {"data": "prompts", "model": "policy"}
"""Fields of other stages -> their names in PPO."""
_BUILDERS: dict[Stage, Callable[[Recipe], Part]] = {
    "sft": _sft,
    "text": _text,
    "dpo": _dpo,
    "kto": _kto,
    "reward": _reward,
    "ppo": _ppo,
}


def _model(recipe: Recipe) -> dict[str, object]:
    return {"model": recipe.model, "adapter": recipe.adapter}


def _shared(recipe: Recipe, evaluation: str = "Validation") -> dict[str, object]:
    """Fields of every stage that trains one model."""
    fields: dict[str, object] = {
        "optimizer": recipe.optimizer,
        "schedule": recipe.schedule,
        **recipe.training,
    }
    if recipe.evaluation.fields:
        fields["evaluation"] = Part(evaluation, **recipe.evaluation.fields)
    fields["checkpoint"] = recipe.checkpoint
    fields["freeze"] = recipe.freeze
    return fields


def _data(recipe: Recipe, kind: str) -> Part:
    validation = tuple(recipe.validation_files) or None
    data = {field: recipe.data[field] for field in _DATA_FIELDS if field in recipe.data}
    return Part(kind, files=tuple(recipe.files), validation_files=validation, **data)


def _preferences(recipe: Recipe) -> Part:
    recipe.data.pop("learn", None)
    if recipe.data.get("too_long") == "cut":
        recipe.decide(
            "data.too_long",
            "rows were cut at their end; here the oldest tokens of the prompt go, answers stay",
        )
    recipe.data["incomparable"] = "drop"
    recipe.decide(
        "data.incomparable",
        "identical answers compare nothing; by default they are an error that names the row",
    )
    return _data(recipe, "Preferences")


def _count_tokens(recipe: Recipe, config: Part, answers: int) -> None:
    """tokens_per_step and tokens_per_pass of rows, or of pairs (2 answers), of at most max_length tokens."""
    batch, longest = recipe.batch, answers * recipe.data["max_length"]
    row = batch.pack or longest
    per_pass = max(longest, batch.rows * row)
    config["tokens_per_pass"] = per_pass
    config["tokens_per_step"] = max(per_pass, batch.total * row)
    unit = "packs" if batch.pack else "rows" if answers == 1 else "pairs"
    why = f"{batch.words} = {batch.total:,} {unit} of {'' if batch.pack else 'at most '}{row:,} tokens"
    if not batch.pack:
        why += (
            "; rows were padded, and here their own tokens are counted, so that a step holds more short rows: for as "
            "many, write their number times their mean length, which `tuner data` shows"
        )
    recipe.decide("tokens_per_step", why)


def _no_dropout(recipe: Recipe, where: str) -> None:
    if recipe.adapter is not None and recipe.adapter.fields.get("dropout"):
        dropout = recipe.adapter.fields["dropout"]
        recipe.adapter["dropout"] = 0.0
        recipe.decide("adapter.dropout", f"it was {dropout:g}; {where} has none")
