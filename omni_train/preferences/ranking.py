"""Hears sampled replies and scores them: restartable, by worker processes, one shard at a time.

    candidates (shards) -> wave -> recognisers -> word errors, pauses, failure -> score -> rows

    OUT/job.json               what makes the scores; another job is refused
    OUT/shard-000000.jsonl     a row for every candidate, in the order of the shard
    OUT/ledger.jsonl           candidates and requests that fail, each with its reason
    OUT/ranking.json           totals; written last

A shard's rows appear whole, so the same command again makes what is missing, and the files are the
same as without an interruption, for any number of processes. The score is a weighted sum, 0 is
best: `wer_weight` * word (or character) error rate + `pause_weight` * pause errors over boundaries
+ `failure_weight` where the reply fails as a whole. Where another number of words is heard than
written no boundary can be placed: its pauses count as wrong as its words are. Of two recognisers
the score is the mean. Not done here: which become a pair (data_pipelines/preferences.py).
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.candidates import (
    RANKING_FILE,
    candidate_shards,
    read_candidates,
    read_rows,
)
from omni_train.data.index import hash_file, write_atomically
from omni_train.evaluation.metrics import Normalizer
from omni_train.evaluation.tts import Failure, SpokenScore, score_reply
from omni_train.speech.asr import AsrConfig, AsrKind, Recognizer, Transcript, build_recognizer
from omni_train.speech.pauses import PauseConfig

JOB_FILE, LEDGER_FILE = "job.json", "ledger.jsonl"
MAX_RECOGNIZERS = 2
# A wave whose loudest sample is below -60 dBFS has nothing to be heard.
_SILENT = 1e-3


@dataclass(kw_only=True, slots=True)
class RankConfig:
    """How candidates are heard and scored.

    Args:
        recognizers: one, or two whose order of a pair can be compared.
        normalizer: how texts are folded before they are compared.
        pauses: what counts as a pause.
        wer_weight, pause_weight, failure_weight: of the score.
        device: where a network recognises.
    """

    recognizers: list[AsrConfig]
    normalizer: Normalizer = Normalizer.seed_tts
    pauses: PauseConfig = field(default_factory=PauseConfig)
    wer_weight: float = 1.0
    pause_weight: float = 0.2
    failure_weight: float = 1.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= len(self.recognizers) <= MAX_RECOGNIZERS:
            raise ConfigError(
                key="--asr",
                value=len(self.recognizers),
                rule="one or two recognisers hear the candidates",
                remedy="give --asr once or twice",
            )
        weights = (self.wer_weight, self.pause_weight, self.failure_weight)
        if min(weights) < 0 or not self.wer_weight:
            raise ConfigError(
                key="weights",
                value=weights,
                rule="no weight is negative, and that of the word errors is positive",
                remedy="leave them out for the defaults",
            )


def rank(
    candidates: Path,
    out_dir: Path,
    config: RankConfig,
    *,
    num_workers: int = 2,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Score all candidates, or those that are missing; return the content of `ranking.json`.

    Args:
        candidates: of a finished `talker_candidates`.
        out_dir: directory that is made, or that an earlier call of the same settings began.
        config: recognisers and weights.
        num_workers: processes; 0 works in this one. Changes no byte.
        report: is called with one line per finished shard.

    Raises:
        ConfigError: `out_dir` holds something else, or a recogniser cannot be made.
        DataError: the candidates are not finished, or a shard is damaged.
    """
    record, tars = candidate_shards(candidates)
    names = [recognizer_name(asr) for asr in config.recognizers]
    job = {"candidates": record, "recognizers": names, "settings": _plain(config)}
    _claim(out_dir, job)
    missing = [tar for tar in tars if not _rows_path(out_dir, tar).is_file()]
    jobs = [(tar, out_dir, config) for tar in missing]
    for number, name in enumerate(_run(jobs, num_workers), 1):
        if report is not None:
            report(f"[{number}/{len(jobs)}] {name}")
    rows = [row for tar in tars for row in read_rows(_rows_path(out_dir, tar))]
    failed = [
        {"key": row["key"], "name": row["name"], "reason": row["reason"]}
        for row in rows
        if row["reason"]
    ]
    write_atomically(out_dir / LEDGER_FILE, _lines(failed))
    scored = [row["score"] for row in rows if row["score"] is not None]
    summary = {
        "candidates": len(rows),
        "scored": len(scored),
        "failures": dict(sorted(Counter(f["reason"].partition(":")[0] for f in failed).items())),
        "mean_score": sum(scored) / max(len(scored), 1),
        "model": record["model"],
        "shards": [_rows_path(out_dir, tar).name for tar in tars],
    }
    write_atomically(out_dir / RANKING_FILE, (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def recognizer_name(config: AsrConfig) -> dict[str, str]:
    """Return kind and revision of a recogniser: package version, or hash of the model's files."""
    if config.kind is AsrKind.pocketsphinx:
        words = ",".join(sorted(set(config.vocabulary)))
        return {"kind": config.kind.name, "revision": version("pocketsphinx"), "grammar": words}
    files = sorted(
        path for path in Path(config.path).glob("*") if path.suffix in (".json", ".safetensors")
    )
    return {
        "kind": config.kind.name,
        "revision": ",".join(f"{path.name}:{hash_file(path)}" for path in files),
        "language": config.language,
    }


def score_of(found: SpokenScore, config: RankConfig) -> float:
    """Return the weighted sum; see the module."""
    pause = min(1.0, found.wer) if found.pauses is None else found.pauses.rate
    failed = config.failure_weight if found.failure is not None else 0.0
    return config.wer_weight * found.wer + config.pause_weight * pause + failed


class _Heard:
    """A recogniser that keeps what it heard, as it was before the normaliser."""

    def __init__(self, recognizer: Recognizer) -> None:
        self._recognizer = recognizer
        self.last = Transcript("", [])

    def transcribe(self, wave: NDArray[np.float32]) -> Transcript:
        """Return the transcript of `wave`, float32 [S] at 16 kHz."""
        self.last = self._recognizer.transcribe(wave)
        return self.last


def _run(jobs: list[tuple[Path, Path, RankConfig]], num_workers: int) -> Iterator[str]:
    if num_workers == 0:
        yield from map(_rank_shard, jobs)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_rank_shard, jobs)


@lru_cache(maxsize=MAX_RECOGNIZERS)
def _recognizer(spec: str, device: str) -> Recognizer:
    values = json.loads(spec)
    return build_recognizer(AsrConfig(**{**values, "kind": AsrKind[values["kind"]]}), device)


def _rank_shard(job: tuple[Path, Path, RankConfig]) -> str:
    """Write the rows of one shard; return its name."""
    tar, out_dir, config = job
    # Each worker has one core; more threads would only wait for one another.
    torch.set_num_threads(1)
    rows = []
    for record, members in read_candidates(tar):
        rows += [_row(record, members, entry, config) for entry in record["candidates"]]
    write_atomically(_rows_path(out_dir, tar), _lines(rows))
    return tar.name


def _row(
    record: dict[str, Any], members: dict[str, bytes], entry: dict[str, Any], config: RankConfig
) -> dict[str, Any]:
    """Everything that is known of one candidate."""
    row: dict[str, Any] = {
        "key": record["key"],
        "name": entry["name"],
        "speaker": record["speaker"],
        "text": record["text"],
        "num_codes": entry["num_codes"],
        "ended": entry["ended"],
        "score": None,
        "failure": None,
        "reason": "",
        "heard": [],
    }
    wave, rate_hz = _wave(members.get(f"{entry['name']}.wav"))
    try:
        for asr in config.recognizers:
            heard = _hear(record["text"], wave, rate_hz, entry["ended"], asr, config)
            row["heard"].append(heard)
    except DataError as error:
        return row | {"reason": f"{error.reason}: {error.detail}", "heard": []}
    # The first recogniser's word counts where two disagree on a kind.
    failure = row["heard"][0]["failure"]
    reason = _reason(failure, wave, record["text"]) if failure else ""
    scores = [heard["score"] for heard in row["heard"]]
    return row | {"score": sum(scores) / len(scores), "failure": failure, "reason": reason}


def _hear(
    text: str,
    wave: NDArray[np.float32],
    rate_hz: int,
    ended: bool,
    asr: AsrConfig,
    config: RankConfig,
) -> dict[str, Any]:
    """What one recogniser makes of a wave."""
    listener = _Heard(_recognizer(json.dumps(_plain(asr), sort_keys=True), config.device))
    # What is silent has no word; a recogniser may make some up.
    found = score_reply(
        text,
        wave[:0] if _quiet(wave) else wave,
        rate_hz,
        ended=ended,
        recognizer=listener,
        normalizer=config.normalizer,
        pauses=config.pauses,
    )
    return {
        "recognizer": recognizer_name(asr)["kind"],
        "raw": listener.last.text,
        "normalized": found.heard,
        "reference": found.reference,
        "errors": found.errors,
        "units": found.units,
        "wer": found.wer,
        "pauses": None if found.pauses is None else asdict(found.pauses),
        "pause_error": None if found.pauses is None else found.pauses.rate,
        "words_per_s": found.words_per_s,
        "failure": found.failure.name if found.failure else None,
        "score": score_of(found, config),
    }


def _reason(failure: str, wave: NDArray[np.float32], text: str) -> str:
    details = {
        Failure.no_end.name: "sampling reached its limit",
        Failure.empty.name: "the wave is silent" if _quiet(wave) else "no word was heard",
        Failure.repeated.name: "words come again and again",
    }
    return f"{failure}: {details[failure]}, for {text!r}"


def _quiet(wave: NDArray[np.float32]) -> bool:
    return not len(wave) or float(np.abs(wave).max()) < _SILENT


def _wave(data: bytes | None) -> tuple[NDArray[np.float32], int]:
    if data is None:
        return np.empty(0, np.float32), 0
    wave, rate_hz = soundfile.read(io.BytesIO(data), dtype="float32")
    return wave, int(rate_hz)


def _claim(out_dir: Path, job: dict[str, Any]) -> None:
    path = out_dir / JOB_FILE
    out_dir.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(job, indent=1, sort_keys=True) + "\n").encode()
    if path.exists():
        if path.read_bytes() != data:
            raise ConfigError(
                key="OUT",
                value=str(out_dir),
                rule="holds a ranking of other candidates or with other settings",
                remedy="choose another directory, or remove this one",
            )
        return
    if any(not path.name.startswith(".") for path in out_dir.iterdir()):
        raise ConfigError(
            key="OUT",
            value=str(out_dir),
            rule=f"holds other files and no {JOB_FILE}",
            remedy="choose an empty directory",
        )
    write_atomically(path, data)


def _rows_path(out_dir: Path, tar: Path) -> Path:
    return out_dir / f"{tar.stem}.jsonl"


def _plain(config: Any) -> Any:
    """Settings as JSON has them."""
    return json.loads(json.dumps(asdict(config), default=lambda value: value.name))


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
