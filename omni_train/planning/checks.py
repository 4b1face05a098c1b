"""Whether a plan can run, and what about it is unwise: pass, warn or fail, each with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omni_train.planning.setup import sequence_parallel

if TYPE_CHECKING:
    from omni_train.planning.estimate import Plan

# Blocks of FlexAttention, and of its varlen peers, are so long.
ATTENTION_BLOCK = 128
# Tokens per device and micro-step under which ZeRO-3's gathers show on a good fabric.
FEW_TOKENS = 4096
# Beyond so many tokens a step is more than models of these sizes have been trained with.
LARGE_BATCH_TOKENS = 16_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `status` is pass, warn or fail."""

    name: str
    status: str
    detail: str


def check_plan(plan: Plan, values: Mapping[str, Any]) -> list[Finding]:
    """Return what there is to say of a plan's validity."""
    return [
        *_heads(plan, sequence_parallel(values)),
        _batch(plan, values),
        _pack(plan, values),
        _trained(plan),
        _zero(plan),
        _memory(plan),
        _tokens(plan, values),
        _length(plan, values),
        _supply(plan),
        _shards(plan, values),
    ]


def _heads(plan: Plan, sp: int) -> list[Finding]:
    found = []
    for name, (heads, kv) in plan.model.heads.items():
        good = heads % sp == 0 and (kv % sp == 0 or sp % kv == 0)
        text = f"{name}: {heads} query and {kv} key-value heads over {sp} ranks"
        found.append(Finding("sequence parallelism", "pass" if good else "fail", text))
    return found


def _batch(plan: Plan, values: Mapping[str, Any]) -> Finding:
    packs = int(values["data"]["global_batch_packs"])
    groups = plan.setup.devices // plan.setup.sequence_parallel
    idle = -packs % groups
    if packs < groups:
        text = f"{packs} packs a step for {groups} groups of ranks: {groups - packs} have nothing"
        return Finding("global batch", "fail", f"{text}; raise data.global_batch_packs")
    if idle:
        text = (
            f"{packs} packs over {groups} groups of ranks leave {idle} idle in the last micro-step"
        )
        return Finding("global batch", "warn", text)
    text = f"{packs} packs = {groups} groups of ranks x {packs // groups} micro-steps"
    return Finding("global batch", "pass", text)


def _pack(plan: Plan, values: Mapping[str, Any]) -> Finding:
    tokens, sp = int(values["data"]["pack_tokens"]), plan.setup.sequence_parallel
    limit = plan.model.max_positions
    if tokens > limit:
        text = f"{tokens} tokens a pack; the model was made for {limit} positions"
        return Finding("pack length", "warn", f"{text}, which one document may exceed")
    if tokens % (ATTENTION_BLOCK * sp):
        text = f"{tokens} tokens are no multiple of {ATTENTION_BLOCK} x SP {sp}"
        return Finding("pack length", "warn" if tokens % sp == 0 else "fail", text)
    return Finding("pack length", "pass", f"{tokens} tokens, {limit} positions at most")


def _trained(plan: Plan) -> Finding:
    trained = [group.name for group in plan.model.groups if group.trained]
    frozen = [group.name for group in plan.model.groups if not group.trained]
    text = f"trained: {', '.join(trained)}; frozen: {', '.join(frozen) or 'nothing'}"
    return Finding("parameter groups", "pass", text)


def _zero(plan: Plan) -> Finding:
    stage = plan.setup.zero_stage
    text = f"stage {stage} over {plan.setup.devices} devices"
    if plan.model.talker is not None and stage == 3:
        text += "; replies are never sampled on it, but on replicas outside of training"
    return Finding("ZeRO", "pass", text)


def _memory(plan: Plan) -> Finding:
    total, have = plan.memory.total, plan.options.hardware.memory_bytes
    text = f"{total / 1e9:.1f} of {have / 1e9:.0f} GB"
    if not plan.fits:
        return Finding("memory", "fail", f"{text}; first knob: {plan.knob}")
    return Finding("memory", "pass", f"{text}, {(have - total) / 1e9:.1f} GB left")


def _tokens(plan: Plan, values: Mapping[str, Any]) -> Finding:
    step = float(values["data"]["pack_tokens"]) * float(values["data"]["global_batch_packs"])
    if step > LARGE_BATCH_TOKENS:
        text = f"{step:,.0f} tokens a step is large; more devices then need more micro-steps' worth"
        return Finding("batch size", "warn", f"{text}, not a larger batch")
    mine = plan.setup.tokens_per_device
    if plan.setup.zero_stage == 3 and plan.setup.devices > 1 and mine < FEW_TOKENS:
        text = f"{mine:,.0f} tokens per device and micro-step: gathers of weights will dominate"
        return Finding("batch size", "warn", text)
    return Finding("batch size", "pass", f"{step:,.0f} tokens a step")


def _length(plan: Plan, values: Mapping[str, Any]) -> Finding:
    steps, epoch = plan.totals.steps, plan.traffic.epoch_tokens
    if epoch is None:
        return Finding("data", "warn", plan.traffic.notes[0])
    epochs = plan.totals.tokens / epoch
    text = f"{steps:,} steps are {epochs:.2g} epochs of {epoch:,} tokens"
    limited = any(source["max_epochs"] for source in values["data"]["sources"].values())
    many = epochs > 1 and limited
    return Finding("data", "warn" if many else "pass", text)


def _supply(plan: Plan) -> Finding:
    supply = plan.supply
    text = f"{supply.cores_needed:.1f} of {supply.cores} cores a node encode; "
    text += f"{supply.workers} workers a rank"
    per_rank = supply.cpu_s_per_device_s
    if supply.cores_needed > supply.cores:
        return Finding("data supply", "fail", f"{text}: training will wait for data")
    if per_rank > max(supply.workers, 1):
        return Finding("data supply", "warn", f"{text}, {per_rank:.1f} are needed")
    return Finding("data supply", "pass", text)


def _shards(plan: Plan, values: Mapping[str, Any]) -> Finding:
    if not plan.traffic.measured:
        return Finding("shards", "warn", "not looked at")
    # Workers read members by offset, so a shard may serve any number of them.
    count = plan.traffic.num_shards
    return Finding("shards", "pass", f"{count}, read by offset: no rank or worker needs its own")
