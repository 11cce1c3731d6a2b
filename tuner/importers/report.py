"""What became of every key of a foreign config."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """What became of the keys of a foreign config. Each is carried, lost or idle; none is dropped in silence."""

    carried: set[str] = field(default_factory=set[str])
    """Keys whose values are in the new config, as they were or by a decision."""

    decided: dict[str, str] = field(default_factory=dict[str, str])
    """Field of the new config -> how its value was chosen, where the other has none; a comment says it in the file."""

    lost: dict[str, str] = field(default_factory=dict[str, str])
    """Key -> why it could not be carried, and what to use instead."""

    idle: dict[str, str] = field(default_factory=dict[str, str])
    """Key -> why it needs no counterpart: it has no effect on what is trained, or it is always so here."""

    def lose(self, key: str, why: str) -> None:
        """Record a key that could not be carried; the first reason stays."""
        self.carried.discard(key)
        self.lost.setdefault(key, why)

    def ignore(self, key: str, why: str) -> None:
        """Record a key that needs no counterpart."""
        self.carried.discard(key)
        self.idle.setdefault(key, why)
