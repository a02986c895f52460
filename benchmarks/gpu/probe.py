"""Say what a machine is and what can run there: a command, so that no fault of it can spread."""

from __future__ import annotations

import json
import sys

import torch

from fused_adamw.backends import unavailable_reason

from ..provenance import provenance


def main(device_type: str, commit: str | None) -> None:
    """Print it as JSON."""
    device = torch.device(device_type)
    is_there = device.type != "cuda" or torch.cuda.is_available()
    found = {"is_there": is_there}
    if is_there:
        found["provenance"] = provenance(device, commit)
        found["unavailable_reason"] = {
            name: unavailable_reason(name, device) for name in ("native", "triton", "reference")
        }
        found["capability"] = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
