"""What those who follow a run say of their own faults."""

from rich.console import Console


def tell(line: str) -> None:
    """Prints a line to stderr as it stands, without wrapping or markup."""
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(line)
