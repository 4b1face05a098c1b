"""Lets torchvision be imported beside a torch that it was not built for.

Import this before `transformers`, which looks for torchvision once. Nothing that the benchmarks
call needs torchvision's compiled operators, but importing it looks two of them up by name.
"""

from __future__ import annotations

import torch

LIBRARY: list[torch.library.Library] = []  # its definitions go when it goes


def import_torchvision() -> bool:
    """Import torchvision; return whether there is one."""
    try:
        import torchvision
    except ImportError:
        return False
    except RuntimeError:
        LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            LIBRARY[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    return True


HAS_TORCHVISION = import_torchvision()
