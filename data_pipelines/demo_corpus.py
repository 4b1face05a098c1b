"""The demo corpus: real media of a small world, made on the spot, the same for the same seed.

    <out>/train/<subset>/     shard-*.tar, shard-*.parquet, manifest.json
    <out>/heldout/<subset>/   the same, with content that never occurs in training
    <out>/tokenizer/          byte-level BPE, trained on the training text
    <out>/corpus.json         seed, voices with their word error rates, counts, hours, seconds

Subsets are planned in demo_tasks.py, demo_dialogue.py and demo_speech.py; the split is
demo_content.py's. The directory appears when it is complete; a finished one with the same
settings is reused.

    python -m data_pipelines.demo_corpus --out runs/demo/corpus --seed 0
"""

# Worker processes import this module again when it is the main program. What needs torch is
# therefore imported where it is used, so that they start at once.
from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from data_pipelines.demo_content import MAX_WORDS, VOCABULARY, Split
from data_pipelines.demo_dialogue import plan_dialogue, plan_question
from data_pipelines.demo_render import measure_voice, render_media
from data_pipelines.demo_speech import plan_speaker, plan_speech, with_errors
from data_pipelines.demo_tasks import (
    Recipe,
    SamplePlan,
    plan_asr,
    plan_av,
    plan_caption,
    plan_text,
    texts_of,
)
from omni_train.config.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_pipelines.shards import Sample

CORPUS_VERSION = 4
CORPUS_FILE = "corpus.json"
VOICES = (
    *("en-us", "en-us+m1", "en-us+f2", "en-us+klatt", "en-us+m3", "en-gb"),
    # Known to be hard to understand; measured all the same.
    *("en-us+f3", "en-us+m4"),
)
PLANNERS: dict[str, Callable[[Recipe], Iterator[SamplePlan]]] = {
    "text": plan_text,
    "asr": plan_asr,
    "caption": plan_caption,
    "av": plan_av,
    "dialogue": plan_dialogue,
    "question": plan_question,
    "speech": plan_speech,
    "speaker": plan_speaker,
}
# Made from the training side of `speech`.
NOISY = "speech_noisy"
# What shapes the bytes of the corpus besides this code.
_PACKAGES = ("av", "espeakng-loader", "pillow", "pocketsphinx", "soundfile", "soxr", "tokenizers")
_MICROSECONDS_PER_HOUR = 3_600_000_000


@dataclass(kw_only=True, slots=True)
class SubsetConfig:
    """Samples of one subset."""

    train: int
    heldout: int

    def __post_init__(self) -> None:
        if self.train < 1 or self.heldout < 1:
            raise ConfigError(
                key="demo_corpus.subsets",
                value=(self.train, self.heldout),
                rule="each side of a subset has at least one sample",
                remedy="use 1 or more",
            )


def _default_subsets() -> dict[str, SubsetConfig]:
    return {
        "text": SubsetConfig(train=3000, heldout=200),
        "asr": SubsetConfig(train=4000, heldout=120),
        "caption": SubsetConfig(train=4000, heldout=120),
        "av": SubsetConfig(train=1500, heldout=96),
        "dialogue": SubsetConfig(train=1500, heldout=120),
        "question": SubsetConfig(train=1000, heldout=120),
        "speech": SubsetConfig(train=4000, heldout=120),
        "speaker": SubsetConfig(train=100, heldout=120),
    }


def _quick_subsets() -> dict[str, SubsetConfig]:
    return {
        "text": SubsetConfig(train=240, heldout=24),
        "asr": SubsetConfig(train=96, heldout=16),
        "caption": SubsetConfig(train=96, heldout=16),
        "av": SubsetConfig(train=24, heldout=24),
        "dialogue": SubsetConfig(train=24, heldout=12),
        "question": SubsetConfig(train=24, heldout=8),
        "speech": SubsetConfig(train=48, heldout=8),
        "speaker": SubsetConfig(train=16, heldout=8),
    }


@dataclass(kw_only=True, slots=True)
class DemoCorpusConfig:
    """Settings of the demo corpus.

    Args:
        out_dir: directory that is made, or reused where it holds the same corpus.
        seed: of everything in it, the split included.
        subsets: samples by subset: text, asr, caption, av, dialogue, question, speech, speaker.
        voices: espeak-ng voices that are measured.
        max_voice_wer: voices with a higher word error rate on raw speech are left out.
        voice_check_utterances: utterances of 1 to 3 words on which each voice is measured.
        samples_per_shard: the last shard of a set may hold fewer.
        vocab_size: largest number of ids of the tokenizer.
        num_workers: processes that render; 0 renders in this one. Changes no byte.
    """

    out_dir: str
    seed: int = 0
    subsets: dict[str, SubsetConfig] = field(default_factory=_default_subsets)
    voices: list[str] = field(default_factory=lambda: list(VOICES))
    max_voice_wer: float = 0.05
    voice_check_utterances: int = 24
    samples_per_shard: int = 256
    vocab_size: int = 640
    num_workers: int = 2

    def __post_init__(self) -> None:
        if set(self.subsets) != set(PLANNERS):
            raise ConfigError(
                key="demo_corpus.subsets",
                value=sorted(self.subsets),
                rule=f"the subsets are {', '.join(PLANNERS)}",
                remedy="give a size for each of them",
            )
        if not self.voices or len(set(self.voices)) != len(self.voices):
            raise ConfigError(
                key="demo_corpus.voices",
                value=self.voices,
                rule="at least one voice, each once",
                remedy="leave the setting out for the default voices",
            )
        if not 0 <= self.max_voice_wer < 1:
            raise ConfigError(
                key="demo_corpus.max_voice_wer",
                value=self.max_voice_wer,
                rule="a word error rate from 0 to 1",
                remedy="0.05 keeps the voices that are understood",
            )


def quick_config(out_dir: str, *, seed: int = 0) -> DemoCorpusConfig:
    """Settings of a small corpus that has every kind of sample; for checks, not for learning."""
    return DemoCorpusConfig(out_dir=out_dir, seed=seed, subsets=_quick_subsets())


def build_demo_corpus(
    config: DemoCorpusConfig, *, report: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Make the corpus, or reuse a finished one of the same settings.

    Args:
        config: settings.
        report: is called with one line per finished part.

    Returns:
        The content of `corpus.json`: `seed`, `config_hash`, `versions`, `vocabulary`,
        `voices` {name: {wer, kept}}, `subsets` {name: {train, heldout, hours}}, `seconds`.

    Raises:
        ConfigError: no voice is understood well enough, or `out_dir` holds something else.
    """
    say = report or (lambda line: None)
    out_dir = Path(config.out_dir)
    digest = _config_hash(config)
    if (finished := _finished(out_dir, digest)) is not None:
        say(f"reused {out_dir}")
        return finished
    started = time.monotonic()
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _workers(config.num_workers) as pool:
        voices = _measure_voices(config, pool)
        say("voices: " + ", ".join(f"{name} {voice['wer']:.3f}" for name, voice in voices.items()))
        kept = tuple(name for name, voice in voices.items() if voice["kept"])
        subsets = _write_subsets(config, partial, kept, pool, say)
    summary = {
        "seed": config.seed,
        "config_hash": digest,
        "versions": {name: version(name) for name in _PACKAGES},
        "vocabulary": list(VOCABULARY),
        "voices": voices,
        "subsets": subsets,
        "seconds": round(time.monotonic() - started, 1),
    }
    text = json.dumps(summary, indent=2) + "\n"
    (partial / CORPUS_FILE).write_text(text, encoding="utf-8")
    if out_dir.exists():
        shutil.rmtree(out_dir)
    partial.replace(out_dir)
    return summary


def _config_hash(config: DemoCorpusConfig) -> str:
    """Hash of all that decides the corpus's bytes."""
    settings = asdict(config)
    del settings["out_dir"], settings["num_workers"]
    settings["corpus_version"] = CORPUS_VERSION
    settings["packages"] = {name: version(name) for name in _PACKAGES}
    return str(xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode()))


def _finished(out_dir: Path, digest: str) -> dict[str, Any] | None:
    """Summary of a finished corpus of these settings; None where it must be made."""
    from omni_train.data.index import index_path, read_manifest

    if not out_dir.exists() or not any(out_dir.iterdir()):
        return None
    try:
        summary = json.loads((out_dir / CORPUS_FILE).read_bytes())
        digest_found = summary["config_hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            key="demo_corpus.out_dir",
            value=str(out_dir),
            rule=f"a directory with other content is not replaced (no readable {CORPUS_FILE})",
            remedy="choose another directory, or remove this one",
        ) from error
    if digest_found != digest or not (out_dir / "tokenizer" / "tokenizer.json").is_file():
        return None
    try:
        for name in summary["subsets"]:
            for split in _sides(name):
                root = out_dir / split.name / name
                for shard in read_manifest(root).shards:
                    path = root / shard.name
                    if path.stat().st_size != shard.bytes or not index_path(path).is_file():
                        return None
    except (DataError, OSError):
        return None
    return dict(summary)


def _sides(subset: str) -> tuple[Split, ...]:
    """Sides that a subset has."""
    return (Split.train,) if subset == NOISY else tuple(Split)


def _workers(num_workers: int) -> AbstractContextManager[Executor | None]:
    """Worker processes, started afresh: a fork would copy whatever threads the caller has."""
    if num_workers == 0:
        return nullcontext(None)
    return ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"))


def _measure_voices(config: DemoCorpusConfig, pool: Executor | None) -> dict[str, dict[str, Any]]:
    """Measure every voice on the same sentences; keep those that are understood."""
    texts = _check_texts(config.voice_check_utterances)
    run = map if pool is None else pool.map
    rates = run(measure_voice, config.voices, [texts] * len(config.voices))
    voices = {
        name: {"wer": round(rate, 4), "kept": rate <= config.max_voice_wer}
        for name, rate in zip(config.voices, rates, strict=True)
    }
    if not any(voice["kept"] for voice in voices.values()):
        raise ConfigError(
            key="demo_corpus.voices",
            value={name: voice["wer"] for name, voice in voices.items()},
            rule=f"none has a word error rate of at most {config.max_voice_wer}",
            remedy="add a voice, such as en-us, or raise demo_corpus.max_voice_wer",
        )
    return voices


def _check_texts(count: int) -> list[str]:
    """Utterances of 1 to 3 words in which all words come equally often, whatever the seed."""
    rng = random.Random("voices")
    stream: list[str] = []
    texts = []
    for number in range(count):
        length = 1 + number % MAX_WORDS
        if len(stream) < length:
            stream += rng.sample(VOCABULARY, len(VOCABULARY))
        texts.append(" ".join(stream[:length]))
        del stream[:length]
    return texts


def _write_subsets(
    config: DemoCorpusConfig,
    root: Path,
    voices: tuple[str, ...],
    pool: Executor | None,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Plan everything, train the tokenizer on the training text, then render and write."""
    from data_pipelines.shards import write_shards
    from omni_train.data.chatml import DEFAULT_SYSTEM
    from omni_train.data.tokenizer import train_tokenizer

    plans = {
        (name, split): list(
            planner(Recipe(getattr(config.subsets[name], split.name), split, voices, config.seed))
        )
        for name, planner in PLANNERS.items()
        for split in Split
    }
    plans[NOISY, Split.train] = list(with_errors(plans["speech", Split.train], config.seed))
    training = (plan for (_, split), made in plans.items() if split is Split.train for plan in made)
    # Each dialogue as the model reads it: with the usual system turn and the names of the roles.
    system = f"system\n{DEFAULT_SYSTEM}"
    texts = [text for plan in training for text in (system, *texts_of(plan.record))]
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    tokenizer.save_pretrained(str(root / "tokenizer"))
    subsets: dict[str, dict[str, Any]] = {name: {} for name, _ in plans}
    for (name, split), made in plans.items():
        folder = root / split.name / name
        samples = _rendered(made, pool)
        per_shard = config.samples_per_shard
        write_shards(samples, folder, tokenizer=tokenizer, samples_per_shard=per_shard)
        subsets[name][split.name] = len(made)
        subsets[name]["hours"] = round(subsets[name].get("hours", 0.0) + _hours(folder), 4)
        say(f"{split.name} {name}: {len(made)} samples")
    return subsets


def _rendered(plans: list[SamplePlan], pool: Executor | None) -> Iterator[Sample]:
    from data_pipelines.shards import Sample

    media = [plan.media for plan in plans]
    rendered: Iterator[dict[str, bytes]] = map(render_media, media)
    if pool is not None and any(media):
        rendered = pool.map(render_media, media, chunksize=16)
    for plan, members in zip(plans, rendered, strict=True):
        yield Sample(plan.key, plan.record, members)


def _hours(folder: Path) -> float:
    """Hours of sound and moving picture in a set."""
    from omni_train.data.index import index_path, read_index, read_manifest

    total = 0
    for shard in read_manifest(folder).shards:
        for row in read_index(index_path(folder / shard.name)):
            total += sum(info.duration_us for info in row.media)
    return total / _MICROSECONDS_PER_HOUR


def main() -> int:
    """Command line; prints the summary as JSON."""
    parser = argparse.ArgumentParser(description="Make the demo corpus.")
    parser.add_argument("--out", required=True, help="directory to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small corpus, for checks")
    given = parser.parse_args()
    if given.quick:
        config = quick_config(given.out, seed=given.seed)
    else:
        config = DemoCorpusConfig(out_dir=given.out, seed=given.seed)
    try:
        summary = build_demo_corpus(config, report=lambda line: print(line, file=sys.stderr))
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 65
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
