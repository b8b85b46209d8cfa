"""Counts in messages."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 file", "2 files", "12,000 files".

    Args:
      count: how many.
      one: the noun.
      many: its plural; None: with an s.
    """
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"
