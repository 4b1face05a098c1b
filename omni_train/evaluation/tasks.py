"""Scores a model on held-out shards: greedy replies, or the most probable of given ones.

    shards -> prompt -> reply -> Answer -> scoring.py -> event, predictions-<task>.jsonl
    first samples with their media -> kept.py -> event, samples/<task>/

The reference is the last assistant turn, or `meta.references` where there are several; a closed
question has `meta.options`, and `meta.group` names a part of the set that gets a score of its own.
The batches are fixed by the order of the index and dealt to ranks whole, so neither a reply nor a
score depends on the number of ranks. Sampling from a ZeRO-3 model is refused by `generate.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import DataError, check_at_least
from omni_train.data.chatml import split_reply
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.source import ShardSet
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import ProcessingConfig, RawSample
from omni_train.engine.distributed import gather_json
from omni_train.engine.run import Run, write_text_atomically
from omni_train.evaluation.generate import greedy
from omni_train.evaluation.kept import keep_sample
from omni_train.evaluation.kinds.base import Answer
from omni_train.evaluation.kinds.choice import letters_of
from omni_train.evaluation.likelihood import reply_logprobs
from omni_train.evaluation.metrics import Metric, Normalizer
from omni_train.evaluation.scoring import KINDS, Scored, score
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
        keep_samples: from the start of the index, whose media are kept to be looked at.
        system: replaces every dialogue's own system text; empty leaves it.
        prompt: replaces the text beside the media of the last user turn; empty leaves it.
    """

    path: str
    metric: Metric
    normalizer: Normalizer = Normalizer.basic
    max_new_tokens: int = 64
    batch_samples: int = 16
    limit: int = 0
    keep_samples: int = 8
    system: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        check_at_least(self, "tasks.*", max_new_tokens=1, batch_samples=1)
        check_at_least(
            self,
            "tasks.*",
            limit=0,
            keep_samples=0,
            remedy="0 takes all samples, and keeps none",
        )


@dataclass(slots=True)
class _Question:
    """A prompt, and what is known of its answer."""

    raw: RawSample
    answer: Answer


def evaluate_task(
    name: str,
    task: EvaluationTask,
    model: ThinkerForTraining,
    tokenizer: PreTrainedTokenizerFast,
    processing: ProcessingConfig,
    run: Run,
) -> Scored:
    """Score one task and write every prediction to `predictions-<name>.jsonl`.

    Args:
        name: of the task, in events and files.
        model: a plain replica on this rank's device.
        processing: how media become tokens, as in training.
        run: gives rank, run directory and event log.

    Returns:
        The scores, the same on every rank.

    Raises:
        DataError: with the sample's key, where it cannot be asked or scored.
    """
    source = ShardSet(name, task.path)
    source.check_tokenizer(tokenizer_hash(tokenizer))
    places = [(s, row) for s, count in enumerate(source.counts) for row in range(count)]
    places = places[: task.limit or None]
    size = task.batch_samples
    batches = [places[i : i + size] for i in range(0, len(places), size)]
    mine: list[tuple[int, list[dict[str, Any]]]] = []
    for number in range(run.world.rank, len(batches), run.world.size):
        questions = [_question(source, place, task) for place in batches[number]]
        replies = _replies(questions, task, model, tokenizer, processing)
        rows = [
            {**asdict(q.answer), "prediction": reply, "prompt_hash": _hash(q.raw.record)}
            for q, reply in zip(questions, replies, strict=True)
        ]
        for at, question in enumerate(questions[: max(0, task.keep_samples - number * size)]):
            rows[at]["kept"] = keep_sample(run.dir, name, number * size + at, question.raw)
        mine.append((number, rows))
    # JSON turns the pairs into lists; batch numbers are unique, so rows are never compared.
    dealt = sorted((part for rank in gather_json(mine) for part in rank), key=lambda part: part[0])
    return _finish(name, task, [entry for _, rows in dealt for entry in rows], run)


def _question(source: ShardSet, place: tuple[int, int], task: EvaluationTask) -> _Question:
    shard, row = place
    raw = fetch(source.path_of(shard), source.row(shard, row))
    key = raw.row.key
    try:
        prompt, reference = split_reply(raw.record["messages"])
        references, options, group = _facts(raw.record.get("meta"), reference)
    except DataError as error:
        raise error.at(shard=source.path_of(shard), key=key) from error
    # Weights of turns belong to training.
    turns = [{name: turn[name] for name in turn if name != "weight"} for turn in prompt]
    raw.record = {**raw.record, "messages": turns}
    if task.system:
        rest = [turn for turn in raw.record["messages"] if turn["role"] != "system"]
        raw.record["messages"] = [{"role": "system", "content": task.system}, *rest]
    if task.prompt:
        raw.record["messages"][-1] = _asked(raw.record["messages"][-1], task.prompt)
    return _Question(raw, Answer(key, references, "", options, group))


def _facts(meta: Any, reference: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Right answers, options and group of a question; `reference` is its last turn."""
    known = meta if isinstance(meta, Mapping) else {}
    lists = [known.get("references") or [reference], known.get("options") or []]
    for found in lists:
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise DataError("bad_meta", f"references and options are lists of texts: {found!r}")
    return tuple(lists[0]), tuple(lists[1]), str(known.get("group", ""))


def _asked(turn: dict[str, Any], prompt: str) -> dict[str, Any]:
    """The last user turn with its media, and another text behind them."""
    content = turn["content"] if isinstance(turn["content"], list) else []
    media = [item for item in content if item["type"] != "text"]
    return {**turn, "content": [*media, {"type": "text", "text": prompt}]}


def _replies(
    questions: list[_Question],
    task: EvaluationTask,
    model: ThinkerForTraining,
    tokenizer: PreTrainedTokenizerFast,
    processing: ProcessingConfig,
) -> list[str]:
    if KINDS[task.metric].likelihood:
        chosen = []
        for question in questions:
            letters = letters_of(question.answer.options, question.answer.key)
            sums = reply_logprobs(model, question.raw, letters, tokenizer, processing)
            chosen.append(letters[sums.index(max(sums))])
        return chosen
    prompts = [
        encode(q.raw, tokenizer, processing, model.spec, add_generation_prompt=True)
        for q in questions
    ]
    replies = greedy(
        model,
        prompts,
        model.spec,
        max_new_tokens=task.max_new_tokens,
        stop_ids=[model.spec.tokens.im_end],
    )
    return [tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]


def _hash(record: Mapping[str, Any]) -> str:
    text = json.dumps(record["messages"], sort_keys=True, ensure_ascii=False)
    return str(xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass")))


def _finish(name: str, task: EvaluationTask, rows: list[dict[str, Any]], run: Run) -> Scored:
    # Tuples came back from the other ranks as lists.
    answers = [
        Answer(
            key=row["key"],
            references=tuple(row["references"]),
            prediction=row["prediction"],
            options=tuple(row["options"]),
            group=row["group"],
        )
        for row in rows
    ]
    scored = score(answers, task.metric, task.normalizer)
    identity = identity_of(task, [row.pop("prompt_hash") for row in rows])
    for row, value in zip(rows, scored.each, strict=True):
        row |= {"reference": row["references"][0], "score": value}
        if kept := row.pop("kept", None):
            said = {key: row[key] for key in ("key", "reference", "prediction", "score")}
            run.event("sample", task=name, **said, **kept)
    if run.is_main:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text_atomically(run.dir / f"predictions-{name}.jsonl", lines)
    run.event(
        "evaluation",
        task=name,
        metric=task.metric.name,
        **asdict(scored.whole),
        groups={group: asdict(one) for group, one in scored.groups.items()},
        **identity,
    )
    return scored


def identity_of(task: EvaluationTask, prompt_hashes: list[str]) -> dict[str, Any]:
    """Return what a score depends on besides the weights: two scores compare where this is equal.

    Args:
        task: settings.
        prompt_hashes: of every prompt as it was asked, system text and wording included.
    """
    prompts = xxhash.xxh3_64_hexdigest("".join(prompt_hashes).encode())
    likelihood = KINDS[task.metric].likelihood
    return {
        "normalizer": task.normalizer.name,
        "decoding": "likelihood" if likelihood else "greedy",
        "repetition_penalty": 1.0,
        "max_new_tokens": 0 if likelihood else task.max_new_tokens,
        "system": task.system,
        "prompt": task.prompt,
        "prompts": str(prompts),
    }
