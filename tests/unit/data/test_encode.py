"""Whole samples of real media: ids, labels, positions, order of the media arrays."""

import numpy as np
import pytest
import torch

from omni_train.config.errors import DataError
from omni_train.data.chatml import count_text_tokens
from omni_train.data.collate import collate
from omni_train.data.encode import encode
from omni_train.data.image import patchify, resize, resize_picture
from omni_train.data.media import decode_audio, decode_picture, decode_video, probe
from omni_train.data.types import IndexRow, ProcessingConfig, RawSample
from omni_train.objectives.next_token import next_token
from omni_train.speech.mel import log_mel
from tests.unit.data.clips import clip, every, tone, wav
from tests.unit.data.samples import CONFIG, SPEC, TOKENIZER, png, raw_sample


def run_encode(raw):
    return encode(raw, TOKENIZER, CONFIG, SPEC)


def user(*items):
    return {"role": "user", "content": list(items)}


def medium(kind, member, **more):
    return {"type": kind, kind: member, **more}


def text(value):
    return {"type": "text", "text": value}


ANSWER = {"role": "assistant", "content": "yellow river"}


def inside(ids, before, after):
    """Ids between the first `before` and the next `after`."""
    start = ids.index(before) + 1
    return ids[start : ids.index(after, start)]


def test_audio_sample():
    data = wav(tone(1.0, 16_000))
    sample = run_encode(
        raw_sample([user(medium("audio", "0.wav"), text("what?")), ANSWER], {"0.wav": data})
    )
    ids, tokens = sample.input_ids.tolist(), SPEC.tokens
    assert inside(ids, tokens.audio_bos, tokens.audio_eos) == [tokens.audio] * 25
    assert sample.mel_lengths.tolist() == [100]
    wave = decode_audio(data, probe(data, "0.wav"))
    assert torch.equal(sample.mel, log_mel(wave, SPEC.num_mel_bins))
    assert sample.patches.shape == (0, 3 * 2 * 14 * 14)
    assert sample.grid_thw.shape == (0, 3)
    assert torch.equal(sample.position_ids[0], torch.arange(len(ids)))
    assert sample.task == "test"


def test_labels_are_the_reply_and_its_end():
    messages = [user(medium("audio", "0.wav"), text("what?")), ANSWER]
    sample = run_encode(raw_sample(messages, {"0.wav": wav(tone(1.0, 16_000))}))
    kept = sample.labels != -100
    assert torch.equal(sample.labels[kept], sample.input_ids[kept])
    assert TOKENIZER.decode(sample.labels[kept]) == "yellow river<|im_end|>"
    assert int(kept.sum()) == count_text_tokens(messages, TOKENIZER)[1]
    assert len(sample.labels) == len(sample.input_ids) == sample.num_tokens


def test_weights_of_turns_reach_the_targets_of_a_pack():
    weights = [0.5, 0, None, 2]
    messages = []
    for number, weight in enumerate(weights):
        extra = {} if weight is None else {"weight": weight}
        messages += [user(text(f"turn {number}")), {**ANSWER, **extra}]
    plain = [{k: v for k, v in turn.items() if k != "weight"} for turn in messages]
    weighted, usual = run_encode(raw_sample(messages, {})), run_encode(raw_sample(plain, {}))
    assert torch.equal(weighted.input_ids, usual.input_ids)
    assert usual.label_weights is None
    batch = collate([usual, weighted], SPEC)
    each = int((usual.labels != -100).sum()) // len(weights)
    wanted = [1.0] * (4 * each) + [0.5] * each + [1.0] * each + [2.0] * each
    assert batch.target_weights.tolist() == wanted
    assert batch.num_target_tokens == len(wanted) == len(batch.target_ids)
    # A pack is the sum of its turns, each at its weight.
    logprobs = torch.arange(1.0, len(wanted) + 1, requires_grad=True)
    output = next_token(lambda given: logprobs, batch)
    assert output.loss == -(torch.tensor(wanted) * logprobs).sum()
    assert output.num_tokens == len(wanted)


def test_prompt_without_supervision():
    messages = [user(text("say something"))]
    raw = raw_sample(messages, {})
    assert (run_encode(raw).labels == -100).all()
    prompt = encode(raw, TOKENIZER, CONFIG, SPEC, add_generation_prompt=True)
    assert TOKENIZER.decode(prompt.input_ids).endswith("<|im_start|>assistant\n")


def test_order_of_media_arrays_is_the_order_of_placeholders():
    media = {
        "0.png": png(60, 90, 1),
        "1.wav": wav(tone(0.5, 16_000)),
        "2.mp4": clip(every(2.0, 4), sound=tone(2.0, 16_000)),
        "3.png": png(120, 60, 2),
        "4.wav": wav(tone(0.3, 16_000)),
    }
    items = [
        medium({"png": "image", "wav": "audio", "mp4": "video"}[name.split(".")[1]], name)
        for name in media
    ]
    sample = run_encode(raw_sample([user(*items), ANSWER], media))
    clip_frames = -(-probe(media["2.mp4"], "2.mp4").num_audio_samples // 160)
    assert sample.mel_lengths.tolist() == [50, clip_frames, 30]
    assert sample.mel.shape[1] == int(sample.mel_lengths.sum())
    assert sample.grid_thw.tolist()[0] == [1, 4, 6]
    assert sample.grid_thw[:, 0].tolist() == [1, 2, 1]
    sizes = sample.grid_thw.prod(1).tolist()
    expected, _ = patchify(resize_picture(decode_picture(media["3.png"]), 112, 56), SPEC)
    assert torch.equal(sample.patches[-sizes[2] :], expected)
    info = probe(media["2.mp4"], "2.mp4")
    grid = sample.grid_thw[1].tolist()
    frames = decode_video(media["2.mp4"], [0, 1, 2, 3], info)
    expected, _ = patchify(resize(frames, grid[1] * 14, grid[2] * 14), SPEC)
    assert torch.equal(sample.patches[sizes[0] : sizes[0] + sizes[1]], expected)


def test_clip_with_sound_is_interleaved_in_time():
    data = clip(every(2.0, 8), sound=tone(4.0, 16_000))  # 4 s: two blocks of two patches
    sample = run_encode(raw_sample([user(medium("video", "0.mp4")), ANSWER], {"0.mp4": data}))
    ids, tokens = sample.input_ids.tolist(), SPEC.tokens
    start = ids.index(tokens.vision_bos)
    assert ids[start + 1] == tokens.audio_bos
    end = ids.index(tokens.vision_eos)
    assert ids[end - 1] == tokens.audio_eos
    inner = ids[start + 2 : end - 1]
    patch = int(sample.grid_thw[0, 1:].prod()) // 4
    sound = (int(sample.mel_lengths[0]) - 1) // 4
    assert inner == (
        [tokens.video] * 2 * patch
        + [tokens.audio] * 50
        + [tokens.video] * 2 * patch
        + [tokens.audio] * (len(inner) - 4 * patch - 50)
    )
    assert abs(len(inner) - 4 * patch - sound) <= 1
    time = sample.position_ids[0]
    base = int(time[start]) + 1
    video = time[torch.tensor(ids) == tokens.video] - base
    assert video.reshape(4, patch)[:, 0].tolist() == [0, 25, 50, 75]
    audio = time[torch.tensor(ids) == tokens.audio] - base
    assert audio.tolist() == list(range(len(audio)))
    assert time[start] == time[start + 1]
    assert time[end] == time[end - 1] == time[start:end].max()
    assert time[end + 1] == time[end] + 1


@pytest.mark.parametrize(("first_frame_s", "sound_s"), [(0.0, 0.48), (0.8, 0.0)])
def test_streams_that_start_apart_are_apart_in_position(first_frame_s, sound_s):
    times = [first_frame_s + t for t in every(2.0, 6)]
    data = clip(times, sound=tone(3.0, 48_000), rate_hz=48_000, sound_start_s=sound_s,
                container="matroska", audio_codec="libopus")  # fmt: skip
    sample = run_encode(raw_sample([user(medium("video", "0.mkv"))], {"0.mkv": data}))
    ids = sample.input_ids
    base = int(sample.position_ids[0, ids.tolist().index(SPEC.tokens.vision_bos)]) + 1
    first_video = int(sample.position_ids[0, ids == SPEC.tokens.video][0]) - base
    first_audio = int(sample.position_ids[0, ids == SPEC.tokens.audio][0]) - base
    assert (first_video, first_audio) == (round(first_frame_s * 25), round(sound_s * 25))


@pytest.mark.parametrize("fps", [1.0, 2.0, 2.5, 4.0])
def test_rates_give_true_times(fps):
    data = clip(every(fps, 8))
    sample = run_encode(raw_sample([user(medium("video", "0.mp4"))], {"0.mp4": data}))
    ids = sample.input_ids
    video = sample.position_ids[0, ids == SPEC.tokens.video]
    found = sorted(set((video - video.min()).tolist()))
    chosen = (
        np.arange(8) if fps <= 2 else np.array({2.5: [0, 2, 3, 4, 5, 7], 4.0: [0, 2, 4, 6]}[fps])
    )
    assert found == [int(25 * i / fps + 1e-6) for i in chosen[::2]]


def test_sound_left_out_silent_and_too_short():
    spoken = clip(every(2.0, 4), sound=tone(2.0, 16_000))
    silent = clip(every(2.0, 4))
    tokens = SPEC.tokens
    for data, item in [
        (spoken, medium("video", "0.mp4", audio_in_video=False)),
        (silent, medium("video", "0.mp4")),
        (clip(every(2.0, 4), sound=np.zeros(0, np.float32)), medium("video", "0.mp4")),
    ]:
        sample = run_encode(raw_sample([user(item), ANSWER], {"0.mp4": data}))
        ids = sample.input_ids.tolist()
        assert set(inside(ids, tokens.vision_bos, tokens.vision_eos)) == {tokens.video}
        assert len(sample.mel_lengths) == 0
    asked = medium("video", "0.mp4", audio_in_video=True)
    with pytest.raises(DataError, match="empty_audio"):
        run_encode(raw_sample([user(asked)], {"0.mp4": silent}))


@pytest.mark.parametrize(("num_samples", "tokens"), [(320, 0), (321, 1), (1, 0)])
def test_sound_too_short_for_a_token(num_samples, tokens):
    data = wav(np.full(num_samples, 0.1))
    raw = raw_sample([user(medium("audio", "0.wav"))], {"0.wav": data})
    if tokens:
        assert int((run_encode(raw).input_ids == SPEC.tokens.audio).sum()) == tokens
        return
    with pytest.raises(DataError) as caught:
        run_encode(raw)
    assert caught.value.reason == "empty_audio"


def test_index_that_does_not_fit_the_dialogue():
    data = {"0.wav": wav(tone(1.0, 16_000)), "1.png": png(60, 60)}
    messages = [user(medium("audio", "0.wav"), medium("image", "1.png"))]
    raw = raw_sample(messages, data)
    raw.row.media.reverse()
    with pytest.raises(DataError, match="stale_index"):
        run_encode(raw)
    raw = raw_sample(messages, data)
    raw.row.media[1].width += 1
    with pytest.raises(DataError, match="stale_index"):
        run_encode(raw)
    raw = raw_sample(messages, data)
    raw.row.media.pop()
    with pytest.raises(DataError, match="stale_index"):
        run_encode(raw)
    raw = raw_sample(messages, data)
    del raw.media["1.png"]
    with pytest.raises(DataError, match="missing_member"):
        run_encode(raw)


def test_no_messages():
    raw = RawSample(IndexRow("k", 0, 0, "", [], 0, 0), {"messages": None}, {})
    with pytest.raises(DataError, match="bad_messages"):
        encode(raw, TOKENIZER, ProcessingConfig(), SPEC)
