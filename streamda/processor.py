"""Which processor this is, as far as it decides how to multiply."""

from pathlib import Path

FACTS = Path("/proc/cpuinfo")


def vendor() -> str | None:
    """Of the processor, as it names itself; None where the system does not tell."""
    return _fact("vendor_id")


def family() -> int | None:
    """Number of the processor's family, of those that its vendor has; None where the system does not tell."""
    number = _fact("cpu family")
    return int(number) if number is not None and number.isdecimal() else None


def _fact(name: str) -> str | None:
    try:
        text = FACTS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), None)
