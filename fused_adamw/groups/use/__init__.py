"""Evidence by use: which operations of a forward pass consume each parameter.

`kinds.py` is the table operation -> kind of use, `watch.py` follows tensors through a forward pass,
`forward.py` runs one without touching the model, `evidence.py` turns what was seen into findings.
"""

from .evidence import with_use
from .forward import observe

__all__ = ["observe", "with_use"]
