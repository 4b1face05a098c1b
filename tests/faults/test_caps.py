"""An hour of sound and an 8K picture through the real loader: a worker stays under its cap."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines.shards import Sample, write_shards
from omni_train.config.errors import ConfigError
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.loader import PlannedLoader
from tests.unit.data.processes import workers_of
from tests.unit.data.samples import SPEC, TOKENIZER

GIB = 1 << 30
MIB = 1 << 20


def hour() -> bytes:
    """An hour of faint noise at 16 kHz: small as FLAC, 230 MB of float32."""
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(-2, 3, 16_000 * 60).astype(np.int16)
    with soundfile.SoundFile(sink, "w", 16_000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(60):
            file.write(noise)
    return sink.getvalue()


def picture_8k() -> bytes:
    sink = io.BytesIO()
    ramp = np.add.outer(np.arange(4320), np.arange(7680)) // 48
    Image.fromarray(np.stack([ramp.astype(np.uint8)] * 3, axis=2)).save(sink, "JPEG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def giants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard: the giants between three small samples."""
    root = tmp_path_factory.mktemp("giants")

    def sample(key: str, kind: str, name: str, data: bytes) -> Sample:
        question = [{"type": kind, kind: name}, {"type": "text", "text": "what is it"}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "big"}]
        return Sample(key, {"messages": turns}, {name: data})

    small = io.BytesIO()
    soundfile.write(small, np.zeros(16_000), 16_000, format="FLAC")
    samples = [sample(f"small-{n}", "audio", "0.flac", small.getvalue()) for n in range(3)]
    samples[1:1] = [sample("hour", "audio", "0.flac", hour())]
    samples[3:3] = [sample("picture", "image", "0.jpg", picture_8k())]
    write_shards(samples, root, tokenizer=TOKENIZER, samples_per_shard=10)
    return root


def steps(root: Path, **settings: Any) -> Iterator[Any]:
    config = DataConfig(
        sources={"giants": SourceConfig(path=str(root), max_epochs=1)},
        pack_tokens=100_000,
        global_batch_packs=1,
        num_workers=1,
        **settings,
    )
    loader = PlannedLoader(
        config,
        tokenizer=TOKENIZER,
        spec=SPEC,
        rank=0,
        world_size=1,
        seed=0,
        ledger=lambda **row: None,
    )
    return loader.steps()


def peak_bytes() -> int:
    """Most that the one worker of this process has had in memory."""
    status = Path(f"/proc/{workers_of(os.getpid(), 1)[0]}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def run(root: Path, **settings: Any) -> tuple[set[str], dict[str, str], int]:
    """Keys that arrive, reasons of those that do not, and the worker's peak."""
    keys, reasons, peak = set(), {}, 0
    for item in steps(root, **settings):
        for batch in item.micro_batches:
            keys |= set(batch.keys)
            reasons |= {key: reason for _, _, key, reason in batch.bad}
        peak = max(peak, peak_bytes())
    return keys, reasons, peak


SMALL = {"small-0", "small-1", "small-2"}


def test_an_hour_of_sound_and_an_8k_picture_stay_under_the_cap(giants: Path) -> None:
    keys, reasons, peak = run(giants, worker_memory_bytes=3 * GIB)
    assert keys == SMALL | {"hour", "picture"}
    assert not reasons
    print(f"peak {peak / MIB:.0f} MiB of {3 * GIB / MIB:.0f}")
    assert peak < 3 * GIB


def test_what_needs_more_than_the_cap_is_left_out_by_name(giants: Path) -> None:
    keys, reasons, peak = run(giants, worker_memory_bytes=800 * MIB)
    print(f"peak {peak / MIB:.0f} MiB of 800, {reasons}")
    assert peak < 800 * MIB
    assert keys >= SMALL
    assert "hour" in reasons
    assert keys | set(reasons) == SMALL | {"hour", "picture"}
    for reason in reasons.values():
        assert reason.startswith("over_memory: it needs more than data.worker_memory_bytes=8388608")


@pytest.mark.parametrize(
    "settings", [{"worker_memory_bytes": GIB}, {"prefetch_bytes": GIB}, {"num_workers": -1}]
)
def test_a_setting_that_would_do_nothing_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"data.{next(iter(settings))}="):
        DataConfig(sources={"a": SourceConfig(path="a")}, **{"num_workers": 0, **settings})
