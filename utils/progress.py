"""How far a run is."""

from dataclasses import asdict, dataclass, field

import torch


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class Progress:
    """How far a run is; together with tensors and random generators, all that a state holds."""

    epoch: int = 1  # the one that runs
    iteration: int = 0  # iterations done in it
    loss_sum: torch.Tensor = field(default_factory=_zero)  # of these iterations
    best: float = float("inf")  # validation loss
    worse: int = 0  # epochs since
    skipped: int = 0  # iterations of the epoch whose loss was no number
    skipped_in_a_row: int = 0
    max_sequences: int = 0  # run at once; how a batch is parted decides how its sums are rounded
    history: list[dict] = field(default_factory=list)  # a row an epoch

    def next_epoch(self) -> None:
        """Stand before the first iteration of the next epoch."""
        self.epoch, self.iteration, self.skipped, self.loss_sum = self.epoch + 1, 0, 0, _zero()

    def finished(self, train_epochs: int, patience: int) -> bool:
        """Whether epochs or patience are used up."""
        return self.epoch > train_epochs or self.worse >= patience

    def to_json(self) -> dict:
        """Values that JSON keeps to the last bit."""
        return asdict(self) | {"loss_sum": float(self.loss_sum)}

    @classmethod
    def from_json(cls, held: dict) -> "Progress":
        """The reverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(**{name: read(held[name]) for name, read in _READ.items()})


_READ = {
    "epoch": int,
    "iteration": int,
    "loss_sum": lambda value: torch.tensor(float(value), dtype=torch.float64),
    "best": float,
    "worse": int,
    "skipped": int,
    "skipped_in_a_row": int,
    "max_sequences": int,
    "history": list,
}
