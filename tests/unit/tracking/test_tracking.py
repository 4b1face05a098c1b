"""Event files with torn lines, and W&B offline as a view of them."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.cli import main
from omni_train.config.errors import ConfigError
from omni_train.engine.run import RunConfig, start_run
from omni_train.tracking.config import TrackingConfig
from omni_train.tracking.curves import flatten, read_curves
from omni_train.tracking.events import JsonlWriter, read_jsonl, read_new, read_steps
from omni_train.tracking.lineage import made_by, read_by
from omni_train.tracking.report import report_page
from omni_train.tracking.report_data import read_run
from omni_train.tracking.tensorboard_view import write_tensorboard
from omni_train.tracking.wandb_view import write_wandb
from tests.wandb_files import read_wandb


def write_events(folder: Path) -> None:
    writer = JsonlWriter(folder / "events.jsonl")
    names = {"stage": "stage1_audio", "experiment": "exp7", "run_id": "exp7/a"}
    writer.write({"kind": "run_start", **names})
    for step in (1, 2, 3):
        writer.write({"kind": "step", "step": step, "loss": 1.0 / step, "lr": {"llm": 0.5}})
    # A step that was done again after a resume.
    metrics = {"loss_source/libri": 3.0}
    rest = {"lr": {"llm": 0.5}, "metrics": metrics, "load": 1.5, "keys": "ff", "time": 7.0}
    writer.write({"kind": "step", "step": 2, "loss": 0.5, **rest})
    writer.write({"kind": "heldout", "task": "asr", "step": 2, "loss": 0.75, "time": 8.0})
    writer.write({"kind": "step", "step": 3, "loss": 0.2, **rest})
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
    assert steps[2]["loss"] == 0.2


def test_flatten_keeps_numbers_only() -> None:
    record = {"a": 1, "b": {"c": 2.5, "d": "nan", "e": True}, "f": math.nan, "g": -math.inf}
    assert flatten(record) == {"a": 1.0, "b/c": 2.5}


def test_numbers_that_are_not_finite_break_no_view(tmp_path: Path) -> None:
    """As our writer puts them, and as Python's JSON does elsewhere."""
    write_events(tmp_path)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 4, "loss": NaN, "lr": {"llm": 0.5}, "load": -1e999}\n')
        file.write('{"kind": "step", "step": 5, "loss": "nan", "lr": {"llm": Infinity}}\n')
        file.write('{"kind": "evaluation", "task": "asr", "value": NaN, "metric": "wer"}\n')
    found = read_curves(list(read_jsonl(tmp_path / "events.jsonl")))
    points = {point.step: point.figures for point in found}
    assert (points[4], points[5]) == ({"lr/llm": 0.5}, {})
    page = report_page("x", [read_run(tmp_path)])
    charts = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert "NaN" not in json.dumps(charts)
    shown = read_wandb(write_wandb(tmp_path, project="test"))
    assert shown.history[4]["lr/llm"] == 0.5
    assert "loss" not in shown.history[4]
    tags = EventAccumulator(str(write_tensorboard(tmp_path))).Reload()
    assert [scalar.step for scalar in tags.Scalars("loss")] == [1, 2, 3]


def test_offline_wandb_run_holds_the_events_and_no_secret(tmp_path: Path, monkeypatch) -> None:
    canary = "canary-2718281828"
    monkeypatch.setattr("sys.argv", ["train", f"--token={canary}"])
    write_events(tmp_path)
    for _ in range(2):  # rebuilding replaces
        home = write_wandb(tmp_path, project="test", config={"width": 4})
    shown = read_wandb(home)
    assert (shown.group, shown.job_type, shown.config["width"]) == ("exp7", "stage1_audio", 4)
    assert {step: row.get("loss") for step, row in shown.history.items()} == {
        1: 1.0,
        2: 0.5,
        3: 0.2,
    }
    assert {row["lr/llm"] for row in shown.history.values()} == {0.5}
    assert shown.history[2]["metrics/loss_source/libri"] == 3.0
    assert shown.history[2]["system/load"] == 1.5
    assert shown.history[2]["heldout/asr/loss"] == 0.75
    assert shown.summary["wer"] == 0.25
    assert canary.encode() not in b"".join(p.read_bytes() for p in home.rglob("*") if p.is_file())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "wandb"]


def write_samples(folder: Path) -> dict[str, bytes]:
    """Events with samples of both kinds; return the content of the files by name."""
    (folder / "audio").mkdir()
    (folder / "samples").mkdir()
    soundfile.write(folder / "audio" / "a.wav", np.sin(np.arange(800) / 9.0), 16_000)
    soundfile.write(folder / "samples" / "0.wav", np.zeros(400, np.float32), 8_000)
    soundfile.write(folder.parent / "outside.wav", np.zeros(160, np.float32), 16_000)
    Image.new("RGB", (40, 30), "red").save(folder / "samples" / "0.png")
    writer = JsonlWriter(folder / "events.jsonl")
    said = {"key": "k7", "speaker": "v", "text": "river doctor", "heard": "river", "wer": 0.5}
    for wave in ("audio/a.wav", "audio/a.wav", "audio/gone.wav", "../outside.wav"):
        writer.write({"kind": "audio", "task": "tts", "wave": wave, **said})
    asked = {"task": "vqa", "prompt": "<image> what | is it?", "reference": "a square"}
    files = ["samples/0.png", "samples/0.wav", "samples/gone.png", "../outside.wav"]
    for reply in ("a cross", "a circle"):  # scored twice
        score = {"prediction": reply, "score": 0.0, "media": files}
        writer.write({"kind": "sample", "key": "q1", **asked, **score})
    told = {"prediction": "a square", "score": float("nan"), "media": []}
    writer.write({"kind": "sample", "key": "q2", **asked, **told})
    writer.close()
    return {path.name: path.read_bytes() for path in folder.rglob("*.*") if path.suffix != ".jsonl"}


def test_samples_are_tables_with_texts_numbers_sound_and_pictures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    files = write_samples(run)
    home = write_wandb(run, project="test")
    shown = read_wandb(home)
    assert set(shown.tables) == {"samples/vqa", "speech/tts"}
    columns, rows = shown.tables["speech/tts"]
    assert columns == ["key", "speaker", "text", "heard", "wer", "audio"]
    heard, gone, outside = rows
    assert heard[:5] == gone[:5] == ["k7", "v", "river doctor", "river", 0.5]
    assert shown.media[heard[5]].read_bytes() == files["a.wav"]
    # No file outside of the run is shown, and none that is not there.
    assert (gone[5], outside[5]) == (None, None)
    columns, rows = shown.tables["samples/vqa"]
    assert columns == ["key", "prompt", "image", "audio", "reference", "prediction", "score"]
    assert [row[4:] for row in rows] == [
        ["a square", "a circle", 0.0],
        ["a square", "a square", None],
    ]
    with Image.open(shown.media[rows[0][2]]) as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((40, 30), (255, 0, 0))
    assert shown.media[rows[0][3]].read_bytes() == files["0.wav"]
    # All of it lies in the run, where it can be copied and deleted with it.
    assert all(path.is_relative_to(home) for path in shown.media.values())


def test_tensorboard_shows_curves_scores_and_samples(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_events(run)
    write_samples(run)
    for _ in range(2):  # rebuilding replaces
        assert main(["track", "tensorboard", str(run)]) == 0
    seen = EventAccumulator(str(run / "tensorboard"))
    seen.Reload()
    tags = seen.Tags()
    points = [(e.step, round(e.value, 6), e.wall_time) for e in seen.Scalars("loss")]
    assert points == [(1, 1.0, 0.0), (2, 0.5, 7.0), (3, 0.2, 7.0)]
    assert {"lr/llm", "metrics/loss_source/libri", "system/load"} <= set(tags["scalars"])
    assert [e.value for e in seen.Scalars("heldout/asr/loss")] == [0.75]
    assert [e.value for e in seen.Scalars("evaluation/wer")] == [0.25]
    (picture,) = seen.Images("samples/vqa/0/image")
    assert (picture.width, picture.height) == (40, 30)
    (sound,) = seen.Audio("speech/tts/0/audio")
    assert (sound.sample_rate, sound.length_frames) == (16_000, 800)
    (table,) = seen.Tensors("samples/vqa/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert "| q1 | <image> what \\| is it? | 0.png | 0.wav | a square | a circle | 0.0 |" in text
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == [
        "audio",
        "samples",
        "tensorboard",
    ]


def test_tensorboard_that_is_not_installed_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config, view = RunConfig(dir=str(tmp_path / "run")), TrackingConfig(tensorboard=True)
    with (
        pytest.raises(ConfigError, match=r"tracking\.tensorboard.*pip install"),
        start_run(config, stage="toy", settings={}, tracking=view),
    ):
        pytest.fail("the run began")
    assert not (tmp_path / "run").exists()


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
    shown = [read_wandb(folder / "wandb") for folder in (first, second)]
    assert (shown[0].used, shown[0].made) == (["omni-train://dataset/text?hash=d1"], [made.address])
    assert shown[1].used == ["omni-train://dataset/asr?hash=d2", made.address]
    assert len(shown[1].made) == 1
    assert shown[0].id != shown[1].id
    # Codes lead to their codec, pairs to the replies that they were chosen from.
    codec = make_stage(tmp_path, "codec", {}, {"asr": "d2"})
    writer = JsonlWriter(codec / "events.jsonl")
    writer.write({"kind": "artifact", "name": "codec", "codebook_xxh3": "c0de"})
    writer.close()
    for name, record in (("codes", {"fingerprint": "c0de"}), ("pairs", {"candidates": "ca"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps(record))
    sources = {name: {"path": str(tmp_path / name)} for name in ("codes", "pairs")}
    third = make_stage(tmp_path, "third", {"run": {"dir": str(first)}, "data": sources}, {})
    (third / "candidates").mkdir()
    (third / "candidates" / "candidates.json").write_text("{}")
    assert made_by(codec)[0] in read_by(third, tmp_path)
    addresses = {item.kind: item.address for item in read_by(third, tmp_path)}
    assert addresses["candidates"] == "omni-train://candidates/candidates?hash=ca"
    # Its own directory, as it was called before it was moved, is no input.
    assert "checkpoint" not in addresses
    assert [item.kind for item in made_by(third)] == ["candidates", "checkpoint"]
    # Another content is another address, under the same name.
    (first / "checkpoints" / "step-4" / "manifest.json").write_text("{}")
    (changed,) = made_by(first)
    assert changed.name == made.name
    assert changed.address != made.address


def test_alerts_say_what_went_wrong(tmp_path: Path) -> None:
    folder = make_stage(tmp_path, "first", {}, {})
    log = folder / "events.jsonl"
    assert read_wandb(write_wandb(folder, project="test")).alerts == [
        "Non-finite step: steps [3]; the samples are in events.jsonl",
        "Run preempted: step 4: asked to stop by SIGUSR1",
    ]
    # Killed, or hung: no end of its own, and nobody there.
    writer = JsonlWriter(log)
    writer.write({"kind": "run_resume", "run_id": "e/first"})
    writer.close()
    (folder / "state.json").write_text(json.dumps({"status": "failed", "reason": "rank 1 hung"}))
    again = read_wandb(write_wandb(folder, project="test")).alerts
    assert again[1:] == ["Run died: rank 1 hung"]


def test_sync_of_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", "sync", str(tmp_path)]) == 66
    assert "there is no run" in capsys.readouterr().err
