"""Stage 0 on the demo's speech: the same codec on 1 and 2 ranks, bad clips, the check by voice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from omni_train.config.load import CONF_DIR
from omni_train.engine.exit_codes import ExitCode
from omni_train.speech.mel_kmeans import MelKMeansCodec
from omni_train.tracking.events import read_jsonl, read_steps
from tests.recipes.launching import finish, start


def run(corpus: Path, run_dir: Path, *extra: str, ranks: int) -> tuple[int, str]:
    overrides = [
        "experiment=speech_codec/debug",
        f"run.dir='{run_dir}'",
        f"speech.asr.path='{corpus}/train/asr'",
        *extra,
    ]
    return finish(start("speech_codec", overrides, ranks=ranks))


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    code, output = run(corpus, run_dir, ranks=1)
    assert code == 0, output
    return run_dir


def trace(run_dir: Path) -> list[tuple[int, float, int]]:
    return [(e["step"], e["loss"], e["tokens"]) for e in read_steps(run_dir / "events.jsonl")]


def test_two_ranks_give_the_same_codec_bit_for_bit(corpus: Path, one: Path, tmp_path: Path) -> None:
    # The check comes from a file: a section that may be left out cannot be given as overrides.
    debug = yaml.safe_load((CONF_DIR / "experiment/speech_codec/debug.yaml").read_text())
    sizes = [
        f"{section}.{key}={value}"
        for section in ("codec", "kmeans")
        for key, value in debug[section].items()
    ]
    overrides = [
        "experiment=demo/speech_codec",
        "tracking=none",
        f"run.dir='{tmp_path}/run'",
        f"speech.asr.path='{corpus}/train/asr'",
        "codec.frame_rate_hz=50",
        *sizes,
        f"check.path='{corpus}/heldout/asr'",
        "check.limit=8",
    ]
    code, output = finish(start("speech_codec", overrides, ranks=2))
    assert code == 0, output
    assert trace(tmp_path / "run") == trace(one)
    for name in ("codec.json", "codec.safetensors"):
        assert (tmp_path / "run/codec" / name).read_bytes() == (one / "codec" / name).read_bytes()
    scores = [e for e in read_jsonl(tmp_path / "run/events.jsonl") if e["kind"] == "evaluation"]
    assert sum(e["num_samples"] for e in scores) == 8
    assert all(e["raw"] <= 0.5 <= 1.0 for e in scores)


@pytest.mark.slow
def test_the_loss_falls_and_the_seed_decides(corpus: Path, one: Path, tmp_path: Path) -> None:
    losses = [loss for _, loss, _ in trace(one)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    assert run(corpus, tmp_path / "run", "run.seed=1", ranks=1)[0] == 0
    other = MelKMeansCodec.load(tmp_path / "run")
    assert other.fingerprint != MelKMeansCodec.load(one).fingerprint


@pytest.mark.slow
def test_damaged_clips_are_recorded_and_too_many_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train" / "asr"
    shutil.copytree(corpus / "train" / "asr", folder)
    shard = folder / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    # In the sound of some sample near the middle.
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    shard.write_bytes(data)
    code, output = run(tmp_path, tmp_path / "a", "kmeans.max_bad_share=0.5", ranks=1)
    assert code == 0, output
    ledger = list(read_jsonl(tmp_path / "a" / "ledger.jsonl"))
    assert {row["reason"] for row in ledger} == {"hash_mismatch"}
    assert run(tmp_path, tmp_path / "b", "kmeans.max_bad_share=0", ranks=2)[0] != 0
    ends = [e for e in read_jsonl(tmp_path / "b" / "events.jsonl") if e["kind"] == "run_end"]
    assert ends[-1]["exit_code"] == ExitCode.bad_data


def test_nothing_to_fit_is_a_config_error(corpus: Path, tmp_path: Path) -> None:
    code, output = finish(start("speech_codec", [f"run.dir='{tmp_path}/x'"], ranks=1))
    assert code != 0
    assert "+speech.NAME.path" in output
