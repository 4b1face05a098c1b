"""Names that become files and folders, and what an evaluation's tasks may be called."""

from __future__ import annotations

from typing import Any

import pytest

from omni_train.config.errors import ConfigError
from omni_train.config.names import check_name
from omni_train.engine.run import RunConfig
from omni_train.evaluation.metrics import Metric
from omni_train.evaluation.spoken import SpeechTask
from omni_train.evaluation.spoken_every import SpokenConfig
from omni_train.evaluation.tasks import EvaluationTask
from omni_train.models.config import ModelConfig
from omni_train.speech.asr import AsrConfig, AsrKind
from omni_train.speech.codec import CodecConfig
from omni_train.speech.sampling import SamplingConfig
from recipes.evaluate import EvaluateConfig, validate

HOSTILE = ("", ".", "..", "../up", "a/b", "a\\b", ".hidden", "-rf", "a\n", "a\0b", "a b", "x" * 64)


def text_task(**changes: Any) -> EvaluationTask:
    return EvaluationTask(path="shards", metric=Metric.wer, **changes)


def spoken_task() -> SpeechTask:
    return SpeechTask(
        path="shards",
        codec=CodecConfig(path="codec"),
        asr=AsrConfig(kind=AsrKind.whisper, path="asr"),
        sampling=SamplingConfig(max_codes=9),
    )


def evaluation(**tasks: Any) -> EvaluateConfig:
    model = ModelConfig(tokenizer="tokenizer", init_from="run")
    return EvaluateConfig(run=RunConfig(dir="run"), model=model, **tasks)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_no_file_name_is_refused_with_its_key(name: str) -> None:
    given = {"tasks": {name: text_task()}, "speech": {name: spoken_task()}}
    for key, tasks in given.items():
        with pytest.raises(ConfigError, match="a name is 1 to 63 letters") as found:
            evaluation(**{key: tasks})
        assert (found.value.key, found.value.value) == (key, name)
    with pytest.raises(ConfigError, match="a name is 1 to 63 letters"):
        SpokenConfig(tasks={name: spoken_task()})


def test_names_as_they_are_used_pass() -> None:
    for name in ("asr", "held-out_2", "mmlu.5shot", "7b", "x" * 63):
        check_name(name, key="tasks")
        evaluation(tasks={name: text_task()}, speech={f"a{name[:-1]}": spoken_task()})


def test_two_tasks_do_not_write_one_file() -> None:
    both = evaluation(tasks={"a": text_task(), "b": text_task()}, speech={"a": spoken_task()})
    with pytest.raises(ConfigError, match="both would write") as found:
        validate(both, 1)
    assert found.value.value == ["a"]


@pytest.mark.parametrize("field", ["limit", "keep_samples", "max_new_tokens", "batch_samples"])
def test_counts_below_their_lowest_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="must be at least") as found:
        text_task(**{field: -1})
    assert found.value.key == f"tasks.*.{field}"
