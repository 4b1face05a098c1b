"""B7: samples out of local shards, against plain webdataset: raw, and decoded by two workers.

    python -m benchmarks.b07_read [--json]

Raw: every member of every sample, the JSON parsed; ours is verified against the index's hashes,
webdataset reads each tar from end to end and verifies nothing. Decoded: the same functions turn
pictures into pixels and sound into 16 kHz waves on both sides, in two worker processes each, and
the values arrive in the main process: ours as packs, the peer's one by one, as its loader gives
them, and in a row of its own packed by our function. Amounts are compared before anything is timed.
The same again in processor seconds of all processes, which other work on the machine changes less.
The shards have been read once, so they are in the machine's cache.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from torch import Tensor

from benchmarks import media
from benchmarks.report import Row, compare, parser, show
from data_pipelines.shards import Sample, write_shards
from omni_train.data.config import DEFAULT_PREFETCH_BYTES
from omni_train.data.fetch import fetch
from omni_train.data.index import index_path, read_index
from omni_train.data.media import decode_audio, decode_image, probe
from omni_train.data.prefetch import Prefetcher
from omni_train.data.tokenizer import train_tokenizer
from omni_train.data.types import IndexRow, MediaInfo, MediaKind

WORKERS = 2
PACK = 16
SECONDS = 1.0
Place = tuple[str, IndexRow]
TOKENIZER = train_tokenizer(["what is it, an example"], vocab_size=320)


def write_corpus(root: Path, *, num_samples: int, num_shards: int) -> list[Path]:
    """Write short speech and small pictures, half and half; return the shards."""
    sounds = [media.wav(SECONDS, seed) for seed in range(8)]
    pictures = [media.jpeg(192, 256, seed) for seed in range(8)]

    def samples() -> Iterator[Sample]:
        for number in range(num_samples):
            kind, name = ("audio", "0.wav") if number % 2 else ("image", "0.jpg")
            data = (sounds if number % 2 else pictures)[number // 2 % 8]
            question = [{"type": kind, kind: name}, {"type": "text", "text": "what is it"}]
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "an example"},
            ]
            yield Sample(f"{number:06d}", {"messages": messages}, {name: data})

    write_shards(samples(), root, tokenizer=TOKENIZER, samples_per_shard=num_samples // num_shards)
    return sorted(root.glob("shard-*.tar"))


def read_ours(places: Iterable[Place]) -> tuple[int, int]:
    """Return how many samples and how many bytes of media they hold."""
    count = size = 0
    for shard, row in places:
        raw = fetch(shard, row)
        count += 1
        size += sum(map(len, raw.media.values()))
    return count, size


def read_peer(shards: list[Path]) -> tuple[int, int]:
    """Return the same, read by webdataset."""
    count = size = 0
    for sample in wds.WebDataset([str(path) for path in shards], shardshuffle=False):
        json.loads(sample["json"])
        count += 1
        size += sum(len(sample[name]) for name in ("0.wav", "0.jpg") if name in sample)
    return count, size


def decoded(data: bytes, info: MediaInfo) -> Tensor:
    """Return a medium's values, flat: uint8 pixels or float32 samples."""
    values = decode_image(data) if info.kind is MediaKind.image else decode_audio(data, info)
    return values.reshape(-1)


def joined(parts: list[Tensor]) -> list[Tensor]:
    """Return the pictures of a pack as one array and its sounds as another."""
    kinds = (torch.uint8, torch.float32)
    return [torch.cat([part for part in parts if part.dtype == kind]) for kind in kinds]


def decode_pack(pack: list[Place], at: Callable[[int], None]) -> list[Tensor]:
    """Decode the samples of a pack, in a worker; what came to it are offsets."""
    parts = []
    for number, place in enumerate(pack):
        at(number)
        raw = fetch(*place)
        info = raw.row.media[0]
        parts.append(decoded(raw.media[info.member], info))
    return joined(parts)


# All sound files of the corpus have the same rate and length: the peer is spared the probing.
INFO_OF = {
    "0.wav": probe(media.wav(SECONDS), "0.wav"),
    "0.jpg": MediaInfo(MediaKind.image, "0.jpg"),
}


def decode_one(sample: dict[str, Any]) -> Tensor:
    """Decode what webdataset read."""
    name = "0.wav" if "0.wav" in sample else "0.jpg"
    return decoded(sample[name], INFO_OF[name])


def packs_of(places: list[Place]) -> Iterator[tuple[list[Place], int]]:
    """Yield packs and the bytes that each will have, from the index."""
    for start in range(0, len(places), PACK):
        pack = places[start : start + PACK]
        media = [row.media[0] for _, row in pack]
        sizes = [info.width * info.height * 3 + info.num_audio_samples * 4 for info in media]
        yield pack, sum(sizes)


def decode_ours(places: list[Place], workers: Prefetcher[list[Place], Any]) -> tuple[int, int]:
    """Return how many pixel values and sound samples arrive from the workers."""
    return received(workers.results(packs_of(places)))


def peer_loader(shards: list[Path], *, packed: bool) -> wds.WebLoader:
    """Return webdataset's loader: samples one by one, or joined into packs as ours are."""
    dataset = wds.WebDataset([str(path) for path in shards], shardshuffle=False).map(decode_one)
    if packed:
        dataset = dataset.batched(PACK, collation_fn=joined)
    return wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)


def received(loader: Iterable[Any]) -> tuple[int, int]:
    """Count what arrived: values of pictures and of sound."""
    pixels = samples = 0
    for item in loader:
        for values in item if isinstance(item, list) else [item]:
            if values.dtype == torch.uint8:
                pixels += values.numel()
            else:
                samples += values.numel()
    return pixels, samples


def decoding_rows(
    places: list[Place], shards: list[Path], *, packed: bool, goal: float, pairs: int
) -> list[Row]:
    """Compare the two loaders with their workers running; they are idle while the other's work."""
    loader = peer_loader(shards, packed=packed)
    name = f"decoded, {WORKERS} workers" + (", peer packed alike" if packed else "")
    with Prefetcher(
        decode_pack,
        num_workers=WORKERS,
        max_bytes=DEFAULT_PREFETCH_BYTES,
        describe=lambda pack, number: pack[number][1].key,
    ) as workers:
        assert decode_ours(places, workers) == received(loader), "different amounts decoded"
        options = {"pairs": pairs, "items": len(places)}
        sides = (lambda: decode_ours(places, workers), lambda: received(loader))
        return [
            compare(name, *sides, goal=goal, **options),
            compare(f"{name}, processor", *sides, goal=0.0, **options, clock=processor_seconds),
        ]


def processor_seconds() -> float:
    """Return the processor time of this process and all below it that are alive."""
    times: dict[int, float] = {}
    parents: dict[int, int] = {}
    tick = os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number] = int(fields[1])
            times[number] = (int(fields[11]) + int(fields[12])) / tick
    ours = {os.getpid()}
    while more := {number for number, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(times[number] for number in ours)


def main() -> int:
    """Run the table."""
    options = parser("Reading samples, against webdataset.")
    options.add_argument("--samples", type=int, default=4_000)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_corpus(Path(folder), num_samples=args.samples, num_shards=4)
        places = [(str(path), row) for path in shards for row in read_index(index_path(path))]
        assert read_ours(places) == read_peer(shards), "the two read different bytes"
        assert read_ours(places) == read_peer(shards), "the two read different bytes"
        rows = [
            compare(
                "raw reading, samples",
                lambda: read_ours(places),
                lambda: read_peer(shards),
                goal=5.0,
                pairs=args.pairs,
                items=args.samples,
            )
        ]
        for packed, goal in ((False, 1.3), (True, 1.0)):
            rows += decoding_rows(places, shards, packed=packed, goal=goal, pairs=args.pairs)
    return show(rows, ("webdataset", "torch", "av", "soundfile"), [], as_json=args.json)


if __name__ == "__main__":
    # Workers find `decode_pack` by its module's name, which must not be that of a program.
    from benchmarks import b07_read

    sys.exit(b07_read.main())
