"""The account of unreadable pictures: each is named in the log once, and too many of them stop the work."""

import logging

log = logging.getLogger(__name__)


class UnreadableLog:
    """Counts the distinct unreadable pictures of one source over a run.

    Args:
        total: number of pictures in the source.
        limit: largest share of them that may be unreadable.
    """

    def __init__(self, total: int, limit: float = 0.01):
        if total < 1 or not 0 <= limit <= 1:
            raise ValueError(f"total={total} must be at least 1 and limit={limit} in [0, 1]")
        self.total, self.limit = total, limit
        self.names: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.names)

    def add(self, unreadable: list[tuple[int, str, str]]) -> None:
        """Record the reports of a batch, (index, name, reason) each.

        Raises:
            ValueError: more than the permitted share of the source is unreadable.
        """
        for _, name, reason in unreadable:
            if name not in self.names:
                self.names[name] = reason
                log.warning("unreadable image left out: %s: %s", name, reason)
        if len(self.names) > self.limit * self.total:
            first = "; ".join(f"{name} ({reason})" for name, reason in list(self.names.items())[:5])
            raise ValueError(
                f"{len(self.names)} of {self.total} images found unreadable so far, more than the {self.limit:.0%} "
                f"allowed. First of them: {first}. Repair or remove these files and start again; work up to the "
                "last checkpoint is kept."
            )
