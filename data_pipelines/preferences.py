"""Ranked candidates to preference pairs: shards, a Hugging Face dataset, a page to listen to.

    ranking + candidates -> every two answers of a request -> kept or dropped, with the reason

    OUT/manifest.json, shard-*     a pair a sample: the dialogue with the chosen codes as its
                                   speech, `rejected_codes` in the record
    OUT/dataset/                   the same without media, for `datasets.load_from_disk`
    OUT/pairs.jsonl                every pair that was looked at: texts, scores, reason
    OUT/listen.html                some pairs with their waves, in one file
    OUT/listen.jsonl               the same pairs and waves, for the report
    OUT/pairs.json                 settings and counts

Lower scores are better. Pairs of a request are looked at from the widest gap down; an answer
stands in one pair at most. OUT appears whole: an interrupted call leaves nothing there, and the
same call again gives the same bytes. Not done here: hearing (omni_train/preferences/ranking.py).
"""

from __future__ import annotations

import base64
import html
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import combinations
from pathlib import Path
from typing import Any

import xxhash

from data_pipelines.shards import Sample, write_shards
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.candidates import (
    CANDIDATES_FILE,
    HEARD_PAIRS_FILE,
    RANKING_FILE,
    RECORDING,
    candidate_shards,
    read_candidates,
    read_rows,
)
from omni_train.data.index import hash_file, write_atomically
from omni_train.data.tokenizer import load_tokenizer
from omni_train.speech.codec import CODES_SUFFIX, MAX_CODES, parse_codes

PAIRS_FILE, ROWS_FILE, PAGE_FILE, DATASET_DIR = (
    "pairs.json",
    "pairs.jsonl",
    "listen.html",
    "dataset",
)
CHOSEN = f"chosen{CODES_SUFFIX}"
KEPT = "kept"


class RecordingUse(Enum):
    """What the request's own speech may be.

    never: left out. may: an answer like any other, by its score. chosen: the chosen answer of every
    pair, whatever its score.
    """

    never = "never"
    may = "may"
    chosen = "chosen"


@dataclass(kw_only=True, slots=True)
class PairConfig:
    """Which two answers become a pair.

    Args:
        min_gap: least difference of their scores.
        max_chosen_score: of the chosen answer; what is merely less wrong is no example.
        max_pairs: kept of one request at most.
        max_length_ratio: codes of the longer answer over those of the shorter one, at most.
        recording: use of the request's own speech.
        samples_per_shard: pairs of one shard.
        page_pairs: pairs on the page, spread over all.
    """

    min_gap: float = 0.3
    max_chosen_score: float = 1.0
    max_pairs: int = 3
    max_length_ratio: float = 2.0
    recording: RecordingUse = RecordingUse.never
    samples_per_shard: int = 256
    page_pairs: int = 24

    def __post_init__(self) -> None:
        for name, valid in (
            ("min_gap", self.min_gap > 0),
            ("max_chosen_score", self.max_chosen_score >= 0),
            ("max_pairs", self.max_pairs >= 1),
            ("max_length_ratio", self.max_length_ratio >= 1),
            ("samples_per_shard", self.samples_per_shard >= 1),
            ("page_pairs", self.page_pairs >= 0),
        ):
            if not valid:
                raise ConfigError(
                    key=f"--{name.replace('_', '-')}",
                    value=getattr(self, name),
                    rule="is out of range",
                    remedy="leave it out for the default",
                )


def build_pairs(
    candidates: Path, ranking: Path, out_dir: Path, config: PairConfig, *, tokenizer_dir: str
) -> dict[str, Any]:
    """Make the pairs, or find them made; return the content of `pairs.json`.

    Args:
        candidates: of a finished `talker_candidates`.
        ranking: of a finished `talker rank` of them.
        out_dir: directory that is made.
        config: which pairs.
        tokenizer_dir: the model's tokenizer.

    Raises:
        ConfigError: `out_dir` holds something else.
        DataError: ranking or candidates are not finished, or of one another; `no_samples` where
            no pair is left.
    """
    record, tars = candidate_shards(candidates)
    job = {"settings": _plain(config), **_ranking(ranking, record)}
    if out_dir.exists() and any(out_dir.iterdir()):
        return _finished(out_dir, job)
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = load_tokenizer(tokenizer_dir)
    maker = _Maker(config, ranking, record["model"])
    manifest = write_shards(
        maker.samples(tars),
        partial,
        tokenizer=tokenizer,
        samples_per_shard=config.samples_per_shard,
    )
    if not manifest.num_samples:
        shutil.rmtree(partial)
        raise DataError(
            "no_samples", f"no pair is kept: {dict(maker.reasons)}; lower --min-gap, say"
        )
    _write_dataset(maker.kept, partial / DATASET_DIR)
    shown = list(maker.page_entries(tars))
    summary = {
        **job,
        "candidates": hash_file(candidates / CANDIDATES_FILE),
        "pairs": manifest.num_samples,
        "reasons": dict(sorted(maker.reasons.items())),
        "ordered_by_pauses": maker.by_pauses,
    }
    write_atomically(partial / ROWS_FILE, _lines(maker.rows))
    write_atomically(partial / PAGE_FILE, listening_page(shown).encode())
    write_atomically(partial / HEARD_PAIRS_FILE, _lines([_heard_pair(*entry) for entry in shown]))
    write_atomically(partial / PAIRS_FILE, _json(summary))
    if out_dir.exists():
        out_dir.rmdir()
    partial.replace(out_dir)
    return summary


def choose_pairs(rows: list[dict[str, Any]], config: PairConfig) -> Iterator[dict[str, Any]]:
    """Yield every pair of a request's candidates that could be one, with what became of it.

    Args:
        rows: of the ranking, all of one request.
        config: which pairs.

    Yields:
        Rows with `chosen`, `rejected` (rows of the ranking), `gap`, `by_wer` (order of the word
        error rates alone: same, tie, reversed) and `reason`: `kept`, or why not.
    """
    usable = [row for row in rows if row["score"] is not None]
    if config.recording is RecordingUse.never:
        usable = [row for row in usable if row["name"] != RECORDING]
    found = [_ordered(one, other, config) for one, other in combinations(usable, 2)]
    # The widest gap first; names decide where gaps are equal.
    found.sort(key=lambda p: (-p[2], p[0]["name"], p[1]["name"]))
    used: set[str] = set()
    kept = 0
    for chosen, rejected, gap in found:
        reason = _why_not(chosen, rejected, gap, config)
        if not reason and kept == config.max_pairs:
            reason = "enough_pairs"
        names = {chosen["name"], rejected["name"]} - {RECORDING}
        if not reason and names & used:
            reason = "used_before"
        if not reason:
            used |= names
            kept += 1
        yield {
            "chosen": chosen,
            "rejected": rejected,
            "gap": gap,
            "by_wer": _order(_wer(chosen), _wer(rejected)),
            "reason": reason or KEPT,
        }


def _ordered(
    one: dict[str, Any], other: dict[str, Any], config: PairConfig
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Better answer, worse answer, gap of their scores."""
    better, worse = (one, other) if one["score"] <= other["score"] else (other, one)
    if config.recording is RecordingUse.chosen and worse["name"] == RECORDING:
        better, worse = worse, better
    return better, worse, worse["score"] - better["score"]


def _why_not(
    chosen: dict[str, Any], rejected: dict[str, Any], gap: float, config: PairConfig
) -> str:
    """Why two answers are no pair; empty where they are one."""
    recorded = RECORDING in (chosen["name"], rejected["name"])
    if config.recording is RecordingUse.chosen and not recorded:
        return "not_recorded"
    # Sums of floats: 0.3 is meant to be enough for 0.3.
    if gap < config.min_gap - 1e-9:
        return "small_gap"
    if chosen["failure"]:
        return "chosen_failed"
    if chosen["score"] > config.max_chosen_score:
        return "chosen_bad"
    if not rejected["num_codes"]:
        return "rejected_empty"
    lengths = sorted([chosen["num_codes"], rejected["num_codes"]])
    if lengths[1] > config.max_length_ratio * lengths[0]:
        return "length_ratio"
    judged = zip(chosen["heard"], rejected["heard"], strict=True)
    if not all(better["score"] < worse["score"] for better, worse in judged):
        return "recognizers_disagree"
    return ""


def _wer(row: dict[str, Any]) -> float:
    """Mean over recognisers."""
    return sum(heard["wer"] for heard in row["heard"]) / len(row["heard"])


def _order(chosen: float, rejected: float) -> str:
    return "tie" if chosen == rejected else "same" if chosen < rejected else "reversed"


class _Maker:
    """Goes through the shards once and remembers what it did.

    Args:
        config: which pairs.
        ranking: directory of the scores.
        model: hash of the model that sampled.
    """

    def __init__(self, config: PairConfig, ranking: Path, model: str) -> None:
        self._config, self._ranking, self._model = config, ranking, model
        self.rows: list[dict[str, Any]] = []
        self.kept: list[dict[str, Any]] = []
        self.reasons: Counter[str] = Counter()
        self.by_pauses = 0

    def samples(self, tars: list[Path]) -> Iterator[Sample]:
        """Yield a sample for each pair that is kept."""
        for tar in tars:
            ranked: dict[str, list[dict[str, Any]]] = {}
            for row in read_rows(self._ranking / f"{tar.stem}.jsonl"):
                ranked.setdefault(row["key"], []).append(row)
            for record, members in read_candidates(tar):
                yield from self._of_request(record, members, ranked[record["key"]])

    def _of_request(
        self, record: dict[str, Any], members: dict[str, bytes], ranked: list[dict[str, Any]]
    ) -> Iterator[Sample]:
        number = 0
        for pair in choose_pairs(ranked, self._config):
            self.reasons[pair["reason"]] += 1
            chosen, rejected = pair["chosen"], pair["rejected"]
            names = {"chosen": chosen["name"], "rejected": rejected["name"]}
            said = {"text": record["text"], "speaker": record["speaker"]}
            judged = {f"{w}_heard": pair[w]["heard"] for w in ("chosen", "rejected")}
            row = {"key": record["key"], **said, **names, "gap": pair["gap"]}
            row |= {"by_wer": pair["by_wer"], "reason": pair["reason"], **judged}
            self.rows.append(row)
            if pair["reason"] != KEPT:
                continue
            self.by_pauses += pair["by_wer"] != "same"
            sample = _sample(record, members, row, number, self._model)
            self.kept.append({"pair": sample.key, **_flat(row, sample)})
            number += 1
            yield sample

    def page_entries(self, tars: list[Path]) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
        """Yield some kept pairs, each with its two waves; reads the shards again."""
        count = min(self._config.page_pairs, len(self.kept))
        kept = [row for row in self.rows if row["reason"] == KEPT]
        shown = [kept[number * len(kept) // count] for number in range(count)]
        wanted: dict[str, list[dict[str, Any]]] = {}
        for row in shown:
            wanted.setdefault(row["key"], []).append(row)
        for tar in tars if wanted else ():
            for record, members in read_candidates(tar):
                for row in wanted.get(record["key"], ()):
                    yield row, [members[f"{row[who]}.wav"] for who in ("chosen", "rejected")]


def _sample(
    record: dict[str, Any], members: dict[str, bytes], row: dict[str, Any], number: int, model: str
) -> Sample:
    """A pair as a dialogue whose speech is the chosen answer."""
    answers = {
        f"{entry['name']}{end}" for entry in record["candidates"] for end in (".wav", CODES_SUFFIX)
    }
    media = {name: data for name, data in members.items() if name not in answers}
    media[CHOSEN] = members[f"{row['chosen']}{CODES_SUFFIX}"]
    rejected = parse_codes(members[f"{row['rejected']}{CODES_SUFFIX}"], MAX_CODES)
    *prompt, reply = record["messages"]
    speech = {"type": "speech", "speech": CHOSEN}
    spoken = {**reply, "content": [*reply["content"], speech]}
    left_out = ("key", "candidates", "messages", "sampling", "seed", "model")
    made = {name: value for name, value in record.items() if name not in left_out}
    made |= {"messages": [*prompt, spoken], "task": "preference"}
    made |= {"rejected_codes": rejected.tolist(), "pair": {**row, "model": model}}
    return Sample(f"{record['key']}-{number}", made, media)


def _flat(row: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """A pair's columns in the dataset."""
    heard = {
        f"{who}_{name}": row[f"{who}_heard"][0][name]
        for who in ("chosen", "rejected")
        for name in ("raw", "normalized", "wer", "pause_error", "score")
    }
    messages = json.dumps(sample.record["messages"][:-1], ensure_ascii=False)
    chosen = parse_codes(sample.media[CHOSEN], MAX_CODES).tolist()
    codes = {"chosen_codes": chosen, "rejected_codes": sample.record["rejected_codes"]}
    plain = {name: row[name] for name in ("key", "text", "speaker", "chosen", "rejected", "gap")}
    return {"prompt": messages, **plain, **heard, **codes}


def _write_dataset(rows: list[dict[str, Any]], folder: Path) -> None:
    from datasets import Dataset

    # A fingerprint of one's own: the library's would differ from call to call.
    content = json.dumps(rows, sort_keys=True).encode()
    made = Dataset.from_list(rows)
    dataset = Dataset(made.data, info=made.info, fingerprint=xxhash.xxh3_64_hexdigest(content))
    dataset.save_to_disk(str(folder))


def _heard_pair(row: dict[str, Any], waves: list[bytes]) -> dict[str, Any]:
    """A pair as the report reads it."""
    made = {name: row[name] for name in ("key", "text", "speaker", "gap")}
    for who, wave in zip(("chosen", "rejected"), waves, strict=True):
        heard = row[f"{who}_heard"][0]
        made[who] = {
            "heard": heard["raw"],
            "wer": heard["wer"],
            "pause_error": heard["pause_error"],
        }
        made[who]["wave"] = base64.b64encode(wave).decode()
    return made


def listening_page(entries: Iterable[tuple[dict[str, Any], list[bytes]]]) -> str:
    """Return a page, complete in itself, with chosen and rejected side by side.

    Args:
        entries: rows of pairs, each with the WAV bytes of chosen and rejected.
    """
    rows = "\n".join(_entry(row, waves) for row, waves in entries)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Preference pairs</title>\n'
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:.4em 1em;text-align:left;"
        "border-bottom:1px solid #ddd}small{color:#666}</style>\n<h1>Preference pairs</h1>\n"
        "<table><tr><th>text</th><th>chosen</th><th>rejected</th><th>gap</th></tr>\n"
        f"{rows}\n</table></html>\n"
    )


def _entry(row: dict[str, Any], waves: list[bytes]) -> str:
    cells = []
    for who, wave in zip(("chosen", "rejected"), waves, strict=True):
        heard = row[f"{who}_heard"][0]
        pause = "-" if heard["pause_error"] is None else f"{heard['pause_error']:.2f}"
        sound = base64.b64encode(wave).decode()
        player = f'<audio controls src="data:audio/wav;base64,{sound}"></audio>'
        scores = f"WER {heard['wer']:.2f}, pause error {pause}"
        said = html.escape(heard["raw"])
        cells.append(f"<td>{player}<br>{said}<br><small>{scores}</small></td>")
    place = html.escape(f"{row['key']}, {row['speaker']}")
    text = f"<td>{html.escape(row['text'])}<br><small>{place}</small></td>"
    return f"<tr>{text}{''.join(cells)}<td>{row['gap']:.2f}</td></tr>"


def _ranking(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the scores are of; raises where they are not finished or of other candidates."""
    path, job = folder / RANKING_FILE, folder / "job.json"
    if not path.is_file() or not job.is_file():
        raise DataError("missing_manifest", f"{path} is missing: finish omni-train talker rank")
    made = json.loads(job.read_bytes())
    if made["candidates"] != record:
        raise DataError("stale_index", f"{folder} ranks other candidates")
    return {
        "recognizers": made["recognizers"],
        "ranking": made["settings"],
        "model": record["model"],
    }


def _finished(out_dir: Path, job: dict[str, Any]) -> dict[str, Any]:
    path = out_dir / PAIRS_FILE
    summary: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    if any(summary.get(name) != value for name, value in job.items()):
        raise ConfigError(
            key="OUT",
            value=str(out_dir),
            rule="holds other pairs, or something else",
            remedy="choose another directory, or remove this one",
        )
    return summary


def _plain(config: Any) -> Any:
    return json.loads(json.dumps(asdict(config), default=lambda value: value.name))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
