"""The one training loop: fetch, forward and backward, vote, update, log, save.

Loss and gradients are sums divided by the supervised tokens of the whole global step, so packing,
accumulation and world size do not change them. Everything particular to a stage is in the step
function it is given; nothing here knows a stage, a modality or a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omni_train.engine import shards
from omni_train.engine.checkpoint import CheckpointWriter, restore_latest
from omni_train.engine.deepspeed import Engine
from omni_train.engine.distributed import gather_json, sum_over_ranks
from omni_train.engine.exit_codes import ExitCode, RunError
from omni_train.engine.faults import Faults
from omni_train.engine.fit_config import FitConfig
from omni_train.engine.hashing import group_hashes
from omni_train.engine.phases import Phases
from omni_train.engine.progress import log_step, report_non_finite
from omni_train.engine.run import Run
from omni_train.engine.spikes import SpikeWatch, rewind, skip_step
from omni_train.engine.stragglers import StragglerWatch
from omni_train.engine.types import Loader, StepItem
from omni_train.engine.vote import Report, Verdict, local_report, verdict_of
from omni_train.engine.watchdog import Watchdog
from omni_train.objectives.types import StepFunction, StepOutput

Every = Sequence[tuple[int, Callable[[Engine, int], bool | None]]]


def fit(
    engine: Engine,
    loader: Loader,
    step: StepFunction,
    cfg: FitConfig,
    run: Run,
    every: Every = (),
) -> None:
    """Train until `cfg.max_steps` global steps are done, from the newest checkpoint if any.

    Args:
        engine: model under DeepSpeed with its groups.
        loader: gives this rank's micro-batches of each global step.
        step: (model, micro-batch) -> StepOutput with the summed loss.
        cfg: length and intervals.
        run: run directory.
        every: (interval, function); the function is called as `fn(engine, step)` on all ranks
            after each step whose number, counted from 1, the interval divides. Where one returns
            True, on all ranks, training ends there.

    Raises:
        RunError: too many non-finite steps in a row (76), a checkpoint could not be written, or
            some rank was asked to stop (75); all have then saved after the same step.
        DataError: the loader counted too many unusable samples.
    """
    keep, milestones = cfg.keep_checkpoints, cfg.milestone_steps
    run.faults = Faults(cfg.fault, run.world)
    phases = Phases(run.faults)
    with (
        run.stop.deferred(),
        Watchdog(cfg.watch, run, phases),
        CheckpointWriter(engine, run, keep=keep, milestone_steps=milestones) as writer,
    ):
        _fit(engine, loader, step, cfg, run, every, writer, phases)


def _fit(
    engine: Engine,
    loader: Loader,
    step: StepFunction,
    cfg: FitConfig,
    run: Run,
    every: Every,
    writer: CheckpointWriter,
    phases: Phases,
) -> None:
    saved = _start(engine, loader, cfg, run)
    skipped, metrics, watch = 0, {}, SpikeWatch(cfg.spikes, run)
    stragglers = StragglerWatch(cfg.watch.slow_ratio, run)
    engine.model.train()
    items = iter(loader.steps()) if engine.step < cfg.max_steps else iter(())
    stopped = False
    while engine.step < cfg.max_steps and not stopped:
        phases.next_step(engine.step + 1)
        with phases.part("data"):
            item = next(items, None)
        if item is None:
            run.event("data_end", step=engine.step)
            break
        if engine.step + 1 in cfg.spikes.skip_steps:
            skip_step(engine, item, run)
            continue
        verdict, lrs = _global_step(engine, item, step, cfg, run, phases)
        metrics = log_step(run, item, verdict, lrs, phases, log_steps=cfg.log_steps)
        watch.see(verdict, item)
        stragglers.see(verdict.own)
        loader.count_bad(verdict.bad_samples, num_samples=verdict.num_samples)
        skipped = 0 if verdict.finite else skipped + 1
        if skipped > cfg.max_skipped_steps:
            reason = f"{skipped} non-finite steps in a row, the last one {engine.step}"
            raise RunError(ExitCode.non_finite, f"{reason}; see the non_finite events for samples")
        stop = verdict.stop if engine.step < cfg.max_steps else ""
        if stop or engine.step % cfg.save_steps == 0:
            with phases.part("checkpoint"):
                saved = writer.save(loader_state=loader.state(), metrics=metrics)
        if stop:
            reason = f"asked to stop by {stop}; saved step {engine.step}"
            raise RunError(ExitCode.preempted, f"{reason}; the same command goes on from there")
        for interval, function in every:
            if engine.step % interval == 0:
                with phases.part("every"):
                    stopped = bool(function(engine, engine.step)) or stopped
                engine.model.train()
    with phases.part("checkpoint"):
        if saved != engine.step:
            writer.save(loader_state=loader.state(), metrics=metrics)
        writer.finish()
    run.event("fit_end", step=engine.step, hashes=group_hashes(engine))


def _start(engine: Engine, loader: Loader, cfg: FitConfig, run: Run) -> int:
    """Restore the newest checkpoint, if any, and record what training starts from."""
    rewind(cfg.spikes, run)
    state = restore_latest(engine, run)
    if state is not None:
        loader.load_state(state["loader"])
        run.event("resume", step=engine.step)
    run.step = engine.step
    run.event(
        "fit_start",
        step=engine.step,
        max_steps=cfg.max_steps,
        trained=[group.name for group in engine.trained],
        activation_checkpointing=engine.checkpointing.name,
        hashes=group_hashes(engine),
    )
    return engine.step


def _global_step(
    engine: Engine,
    item: StepItem,
    step: StepFunction,
    cfg: FitConfig,
    run: Run,
    phases: Phases,
) -> tuple[Verdict, dict[str, float]]:
    """Run all micro-batches of a global step and update if every rank agrees that it may."""
    model, batches = engine.model, item.micro_batches
    num_tokens = sum_over_ranks([sum(batch.num_target_tokens for batch in batches)])[0]
    # DeepSpeed averages over ranks; with this factor that becomes sum / tokens.
    scale = run.world.size / max(num_tokens, 1)
    outputs: list[StepOutput] = []
    for number, batch in enumerate(batches, start=1):
        model.set_gradient_accumulation_boundary(number == len(batches))
        with phases.part("forward"):
            output = step(model, batch.to(run.world.device))
            output.loss = run.faults.poisoned(output.loss, engine.step + 1)
        if output.num_tokens != batch.num_target_tokens:
            counts = f"{output.num_tokens} against {batch.num_target_tokens}"
            raise RunError(ExitCode.bug, f"objective and batch count other tokens: {counts}")
        with phases.part("backward"):
            model.backward(output.loss * scale, scale_wrt_gas=False)
        output.loss = output.loss.detach()
        outputs.append(output)
    with phases.part("vote"):
        report = local_report(engine, outputs, batches, stop=run.stop.name, own=phases.own)
        verdict = verdict_of([Report(**rank) for rank in gather_json(report.as_dict())], num_tokens)
    engine.step += 1
    run.step = engine.step
    with phases.part("update"):
        lrs = engine.set_lr(step=engine.step - 1, max_steps=cfg.max_steps)
        if verdict.finite and num_tokens:
            model.step()
            if not model.was_step_applied():
                raise RunError(ExitCode.bug, f"DeepSpeed refused step {engine.step} after the vote")
        else:
            shards.discard_gradients(model)
    if not verdict.finite:
        report_non_finite(verdict, batches, run, step=engine.step)
    for row in verdict.bad_samples:
        run.ledger(source=row[0], shard=row[1], key=row[2], reason=row[3])
    return verdict, lrs
