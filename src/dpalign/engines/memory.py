"""Redo a batch in halves when it runs out of memory; only for answers that do not depend on their neighbours."""

import gc
import logging
import sys
from collections.abc import Callable
from typing import Final, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

CPU_SAID: Final = ("can't allocate memory", "not enough memory")
"""Parts of the RuntimeErrors of torch's CPU allocator."""

_halvings = 0


def halvings() -> int:
    """How often a batch was halved in this process."""
    return _halvings


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that torch or Python ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in CPU_SAID)


def in_halves(work: Callable[[int], T], size: int, what: str, least: int = 1) -> tuple[T, int]:
    """Call `work` with a batch size, halved while memory is short; returns its result and the size that fits.

    Args:
        what: names the model, and what the size counts: "policy-1: {} answers side by side".
        least: the smallest size to try.

    Raises:
        ValueError: memory is short even at the least size.
    """
    global _halvings
    while True:
        try:
            return work(size), size
        except Exception as error:
            if not out_of_memory(error):
                raise
            if size <= least:
                raise ValueError(
                    f"out of memory, {what.format(size)}, and no batch is smaller; take a smaller model or shorter "
                    f"texts, or free memory ({error})"
                ) from error
        # outside of the handler: the error holds the frames, and they hold the memory
        _free()
        fewer = max(least, size // 2)
        log.warning("out of memory, %s; going on with %d", what.format(size), fewer)
        size, _halvings = fewer, _halvings + 1


def _free() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
