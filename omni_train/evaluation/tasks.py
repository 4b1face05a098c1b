"""Scores a model on held-out shards: greedy replies against the last assistant turn.

The batches are fixed by the order of the index and dealt to ranks whole, so a score does not depend
on the number of ranks. Sampling from a ZeRO-3 model is refused by `generate.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError
from omni_train.data.chatml import split_reply
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.source import ShardSet
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import EncodedSample, ProcessingConfig
from omni_train.engine.distributed import gather_json
from omni_train.engine.run import Run, write_text_atomically
from omni_train.evaluation.generate import greedy
from omni_train.evaluation.metrics import METRICS, Metric, Normalizer
from omni_train.models.thinker import ThinkerForTraining


@dataclass(kw_only=True, slots=True)
class EvaluationTask:
    """One score on one set of held-out shards.

    Args:
        path: directory of the shards.
        metric: how replies are scored.
        normalizer: how texts are folded before they are compared.
        max_new_tokens: longest reply.
        batch_samples: prompts decoded together.
        limit: number of samples, from the start of the index; 0 takes all.
    """

    path: str
    metric: Metric
    normalizer: Normalizer = Normalizer.basic
    max_new_tokens: int = 64
    batch_samples: int = 16
    limit: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    key=f"tasks.*.{name}",
                    value=getattr(self, name),
                    rule="must be at least 1",
                    remedy="raise it",
                )


def evaluate_task(
    name: str,
    task: EvaluationTask,
    model: ThinkerForTraining,
    tokenizer: PreTrainedTokenizerFast,
    processing: ProcessingConfig,
    run: Run,
) -> float:
    """Score one task and write every prediction to `predictions-<name>.jsonl`.

    Args:
        name: of the task, in events and files.
        model: a plain replica on this rank's device.
        processing: how media become tokens, as in training.
        run: gives rank, run directory and event log.

    Returns:
        The score, the same on every rank.
    """
    source = ShardSet(name, task.path)
    source.check_tokenizer(tokenizer_hash(tokenizer))
    places = [(s, row) for s, count in enumerate(source.counts) for row in range(count)]
    places = places[: task.limit or None]
    batches = [
        places[i : i + task.batch_samples] for i in range(0, len(places), task.batch_samples)
    ]
    mine: list[tuple[int, list[dict[str, str]]]] = []
    for number in range(run.world.rank, len(batches), run.world.size):
        prompts: list[EncodedSample] = []
        rows: list[dict[str, str]] = []
        for shard, row in batches[number]:
            raw = fetch(source.path_of(shard), source.row(shard, row))
            prompt, reference = split_reply(raw.record["messages"])
            raw.record = {**raw.record, "messages": prompt}
            prompts.append(
                encode(raw, tokenizer, processing, model.spec, add_generation_prompt=True)
            )
            rows.append({"key": raw.row.key, "reference": reference})
        replies = greedy(
            model,
            prompts,
            model.spec,
            max_new_tokens=task.max_new_tokens,
            stop_ids=[model.spec.tokens.im_end],
        )
        for entry, reply in zip(rows, replies, strict=True):
            entry["prediction"] = tokenizer.decode(reply, skip_special_tokens=True)
        mine.append((number, rows))
    # JSON turns the pairs into lists; batch numbers are unique, so rows are never compared.
    dealt = sorted((part for rank in gather_json(mine) for part in rank), key=lambda part: part[0])
    predictions = [entry for _, rows in dealt for entry in rows]
    return _score(name, task, predictions, run)


def _score(name: str, task: EvaluationTask, predictions: list[dict[str, str]], run: Run) -> float:
    value = METRICS[task.metric](
        [entry["reference"] for entry in predictions],
        [entry["prediction"] for entry in predictions],
        task.normalizer,
    )
    if run.is_main:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in predictions)
        write_text_atomically(run.dir / f"predictions-{name}.jsonl", lines)
    run.event(
        "evaluation",
        task=name,
        metric=task.metric.name,
        value=value,
        num_samples=len(predictions),
        # What the score depends on besides the weights and the data.
        normalizer=task.normalizer.name,
        decoding="greedy",
        max_new_tokens=task.max_new_tokens,
    )
    return value
