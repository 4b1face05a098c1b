"""The benchmarks that have a converter, and how `evaluate` is told to score each.

Names of fields are those that the owners document, and for RefCOCO, MME and EgoSchema those of
lmms-lab's copies; where a set comes in several layouts, the one that is read stands in the
converter's docstring.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipelines.benchmarks import choices, code, labels, music, pictures, questions, speech
from data_pipelines.benchmarks.base import Convert


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Args:
        convert: row to question.
        task: name in the records.
        metric, normalizer: of `tasks.NAME` in `evaluate`; wer of Chinese sets is cer.
        max_new_tokens: longest reply that makes sense.
        quoted: whether a TSV has its long texts in quotes.
    """

    convert: Convert
    task: str
    metric: str
    normalizer: str = "basic"
    max_new_tokens: int = 16
    quoted: bool = False


BENCHMARKS: dict[str, Benchmark] = {
    "librispeech": Benchmark(speech.librispeech, "asr", "wer", "english", 256),
    "common_voice": Benchmark(speech.common_voice, "asr", "wer", "basic", 256),
    "common_voice_zh": Benchmark(speech.common_voice, "asr", "cer", "chinese", 256),
    "fleurs": Benchmark(speech.fleurs, "asr", "wer", "basic", 256),
    "fleurs_zh": Benchmark(speech.fleurs, "asr", "cer", "chinese", 256),
    "voxpopuli": Benchmark(speech.voxpopuli, "asr", "wer", "english", 256),
    "wenetspeech": Benchmark(speech.wenetspeech, "asr", "cer", "chinese", 256),
    "covost2": Benchmark(speech.covost2, "translation", "bleu", "basic", 256),
    "covost2_zh": Benchmark(speech.covost2, "translation", "bleu", "chinese", 256),
    "meld": Benchmark(labels.meld, "emotion", "label"),
    "vocalsound": Benchmark(labels.vocalsound, "sound", "label"),
    "giantsteps": Benchmark(music.giantsteps, "music", "tempo"),
    "musiccaps": Benchmark(music.musiccaps, "caption", "answered", "basic", 256),
    "omnibench": Benchmark(choices.omnibench, "choice", "choice"),
    "mmau": Benchmark(choices.mmau, "choice", "choice"),
    "mmmu": Benchmark(choices.mmmu, "choice", "choice"),
    "mmlu": Benchmark(choices.mmlu, "choice", "choice_likelihood"),
    "mmlu_pro": Benchmark(choices.mmlu_pro, "choice", "choice_likelihood"),
    "mmlu_redux": Benchmark(choices.mmlu_redux, "choice", "choice_likelihood"),
    "gpqa": Benchmark(choices.gpqa, "choice", "choice_likelihood"),
    "mmbench": Benchmark(pictures.mmbench, "choice", "choice", quoted=True),
    "mmmu_pro": Benchmark(pictures.mmmu_pro, "choice", "choice"),
    "muirbench": Benchmark(pictures.muirbench, "choice", "choice"),
    "mmstar": Benchmark(pictures.mmstar, "choice", "exact_match"),
    "realworldqa": Benchmark(pictures.realworldqa, "question", "exact_match"),
    "mme": Benchmark(pictures.mme, "question", "exact_match"),
    "mathvista": Benchmark(pictures.mathvista, "question", "exact_match", "verbatim", 64),
    "mathvision": Benchmark(pictures.mathvision, "question", "exact_match", "verbatim", 64),
    "video_mme": Benchmark(choices.video_mme, "choice", "choice"),
    "mvbench": Benchmark(choices.mvbench, "choice", "choice"),
    "egoschema": Benchmark(choices.egoschema, "choice", "choice"),
    "ai2d": Benchmark(choices.ai2d, "choice", "choice"),
    "chartqa": Benchmark(questions.chartqa, "question", "relaxed_match"),
    "textvqa": Benchmark(questions.textvqa, "question", "vqa"),
    "docvqa": Benchmark(questions.docvqa, "question", "anls", "verbatim", 64),
    "refcoco": Benchmark(questions.refcoco, "grounding", "grounding", "basic", 32),
    "refcoco_plus": Benchmark(questions.refcoco, "grounding", "grounding", "basic", 32),
    "refcoco_g": Benchmark(questions.refcoco, "grounding", "grounding", "basic", 32),
    "voicebench": Benchmark(questions.voicebench, "question", "exact_match", "basic", 64),
    "voicebench_text": Benchmark(questions.voicebench_text, "question", "exact_match", "basic", 64),
    "voicebench_open": Benchmark(questions.voicebench_open, "question", "answered", "basic", 512),
    "gsm8k": Benchmark(questions.gsm8k, "question", "relaxed_match", "basic", 256),
    "math": Benchmark(questions.math, "question", "exact_match", "verbatim", 256),
    "humaneval": Benchmark(code.humaneval, "code", "answered", "basic", 512),
    "mbpp": Benchmark(code.mbpp, "code", "answered", "basic", 512),
}
