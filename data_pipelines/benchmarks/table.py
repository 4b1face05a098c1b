"""The benchmarks that have a converter, and how `evaluate` is told to score each.

Names of fields are those that the owners document; where a set comes in several layouts, the one
that is read stands in the converter's docstring.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipelines.benchmarks import choices, labels, questions, speech
from data_pipelines.benchmarks.base import Convert


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Args:
        convert: row to question.
        task: name in the records.
        metric, normalizer: of `tasks.NAME` in `evaluate`; wer of Chinese sets is cer.
        max_new_tokens: longest reply that makes sense.
    """

    convert: Convert
    task: str
    metric: str
    normalizer: str = "basic"
    max_new_tokens: int = 16


BENCHMARKS: dict[str, Benchmark] = {
    "librispeech": Benchmark(speech.librispeech, "asr", "wer", "english", 256),
    "common_voice": Benchmark(speech.common_voice, "asr", "wer", "basic", 256),
    "common_voice_zh": Benchmark(speech.common_voice, "asr", "cer", "chinese", 256),
    "fleurs": Benchmark(speech.fleurs, "asr", "wer", "basic", 256),
    "fleurs_zh": Benchmark(speech.fleurs, "asr", "cer", "chinese", 256),
    "voxpopuli": Benchmark(speech.voxpopuli, "asr", "wer", "english", 256),
    "covost2": Benchmark(speech.covost2, "translation", "bleu", "basic", 256),
    "covost2_zh": Benchmark(speech.covost2, "translation", "bleu", "chinese", 256),
    "meld": Benchmark(labels.meld, "emotion", "label"),
    "vocalsound": Benchmark(labels.vocalsound, "sound", "label"),
    "omnibench": Benchmark(choices.omnibench, "choice", "choice"),
    "mmau": Benchmark(choices.mmau, "choice", "choice"),
    "mmmu": Benchmark(choices.mmmu, "choice", "choice"),
    "mmlu": Benchmark(choices.mmlu, "choice", "choice_likelihood"),
    "mmlu_pro": Benchmark(choices.mmlu_pro, "choice", "choice_likelihood"),
    "video_mme": Benchmark(choices.video_mme, "choice", "choice"),
    "mvbench": Benchmark(choices.mvbench, "choice", "choice"),
    "ai2d": Benchmark(choices.ai2d, "choice", "choice"),
    "chartqa": Benchmark(questions.chartqa, "question", "relaxed_match"),
    "textvqa": Benchmark(questions.textvqa, "question", "exact_match"),
    "docvqa": Benchmark(questions.docvqa, "question", "exact_match"),
    "refcoco": Benchmark(questions.refcoco, "grounding", "grounding", "basic", 32),
    "voicebench": Benchmark(questions.voicebench, "question", "exact_match", "basic", 64),
    "voicebench_text": Benchmark(questions.voicebench_text, "question", "exact_match", "basic", 64),
    "gsm8k": Benchmark(questions.gsm8k, "question", "relaxed_match", "basic", 256),
}
