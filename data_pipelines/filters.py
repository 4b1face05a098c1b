"""Quality scores of a sample, measured once and kept in the index.

Done here: measuring, from the record, the media's facts and the sound itself. Not done here:
limits and decisions (omni_train/data/filters.py, which also says what each score means).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from omni_train.data.media import SoundInOrder, decode_audio
from omni_train.data.types import IndexRow, MediaInfo, MediaKind
from omni_train.data.video import MICROSECONDS
from omni_train.speech.mel import SAMPLE_RATE_HZ

_FULL_SCALE = 0.9995
_SILENCE = 10 ** (-50 / 20)
_WINDOWS_PER_SECOND = 50
_NGRAM = 4
# Scripts without spaces count by character; everything else by runs of letters and digits.
_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]"
    "|[^\\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]+(?:['\u2019]\\w+)*"
)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; Chinese, Japanese and Thai by character."""
    return [word.lower() for word in _WORD.findall(text)]


def repeated_ngram_share(words: Sequence[str], *, size: int = _NGRAM) -> float:
    """Return the share of n-grams that came before; 0 where there are fewer words than `size`."""
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def sound_shares(data: bytes, info: MediaInfo) -> tuple[float, float]:
    """Return (clipping share, silence share) of a sound file or of a clip's sound."""
    windows, quiet, samples, clipped = 0, 0, 0, 0
    for block, rate_hz in _blocks(data, info):
        clipped += int((np.abs(block) >= _FULL_SCALE).sum())
        samples += block.size
        length = max(1, rate_hz // _WINDOWS_PER_SECOND)
        mono = block.mean(axis=1, dtype=np.float64)
        whole = len(mono) // length
        # What is left of a last window counts as a window of its own.
        parts = [mono[: whole * length].reshape(whole, length), mono[None, whole * length :]]
        for part in parts:
            if part.size:
                power = np.sqrt((part**2).mean(axis=1))
                windows += len(power)
                quiet += int((power < _SILENCE).sum())
    return clipped / max(samples, 1), quiet / max(windows, 1)


def av_mismatch_s(info: MediaInfo) -> float:
    """Return by how many seconds sound and picture of a clip start or end apart."""
    frame_us = MICROSECONDS / info.fps if info.fps > 0 else 0.0
    first_us = info.first_frame_us
    last_us = first_us + (info.num_frames - 1) * frame_us
    if info.frame_times_us:
        first_us, last_us = info.frame_times_us[0], float(info.frame_times_us[-1])
    sound_us = info.num_audio_samples * MICROSECONDS / info.sample_rate_hz
    starts = abs(info.audio_start_us - first_us)
    ends = abs(info.audio_start_us + sound_us - (last_us + frame_us))
    return max(starts, ends) / MICROSECONDS


def measure_quality(
    record: Mapping[str, Any], media: Sequence[MediaInfo], data: Mapping[str, bytes]
) -> dict[str, float]:
    """Return the scores that apply to a sample, by name.

    Args:
        record: its JSON member.
        media: facts of its media.
        data: bytes of at least every member with sound.
    """
    words = words_of(" ".join(_texts(record, "assistant")))
    quality = {"repeated_ngram_share": repeated_ngram_share(words)}
    heard = [info for info in media if info.has_audio and info.use_audio]
    if heard:
        shares = [sound_shares(data[sound_member(info)], info) for info in heard]
        quality["clipping_share"] = max(clipping for clipping, _ in shares)
        seconds = [info.num_audio_samples / info.sample_rate_hz for info in heard]
        weighted = sum(quiet * s for (_, quiet), s in zip(shares, seconds, strict=True))
        quality["silence_share"] = weighted / sum(seconds)
        quality["words_per_second"] = len(words) / sum(seconds)
    clips = [info for info in heard if info.kind is MediaKind.video]
    if clips:
        quality["av_mismatch_s"] = max(av_mismatch_s(info) for info in clips)
    return {name: round(score, 6) for name, score in quality.items()}


def sound_member(info: MediaInfo) -> str:
    """Return the member that a medium's sound is read from."""
    return info.parts[-1].member if info.parts else info.member


def content_hash(record: Mapping[str, Any], row: IndexRow) -> str:
    """Return a hash that two samples share where their media, questions and replies are the same.

    A prompt whose wording was chosen from several (`asked`) counts by what it asks for.
    """
    digest = xxhash.xxh3_128()
    for info in row.media:
        for place in info.places():
            digest.update(f"{info.kind.name}:{place.xxh3}\n".encode())
    if row.speech is not None:
        # The same words in another voice are another sample.
        digest.update(f"speech:{row.speaker}:{row.speech.xxh3}\n".encode())
    roles = ("assistant",) if record.get("asked") else ("system", "user", "assistant")
    asked = sorted(dict(record.get("asked") or {}).items())
    texts = [(role, text) for role in roles for text in _texts(record, role)]
    digest.update(repr((asked, texts)).encode("utf-8", "backslashreplace"))
    return str(digest.hexdigest())


def _texts(record: Mapping[str, Any], role: str) -> list[str]:
    texts: list[str] = []
    for turn in record["messages"]:
        if turn.get("role") != role:
            continue
        content = turn.get("content")
        if isinstance(content, str):
            texts.append(content)
        else:
            texts += [item["text"] for item in content or () if item.get("type") == "text"]
    return texts


def _blocks(data: bytes, info: MediaInfo) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Yield (float32 [S, channels], rate in Hz), a minute of a sound file at a time."""
    if info.kind is MediaKind.video and not info.parts:
        yield decode_audio(data, info).numpy()[:, None], SAMPLE_RATE_HZ
        return
    with SoundInOrder(io.BytesIO(data)) as file:
        rate_hz = int(file.samplerate)
        size = max((rate_hz // _WINDOWS_PER_SECOND) * _WINDOWS_PER_SECOND * 60, 1)
        while len(block := file.read(size, dtype="float32", always_2d=True)):
            yield block, rate_hz
