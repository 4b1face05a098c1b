"""Event files with torn lines, and W&B offline as a view of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from launch.cli import main
from omni_train.tracking.events import JsonlWriter, read_jsonl, read_new, read_steps
from omni_train.tracking.lineage import made_by, read_by
from omni_train.tracking.wandb_view import flatten, write_wandb
from tests.wandb_files import wandb_bytes


def write_events(folder: Path) -> None:
    writer = JsonlWriter(folder / "events.jsonl")
    names = {"stage": "stage1_audio", "experiment": "exp7", "run_id": "exp7/a"}
    writer.write({"kind": "run_start", **names})
    for step in (1, 2, 3):
        writer.write({"kind": "step", "step": step, "loss": 1.0 / step, "lr": {"llm": 0.5}})
    writer.write({"kind": "step", "step": 3, "loss": float("nan"), "keys": "ff"})
    writer.write({"kind": "evaluation", "wer": 0.25})
    writer.close()


def test_torn_lines_are_passed_over_and_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = JsonlWriter(path)
    writer.write({"kind": "a", "x": float("nan")})
    writer.close()
    with path.open("a") as file:
        file.write('{"kind": "b", "x"')
    assert [event["kind"] for event in read_jsonl(path)] == ["a"]
    writer = JsonlWriter(path)
    writer.write({"kind": "c"})
    writer.close()
    found = list(read_jsonl(path))
    assert [event["kind"] for event in found] == ["a", "c"]
    assert math.isnan(float(found[0]["x"]))
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_a_repeated_step_counts_once(tmp_path: Path) -> None:
    write_events(tmp_path)
    steps = read_steps(tmp_path / "events.jsonl")
    assert [event["step"] for event in steps] == [1, 2, 3]
    assert steps[2]["loss"] == "nan"


def test_flatten_keeps_numbers_only() -> None:
    record = {"a": 1, "b": {"c": 2.5, "d": "nan", "e": True}}
    assert flatten(record) == {"a": 1.0, "b/c": 2.5}


def test_offline_wandb_run_holds_the_events_and_no_secret(tmp_path: Path, monkeypatch) -> None:
    canary = "canary-2718281828"
    monkeypatch.setattr("sys.argv", ["train", f"--token={canary}"])
    write_events(tmp_path)
    for _ in range(2):  # rebuilding replaces
        home = write_wandb(tmp_path, project="test", config={"width": 4})
    content = wandb_bytes(home)
    for word in (b"stage1_audio", b"exp7", b"loss", b"lr/llm", b"wer", b"width"):
        assert word in content, word
    assert canary.encode() not in b"".join(p.read_bytes() for p in home.rglob("*") if p.is_file())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "wandb"]


def test_waves_can_be_listened_to_beside_text_and_wer(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", np.zeros(800, np.float32), 16_000)
    writer = JsonlWriter(tmp_path / "events.jsonl")
    said = {"key": "k7", "speaker": "v", "text": "river doctor", "heard": "river", "wer": 0.5}
    for wave in ("audio/a.wav", "audio/a.wav", "audio/gone.wav"):
        writer.write({"kind": "audio", "task": "tts", "wave": wave, **said})
    writer.close()
    home = write_wandb(tmp_path, project="test")
    (wave,) = home.rglob("*.wav")
    assert wave.read_bytes() == (tmp_path / "audio" / "a.wav").read_bytes()
    assert b"river doctor | heard: river | WER 0.50 | v k7" in wandb_bytes(home)


def test_following_a_log_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_new(path, 0) == ([], 0)
    writer = JsonlWriter(path)
    writer.write({"a": 1})
    first, offset = read_new(path, 0)
    assert first == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b'{"a": 2')
    assert read_new(path, offset) == ([], offset)
    with path.open("ab") as file:
        file.write(b'}\n{"a": 3}\n')
    second, offset = read_new(path, offset)
    assert second == [{"a": 2}, {"a": 3}]
    assert read_new(path, offset) == ([], path.stat().st_size)


def make_stage(root: Path, name: str, settings: dict[str, object], data: dict[str, str]) -> Path:
    """A stage that ended with a checkpoint, below `root`."""
    folder = root / name
    checkpoint = folder / "checkpoints" / "step-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"of": name}))
    writer = JsonlWriter(folder / "events.jsonl")
    writer.write({"kind": "run_start", "stage": name, "experiment": "e", "run_id": f"e/{name}"})
    writer.write({"kind": "step", "step": 4, "loss": 1.0})
    writer.write({"kind": "non_finite", "step": 3, "rank": 1})
    end = {"status": "preempted", "step": 4, "reason": "asked to stop by SIGUSR1"}
    writer.write({"kind": "run_end", **end})
    writer.close()
    (folder / "resolved.yaml").write_text(yaml.safe_dump(settings))
    (folder / "fingerprint.json").write_text(json.dumps({"data": data}))
    return folder


def test_lineage_spans_from_the_data_to_the_last_stage(tmp_path: Path) -> None:
    first = make_stage(tmp_path, "first", {}, {"text": "d1"})
    model = {"model": {"init_from": str(first / "checkpoints")}, "tracking": {"project": "p"}}
    second = make_stage(tmp_path, "second", model, {"asr": "d2"})
    (made,) = made_by(first)
    assert [item.kind for item in read_by(second, tmp_path)] == ["dataset", "checkpoint"]
    assert read_by(second, tmp_path)[1] == made
    assert main(["track", "sync", str(first), str(second), "--offline"]) == 0
    written = {folder: wandb_bytes(folder / "wandb") for folder in (first, second)}
    address = made.address.encode()
    assert b"omni-train://dataset/text?hash=d1" in written[first]
    assert address in written[first]
    assert address in written[second]
    # Another content is another address, under the same name.
    (first / "checkpoints" / "step-4" / "manifest.json").write_text("{}")
    (changed,) = made_by(first)
    assert changed.name == made.name
    assert changed.address != made.address


def test_alerts_say_what_went_wrong(tmp_path: Path) -> None:
    folder = make_stage(tmp_path, "first", {}, {})
    content = wandb_bytes(write_wandb(folder, project="test"))
    assert b"Non-finite step" in content
    assert b"step 4: asked to stop by SIGUSR1" in content


def test_sync_of_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", "sync", str(tmp_path)]) == 66
    assert "there is no run" in capsys.readouterr().err
