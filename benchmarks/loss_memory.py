"""Memory of the loss over 152,064 ids: ours against logits that are built whole.

    python -m benchmarks.loss_memory [--json]

Peak resident memory over what is there before, forward and backward, at 1,024, 2,048 and 4,096
supervised positions; the slope of a straight line through them is what a position costs. Then ours
at 32,768 positions, where the plain path would need some 80 GB. fp32, a narrow hidden state (64):
what is measured is the vocabulary's. Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from omni_train.models.thinker import LogProbHead

VOCABULARY = 152_064
WIDTH = 64
POSITIONS = (1024, 2048, 4096)
LONG = 32_768
GOAL = 7.0


def ours(head: LogProbHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """The loss as the stages compute it."""
    return -head(hidden, targets).sum()


def plain(head: LogProbHead, hidden: Tensor, targets: Tensor) -> Tensor:
    """The loss as transformers' `ForCausalLMLoss` computes it: all logits, in fp32."""
    return cross_entropy(head(hidden).float(), targets, reduction="sum")


PATHS = {"ours": ours, "plain": plain}


def peak_bytes(path: str, positions: int) -> int:
    """Return the peak of resident memory of one forward and backward pass, over that before."""
    head, hidden, targets = _inputs(positions)
    gc.collect()
    # 5 sets the process's peak to what it holds now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    PATHS[path](head, hidden, targets).backward()
    return _status("VmHWM") - before


def largest_difference(positions: int = 64) -> float:
    """Return by how much loss and gradients differ, relative to the plain path's largest value."""
    found = []
    for path in PATHS.values():
        head, hidden, targets = _inputs(positions)
        loss = path(head, hidden, targets)
        loss.backward()
        assert hidden.grad is not None
        assert head.weight.grad is not None
        found.append((loss.detach(), hidden.grad, head.weight.grad))
    return max(
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(*found, strict=True)
    )


def slope(peaks: list[int]) -> float:
    """Return the bytes per position of the least-squares line through `POSITIONS`."""
    x = torch.tensor(POSITIONS, dtype=torch.double)
    y = torch.tensor(peaks, dtype=torch.double)
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def measure(*, long: bool) -> dict[str, float]:
    """Return all figures, in bytes.

    Args:
        long: also ours at `LONG` positions, which takes minutes.
    """
    torch.set_num_threads(1)
    peak_bytes("ours", 64)  # what a first call loads is no part of any
    figures: dict[str, float] = {"largest_difference": largest_difference()}
    for path in PATHS:
        peaks = [peak_bytes(path, positions) for positions in POSITIONS]
        figures[f"{path}_bytes_per_position"] = slope(peaks)
        figures[f"{path}_peak_at_{POSITIONS[-1]}"] = peaks[-1]
    figures["ratio"] = figures["plain_bytes_per_position"] / figures["ours_bytes_per_position"]
    if long:
        figures[f"ours_peak_at_{LONG}"] = peak_bytes("ours", LONG)
    return figures


def _inputs(positions: int) -> tuple[LogProbHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = LogProbHead(WIDTH, VOCABULARY, bias=False)
    hidden = torch.randn(positions, WIDTH, requires_grad=True)
    return head, hidden, torch.randint(0, VOCABULARY, (positions,))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not tell {name}")


def main() -> int:
    """Measure, print, and say whether the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    figures = measure(long=True)
    if as_json:
        print(json.dumps({"torch": torch.__version__, "goal": GOAL, **figures}))
    else:
        print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread")
        for name, value in figures.items():
            shown = (
                f"{value / 1e6:,.3f} MB" if "bytes" in name or "peak" in name else f"{value:.3g}"
            )
            print(f"{name:<28} {shown}")
    return 0 if figures["ratio"] >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
