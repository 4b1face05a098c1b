"""B6: memory and time of the loss over 152,064 ids, against logits that are built whole.

    python -m benchmarks.b06_loss [--long] [--json]

Memory: peak resident memory over what is there before, forward and backward, at 1,024, 2,048 and
4,096 supervised positions; the slope of a straight line through them is what a position costs.
`--long` adds ours at 32,768 positions, where the plain path would need some 80 GB; some minutes.
Time: forward and backward with every position supervised, and with every fourth one: the plain path
computes all of them, ours those that count. fp32, a narrow hidden state (64 for memory, 256 for
time), for what is measured is the vocabulary's. The plain path has no better setting.

Loss and gradients are compared first. Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.report import Row, compare, parser, show
from omni_train.models.thinker import LogProbHead

VOCABULARY = 152_064
WIDTH, TIMED_WIDTH = 64, 256
POSITIONS = (1024, 2048, 4096)
TIMED_POSITIONS = 512
LONG = 32_768
GOAL = 7.0
# Least ratio of time with each, or each fourth, position supervised.
TIME_GOALS = {1: 1.5, 4: 4.0}
WHY = (
    "Ours makes the logits twice, and TRL's kernel reads and writes each tile a dozen times where "
    "there is no Triton (profile in NOTES.md, The loss)"
)


def ours(head: LogProbHead, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss as the stages compute it: of the supervised positions alone."""
    kept = (labels != -100).nonzero().squeeze(1)
    return -head(hidden.index_select(0, kept), labels[kept]).sum()


def plain(head: LogProbHead, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss as transformers computes it: all logits, in fp32."""
    size = head.out_features
    loss: Tensor = ForCausalLMLoss(head(hidden), None, size, 1, shift_labels=labels)
    return loss


PATHS = {"ours": ours, "plain": plain}


def peak_bytes(path: str, positions: int) -> int:
    """Return the peak of resident memory of one forward and backward pass, over that before.

    In a process of its own: memory that was freed before is used again, and would count as none.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_peak_bytes, path, positions).result()


def _peak_bytes(path: str, positions: int) -> int:
    torch.set_num_threads(1)
    for warm in PATHS.values():  # what a first call loads is no part of any
        warm(*_inputs(64)).backward()
    head, hidden, labels = _inputs(positions)
    gc.collect()
    # 5 sets the process's peak to what it holds now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    PATHS[path](head, hidden, labels).backward()
    return _status("VmHWM") - before


def largest_difference(positions: int = 64) -> float:
    """Return by how much loss and gradients differ, relative to the plain path's largest value."""
    found = []
    for path in PATHS.values():
        head, hidden, labels = _inputs(positions, every=4)
        loss = path(head, hidden, labels)
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


def memory_row() -> Row:
    """Return megabytes a position: of one slope there is no range."""
    found = {path: slope([peak_bytes(path, n) for n in POSITIONS]) / 1e6 for path in PATHS}
    ratio = found["plain"] / found["ours"]
    name = "memory of a position"
    return Row(name, found["ours"], found["plain"], "MB", ratio, ratio, ratio, GOAL)


def long_row(per_position: float) -> Row:
    """Return the peak at `LONG` positions; the plain path's from its `per_position` megabytes."""
    mine, theirs = peak_bytes("ours", LONG) / 1e6, LONG * per_position
    ratio = theirs / mine
    return Row(f"peak at {LONG} positions", mine, theirs, "MB", ratio, ratio, ratio, GOAL)


def time_rows(pairs: int) -> list[Row]:
    """Return the time of a forward and backward pass, by share of supervised positions."""
    rows = []
    for every, goal in TIME_GOALS.items():
        head, hidden, labels = _inputs(TIMED_POSITIONS, every=every, width=TIMED_WIDTH)

        def run(path: Callable[..., Tensor], inputs: tuple[LogProbHead, Tensor, Tensor]) -> None:
            path(*inputs).backward()
            inputs[0].weight.grad = inputs[1].grad = None

        rows.append(
            compare(
                f"time, {100 // every} % supervised",
                lambda given=(head, hidden, labels): run(ours, given),  # type: ignore[misc]
                lambda given=(head, hidden, labels): run(plain, given),  # type: ignore[misc]
                goal=goal,
                # Ours was seen to take 2.4 to 3.8 s within one run.
                pairs=max(pairs, 9),
                why=WHY,
            )
        )
    return rows


def _inputs(
    positions: int, *, every: int = 1, width: int = WIDTH
) -> tuple[LogProbHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = LogProbHead(width, VOCABULARY, bias=False)
    hidden = torch.randn(positions, width, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (positions,))
    return head, hidden, labels.where(torch.arange(positions) % every == 0, -100)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not tell {name}")


def main() -> int:
    """Run the table."""
    options = parser("Memory and time of the loss over 152,064 ids.")
    options.add_argument("--long", action="store_true", help=f"also {LONG} positions; minutes")
    args = options.parse_args()
    torch.set_num_threads(1)
    gap = largest_difference()
    assert gap < 1e-4, f"loss or gradients differ by {gap}"
    rows = [memory_row()]
    if args.long:
        rows.append(long_row(rows[0].peer))
    rows += time_rows(args.pairs)
    notes = [f"loss and gradients differ by {gap:.1e} of the largest value"]
    return show(rows, ("torch", "transformers", "trl"), notes, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
