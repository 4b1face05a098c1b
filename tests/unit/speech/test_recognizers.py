"""The other recognisers behind the interface, and the settings that choose one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from data_pipelines.voices import speak
from omni_train.config.errors import ConfigError, DataError
from omni_train.speech.asr import (
    AsrConfig,
    AsrKind,
    PocketSphinxRecognizer,
    WhisperRecognizer,
    build_recognizer,
)

CONTROL = ("<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>")
CONTROL += ("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Whisper with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("whisper")
    pieces = [*LETTERS, *("\u0120" + c for c in LETTERS)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    stamps = [f"<|{0.02 * i:.2f}|>" for i in range(1501)]
    tokenizer = WhisperTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=CONTROL[0],
        bos_token=CONTROL[0],
        eos_token=CONTROL[0],
        pad_token=CONTROL[0],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    tokenizer.add_tokens(stamps)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in CONTROL}
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=64,
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )
    model = WhisperForConditionalGeneration(config)
    settings = model.generation_config
    # A release's own; one made from the model's config would be made again on loading.
    settings._from_model_config = False
    settings.alignment_heads = [[0, 0]]
    settings.no_timestamps_token_id = ids["<|notimestamps|>"]
    settings.is_multilingual = False
    settings.max_length = 24
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


def test_whisper_gives_words_with_times_inside_the_wave(whisper: Path) -> None:
    recognizer = build_recognizer(AsrConfig(kind=AsrKind.whisper, path=str(whisper)))
    wave = speak("river doctor", "en-us")
    heard = recognizer.transcribe(wave)
    assert heard == recognizer.transcribe(wave)
    assert heard.text
    assert heard.text.split() == [word for w in heard.words for word in w.text.split()]
    end_s = len(wave) / 16_000
    assert all(0 <= w.start_s <= w.end_s <= end_s for w in heard.words)
    with pytest.raises(DataError, match="bad_wave"):
        recognizer.transcribe(np.zeros(0, np.float32))


def test_a_model_that_cannot_time_words_is_refused(whisper: Path, tmp_path: Path) -> None:
    for file in whisper.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "generation_config.json"
    settings = json.loads(path.read_text())
    del settings["alignment_heads"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="alignment_heads"):
        WhisperRecognizer(str(tmp_path))
    with pytest.raises(ConfigError, match="no Whisper model"):
        WhisperRecognizer(str(tmp_path / "none"))


def test_paraformer_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="pip install funasr"):
        build_recognizer(AsrConfig(kind=AsrKind.paraformer, path="model"))


def test_settings_belong_to_their_backend() -> None:
    made = build_recognizer(AsrConfig(kind=AsrKind.pocketsphinx, vocabulary=["river"]))
    assert isinstance(made, PocketSphinxRecognizer)
    for change, key in (
        ({"kind": AsrKind.pocketsphinx}, "vocabulary"),
        ({"kind": AsrKind.pocketsphinx, "vocabulary": ["a"], "path": "x"}, "path"),
        ({"kind": AsrKind.whisper}, "path"),
        ({"kind": AsrKind.whisper, "path": "x", "vocabulary": ["a"]}, "vocabulary"),
        ({"kind": AsrKind.paraformer, "path": "x", "language": "zh"}, "language"),
    ):
        with pytest.raises(ConfigError, match=rf"asr\.{key}"):
            AsrConfig(**change)  # type: ignore[arg-type]
