"""Structure of media files, read from their bytes alone before any decoder sees them.

Done here: telling the container from its first bytes, and finding files that were cut short, which
the decoders read without complaint. Not done here: decoding (media.py, clip.py).
"""

from __future__ import annotations

from omni_train.config.errors import DataError

WAV_MAGICS = (b"RIFF", b"RIFX")
MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
EBML_ID = b"\x1a\x45\xdf\xa3"
SEGMENT_ID = b"\x18\x53\x80\x67"
MP4, MATROSKA = "mp4", "matroska"


def clip_container(data: bytes) -> str:
    """Return the name of the demuxer for a clip, `mp4` or `matroska`, after checking its size.

    The name is handed to FFmpeg, so that it never guesses: a text file named `.mp4` that lists
    other files is not opened as such a list.

    Raises:
        DataError: `bad_container` for anything else, `truncated` where bytes are missing.
    """
    if data[4:8] in MP4_FIRST_BOXES:
        _check_mp4(data)
        return MP4
    if data[:4] == EBML_ID:
        _check_matroska(data)
        return MATROSKA
    raise DataError("bad_container", f"neither mp4 nor matroska/webm: starts with {data[:8]!r}")


def check_wav(data: bytes) -> None:
    """Compare the size of a RIFF file's data chunk with what is there; others pass unchecked.

    Raises:
        DataError: `truncated` where bytes are missing or no data chunk exists.
    """
    if data[:4] not in WAV_MAGICS:
        return
    order = "big" if data[:4] == b"RIFX" else "little"
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], order)  # type: ignore[arg-type]
        if data[at : at + 4] == b"data":
            if at + 8 + size > len(data):
                found = len(data) - at - 8
                raise DataError("truncated", f"wav declares {size} bytes of sound, has {found}")
            return
        at += 8 + size + size % 2
    raise DataError("truncated", "wav without a data chunk")


def _check_mp4(data: bytes) -> None:
    """Walk the top-level boxes; each must lie inside the file."""
    at, seen = 0, set()
    while at + 8 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        elif size == 0:
            size = len(data) - at
        if size < 8:
            break
        if at + size > len(data):
            raise DataError(
                "truncated", f"mp4 box {name!r} declares {size} bytes, {len(data) - at} are left"
            )
        seen.add(name)
        at += size
    if b"moov" not in seen:
        raise DataError("truncated", "mp4 without a moov box")


def _check_matroska(data: bytes) -> None:
    """Compare the declared size of the segment, where it is declared, with the bytes there are."""
    header_size, at = _ebml_size(data, 4)
    at += header_size or 0
    if data[at : at + 4] != SEGMENT_ID:
        raise DataError("truncated", "matroska without a segment")
    size, at = _ebml_size(data, at + 4)
    if size is not None and at + size > len(data):
        raise DataError(
            "truncated", f"matroska segment declares {size} bytes, {len(data) - at} are left"
        )


def _ebml_size(data: bytes, at: int) -> tuple[int | None, int]:
    """Read a variable-length size; return it (None if unknown) and the place behind it."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    if first == 0 or at + length > len(data):
        raise DataError("truncated", "matroska header ends in the middle")
    mask = (1 << (7 * length)) - 1
    value = int.from_bytes(data[at : at + length], "big") & mask
    return (None if value == mask else value), at + length
