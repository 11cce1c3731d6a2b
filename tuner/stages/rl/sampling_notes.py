"""What a policy stage's sampling settings entail that their reader may not expect."""

from __future__ import annotations

from tuner.config.sampling import Sampling


def sampling_notes(sampling: Sampling, *, has_reference: bool) -> list[str]:
    """A sentence on every consequence; none where tokens are sampled from the whole distribution."""
    if not sampling.is_truncated:
        return []
    limits = {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_new_tokens": sampling.min_new_tokens}
    no_limits = {"top_p": 1.0, "top_k": None, "min_new_tokens": 0}
    named = ", ".join(f"{name}={value}" for name, value in limits.items() if value != no_limits[name])
    notes = []
    if sampling.top_p < 1:
        notes.append(
            f"sampling.top_p={sampling.top_p}: what is rarer than the most likely {sampling.top_p:.0%} is never "
            "sampled, so rare habits are neither rewarded nor unlearned; top_p=1 samples them, too"
        )
    if has_reference:
        notes.append(
            f"sampling.{named}: some tokens cannot be sampled, while log-probabilities are over the full vocabulary, "
            "so that estimates of the KL divergence (k1, k2 and k3) are biased"
        )
    return notes
