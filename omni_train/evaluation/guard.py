"""Whether a Talker still speaks as well after its Thinker was trained further.

The Talker reads the Thinker's states; a Thinker that changes may spoil it without a word (issue 344
of QwenLM/Qwen2.5-Omni). So the same texts are spoken with the Thinker before and after, by the same
Talker, with the same noise, and both word error rates are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from omni_train.data.types import ProcessingConfig
from omni_train.engine.deepspeed import Precision
from omni_train.engine.run import Run
from omni_train.evaluation.spoken import SpeechTask, evaluate_speech
from omni_train.models.config import ModelConfig
from omni_train.models.talker_build import with_talker_from
from omni_train.speech.speaking import load_replicas


def speak_before(
    tasks: Mapping[str, SpeechTask],
    config: ModelConfig,
    before: str,
    tokenizer: PreTrainedTokenizerFast,
    processing: ProcessingConfig,
    precision: Precision,
    run: Run,
) -> tuple[ModelConfig, dict[str, dict[str, float]]]:
    """Score the spoken tasks with the Thinker as it was, under the names `<task>_before`.

    Args:
        tasks: spoken tasks by name.
        config: of the model that is evaluated; all that counts of it is its Thinker.
        before: run or directory with a Talker and the Thinker that it goes with.
        tokenizer, processing, precision, run: as in `evaluate_speech`.

    Returns:
        The settings of the new Thinker with that Talker, and the figures by task.
    """
    old = replace(config, init_from=before, init_groups={})
    replicas = load_replicas(old, tokenizer, precision, run.world.device)
    figures = {
        name: evaluate_speech(
            name, task, replicas, tokenizer, processing, run, saved_as=f"{name}_before"
        )
        for name, task in tasks.items()
    }
    return with_talker_from(config, before), figures


def report_change(
    name: str, before: Mapping[str, float], after: Mapping[str, float], run: Run
) -> float:
    """Write a `talker_guard` event; return by how much the word error rate rose.

    Args:
        name: of the task.
        before, after: its figures.
    """
    rise = after["wer"] - before["wer"]
    run.event(
        "talker_guard", task=name, wer_before=before["wer"], wer_after=after["wer"], rise=rise
    )
    run.say(
        f"{name}: the Talker's WER was {before['wer']:.3f} with the Thinker before, is "
        f"{after['wer']:.3f} with this one"
    )
    return rise
