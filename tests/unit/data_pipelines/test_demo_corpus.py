"""The demo corpus at a small size: same seed same bytes, disjoint sides, every kind of clip."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import webdataset
import xxhash
from omegaconf import OmegaConf

from data_pipelines.clips import word_wave
from data_pipelines.demo_content import (
    COLORS,
    SHAPES,
    VOCABULARY,
    Split,
    scenes,
    word_sequences,
)
from data_pipelines.demo_corpus import (
    NOISY,
    PLANNERS,
    VOICES,
    DemoCorpusConfig,
    SubsetConfig,
    build_demo_corpus,
    quick_config,
)
from data_pipelines.demo_speech import plan_speech
from data_pipelines.demo_tasks import CAPTION_PROMPTS, Recipe
from data_pipelines.voices import SAMPLE_RATE_HZ
from omni_train.config.errors import ConfigError
from omni_train.data.index import index_path, read_index, read_manifest
from omni_train.data.tokenizer import encode_text, load_tokenizer, tokenizer_hash
from omni_train.data.types import IndexRow, MediaKind

SIZES = {
    "text": SubsetConfig(train=60, heldout=20),
    "asr": SubsetConfig(train=24, heldout=12),
    "caption": SubsetConfig(train=24, heldout=12),
    "av": SubsetConfig(train=24, heldout=24),
    "dialogue": SubsetConfig(train=10, heldout=10),
    "question": SubsetConfig(train=8, heldout=8),
    "speech": SubsetConfig(train=20, heldout=10),
    "speaker": SubsetConfig(train=6, heldout=6),
}
SETS = [(split.name, name) for split in Split for name in SIZES] + [("train", NOISY)]


def config(out_dir: Path, **changes: Any) -> DemoCorpusConfig:
    basics: dict[str, Any] = {
        "out_dir": str(out_dir),
        "subsets": SIZES,
        "voices": ["en-us+f2", "en-us+klatt", "en-gb"],
        "voice_check_utterances": 12,
        "samples_per_shard": 16,
    }
    return DemoCorpusConfig(**{**basics, **changes})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("demo") / "corpus"
    build_demo_corpus(config(out_dir, num_workers=2))
    return out_dir


def samples(corpus: Path, split: str, name: str) -> Iterator[dict[str, Any]]:
    shards = [str(path) for path in sorted((corpus / split / name).glob("*.tar"))]
    yield from webdataset.WebDataset(shards, shardshuffle=False)


def records(corpus: Path, split: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(sample["json"]) for sample in samples(corpus, split, name)]


def rows(corpus: Path, split: str, name: str) -> list[IndexRow]:
    folder = corpus / split / name
    shards = read_manifest(folder).shards
    return [row for shard in shards for row in read_index(index_path(folder / shard.name))]


def reply(record: dict[str, Any]) -> str:
    return str(record["messages"][-1]["content"][0]["text"])


def test_same_seed_same_bytes_with_and_without_workers(corpus: Path, tmp_path: Path) -> None:
    build_demo_corpus(config(tmp_path / "again", num_workers=0))
    files = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    for file in files:
        if file.name != "corpus.json":
            assert (corpus / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    again = sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*.*"))
    assert [file for file in files if file.suffix] == again


def test_plain_webdataset_reads_every_sample(corpus: Path) -> None:
    for split, name in SETS:
        indexed = rows(corpus, split, name)
        seen = list(samples(corpus, split, name))
        assert [sample["__key__"] for sample in seen] == [row.key for row in indexed]
        assert len(seen) == getattr(SIZES["speech" if name == NOISY else name], split)
        for sample, row in zip(seen, indexed, strict=True):
            assert xxhash.xxh3_64_hexdigest(sample["json"]) == row.json_xxh3
            members = {key for key in sample if not key.startswith("__") and key != "json"}
            spoken = {"reply.wav"} if name in ("speech", "speaker", NOISY) else set()
            assert members == {info.member for info in row.media} | spoken
            for info in row.media:
                assert xxhash.xxh3_64_hexdigest(sample[info.member]) == info.xxh3


def test_no_content_is_on_both_sides(corpus: Path) -> None:
    words: dict[str, set[str]] = {"train": set(), "heldout": set()}
    shown: dict[str, set[str]] = {"train": set(), "heldout": set()}
    media: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for split, name in SETS:
        for record in records(corpus, split, name):
            words[split].update(record["meta"]["words"])
            shown[split].update(record["meta"]["scenes"])
        for row in rows(corpus, split, name):
            # What is asked by voice is a wording, the same on both sides like those in writing.
            contents = [i for i in row.media if name != "question" or i.kind is not MediaKind.audio]
            media[split].update(info.xxh3 for info in contents)
    for sides in (words, shown, media):
        assert min(len(side) for side in sides.values()) > 20
        assert not sides["train"] & sides["heldout"]


def test_meta_tells_the_content_of_each_reply(corpus: Path) -> None:
    for record in records(corpus, "train", "asr") + records(corpus, "heldout", "asr"):
        assert record["meta"]["words"] == [reply(record)]
        assert 1 <= len(reply(record).split()) <= 3
    for record in records(corpus, "heldout", "caption"):
        (scene,) = record["meta"]["scenes"]
        assert reply(record) == "a " + " ".join(scene.split()[:3])


def test_every_single_word_is_training_content() -> None:
    assert len(word_sequences(1, Split.train, 3)) == len(VOCABULARY)
    assert not word_sequences(1, Split.heldout, 3)
    held_out = plan_speech(Recipe(50, Split.heldout, ("en-us",), 3))
    assert {len(plan.record["meta"]["words"][0].split()) for plan in held_out} == {2, 3}


@pytest.mark.parametrize("seed", range(20))
def test_every_pair_of_colour_and_shape_is_in_training(seed: int) -> None:
    train, heldout = scenes(Split.train, seed), scenes(Split.heldout, seed)
    assert len({scene.name for scene in train}) == len(COLORS) * len(SHAPES)
    assert not set(train) & set(heldout)
    assert len(heldout) > 10
    assert len(word_sequences(3, Split.heldout, seed)) > 300


def test_the_default_pictures_show_every_pair() -> None:
    recipe = Recipe(1500, Split.train, ("en-us",), 0)
    shown = {" ".join(reply(plan.record).split()[2:]) for plan in PLANNERS["caption"](recipe)}
    assert len(shown) == len(COLORS) * len(SHAPES)


def test_clips_have_all_rates_and_layouts(corpus: Path) -> None:
    for split in ("train", "heldout"):
        kinds = Counter()
        for record, row in zip(
            records(corpus, split, "av"), rows(corpus, split, "av"), strict=True
        ):
            (info,), meta = row.media, record["meta"]
            kinds[meta["fps"], meta["sound"]] += 1
            assert info.fps == meta["fps"]
            assert info.num_frames == round(meta["video_s"] * meta["fps"])
            assert info.has_audio == (meta["sound"] != "none")
            assert (info.first_frame_us, info.audio_start_us) == (0, 0)
            sound_s = info.num_audio_samples / SAMPLE_RATE_HZ
            # The codec works in blocks of 64 ms.
            assert meta["audio_s"] <= sound_s < meta["audio_s"] + 0.13
            if meta["sound"] == "shorter":
                assert sound_s < meta["video_s"] - 0.5
            if meta["sound"] == "longer":
                assert sound_s > meta["video_s"] + 1
        layouts = {"full", "none", "shorter", "longer"}
        assert set(kinds) == {(fps, sound) for fps in (1.0, 2.0, 2.5, 4.0) for sound in layouts}


def test_clips_show_and_say_what_the_schedule_says(corpus: Path) -> None:
    for sample in list(samples(corpus, "heldout", "av"))[:12]:
        record = json.loads(sample["json"])
        meta = record["meta"]
        with av.open(io.BytesIO(sample["0.mp4"])) as clip:
            frames = [(f.time, f.to_ndarray(format="rgb24")) for f in clip.decode(video=0)]
        for time_s, picture in frames:
            (slot,) = [s for s in meta["slots"] if s["start_s"] <= time_s < s["end_s"]]
            distance = np.abs(picture.astype(int) - COLORS[slot["color"]]).sum(axis=2)
            assert (distance < 60).sum() > 80, (sample["__key__"], time_s)
        if meta["sound"] == "none":
            continue
        with av.open(io.BytesIO(sample["0.mp4"])) as clip:
            wave = np.concatenate([f.to_ndarray()[0] for f in clip.decode(audio=0)])
        for said in meta["spoken"]:
            start = round(said["start_s"] * SAMPLE_RATE_HZ)
            word = word_wave(said["word"], record["speaker"])
            lags = range(-200, 201, 10)
            match = [float(wave[start + lag : start + lag + len(word)] @ word) for lag in lags]
            assert abs(lags[int(np.argmax(match))]) <= 10
            if said["slot"] >= 0:
                slot = meta["slots"][said["slot"]]
                assert slot["start_s"] <= said["start_s"] < said["end_s"] <= slot["end_s"]


def test_answers_about_clips_follow_from_the_schedule(corpus: Path) -> None:
    kinds = Counter()
    for split in ("train", "heldout"):
        for record in records(corpus, split, "av"):
            meta = record["meta"]
            # A held-out clip is asked one thing: no earlier turn gives its answer away.
            assert len(meta["questions"]) == (
                1 if split == "heldout" else len(set(meta["questions"]))
            )
            assert len(record["messages"]) == 2 * len(meta["questions"])
            for turn, kind in enumerate(meta["questions"]):
                kinds[split, kind, meta["sound"] == "none"] += 1
                prompt, answer = record["messages"][2 * turn : 2 * turn + 2]
                check_answer(
                    meta, kind, prompt["content"][-1]["text"], answer["content"][0]["text"]
                )
    for split in ("train", "heldout"):
        assert {kind for side, kind, _ in kinds if side == split} == {"shown", "said", "when"}
        assert kinds[split, "said", True] > 0


def check_answer(meta: dict[str, Any], kind: str, prompt: str, answer: str) -> None:
    names = [f"{slot['color']} {slot['shape']}" for slot in meta["slots"]]
    if kind == "shown":
        assert answer == ", ".join(names)
    elif kind == "said":
        assert answer == (meta["words"][0] if meta["words"] else "nothing is said")
    else:
        said = [s for s in meta["spoken"] if f" {s['word']}" in prompt]
        assert [names[s["slot"]] for s in said] == [answer]


def test_wordings_vary_and_follow_from_the_key(corpus: Path) -> None:
    prompts = {r["messages"][0]["content"][1]["text"] for r in records(corpus, "train", "caption")}
    assert prompts == set(CAPTION_PROMPTS)
    big, small = (Recipe(count, Split.train, ("en-us",), 7) for count in (40, 10))
    for planner in (PLANNERS["caption"], PLANNERS["text"], PLANNERS["dialogue"]):
        assert [p.record for p in planner(big)][:10] == [p.record for p in planner(small)]


def test_kept_voices_are_understood(corpus: Path) -> None:
    summary = json.loads((corpus / "corpus.json").read_bytes())
    assert set(summary["voices"]) == {"en-us+f2", "en-us+klatt", "en-gb"}
    for voice in summary["voices"].values():
        assert voice["kept"] == (voice["wer"] <= 0.05)
    assert summary["voices"]["en-us+f2"]["kept"]
    assert not summary["voices"]["en-gb"]["kept"]
    kept = {name for name, voice in summary["voices"].items() if voice["kept"]}
    for split, name in SETS:
        assert {row.speaker for row in rows(corpus, split, name)} <= kept | {""}
    assert summary["seed"] == 0
    assert summary["subsets"]["asr"]["train"] == SIZES["asr"].train
    assert summary["subsets"]["av"]["hours"] > 0


def test_errors_are_in_the_text_and_not_in_the_sound(corpus: Path) -> None:
    clean, noisy = (list(samples(corpus, "train", name)) for name in ("speech", NOISY))
    assert [s["__key__"] for s in noisy] == [s["__key__"] for s in clean]
    assert [s["reply.wav"] for s in noisy] == [s["reply.wav"] for s in clean]
    changed = [a["json"] != b["json"] for a, b in zip(clean, noisy, strict=True)]
    assert changed == [number % 2 == 1 for number in range(SIZES["speech"].train)]


def test_tokenizer_is_the_one_that_counted(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    for split, name in SETS:
        assert read_manifest(corpus / split / name).tokenizer_hash == tokenizer_hash(tokenizer)
    # The frame of every dialogue is whole words, or prompts would be twice as long.
    assert len(encode_text(tokenizer, "system\nYou are a helpful assistant.")) <= 8


def test_a_finished_corpus_is_reused_and_a_damaged_one_is_not(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    stamp = (corpus / "corpus.json").stat().st_mtime_ns
    first = build_demo_corpus(config(corpus, num_workers=0), report=lines.append)
    assert lines == [f"reused {corpus}"]
    assert (corpus / "corpus.json").stat().st_mtime_ns == stamp
    assert first == json.loads((corpus / "corpus.json").read_bytes())


def test_a_damaged_corpus_is_made_again_and_other_content_is_left_alone(tmp_path: Path) -> None:
    tiny = dict.fromkeys(SIZES, SubsetConfig(train=2, heldout=2))
    small = config(tmp_path / "c", subsets=tiny, voices=["en-us+f2"], num_workers=0)
    build_demo_corpus(small)
    shard = next((tmp_path / "c" / "train" / "asr").glob("*.tar"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-512])
    lines: list[str] = []
    build_demo_corpus(small, report=lines.append)
    assert shard.read_bytes() == good
    build_demo_corpus(replace(small, seed=1), report=lines.append)
    assert not any(line.startswith("reused") for line in lines)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="not replaced"):
        build_demo_corpus(config(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_no_understandable_voice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="word error rate"):
        build_demo_corpus(config(tmp_path / "c", voices=["en-gb"], num_workers=0))
    assert not (tmp_path / "c").exists()


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least one sample"):
        SubsetConfig(train=0, heldout=1)
    with pytest.raises(ConfigError, match="subsets"):
        DemoCorpusConfig(out_dir="c", subsets={"asr": SubsetConfig(train=1, heldout=1)})
    with pytest.raises(ConfigError, match="voices"):
        DemoCorpusConfig(out_dir="c", voices=[])
    with pytest.raises(ConfigError, match="max_voice_wer"):
        DemoCorpusConfig(out_dir="c", max_voice_wer=1.5)
    merged = OmegaConf.merge(OmegaConf.structured(DemoCorpusConfig(out_dir="c")), {"seed": 3})
    assert OmegaConf.to_object(merged) == DemoCorpusConfig(out_dir="c", seed=3)
    assert quick_config("c").voices == list(VOICES)
