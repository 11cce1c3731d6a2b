"""What truncated sampling entails is said where it is set."""

from tuner.config import Sampling
from tuner.stages.rl.sampling_notes import sampling_notes


def test_rare_habits_that_top_p_hides_are_said() -> None:
    rare, biased = sampling_notes(Sampling(top_p=0.9), has_reference=True)
    assert "top_p=0.9: what is rarer than the most likely 90% is never sampled" in rare
    assert "estimates of the KL divergence" in biased
    assert sampling_notes(Sampling(top_p=0.9), has_reference=False) == [rare]
    assert len(sampling_notes(Sampling(top_p=1.0, top_k=5), has_reference=True)) == 1
    assert sampling_notes(Sampling(top_p=1.0), has_reference=True) == []
