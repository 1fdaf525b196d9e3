"""Which of the processes this is, and what part of the work is its own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """A rank among `world_size`."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all, and writes what the run leaves behind."""
        return self.rank == 0

    def block(self, count: int) -> slice:
        """The part of `count` things in order that is this rank's."""
        return slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)
