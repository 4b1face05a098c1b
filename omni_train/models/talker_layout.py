"""Which Thinker state, table row and codec embedding goes into which position of the Talker.

Pure host code for the data worker: it reads lengths and ids and gives index tensors, so the forward
pass on a GPU has nothing to wait for. No weight is touched here (talker.py does the sums).

The Thinker's document holds a prompt of P tokens, a reply y_1..y_N and, for speech continuation, a
reference text r_1..r_M with its codes a_1..a_A. s(p) is the Thinker's state at position p: last
hidden state plus input embedding, the latter zero at media placeholders. E is the Thinker's
embedding table, C the Talker's (RECIPE.md section 5).

    position        input                                          target
    0 .. P-1        s(p)                                           -
    P               E[speaker bos]    + C[codec pad]               -
    P+i             ref_i             + C[a_i]        i = 1..A     -
    P+A+1           s(y_1)            + C[codec bos]               c_1
    P+A+1+k         text_k            + C[c_k]        k = 1..K     c_{k+1}, finally codec eos

    text_1, text_2, .. = s(y_2) .. s(y_N), then E[tts text eos], then E[tts text pad] repeated
    ref_1, ref_2, ..   = s(r_1) .. s(r_M), then E[tts text eos], then E[tts text pad] repeated

Without a reference A = 0, which is the release's own layout. The reference text may stand anywhere
before y_1: at the start of the spoken reply itself (continuation), or in an earlier turn (another
utterance of the voice). A reference whose codes end before its text does is refused. Positions: the
prompt's own TMRoPE ids, then one more on all axes for each position.

Letters: T tokens of the Thinker's pack, R rows that the Talker keeps of the Thinker's table, S
positions of the Talker's pack, N targets, otherwise as above.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from omni_train.config.errors import DataError
from omni_train.data.types import IGNORE_INDEX, Batch, EncodedSample
from omni_train.data.visibility import Segments

# Rows of `TalkerSpec.row_ids` that are always there.
EOS_ROW, PAD_ROW = 0, 1


@dataclass(frozen=True, slots=True)
class TalkerSpec:
    """What a data worker must know of the Talker; small and picklable.

    Args:
        codec_pad, codec_bos, codec_eos, codec_mask: control ids of the Talker's table.
        num_codes: ids below are codes of the speech codec.
        vocab_size: rows of the Talker's table.
        row_ids: ids of the Thinker's table whose rows the Talker keeps: tts text eos, tts text pad,
            the speakers; then once more those speakers that get a new row.
        num_new_speakers: how many of `row_ids`, at its end, are new rows.
        speakers: id of the Thinker's table by speaker name.
    """

    codec_pad: int
    codec_bos: int
    codec_eos: int
    codec_mask: int
    num_codes: int
    vocab_size: int
    row_ids: tuple[int, ...]
    num_new_speakers: int = 0
    speakers: dict[str, int] = field(default_factory=dict)

    def speaker_row(self, name: str) -> int:
        """Return the row of a speaker, its new one where it has one.

        Raises:
            DataError: `unknown_speaker`.
        """
        if name not in self.speakers:
            known = ", ".join(sorted(self.speakers)) or "none"
            raise DataError("unknown_speaker", f"no speaker is called {name!r}; known: {known}")
        wanted = self.speakers[name]
        return max(row for row, token in enumerate(self.row_ids) if token == wanted)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Codec ids that end speech, as in the release."""
        return (self.codec_pad, self.codec_eos)

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Ids never sampled: what is neither a code nor a stop. The release suppresses bos alone;
        the others have no sound, so drawing one could only spoil the speech."""
        others = range(self.num_codes, self.vocab_size)
        return tuple(token for token in others if token not in self.stop_ids)


@dataclass(slots=True)
class Reference:
    """Speech whose voice is continued, with its text in the same Thinker document.

    Args:
        start, length: where the M tokens of its text stand in the document.
        codes: int64 [A].
    """

    start: int
    length: int
    codes: Tensor


@dataclass(slots=True)
class SpokenReply:
    """A reply to be spoken, as positions of its Thinker document.

    Args:
        position_ids: int64 [3, tokens of the document], TMRoPE.
        prompt_length: P, tokens before the assistant's text.
        reply_start: position of y_1; P, or P + M where the reply begins with the reference.
        reply_length: N tokens, the closing `<|im_end|>` not among them.
        speaker: name.
        codes: int64 [K]; empty where the speech is yet to be sampled.
        reference: for speech continuation.
    """

    position_ids: Tensor
    prompt_length: int
    reply_start: int
    reply_length: int
    speaker: str
    codes: Tensor
    reference: Reference | None = None


@dataclass(slots=True)
class TalkerLayout:
    """One spoken reply as the Talker reads it, up to and with the codec bos; then the codes.

    In every index a value p >= 0 is position p of the Thinker's document and -1 - r is row r of
    `TalkerSpec.row_ids`.

    Args:
        text_index: int64 [P + A + 2].
        codec_ids: int64 [P + A + 2]; -1 where nothing of the Talker's table is added.
        position_ids: int64 [3, P + A + 2].
        stream_index: int64 [N + 1], text_1, text_2, .. ; its last item is repeated.
        codes: int64 [K].
    """

    text_index: Tensor
    codec_ids: Tensor
    position_ids: Tensor
    stream_index: Tensor
    codes: Tensor

    @property
    def num_positions(self) -> int:
        """Talker positions with all codes."""
        return int(self.text_index.numel() + self.codes.numel())


@dataclass(slots=True)
class TalkerBatch:
    """Packed spoken replies; nothing in it needs a host sync on a GPU.

    A pack without speech holds one position with one target of weight zero.

    Args:
        text_index: int64 [S], rows of (Thinker states [T], then the Talker's own rows [R]).
        codec_index: int64 [C], positions to which `codec_ids` int64 [C] are added.
        codec_ids: see there.
        position_ids: int64 [4, 1, S]; row 0 restarts at each reply, rows 1-3 are TMRoPE.
        segments: one for each reply; their lengths add up to S.
        target_index: int64 [N], positions whose output predicts `target_ids`.
        target_ids: int64 [N].
        target_weights: float32 [N]; 0 only for the dummy.
        num_target_tokens: N, or 0 with the dummy.
    """

    text_index: Tensor
    codec_index: Tensor
    codec_ids: Tensor
    position_ids: Tensor
    segments: Segments
    target_index: Tensor
    target_ids: Tensor
    target_weights: Tensor
    num_target_tokens: int

    def to(self, device: torch.device) -> TalkerBatch:
        """Return the batch with every tensor on `device`."""
        return TalkerBatch(**_moved(self, device))


@dataclass(slots=True)
class SpeechBatch:
    """One micro-batch of a Talker stage.

    Args:
        talker: positions and targets.
        thinker: the documents' pack, where the Thinker runs along; else None.
        states: [T, embedding size], the cached states of the same documents; else None.
        keys: sample keys in pack order.
        bad: (source, shard, key, reason) of samples that could not be used.
    """

    talker: TalkerBatch
    thinker: Batch | None = None
    states: Tensor | None = None
    keys: list[str] = field(default_factory=list)
    bad: list[tuple[str, str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert (self.thinker is None) != (self.states is None), "one source of Thinker states"

    @property
    def num_target_tokens(self) -> int:
        """Supervised codec tokens."""
        return self.talker.num_target_tokens

    @property
    def num_tokens(self) -> int:
        """Positions of the Talker, and tokens of the Thinker where it runs along."""
        thinker = self.thinker.num_tokens if self.thinker is not None else 0
        return thinker + int(self.talker.text_index.numel())

    def to(self, device: torch.device) -> SpeechBatch:
        """Return the batch with every tensor on `device`."""
        return SpeechBatch(**_moved(self, device))


def spoken_reply(
    sample: EncodedSample,
    *,
    im_end: int,
    speaker: str,
    codes: Tensor,
    num_reference_tokens: int = 0,
    reference_codes: Tensor | None = None,
) -> SpokenReply:
    """Return the last assistant turn of a dialogue as a reply to be spoken.

    Args:
        sample: a whole dialogue, whose last supervised turn ends in `<|im_end|>`.
        im_end: that id.
        speaker, codes: see `SpokenReply`.
        num_reference_tokens: M, where the reply begins with the reference's text; else 0.
        reference_codes: int64 [A], with M > 0.

    Raises:
        DataError: `no_reply` where the dialogue has no such turn.
    """
    ends = torch.nonzero(sample.labels == im_end).squeeze(1)
    end = int(ends[-1]) if ends.numel() else 0
    unsupervised = torch.nonzero(sample.labels[:end] == IGNORE_INDEX).squeeze(1)
    if not unsupervised.numel():
        raise DataError("no_reply", "the dialogue has no prompt and reply of an assistant")
    start = int(unsupervised[-1]) + 1
    assert (num_reference_tokens > 0) == (reference_codes is not None), "a reference has both"
    reference = reference_codes is not None and Reference(
        start, num_reference_tokens, reference_codes
    )
    return SpokenReply(
        position_ids=sample.position_ids,
        prompt_length=start,
        reply_start=start + num_reference_tokens,
        reply_length=end - start - num_reference_tokens,
        speaker=speaker,
        codes=codes,
        reference=reference or None,
    )


def lay_out(reply: SpokenReply, spec: TalkerSpec) -> TalkerLayout:
    """Return where everything goes; the table of the module docstring.

    Raises:
        DataError: `empty_reply`, `bad_span`, `bad_codes`, `short_reference`, `unknown_speaker`.
    """
    _check(reply, spec)
    prompt = torch.arange(reply.prompt_length)
    words = torch.arange(reply.reply_start, reply.reply_start + reply.reply_length)
    tail = _rows(EOS_ROW, PAD_ROW)
    text = [prompt, _rows(spec.speaker_row(reply.speaker))]
    codec = [torch.full((reply.prompt_length,), -1), torch.tensor([spec.codec_pad])]
    if reply.reference is not None:
        span = reply.reference
        stream = torch.cat([torch.arange(span.start, span.start + span.length), tail])
        text.append(consumed(stream, span.codes.numel()))
        codec.append(span.codes)
    text_index = torch.cat([*text, words[:1]])
    ids = reply.position_ids[:, : reply.prompt_length]
    spoken = int(ids.max()) + 1 + torch.arange(text_index.numel() - reply.prompt_length)
    return TalkerLayout(
        text_index=text_index,
        codec_ids=torch.cat([*codec, torch.tensor([spec.codec_bos])]),
        position_ids=torch.cat([ids, spoken.expand(3, -1)], dim=1),
        stream_index=torch.cat([words[1:], tail]),
        codes=reply.codes,
    )


def pack_speech(
    layouts: list[TalkerLayout | None], document_lengths: list[int], spec: TalkerSpec
) -> TalkerBatch:
    """Pack the spoken replies of a Thinker pack into one row.

    Args:
        layouts: one for each document of the pack, None where nothing is spoken.
        document_lengths: Thinker tokens of each document; they add up to T.
        spec: ids.
    """
    total = sum(document_lengths)
    starts = [sum(document_lengths[:i]) for i in range(len(document_lengths))]
    parts = [
        _taught(layout, start, total, spec)
        for layout, start in zip(layouts, starts, strict=True)
        if layout is not None
    ]
    if not parts:
        return dummy_batch(spec)
    lengths = [text.numel() for text, _, _, _ in parts]
    codec = torch.cat([codec for _, codec, _, _ in parts])
    codec_index = torch.nonzero(codec >= 0).squeeze(1)
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]
    targets = [targets for _, _, _, targets in parts]
    # The targets of a reply belong to its last positions: bos and all codes.
    target_index = [
        torch.arange(offset + length - ids.numel(), offset + length)
        for offset, length, ids in zip(offsets, lengths, targets, strict=True)
    ]
    restart = torch.cat([torch.arange(length) for length in lengths])
    positions = torch.cat([ids for _, _, ids, _ in parts], dim=1)
    target_ids = torch.cat(targets)
    return TalkerBatch(
        text_index=torch.cat([text for text, _, _, _ in parts]),
        codec_index=codec_index,
        codec_ids=codec[codec_index],
        position_ids=torch.cat([restart[None], positions])[:, None, :],
        segments=Segments(lengths),
        target_index=torch.cat(target_index),
        target_ids=target_ids,
        target_weights=torch.ones(target_ids.numel()),
        num_target_tokens=target_ids.numel(),
    )


def absolute_index(index: Tensor, start: int, total: int) -> Tensor:
    """Turn the indices of a layout into rows of (T states, R rows) of a pack.

    Args:
        index: int64, as in `TalkerLayout`.
        start: where the document begins in the pack.
        total: T.
    """
    return torch.where(index >= 0, index + start, total - 1 - index)


def _taught(
    layout: TalkerLayout, start: int, total: int, spec: TalkerSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Text rows [L], codec ids [L], positions [3, L] and targets [K + 1] with the codes as input.

    Raises:
        DataError: `empty_speech`.
    """
    count = layout.codes.numel()
    if not count:
        raise DataError("empty_speech", "a reply that is learnt from has codes")
    text = torch.cat([layout.text_index, consumed(layout.stream_index, count)])
    after = layout.position_ids[:, -1:] + torch.arange(1, count + 1)
    return (
        absolute_index(text, start, total),
        torch.cat([layout.codec_ids, layout.codes]),
        torch.cat([layout.position_ids, after], dim=1),
        torch.cat([layout.codes, torch.tensor([spec.codec_eos])]),
    )


def dummy_batch(spec: TalkerSpec) -> TalkerBatch:
    """Return one position through every module, so that a rank without speech keeps in step."""
    zero = torch.zeros(1, dtype=torch.long)
    return TalkerBatch(
        text_index=zero,
        codec_index=zero,
        codec_ids=torch.tensor([spec.codec_pad]),
        position_ids=torch.zeros(4, 1, 1, dtype=torch.long),
        segments=Segments([1]),
        target_index=zero,
        target_ids=torch.tensor([spec.codec_eos]),
        target_weights=torch.zeros(1),
        num_target_tokens=0,
    )


def _rows(*rows: int) -> Tensor:
    return -1 - torch.tensor(rows, dtype=torch.long)


def consumed(stream: Tensor, count: int) -> Tensor:
    """Return the first `count` items of a text stream whose last item repeats."""
    return stream[torch.arange(count).clamp(max=stream.numel() - 1)]


def _check(reply: SpokenReply, spec: TalkerSpec) -> None:
    tokens = reply.position_ids.shape[1]
    if reply.reply_length < 1:
        raise DataError("empty_reply", "the spoken reply has no text")
    end = reply.reply_start + reply.reply_length
    if not 1 <= reply.prompt_length <= reply.reply_start < end <= tokens:
        raise DataError(
            "bad_span",
            f"prompt of {reply.prompt_length} and reply {reply.reply_start}..{end} do not fit "
            f"a document of {tokens} tokens",
        )
    spoken = [reply.codes]
    if (span := reply.reference) is not None:
        if span.length < 1 or not 0 <= span.start <= reply.reply_start - span.length:
            raise DataError("bad_span", "the reference text stands before the reply")
        if span.codes.numel() <= span.length:
            raise DataError(
                "short_reference",
                f"{span.codes.numel()} reference codes end before their {span.length} text tokens",
            )
        spoken.append(span.codes)
    for codes in spoken:
        if bool(((codes < 0) | (codes >= spec.num_codes)).any()):
            raise DataError("bad_codes", f"codes lie outside 0..{spec.num_codes - 1}")


def _moved(record: Any, device: torch.device) -> dict[str, Any]:
    """Fields of a dataclass, with tensors and nested batches on `device`."""
    values = {spec.name: getattr(record, spec.name) for spec in fields(record)}
    return {
        name: value.to(device, non_blocking=True)
        if isinstance(value, Tensor)
        else value.to(device)
        if isinstance(value, TalkerBatch | Batch | Segments)
        else value
        for name, value in values.items()
    }
