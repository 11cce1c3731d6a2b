"""Which prompts a step answers: the specified order, exact shares, and runs that are short."""

import numpy as np
import pytest

from tuner.config.data import Source
from tuner.data.examples import Origins
from tuner.data.packing import Share, StepPlan, exhausted
from tuner.data.prompt_stream import PromptStream, plan_prompts
from tuner.data.prompts import PromptSet
from tuner.errors import UserError


def prompts_of(counts: list[int]) -> PromptSet:
    """Prompts of a token and a byte each, of so many sources."""
    sources_N = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    count = len(sources_N)
    return PromptSet(
        tokens_T=np.zeros(count, np.int32), offsets=np.arange(count + 1), rows_B=np.zeros(count, np.uint8),
        row_offsets=np.arange(count + 1), conditions=np.full(count, -1, np.int32), condition_names=(),
        sources=sources_N, origins=Origins(("a.jsonl",), np.zeros(count, np.int32), np.arange(1, count + 1)),
    )  # fmt: skip


def plan(count: int, prompts_per_step: int, epochs: float = 1.0, seed: int = 0) -> PromptStream:
    return plan_prompts(prompts_of([count]), prompts_per_step=prompts_per_step, epochs=epochs, seed=seed)


def mix(counts: list[int], shares: list[float], prompts_per_step: int, epochs=1.0, seed=0) -> PromptStream:
    sources = [Source(path=f"{place}.jsonl", share=share) for place, share in enumerate(shares)]
    return plan_prompts(
        prompts_of(counts), prompts_per_step=prompts_per_step, epochs=epochs, seed=seed, sources=sources
    )


def steps(stream: PromptStream) -> list[list[int]]:
    return [stream.step(index).tolist() for index in range(len(stream))]


@pytest.mark.parametrize(
    ("count", "size", "epochs"), [(10, 4, 3.0), (10, 10, 2.0), (7, 16, 9.0), (10, 3, 2.5), (1, 4, 9.0)]
)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_order_is_the_specified_one(count, size, epochs, seed):
    whole = [np.random.default_rng((seed, epoch)).permutation(count) for epoch in range(int(epochs))]
    rest = np.random.default_rng((seed, int(epochs))).permutation(count)
    whole = np.concatenate([*whole, rest[: round((epochs - int(epochs)) * count)]])
    stream = plan(count, size, epochs, seed)
    assert len(stream) == len(whole) // size
    assert steps(stream) == whole[: len(stream) * size].reshape(-1, size).tolist()
    assert stream.step(0).dtype == np.int64


def test_epochs_begun():
    stream = plan(10, 4, 3.0)
    assert [stream.epoch(step) for step in range(len(stream))] == [0.4, 0.8, 1.2, 1.6, 2.0, 2.4, 2.8]


def test_a_run_without_a_whole_step_has_one():
    stream = plan(5, 16, 2.0)
    assert len(stream) == 1
    assert sorted(stream.step(0).tolist()) == sorted([*range(5), *range(5)])
    assert stream.epoch(0) == 2.0
    assert plan(5, 16, 0.5).step(0).tolist() == np.random.default_rng((0, 0)).permutation(5)[:2].tolist()


def test_a_run_without_prompts_is_refused():
    for count, epochs in ((0, 1.0), (10, 0.01)):
        with pytest.raises(
            UserError, match=rf"prompts: {epochs:g} epochs of {count} prompts are none to answer"
        ):
            plan(count, 4, epochs)


def test_what_the_loop_knows_of_a_step_before_it_begins():
    stream = plan(10, 4, 3.0)
    contents = stream.contents(2, Share(1, 2))
    assert (contents.epoch, contents.batches, contents.totals, contents.tokens) == (1.2, (), {}, 0)
    assert stream.origins(2) == [f"a.jsonl:{index + 1}" for index in stream.step(2)]


def test_steps_that_there_are_not():
    for index in (-1, 2):
        with pytest.raises(IndexError):
            plan(10, 4).step(index)


def test_a_long_run_costs_nothing_before_it_is_drawn():
    stream = plan(1000, 512, 1e9)
    assert len(stream) == 1000 * 10**9 // 512
    assert sorted(stream.step(len(stream) - 1).tolist()) != list(range(512))


def test_shares_are_kept_in_every_step_while_sources_last():
    stream = mix([600, 600], [3.0, 1.0], 80)
    for step in range(600 // 60):
        drawn = np.bincount(stream.prompts.sources[stream.step(step)], minlength=2)
        assert abs(drawn[0] - 60) <= 1
        assert drawn.sum() == 80


def test_no_prompt_comes_twice_in_an_epoch_and_epochs_differ():
    stream = mix([30, 10, 60], [1.0, 5.0, 1.0], 20, epochs=2.0)
    everything = [index for step in steps(stream) for index in step]
    for epoch in (everything[:100], everything[100:]):
        assert sorted(epoch) == list(range(100))
    assert everything[:100] != everything[100:]


def test_the_order_follows_the_seed_alone():
    [one, same, other] = [mix([30, 10], [1.0, 2.0], 8, seed=seed) for seed in (3, 3, 4)]
    assert steps(one) == steps(same) != steps(other)
    assert [one.step(2).tolist(), one.step(1).tolist()] == steps(one)[2:0:-1]


@pytest.mark.parametrize("counts", [[40, 10, 90], [5, 5], [1, 200, 3], [0, 8, 30]])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.4])
def test_exhausted_sources_are_those_that_packed_streams_tell(counts, epochs):
    stream = mix(counts, [2.0, 1.0, 1.5][: len(counts)], 8, epochs)
    plans = [StepPlan(stream.step(index), stream.epoch(index)) for index in range(len(stream))]
    expected: dict[int, list[str]] = {}
    for source, step in exhausted(plans, stream.prompts.sources, len(counts)):
        expected.setdefault(step, []).append(f"{source}.jsonl")
    assert stream.exhausted == expected


def test_one_source_is_never_told_to_end():
    assert mix([20], [2.0], 8).exhausted == {}
