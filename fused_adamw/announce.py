"""The one line that says which parameters decay, where somebody sees it.

It is logged at INFO, which nobody sees unless logging was configured. Where it was not, it goes to stderr.
`FUSED_ADAMW_LOG=0` or `logging.getLogger("fused_adamw").setLevel(logging.WARNING)` switches that off.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("fused_adamw")


def announce(message: str) -> None:
    """Log a line at INFO, or write it to stderr if neither this logger nor the root logger has a handler."""
    if logger.hasHandlers():
        logger.info(message)
    elif _is_wanted():
        record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, message, (), None)
        logging.StreamHandler().handle(record)


def _is_wanted() -> bool:
    """Whether nobody asked for silence; of several processes the first one speaks."""
    if os.environ.get("FUSED_ADAMW_LOG") == "0" or os.environ.get("RANK", "0") != "0":
        return False
    return logger.level <= logging.INFO and logger.manager.disable < logging.INFO and not logger.disabled
