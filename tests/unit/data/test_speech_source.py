"""The plan of spoken replies: both budgets, references, repeats, on any number of ranks."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.shards import Sample
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.balance import count_cells, most_by_word, repeats_of, words_of
from omni_train.data.config import SourceConfig
from omni_train.data.loader import PlannedLoader, expected_bytes
from omni_train.data.measure import joint_tokens
from omni_train.data.segment import write_segment
from omni_train.data.skiplist import write_skip_list
from omni_train.data.speech import SpeechMaker, state_name
from omni_train.data.speech_config import Balance, ReferenceChoice, SpeechDataConfig
from omni_train.data.speech_loader import build_speech_loader
from omni_train.data.speech_source import SpeechSource
from omni_train.data.stores import Store
from omni_train.data.types import IndexRow, PackSpec, SampleRef
from omni_train.engine.run import Run, RunConfig, start_run
from omni_train.models.config import ModelConfig, TinySizes
from omni_train.models.presets import resolve_speech_config
from omni_train.models.talker_spec import talker_spec
from omni_train.models.talker_states import StateStore
from omni_train.speech.codec import dump_codes
from tests.faults.shards import wav
from tests.speech_sets import NUM_CODES, VOICES, WORDS, some_samples, spoken_sample, write_set
from tests.unit.data.samples import CONFIG, SPEC, TOKENIZER

MODEL = ModelConfig(tokenizer="in memory", tiny=TinySizes(num_codes=NUM_CODES))
TALKER = talker_spec(resolve_speech_config(MODEL, TOKENIZER), MODEL, TOKENIZER)
TOKENS, POSITIONS = 512, 400


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 utterances in three shards."""
    root = tmp_path_factory.mktemp("spoken")
    write_set(root, some_samples(90), TOKENIZER)
    return root


def settings(root: Path, **values: Any) -> SpeechDataConfig:
    basics: dict[str, Any] = {
        "pack_tokens": TOKENS,
        "pack_positions": POSITIONS,
        "global_batch_packs": 4,
        "num_workers": 0,
        "processing": CONFIG,
    }
    return SpeechDataConfig(sources={"a": SourceConfig(path=str(root))}, **(basics | values))


@dataclass
class Notes:
    """Ledger rows and events of a loader."""

    ledger: list[dict[str, str]]
    events: list[dict[str, Any]]


def make_loader(
    root: Path, *, rank: int = 0, world_size: int = 1, seed: int = 3, **values: Any
) -> tuple[PlannedLoader, Notes]:
    config, notes = settings(root, **values), Notes([], [])
    noise = config.reference_noise
    loader = PlannedLoader(
        config,
        tokenizer=TOKENIZER,
        spec=SPEC,
        rank=rank,
        world_size=world_size,
        seed=seed,
        ledger=lambda **row: notes.ledger.append(row),
        event=lambda kind, **fields: notes.events.append({"kind": kind, **fields}),
        source_type=SpeechSource,
        make=SpeechMaker(TOKENIZER, CONFIG, SPEC, Store(), talker=TALKER, noise=noise, seed=seed),
    )
    return loader, notes


def packs_of(loader: PlannedLoader, steps: int) -> list[PackSpec]:
    planned = islice(loader.planned_steps(), steps)
    return [pack for _, _, _, packs in planned for pack in packs]


def row_of(loader: PlannedLoader, ref: SampleRef) -> IndexRow:
    return loader.sources[ref.source].row(ref.shard, ref.row)


CONTINUED = {"reference": ReferenceChoice.same_speaker}


@pytest.mark.parametrize("values", [{}, CONTINUED], ids=["plain", "continued"])
def test_the_index_promises_the_tokens_and_positions_that_encoding_gives(
    spoken: Path, values: dict[str, Any]
) -> None:
    """In both units: with one budget very large the size is the other's own."""
    checked = 0
    for budgets in ({"pack_positions": 1 << 30}, {"pack_positions": 1, "pack_tokens": 4096}):
        # A position is worth the whole token budget in the second case, so sizes are exact too.
        loader, _ = make_loader(spoken, **{"pack_tokens": 4096, **values, **budgets})
        source = loader.sources[0]
        found = source.window(0, source.epoch_tokens, seed=(3, 0))
        for i, ref in enumerate(
            map(
                SampleRef,
                [0] * len(found.row),
                *(v.tolist() for v in (found.shard, found.row, found.visit, found.reference)),
            )
        ):
            batch = loader._make([source.place(ref)], lambda number: None)
            assert batch.bad == []
            if budgets["pack_positions"] == 1:
                assert found.costs.num_tokens[i] == 4096 * batch.talker.text_index.numel()
            else:
                assert found.costs.num_tokens[i] == batch.thinker.num_tokens
            checked += 1
    assert checked == 2 * 90


def test_joint_sizes_keep_any_pack_within_both_budgets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        budgets = rng.integers(10, 400, 2)
        tokens, positions = rng.integers(0, 60, (2, 50))
        sizes = joint_tokens(
            tokens, positions, token_budget=int(budgets[0]), position_budget=int(budgets[1])
        )
        pack = np.cumsum(sizes) <= budgets[0]
        assert tokens[pack].sum() <= budgets[0]
        assert positions[pack].sum() <= budgets[1]
        # None is taken for larger than its own budget asks.
        assert ((sizes <= budgets[0]) == ((tokens <= budgets[0]) & (positions <= budgets[1]))).all()


@pytest.mark.parametrize("values", [{}, CONTINUED], ids=["plain", "continued"])
@pytest.mark.parametrize("budgets", [(TOKENS, POSITIONS), (300, 1000), (3000, 300)])
def test_packs_keep_within_both_budgets(
    spoken: Path, budgets: tuple[int, int], values: dict[str, Any]
) -> None:
    loader, notes = make_loader(spoken, pack_tokens=budgets[0], pack_positions=budgets[1], **values)
    batches = [b for item in islice(loader.steps(), 4) for b in item.micro_batches]
    tokens = [batch.thinker.num_tokens for batch in batches]
    positions = [batch.talker.text_index.numel() for batch in batches]
    assert max(tokens) <= budgets[0]
    assert max(positions) <= budgets[1]
    # The tighter budget is used well.
    full = max(np.mean(tokens) / budgets[0], np.mean(positions) / budgets[1])
    assert full > 0.7
    assert notes.ledger == []


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    record = {
        "messages": [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "o"}]
    }
    made = [*some_samples(30), Sample("silent", record)]
    made.append(spoken_sample("alone", "apple", "<|speaker_1|>", speaker="only once"))
    write_set(tmp_path, made, TOKENIZER, samples_per_shard=100)
    for values, wanted in (
        ({}, {"no_codes": 1}),
        (CONTINUED, {"no_codes": 1, "no_reference": 1}),
    ):
        loader, notes = make_loader(tmp_path, **values)
        left = {e["reason"]: e["samples"] for e in notes.events if e["kind"] == "left_out"}
        assert left == wanted
        keys = {row_of(loader, ref).key for p in packs_of(loader, 20) for ref in p.samples}
        assert len(keys) == 32 - sum(wanted.values())
        assert "silent" not in keys


def test_a_sample_over_the_talkers_budget_is_reported(spoken: Path) -> None:
    whole, _ = make_loader(spoken, pack_tokens=8192)
    batches = [b for item in islice(whole.steps(), 3) for b in item.micro_batches]
    lengths = [n for batch in batches for n in batch.talker.segments.lengths]
    limit = int(np.median(lengths))
    loader, notes = make_loader(spoken, pack_positions=limit)
    for item in islice(loader.steps(), 3):
        assert all(b.talker.text_index.numel() <= limit for b in item.micro_batches)
    assert notes.ledger
    assert all(f"data.pack_positions={limit}" in row["reason"] for row in notes.ledger)


def test_references_are_others_of_the_same_speaker_and_change(spoken: Path) -> None:
    loader, _ = make_loader(spoken, **CONTINUED)
    source = loader.sources[0]
    chosen: dict[tuple[int, int], set[int]] = {}
    for epoch in range(4):
        start = epoch * source.epoch_tokens
        found = source.window(start, start + source.epoch_tokens, seed=(3, 0))
        assert (found.visit == epoch).all()
        for shard, row, other in zip(found.shard, found.row, found.reference, strict=True):
            assert other != row
            assert source.row(shard, other).speaker == source.row(shard, row).speaker
            chosen.setdefault((shard, row), set()).add(other)
    assert len(chosen) == 90
    assert np.mean([len(others) for others in chosen.values()]) > 3.0
    again, _ = make_loader(spoken, **CONTINUED)
    same = again.sources[0].window(start, start + source.epoch_tokens, seed=(3, 0))
    np.testing.assert_array_equal(same.reference, found.reference)
    other_seed = again.sources[0].window(start, start + source.epoch_tokens, seed=(4, 0))
    chosen_by = [
        dict(zip(zip(f.shard, f.row, strict=True), f.reference, strict=True))
        for f in (found, other_seed)
    ]
    kept = [chosen_by[1][place] == other for place, other in chosen_by[0].items()]
    assert np.mean(kept) < 0.5


def batch_tensors(loader: PlannedLoader, steps: int) -> list[list[int]]:
    return [
        batch.talker.codec_ids.tolist()
        for item in islice(loader.steps(), steps)
        for batch in item.micro_batches
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resume_gives_the_same_references_and_noise(spoken: Path, num_workers: int) -> None:
    values: dict[str, Any] = {**CONTINUED, "reference_noise": 0.2, "balance": Balance.words}
    loader, _ = make_loader(spoken, **values)
    list(islice(loader.steps(), 2))
    wanted = batch_tensors(make_loader(spoken, **values)[0], 5)[8:]
    resumed, _ = make_loader(spoken, **values, num_workers=num_workers)
    resumed.load_state(loader.state())
    assert batch_tensors(resumed, 3) == wanted
    ranks = [make_loader(spoken, rank=r, world_size=2, **values)[0] for r in range(2)]
    dealt = [batch_tensors(rank, 5) for rank in ranks]
    assert sorted(dealt[0][4:] + dealt[1][4:]) == sorted(wanted)
    with pytest.raises(ConfigError, match=r"data\.reference_noise: 0\.2 -> 0\.1"):
        make_loader(spoken, **{**values, "reference_noise": 0.1})[0].load_state(loader.state())


def test_noise_replaces_its_share_of_the_reference_and_nothing_else(spoken: Path) -> None:
    clean, _ = make_loader(spoken, **CONTINUED)
    noisy, _ = make_loader(spoken, **CONTINUED, reference_noise=0.3)
    changed = total = 0
    for pack in packs_of(clean, 4):
        for ref in pack.samples:
            sample = clean.sources[0].place(ref)
            before, after = (
                loader._make([sample], lambda number: None).talker for loader in (clean, noisy)
            )
            assert torch.equal(before.target_ids, after.target_ids)
            assert torch.equal(before.text_index, after.text_index)
            assert sample.reference is not None
            assert sample.reference.speech is not None
            differs = before.codec_ids != after.codec_ids
            # Behind codec pad, before codec bos.
            assert not differs[0]
            assert not differs[1 + sample.reference.speech.num_codes :].any()
            changed += int(differs.sum())
            total += sample.reference.speech.num_codes
    assert 0.25 < changed / total < 0.35


def biased(count: int, rare: int) -> list[Sample]:
    """`window` is said by voice 0 but for every `rare`-th time; other words are even."""
    made = []
    for number in range(count):
        voice = VOICES[int(number % rare == 0)]
        made.append(spoken_sample(f"w-{number:03d}", f"window {WORDS[number % 3]}", voice))
        text = f"{WORDS[4 + number % 3]} {WORDS[number % 3]}"
        made.append(spoken_sample(f"o-{number:03d}", text, VOICES[number % 2]))
    return made


def test_balance_brings_every_word_in_every_voice_alike(tmp_path: Path) -> None:
    write_set(tmp_path, biased(100, 20), TOKENIZER, samples_per_shard=50)

    def epoch(**values: Any) -> Counter[tuple[str, bool]]:
        source = make_loader(tmp_path, **values)[0].sources[0]
        found = source.window(0, source.epoch_tokens, seed=(3, 0))
        visits = {*zip(found.shard.tolist(), found.row.tolist(), found.visit.tolist(), strict=True)}
        assert len(visits) == len(found.row)
        rows = map(source.row, found.shard.tolist(), found.row.tolist())
        said = [(row.speech.text, row.speaker) for row in rows if row.speech]
        return Counter((speaker, "window" in text) for text, speaker in said)

    plain, even = epoch(), epoch(balance=Balance.words, max_repeats=32)
    assert plain[VOICES[0], True] == 95
    assert plain[VOICES[1], True] == 5
    assert even[VOICES[0], True] == even[VOICES[1], True] == 95
    # Nothing that is common was lost.
    assert all(even[cell] >= count for cell, count in plain.items())
    capped = epoch(balance=Balance.words, max_repeats=4)
    assert capped[VOICES[1], True] == 20


def test_repeats_follow_the_rarest_cell() -> None:
    said = [("a b", "en", "x")] * 6 + [("a", "en", "y")] * 2 + [("c", "en", "y")]
    counts = count_cells(said)
    most = most_by_word(counts)
    assert counts == {("a", "x"): 6, ("b", "x"): 6, ("a", "y"): 2, ("c", "y"): 1}
    times = [repeats_of(u, counts, most, max_repeats=9) for u in (said[0], said[6], said[8])]
    # A word of one voice alone has nothing to be balanced with.
    assert times == [1, 3, 1]
    assert repeats_of(said[6], counts, most, max_repeats=2) == 2
    assert words_of("Don't stop, don't!", "en") == {"don't", "stop"}
    assert words_of("\u4f60\u597d\u3002\u4f60", "zh") == {"\u4f60", "\u597d"}


def test_rows_that_a_skip_list_names_are_neither_samples_nor_references(tmp_path: Path) -> None:
    write_set(tmp_path, some_samples(20), TOKENIZER)
    gone = {f"s-{number:04d}": "noise" for number in range(0, 20, 3)}
    write_skip_list(tmp_path, {"shard-000000.tar": gone})
    loader, _ = make_loader(tmp_path, **CONTINUED)
    source = loader.sources[0]
    found = source.window(0, 3 * source.epoch_tokens, seed=(3, 0))
    used = {source.row(0, row).key for row in {*found.row.tolist(), *found.reference.tolist()}}
    assert used
    assert not used & set(gone)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"pack_positions": 0}, "data.pack_positions"),
        ({"reference_noise": 0.1}, "data.reference_noise"),
        ({**CONTINUED, "reference_noise": 1.5}, "data.reference_noise"),
        ({"max_repeats": 3}, "data.max_repeats"),
        ({"balance": Balance.words, "max_repeats": 0}, "data.max_repeats"),
        ({"pack_tokens": 0}, "data.pack_tokens"),
    ],
)
def test_settings_that_are_wrong_or_without_effect_are_refused(
    spoken: Path, values: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as error:
        settings(spoken, **values)
    assert error.value.key == key


def test_bad_samples_leave_their_pack_shorter_and_are_named(tmp_path: Path) -> None:
    made = some_samples(6)
    made[1].record["speaker"] = "nobody"
    made[2].media["reply.codes.npy"] = dump_codes(torch.tensor([5, NUM_CODES]))
    write_set(tmp_path, made, TOKENIZER)
    loader, _ = make_loader(tmp_path)
    work = [loader.sources[0].place(SampleRef(0, 0, row)) for row in range(6)]
    batch = loader._make(work, lambda number: None)
    assert batch.keys == ["s-0000", "s-0003", "s-0004", "s-0005"]
    reasons = {key: reason.partition(":")[0] for _, _, key, reason in batch.bad}
    assert reasons == {"s-0001": "unknown_speaker", "s-0002": "bad_codes"}
    tar = tmp_path / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    speech = work[3].row.speech
    assert speech is not None
    data[speech.offset + speech.size - 1] ^= 1
    tar.write_bytes(bytes(data))
    (bad,) = loader._make(work[3:5], lambda number: None).bad
    assert bad[3].startswith("hash_mismatch")
    # A pack of which nothing is left keeps its rank in step.
    nothing = loader._make(work[1:3], lambda number: None)
    assert (nothing.keys, nothing.num_target_tokens, len(nothing.bad)) == ([], 0, 2)


def test_codes_of_another_codec_are_refused(tmp_path: Path) -> None:
    sources = {}
    for name, record in (
        ("a", {"codec": "mel_kmeans", "fingerprint": "f" * 16, "codebook_size": NUM_CODES}),
        ("b", {"codec": "mel_kmeans", "fingerprint": "e" * 16, "codebook_size": NUM_CODES}),
        ("large", {"codec": "mel_kmeans", "fingerprint": "f" * 16, "codebook_size": 200}),
        ("damaged", {"codec": "mel_kmeans"}),
        ("plain", None),
    ):
        write_set(tmp_path / name, some_samples(6), TOKENIZER)
        sources[name] = SourceConfig(path=str(tmp_path / name))
        if record is not None:
            (tmp_path / name / "codes.json").write_text(json.dumps(record))

    def build(run: Run, *names: str) -> PlannedLoader:
        config = settings(tmp_path)
        config.sources = {name: sources[name] for name in names}
        return build_speech_loader(config, TOKENIZER, SPEC, TALKER, run)

    place = RunConfig(dir=str(tmp_path / "run"))
    with start_run(place, stage="test", settings=place) as run:
        assert len(build(run, "a", "plain").sources) == 2
        with pytest.raises(ConfigError, match="of another codec"):
            build(run, "a", "b")
        with pytest.raises(ConfigError, match=r"200 codes, the Talker knows 96"):
            build(run, "large")
        with pytest.raises(DataError, match="corrupt_codes_file"):
            build(run, "damaged")


def test_the_name_of_cached_states_follows_the_content(tmp_path: Path) -> None:
    names = []
    for number, heard in enumerate((wav(0), wav(0), wav(1), None)):
        root = tmp_path / str(number)
        write_set(root, [spoken_sample("k", "apple", heard=heard)], TOKENIZER)
        source = make_loader(root)[0].sources[0]
        names.append(state_name(source.place(SampleRef(0, 0, 0))))
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_expected_bytes_cover_what_a_pack_takes(spoken: Path, tmp_path: Path) -> None:
    """With the states of a Thinker in it too, which are most of such a pack."""
    store = StateStore(tmp_path / "states", thinker="t", width=4096, dtype=torch.float32)
    place = RunConfig(dir=str(tmp_path / "run"))
    with start_run(place, stage="test", settings=place) as run:
        config = settings(spoken)
        running = build_speech_loader(config, TOKENIZER, SPEC, TALKER, run)
        cached = build_speech_loader(config, TOKENIZER, SPEC, TALKER, run, states=store)
    for pack in packs_of(running, 2):
        work = [running.sources[0].place(ref) for ref in pack.samples]
        made = running._make(work, lambda number: None)
        for sample, length in zip(work, made.thinker.segments.lengths, strict=True):
            store.put(state_name(sample), torch.zeros(length, 4096))
        for loader in (running, cached):
            batch = loader._make(work, lambda number: None)
            assert batch.bad == []
            fd = write_segment(batch)
            size = os.fstat(fd).st_size
            os.close(fd)
            expected = expected_bytes(pack, work, SPEC, loader._bytes_per_token)
            assert size <= expected
            # Short sounds count as whole chunks; states are all that is large where they are kept.
            assert loader is running or expected < 2 * size
