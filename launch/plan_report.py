"""The plan as text: what decides first, then memory, time, the whole run, in tables.

Fits 80 columns and uses no more than it needs of a wider terminal.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omni_train.planning.estimate import MFU_DEFINITION, Plan

if TYPE_CHECKING:
    from launch.plan import Refit

_BAR = 24
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
_GB = 1e9


def launch_command(plan: Plan, overrides: list[str]) -> str:
    """Return the command that starts what was planned, on one node or for each of several."""
    words = " ".join(shlex.quote(word) for word in overrides)
    node = plan.options.hardware.devices_per_node
    devices = plan.options.devices
    if devices <= node:
        return f"omni-train train {plan.recipe} {words} --ranks {devices}".replace("  ", " ")
    nodes = -(-devices // node)
    torchrun = f"torchrun --nnodes={nodes} --nproc-per-node={node} --rdzv-backend=c10d"
    return f"{torchrun} --rdzv-endpoint=HOST:29500 -m recipes.{plan.recipe} {words}".rstrip()


def print_plan(
    plan: Plan,
    *,
    filled: list[str],
    refit: Refit | None,
    command: str,
    console: Console | None = None,
) -> None:
    """Print a plan.

    Args:
        plan: what was estimated.
        filled: settings that were filled in.
        refit: what a finished run said, if one was asked.
        command: that starts the run.
        console: where to; the default is the terminal.
    """
    out = console or Console(highlight=False)
    _headline(plan, filled, out)
    _checks(plan, out)
    _parameters(plan, out)
    _memory(plan, out)
    _time(plan, out)
    _whole_run(plan, out)
    if refit is not None:
        _refit(refit, out)
    out.print(Text("launch", style="bold"))
    out.print(Text(f"  {command}"), soft_wrap=True)
    if filled:
        out.print(f"  with values of your own for {', '.join(filled)}")


def _headline(plan: Plan, filled: list[str], out: Console) -> None:
    hardware = plan.options.hardware
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    memory = f"{plan.memory.total / _GB:.1f} of {hardware.memory_bytes / _GB:.0f} GB"
    out.print(Text(f"{plan.recipe} on {plan.options.devices} x {hardware.name}", style="bold"))
    out.print(
        f"{verdict}, {memory}; {plan.tokens_per_s:,.0f} tokens/s per device, MFU {plan.mfu:.1%}; "
        f"{_duration(plan.totals.hours)} for {_count(plan.totals.tokens)} tokens"
    )
    if not plan.fits:
        out.print(Text(f"first knob: {plan.knob}", style="bold red"))
    if filled:
        out.print(f"filled in, as a plan does not need it: {', '.join(filled)}")
    for note in plan.traffic.notes:
        out.print(note)
    out.print()


def _checks(plan: Plan, out: Console) -> None:
    table = _table("checks")
    table.add_column("")
    table.add_column("", overflow="fold")
    for finding in plan.findings:
        status = Text(finding.status, style=_COLOURS[finding.status])
        table.add_row(finding.name, status, Text(finding.detail))
    _print(table, out)


def _parameters(plan: Plan, out: Console) -> None:
    table = _table("parameters")
    table.add_column("number", justify="right")
    table.add_column("")
    for group in plan.model.groups:
        table.add_row(group.name, f"{group.parameters:,}", "trained" if group.trained else "frozen")
    all_of_them, trained = plan.model.parameters, plan.model.trained_parameters
    table.add_row("all", f"{all_of_them:,}", f"{trained:,} trained", style="bold")
    _print(table, out)


def _memory(plan: Plan, out: Console) -> None:
    setup = plan.setup
    meaning = {
        "static": f"weights, gradients, moments; ZeRO {setup.zero_stage}",
        "gathered": "live and prefetched weights, largest tensor",
        "kept": f"activations, {setup.recompute.value} checkpointing",
        "working": "the layer being run",
        "logits": "fused" if setup.fused_loss else "built whole",
        "encoders": "fullest pack" if plan.traffic.measured else "a pack of media alone",
        "rest": "CUDA, NCCL, fragments; one measured step replaces it",
    }
    if plan.options.hardware.rest_bytes is not None:
        meaning["rest"] = "interpreter and libraries; one measured step replaces it"
    table = _table("memory per device")
    table.add_column("GB", justify="right")
    table.add_column("")
    table.add_column("", overflow="fold")
    total = plan.options.hardware.memory_bytes
    for name, value in plan.memory.parts.items():
        table.add_row(name, f"{value / _GB:.2f}", _bar(value / total), meaning[name])
    margin = total - plan.memory.total
    table.add_row("free", f"{margin / _GB:.2f}", _bar(margin / total), "")
    if plan.memory.host:
        table.add_row("host, per node", f"{plan.memory.host / _GB:.1f}", "", "kept inputs")
    _print(table, out)


def _time(plan: Plan, out: Console) -> None:
    step, traffic, supply = plan.step, plan.traffic, plan.supply
    rows = [
        ("matrix products", step.matmul, "recomputation included"),
        ("attention", step.attention, f"documents, {traffic.fill:.1%} of a pack filled"),
        ("encoders", step.encoders, _shares(traffic.shares)),
        ("exposed gathers", step.exposed, f"of {step.gathers:.3f} s of communication"),
        ("exchange", step.exchange, f"sequence parallelism {plan.setup.sequence_parallel}"),
        ("waiting", step.waiting, f"imbalance {traffic.imbalance:.3f}"),
    ]
    table = _table("seconds per step")
    table.add_column("s", justify="right")
    table.add_column("")
    table.add_column("", overflow="fold")
    for name, seconds, note in rows:
        table.add_row(name, f"{seconds:.3f}", _bar(seconds / step.total), note)
    micro = f"{plan.setup.micro_steps} micro-steps, {plan.setup.tokens_per_device:,.0f} tokens each"
    table.add_row("step", f"{step.total:.3f}", "", micro, style="bold")
    _print(table, out)
    out.print(
        f"data: {supply.cpu_s_per_device_s:.2f} CPU s per device s, {supply.cores_needed:.1f} of "
        f"{supply.cores} cores of a node"
    )
    out.print(f"MFU: {MFU_DEFINITION}", style="dim")
    out.print()


def _whole_run(plan: Plan, out: Console) -> None:
    totals, fate, options = plan.totals, plan.reliability, plan.options
    modalities = ", ".join(f"{n} {_count(t)}" for n, t in totals.by_modality.items() if t >= 0.5)
    cost = "" if totals.cost is None else f", {totals.cost:,.0f} at {options.price:g} an hour"
    saved = (
        f"{_bytes(totals.checkpoint_bytes)} each, {_bytes(totals.frozen_bytes)} frozen once; "
        f"stops training for {totals.save_s:.1f} s; export {_bytes(totals.export_bytes)}"
    )
    failures = (
        f"{fate.interruptions:.2g} expected; one failure in {_duration(fate.mtbf_hours)} "
        f"(a device in {options.mtbf_device_hours:,.0f} h)"
    )
    interval = (
        f"{_duration(fate.daly_s / 3600)} = {max(1, round(fate.daly_s / plan.step.total)):,} "
        f"steps (Daly; Young {_duration(fate.young_s / 3600)}); failures and saves cost "
        f"{_duration(fate.lost_hours)} in all"
    )
    rows = [
        ("steps", f"{totals.steps:,} of {_count(totals.tokens / totals.steps)} tokens"),
        ("tokens", f"{_count(totals.tokens)}: {modalities}"),
        ("time", f"{_duration(totals.hours)}, {totals.device_hours:,.1f} device hours{cost}"),
        ("checkpoint", saved),
        ("interruptions", failures),
        ("save every", interval),
    ]
    table = Table(show_header=False, show_edge=False, pad_edge=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    out.print(Text("whole run", style="bold"))
    _print(table, out)


def _refit(refit: Refit, out: Console) -> None:
    table = _table(f"refit by {refit.run}")
    table.add_column("predicted", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("measured / predicted", justify="right")
    for name, (predicted, measured), unit in (
        ("seconds per step", refit.step_s, 1.0),
        ("peak GB", refit.peak_bytes, _GB),
    ):
        ratio = f"{measured / predicted:.3f}"
        table.add_row(name, f"{predicted / unit:.3f}", f"{measured / unit:.3f}", ratio)
    _print(table, out)
    out.print(f"{refit.steps} steps of {refit.stage}; above is corrected by both")
    out.print()


def _table(title: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    table.add_column(title, no_wrap=True)
    return table


def _print(table: Table, out: Console) -> None:
    out.print(table)
    out.print()


def _bar(share: float) -> str:
    return "#" * round(_BAR * max(0.0, min(1.0, share)))


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in _known(shares)) + " of the tokens"


def _known(shares: dict[str, float]) -> Iterable[tuple[str, float]]:
    return ((name, share) for name, share in shares.items() if share > 0)


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    return f"{number / _GB:,.1f} GB" if number >= _GB / 10 else f"{number / 1e6:,.1f} MB"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.1f} s"
