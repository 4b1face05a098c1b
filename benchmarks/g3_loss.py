"""G3: the loss of 8,192 positions of width 3,584 over 152,064 ids, forward and backward.

Its FLOPs are 8 * positions * width * ids, since the logits are made twice; held against a product
of 8192^3, and its memory against a gigabyte over hidden states and gradients. The peer builds all
logits, in fp32.
"""

from __future__ import annotations

import torch

from benchmarks import gpu
from benchmarks.report import Row, compare
from omni_train.models.thinker import LogProbHead

LEAST_RATE, MOST_GB = 0.70, 1.0


def measure(place: gpu.Place, pairs: int) -> tuple[list[Row], list[str]]:
    """Return the rows."""
    count, width, ids = place.pick((8192, 3584, 152_064), (32, 16, 500))
    head = gpu.build(place, lambda: LogProbHead(width, ids, bias=False))
    hidden = torch.randn(count, width, device=place.device, dtype=place.dtype, requires_grad=True)
    targets = torch.randint(0, ids, (count,), device=place.device)

    def ours() -> None:
        (-head(hidden, targets).mean()).backward()

    def plain() -> None:
        torch.nn.functional.cross_entropy(head(hidden).float(), targets).backward()

    found = []
    for run in (ours, plain):
        gpu.clear(head, hidden)
        run()
        assert hidden.grad is not None
        found.append(hidden.grad.float())
    gap = float((found[0] - found[1]).abs().max() / found[1].abs().max())
    assert gap < place.pick(0.05, 1e-4), f"gradients differ by {gap}"
    ceiling = gpu.matmul_flops(place)
    timed = gpu.median_s(place, ours, pairs)
    title = "share of the ceiling"
    rows = [gpu.rate_row(title, 8.0 * count * width * ids, timed, ceiling, LEAST_RATE)]
    # Gradients are there already, so that only what comes and goes is counted.
    extra = [gpu.peak_bytes(place, run) / 1e9 for run in (ours, plain)]
    rows.append(gpu.limit_row("memory that comes and goes", extra[0], MOST_GB, "GB"))
    ratio = extra[1] / extra[0]
    rows.append(Row("the same, peer", extra[0], extra[1], "GB", ratio, ratio, ratio, 0.0))
    rows.append(
        compare(
            "time, peer with whole logits",
            lambda: gpu.seconds(place, ours),
            lambda: gpu.seconds(place, plain),
            goal=0.0,
            pairs=pairs,
        )
    )
    return rows, [f"gradients differ by {gap:.1e} of the largest"]


if __name__ == "__main__":
    gpu.run_main("The loss over 152,064 ids.", measure)
