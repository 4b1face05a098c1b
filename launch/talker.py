"""`omni-train talker`: scores for sampled replies, and preference pairs from the scores."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.failures import guarded
from omni_train.config.errors import ConfigError
from omni_train.engine.lock import RunLock

if TYPE_CHECKING:
    from launch.cli import Add
    from omni_train.speech.asr import AsrConfig


def add_talker(add: Add) -> None:
    """Add `rank` and `pairs`."""
    rank = add(
        "rank",
        "Hear sampled replies and score them; the same command again goes on.",
        "omni-train talker rank runs/candidates/candidates runs/ranking --asr whisper:DIR:en",
        "omni-train talker rank CANDIDATES OUT --asr pocketsphinx:apple,river --pause-weight 0.5",
    )
    rank.add_argument("candidates", help="directory that talker_candidates made")
    rank.add_argument("out", help="directory of the scores")
    rank.add_argument(
        "--asr",
        action="append",
        required=True,
        metavar="KIND:VALUE",
        help="pocketsphinx:WORD,WORD..., whisper:DIR[:LANGUAGE] or paraformer:DIR; twice for two",
    )
    rank.add_argument("--normalizer", default="seed_tts", help="basic, english, seed_tts, chinese")
    rank.add_argument("--wer-weight", type=float, default=1.0, help="of word errors; default 1")
    rank.add_argument("--pause-weight", type=float, default=0.2, help="of pauses; default 0.2")
    rank.add_argument("--failure-weight", type=float, default=1.0, help="of no end, no word, loops")
    rank.add_argument("--min-pause-s", type=float, default=0.12, help="shortest; default 0.12")
    rank.add_argument(
        "--pause-threshold-db", type=float, default=35.0, help="silence is so far below the loudest"
    )
    rank.add_argument("--device", default="cpu", help="where a network recognises, such as cuda")
    rank.add_argument("--workers", type=int, default=2, help="processes; 0 works in this one")
    pairs = add(
        "pairs",
        "Make preference pairs from scores: shards, a dataset, a page to listen to.",
        "omni-train talker pairs CANDIDATES RANKING runs/pairs --tokenizer TOKENIZER",
    )
    pairs.add_argument("candidates", help="directory that talker_candidates made")
    pairs.add_argument("ranking", help="directory that talker rank made")
    pairs.add_argument("out", help="directory of the pairs")
    pairs.add_argument("--tokenizer", required=True, help="directory of a saved tokenizer")
    pairs.add_argument("--min-gap", type=float, default=0.3, help="least difference of scores")
    pairs.add_argument(
        "--max-chosen-score", type=float, default=1.0, help="a chosen reply is no worse; default 1"
    )
    pairs.add_argument("--max-pairs", type=int, default=3, help="of one request")
    pairs.add_argument(
        "--max-length-ratio", type=float, default=2.0, help="of the two replies' codes; default 2"
    )
    pairs.add_argument(
        "--recording",
        choices=["never", "may", "chosen"],
        default="never",
        help="use of the request's own speech: may be chosen, or always is; default never",
    )


@guarded
def run_talker(args: argparse.Namespace) -> int:
    """Run one `talker` command and return its exit code."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = RunLock(out.with_name(f".{out.name}.lock"))
    lock.acquire(f"talker {args.action}")
    try:
        (_rank if args.action == "rank" else _pairs)(args)
    finally:
        lock.release()
    return 0


def _rank(args: argparse.Namespace) -> None:
    from omni_train.evaluation.metrics import Normalizer
    from omni_train.preferences.ranking import RankConfig, rank
    from omni_train.speech.pauses import PauseConfig

    if args.normalizer not in Normalizer.__members__:
        raise ConfigError(
            key="--normalizer",
            value=args.normalizer,
            rule="there is no such normaliser",
            remedy=f"use one of {', '.join(Normalizer.__members__)}",
        )
    config = RankConfig(
        recognizers=[recognizer_of(text) for text in args.asr],
        normalizer=Normalizer[args.normalizer],
        pauses=PauseConfig(min_pause_s=args.min_pause_s, threshold_db=args.pause_threshold_db),
        wer_weight=args.wer_weight,
        pause_weight=args.pause_weight,
        failure_weight=args.failure_weight,
        device=args.device,
    )
    found = rank(
        Path(args.candidates),
        Path(args.out),
        config,
        num_workers=args.workers,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    failed = ", ".join(f"{count} {name}" for name, count in found["failures"].items()) or "none"
    print(f"{found['scored']} of {found['candidates']} candidates scored; failures: {failed}")


def recognizer_of(text: str) -> AsrConfig:
    """Return the recogniser that `KIND:VALUE` stands for.

    Raises:
        ConfigError: it stands for none.
    """
    from omni_train.speech.asr import AsrConfig, AsrKind

    kind, _, value = text.partition(":")
    if kind not in AsrKind.__members__ or not value:
        raise ConfigError(
            key="--asr",
            value=text,
            rule=f"is KIND:VALUE with a kind of {', '.join(AsrKind.__members__)}",
            remedy="write pocketsphinx:apple,river or whisper:DIRECTORY:en",
        )
    if AsrKind[kind] is AsrKind.pocketsphinx:
        return AsrConfig(kind=AsrKind.pocketsphinx, vocabulary=value.split(","))
    path, _, language = value.partition(":")
    return AsrConfig(kind=AsrKind[kind], path=path, language=language)


def _pairs(args: argparse.Namespace) -> None:
    from data_pipelines.preferences import PairConfig, RecordingUse, build_pairs

    config = PairConfig(
        min_gap=args.min_gap,
        max_chosen_score=args.max_chosen_score,
        max_pairs=args.max_pairs,
        max_length_ratio=args.max_length_ratio,
        recording=RecordingUse[args.recording],
    )
    folders = (Path(args.candidates), Path(args.ranking), Path(args.out))
    made = build_pairs(*folders, config, tokenizer_dir=args.tokenizer)
    reasons = ", ".join(f"{count} {name}" for name, count in made["reasons"].items())
    print(f"{made['pairs']} pairs ({reasons}); pauses decide {made['ordered_by_pauses']}")
