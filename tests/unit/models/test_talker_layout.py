"""What goes into each position of the Talker, written out by hand, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omni_train.config.errors import DataError
from omni_train.data.types import EncodedSample
from omni_train.models.talker_layout import (
    Reference,
    SpeechBatch,
    SpokenReply,
    TalkerSpec,
    lay_out,
    pack_speech,
    spoken_reply,
)

# Rows: tts text eos, tts text pad, two speakers, and a new row for the second of them.
SPEC = TalkerSpec(
    codec_pad=100,
    codec_bos=101,
    codec_eos=102,
    codec_mask=104,
    num_codes=96,
    vocab_size=108,
    row_ids=(7, 8, 20, 21, 21),
    num_new_speakers=1,
    speakers={"anna": 20, "bert": 21},
)
EOS, PAD, ANNA, BERT = -1, -2, -3, -5


def reply(codes: list[int], *, length: int = 3, speaker: str = "anna") -> SpokenReply:
    """A prompt of 4 tokens with a picture in it, and words at 4, 5, .. of the document."""
    positions = torch.tensor([[0, 1, 1, 4], [0, 1, 2, 4], [0, 1, 3, 4]])
    text = 5 + torch.arange(8)
    return SpokenReply(
        position_ids=torch.cat([positions, text.expand(3, -1)], dim=1),
        prompt_length=4,
        reply_start=4,
        reply_length=length,
        speaker=speaker,
        codes=torch.tensor(codes, dtype=torch.long),
    )


def test_layout_of_a_reply() -> None:
    layout = lay_out(reply([11, 12, 13, 14, 15]), SPEC)
    assert layout.text_index.tolist() == [0, 1, 2, 3, ANNA, 4]
    assert layout.codec_ids.tolist() == [-1, -1, -1, -1, 100, 101]
    assert layout.stream_index.tolist() == [5, 6, EOS, PAD]
    assert layout.position_ids[0].tolist() == [0, 1, 1, 4, 5, 6]
    assert layout.position_ids[2].tolist() == [0, 1, 3, 4, 5, 6]
    batch = pack_speech([layout], [12], SPEC)
    assert batch.text_index.tolist() == [0, 1, 2, 3, 12 + 2, 4, 5, 6, 12 + 0, 12 + 1, 12 + 1]
    assert batch.codec_index.tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert batch.codec_ids.tolist() == [100, 101, 11, 12, 13, 14, 15]
    assert batch.target_index.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.target_ids.tolist() == [11, 12, 13, 14, 15, 102]
    assert batch.position_ids[1, 0].tolist() == [0, 1, 1, 4, 5, 6, 7, 8, 9, 10, 11]
    assert layout.num_positions == 4 + 2 + 5


def test_layout_with_a_reference() -> None:
    """Two words of the reply are the reference; its codes come before the codec bos."""
    asked = replace(
        reply([31, 32], length=2),
        reply_start=6,
        reference=Reference(4, 2, torch.tensor([21, 22, 23, 24])),
    )
    layout = lay_out(asked, SPEC)
    assert layout.text_index.tolist() == [0, 1, 2, 3, ANNA, 4, 5, EOS, PAD, 6]
    assert layout.codec_ids.tolist() == [-1, -1, -1, -1, 100, 21, 22, 23, 24, 101]
    assert layout.stream_index.tolist() == [7, EOS, PAD]
    batch = pack_speech([layout], [12], SPEC)
    assert batch.target_index.tolist() == [9, 10, 11]
    assert batch.target_ids.tolist() == [31, 32, 102]
    assert batch.position_ids[3, 0].tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert layout.num_positions == 4 + 2 + 4 + 2


def test_documents_without_speech_only_move_the_others() -> None:
    one, two = lay_out(reply([1, 2]), SPEC), lay_out(reply([3], length=1, speaker="bert"), SPEC)
    batch = pack_speech([one, None, two], [12, 30, 12], SPEC)
    assert batch.segments.lengths == [one.num_positions, two.num_positions]
    assert batch.text_index[8:].tolist() == [42, 43, 44, 45, 54 + 4, 46, 54 + 0]
    assert batch.target_index.tolist() == [5, 6, 7, 8 + 5, 8 + 6]
    assert batch.target_ids.tolist() == [1, 2, 102, 3, 102]
    assert batch.position_ids[0, 0].tolist() == [*range(8), *range(7)]
    assert batch.num_target_tokens == 5
    assert -1 - SPEC.speaker_row("bert") == BERT, "the new row, not the table's"


def test_a_pack_without_speech_has_one_weightless_target() -> None:
    for batch in (pack_speech([], [], SPEC), pack_speech([None], [9], SPEC)):
        assert (batch.num_target_tokens, batch.target_weights.tolist()) == (0, [0.0])
        assert batch.text_index.tolist() == [0]


def dialogue(ids: list[int], supervised: list[int]) -> EncodedSample:
    tokens = torch.tensor(ids)
    labels = torch.full_like(tokens, -100)
    labels[supervised] = tokens[supervised]
    empty = torch.zeros(0, dtype=torch.long)
    return EncodedSample(
        key="k",
        input_ids=tokens,
        labels=labels,
        position_ids=torch.arange(len(ids)).expand(3, -1),
        patches=empty,
        grid_thw=empty,
        mel=empty,
        mel_lengths=empty,
    )


def test_the_last_assistant_turn_is_spoken() -> None:
    """Two assistant turns, each with its end (99); a newline follows."""
    ids = [1, 2, 5, 6, 99, 3, 1, 2, 7, 8, 9, 99, 3]
    sample = dialogue(ids, [2, 3, 4, 8, 9, 10, 11])
    got = spoken_reply(sample, im_end=99, speaker="anna", codes=torch.tensor([1]))
    assert (got.prompt_length, got.reply_start, got.reply_length) == (8, 8, 3)
    codes = torch.tensor([4, 5, 6])
    got = spoken_reply(
        sample,
        im_end=99,
        speaker="anna",
        codes=torch.tensor([1]),
        num_reference_tokens=2,
        reference_codes=codes,
    )
    assert (got.prompt_length, got.reply_start, got.reply_length) == (8, 10, 1)
    assert got.reference == Reference(8, 2, codes)
    assert lay_out(got, SPEC).text_index[8:].tolist() == [ANNA, 8, 9, EOS, 10]
    with pytest.raises(DataError, match="no_reply"):
        spoken_reply(dialogue(ids, []), im_end=99, speaker="anna", codes=codes)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (reply([1], length=0), "empty_reply"),
        (reply([1], length=9), "bad_span"),
        (replace(reply([1]), prompt_length=0), "bad_span"),
        (replace(reply([1]), reply_start=3), "bad_span"),
        (reply([96]), "bad_codes"),
        (reply([-1]), "bad_codes"),
        (reply([1], speaker="carl"), "unknown_speaker"),
        (replace(reply([1]), reference=Reference(4, 2, torch.arange(4))), "bad_span"),
        (
            replace(reply([1]), reply_start=6, reference=Reference(4, 2, torch.arange(2))),
            "short_reference",
        ),
        (
            replace(reply([1]), reply_start=6, reference=Reference(4, 2, torch.tensor([1, 2, 99]))),
            "bad_codes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_spoken(asked: SpokenReply, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as raised:
        lay_out(asked, SPEC)
    assert raised.value.reason == reason


def test_speech_without_codes_cannot_be_learnt() -> None:
    with pytest.raises(DataError, match="empty_speech"):
        pack_speech([lay_out(reply([]), SPEC)], [12], SPEC)


def test_ids_that_are_no_sound_are_suppressed() -> None:
    assert SPEC.stop_ids == (100, 102)
    assert SPEC.suppressed_ids == (96, 97, 98, 99, 101, 103, 104, 105, 106, 107)


def test_a_batch_has_one_source_of_states() -> None:
    pack = pack_speech([], [], SPEC)
    with pytest.raises(AssertionError):
        SpeechBatch(talker=pack)
    moved = SpeechBatch(talker=pack, states=torch.zeros(1, 4)).to(torch.device("meta"))
    assert moved.states is not None
    assert moved.states.is_meta
    assert moved.talker.text_index.is_meta
