"""Stage 9 on spoken replies: the same codes, waves and scores on 1 and 2 ranks, kept and logged."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from data_pipelines.codes import add_codes
from data_pipelines.demo_content import VOCABULARY
from data_pipelines.shards import Sample, write_shards
from data_pipelines.voices import SAMPLE_RATE_HZ, speak
from omni_train.config.errors import DataError
from omni_train.data.source import ShardSet
from omni_train.evaluation.references import References
from omni_train.evaluation.tts import Failure
from omni_train.speech.codec import CodecConfig
from omni_train.speech.codec_fit import starting_centroids
from omni_train.speech.mel_kmeans import CODEC_DIR, MelKMeansCodec, MelKMeansConfig, stacked_mel
from omni_train.tracking.events import read_jsonl
from tests.numerics.samples import small_tokenizer
from tests.numerics.talker_models import SIZES, VOICE, make_models
from tests.recipes.launching import finish, start
from tests.wandb_files import read_wandb

OTHER = "<|speaker_2|>"
# espeak-ng's name of each speaker's voice.
VOICES = {VOICE: "en-us", OTHER: "en-us+f2"}
TEXTS = tuple(f"{one} {other}" for one, other in zip(VOCABULARY, VOCABULARY[5:], strict=False))
SAMPLES, KEPT, MAX_CODES = 2, 3, 12


def wav(text: str, voice: str) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, speak(text, voice), SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return sink.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, a codec, spoken replies without codes, recordings of two voices."""
    root = tmp_path_factory.mktemp("spoken")
    (root / "model").mkdir()
    make_models(root / "model")
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(str(root / "tokenizer"))
    config = MelKMeansConfig(frame_rate_hz=25, codebook_size=SIZES.num_codes)
    waves = [torch.from_numpy(speak(text, v)) for text in TEXTS for v in VOICES.values()]
    frames = torch.cat([stacked_mel(wave, SAMPLE_RATE_HZ, config) for wave in waves])
    centroids = starting_centroids(frames, SIZES.num_codes, seed=0)
    MelKMeansCodec(config, centroids).save(root / "codec" / CODEC_DIR)
    spoken, recordings = [], []
    for number, text in enumerate(TEXTS):
        speaker = (VOICE, OTHER)[number % 2]
        media = {"0.wav": wav(text, VOICES[speaker])}
        said = [{"type": "text", "text": text}, {"type": "speech", "speech": "0.wav"}]
        asked = {"role": "user", "content": f"say {text}"}
        record = {"messages": [asked, {"role": "assistant", "content": said}], "speaker": speaker}
        spoken.append(Sample(f"s{number}", record, media))
        heard = {"role": "user", "content": [{"type": "audio", "audio": "0.wav"}]}
        record = {"messages": [heard, {"role": "assistant", "content": text}], "speaker": speaker}
        recordings.append(Sample(f"r{number}", record, media))
    for name, samples in (("spoken", spoken), ("recordings", recordings)):
        write_shards(samples, root / name, tokenizer=tokenizer, samples_per_shard=4)
    add_codes(
        root / "spoken",
        root / "coded",
        CodecConfig(path=str(root / "codec")),
        tokenizer_dir=str(root / "tokenizer"),
        num_workers=0,
    )
    return root


def run(made: Path, run_dir: Path, *extra: str, ranks: int) -> tuple[int, str]:
    asr = f"{{kind: pocketsphinx, vocabulary: [{', '.join(VOCABULARY)}]}}"
    sampling = f"{{max_codes: {MAX_CODES}, num_samples: {SAMPLES}, num_slots: 4}}"
    voices = f"{{path: '{made}/recordings', per_voice: 3}}"
    task = f"{{path: '{made}/spoken', codec: {{path: '{made}/codec'}}, asr: {asr}, "
    task += f"sampling: {sampling}, voices: {voices}, keep_waves: {KEPT}}}"
    overrides = [
        f"run.dir='{run_dir}'",
        f"model.tokenizer='{made}/tokenizer'",
        f"model.init_from='{made}/model'",
        "precision=fp32",
        f"+speech={{tts: {task}}}",
        *extra,
    ]
    return finish(start("evaluate", overrides, ranks=ranks))


@pytest.fixture(scope="module")
def one(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    code, output = run(made, run_dir, ranks=1)
    assert code == 0, output
    return run_dir


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(run_dir / "predictions-tts.jsonl"))


def figures(run_dir: Path) -> dict[str, float]:
    events = read_jsonl(run_dir / "events.jsonl")
    (found,) = [e["figures"] for e in events if e["kind"] == "evaluation"]
    return found  # type: ignore[no-any-return]


def test_two_ranks_score_as_one(made: Path, one: Path, tmp_path: Path) -> None:
    code, output = run(made, tmp_path / "run", "tracking=none", ranks=2)
    assert code == 0, output
    assert rows(tmp_path / "run") == rows(one)
    assert figures(tmp_path / "run") == figures(one)
    waves = [sorted((r / "audio" / "tts").iterdir()) for r in (one, tmp_path / "run")]
    assert [path.name for path in waves[0]] == [f"s{number}.wav" for number in range(KEPT)]
    assert [p.read_bytes() for p in waves[0]] == [p.read_bytes() for p in waves[1]]


@pytest.mark.slow
def test_a_talker_is_heard_before_and_after_its_thinker_changed(
    made: Path, one: Path, tmp_path: Path
) -> None:
    """The same Thinker gives the same speech; another one is heard with the same Talker."""
    tensors = load_file(made / "model" / "model.safetensors")
    (tmp_path / "other").mkdir()
    shutil.copy(made / "model" / "config.json", tmp_path / "other" / "config.json")
    thinker = {name: t for name, t in tensors.items() if name.startswith("thinker.")}
    head = "thinker.lm_head.weight"
    # The head makes no speech, so this Thinker is the same to the Talker.
    save_file(thinker | {head: thinker[head] * 2}, str(tmp_path / "other" / "model.safetensors"))
    more = (f"talker_before='{made}/model'", "tracking=none")
    code, output = run(
        made, tmp_path / "run", f"model.init_from='{tmp_path}/other'", *more, ranks=1
    )
    assert code == 0, output
    events = list(read_jsonl(tmp_path / "run" / "events.jsonl"))
    (guard,) = [e for e in events if e["kind"] == "talker_guard"]
    assert guard["task"] == "tts"
    assert guard["rise"] == 0.0
    assert guard["wer_before"] == guard["wer_after"] == figures(one)["wer"]
    assert rows(tmp_path / "run") == rows(one)
    names = [e["task"] for e in events if e["kind"] == "evaluation"]
    assert names == ["tts_before", "tts"]


def test_every_prediction_is_there_with_what_was_heard(made: Path, one: Path) -> None:
    found = rows(one)
    assert [(r["key"], r["sample"]) for r in found] == [
        (f"s{number}", sample) for number in range(len(TEXTS)) for sample in range(SAMPLES)
    ]
    assert {r["text"] for r in found} == set(TEXTS)
    assert len({tuple(r["codes"]) for r in found}) > len(TEXTS), "samples differ"
    assert all(len(r["codes"]) <= MAX_CODES for r in found)
    for r in found:
        assert r["wer"] == r["errors"] / 2
        cut = len(r["codes"]) == MAX_CODES and not r["ended"]
        assert (r["failure"] == Failure.no_end.name) == cut
    whole = figures(one)
    assert whole["wer"] == pytest.approx(sum(r["wer"] for r in found) / len(found))
    assert whole["low"] <= whole["wer"] <= whole["high"]
    nearest = [r["nearest"] == r["speaker"] for r in found if "nearest" in r]
    assert whole["nearest_share"] == pytest.approx(sum(nearest) / len(found))
    assert whole["voice_accuracy"] >= 0.8


def test_kept_waves_are_those_of_the_codes_and_in_wandb(made: Path, one: Path) -> None:
    codec = MelKMeansCodec.load(made / "codec")
    first = rows(one)[0]
    wave, rate = soundfile.read(one / first["wave"], dtype="float32")
    assert rate == codec.sample_rate_hz
    decoded = codec.decode(torch.tensor(first["codes"]))
    # As 16-bit samples.
    torch.testing.assert_close(torch.from_numpy(wave), decoded, rtol=0, atol=1e-4)
    shown = read_wandb(one / "wandb")
    (columns, said) = next(iter(shown.tables.values()))
    assert [row[columns.index("text")] for row in said] == list(TEXTS[:KEPT])
    heard = [shown.media[row[columns.index("audio")]].read_bytes() for row in said]
    assert heard == [(one / row["wave"]).read_bytes() for row in rows(one) if "wave" in row]


@pytest.mark.slow
def test_a_reply_may_continue_another_utterance_of_its_voice(
    made: Path, one: Path, tmp_path: Path
) -> None:
    codec = MelKMeansCodec.load(made / "codec")
    references = References(str(made / "coded"), SIZES.num_codes)
    source = ShardSet("spoken", str(made / "spoken"))
    rows_of = [row for shard in range(len(source.counts)) for row in source.rows(shard)]
    for row in rows_of:
        found = references.choose(row)
        assert row.speech is not None
        assert found.text != row.speech.text
        wave = torch.from_numpy(speak(found.text, VOICES[row.speaker]))
        assert len(found.codes) == len(codec.encode(wave, SAMPLE_RATE_HZ))
        assert references.choose(row).text == found.text
    rows_of[0].speaker = "nobody"
    with pytest.raises(DataError, match="no_reference"):
        references.choose(rows_of[0])
    given = f"speech.tts.references='{made}/coded'"
    code, output = run(made, tmp_path / "run", given, "tracking=none", ranks=1)
    assert code == 0, output
    assert [r["text"] for r in rows(tmp_path / "run")] == [r["text"] for r in rows(one)]
    assert [r["codes"] for r in rows(tmp_path / "run")] != [r["codes"] for r in rows(one)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.tiny.talker_width=7", "model.tiny.talker_width"),
        ("model.init_from=''", "random weights"),
        ("speech.tts.sampling.top_p=0", "sampling.top_p"),
        ("speech.tts.voices.per_voice=40", "no recording is left"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    made: Path, tmp_path: Path, change: str, message: str
) -> None:
    code, output = run(made, tmp_path / "run", change, "tracking=none", ranks=1)
    assert code != 0
    assert message in output
