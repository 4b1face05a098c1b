"""The report: what it shows, that nothing of a run becomes markup, and how a browser renders it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from launch.cli import main
from omni_train.tracking.events import JsonlWriter
from omni_train.tracking.report_data import read_run, thin
from omni_train.tracking.samples import MediaType

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Run in the page by the test: what a person would look at.
PROBE = """
const done = (value) => console.log('RESULT' + JSON.stringify(value) + 'END');
window.addEventListener('load', () => setTimeout(async () => {
  const canvas = document.querySelector('canvas');
  const drawn = () => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
    .filter((v, i) => i % 4 === 3 && v > 0).length;
  const before = drawn(), box = canvas.getBoundingClientRect();
  const at = (share) => ({ clientX: box.left + box.width * share, clientY: box.top + 50,
    pointerId: 1, bubbles: true });
  canvas.setPointerCapture = () => {};
  const label = () => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
    .reduce((sum, v, i) => (sum * 31 + v) % 1000003, 0);
  const whole = label();
  canvas.dispatchEvent(new PointerEvent('pointerdown', at(0.4)));
  canvas.dispatchEvent(new PointerEvent('pointermove', at(0.8)));
  canvas.dispatchEvent(new PointerEvent('pointerup', at(0.8)));
  const button = document.querySelector('figure button');
  const zoomed = !button.hidden && label() !== whole;
  button.click();
  const back = button.hidden;
  const audio = document.querySelector('audio');
  audio.muted = true;
  let played = 'no';
  try {
    await audio.play();
    for (let n = 0; n < 300 && audio.currentTime === 0; n++)
      await new Promise((r) => setTimeout(r, 50));
    played = audio.currentTime > 0 && audio.duration > 0.9;
  } catch (e) { played = String(e); }
  done({ before, zoomed, back, played, title: document.title,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    images: document.images.length, width: window.innerWidth });
}, 300));
"""


def make_pairs(folder: Path, evil: str) -> Path:
    answer = {"heard": f"river{evil}", "wer": 0.5, "pause_error": None, "wave": "UklGRg=="}
    row = {"key": "k", "text": f"doctor{evil}", "speaker": evil, "gap": 0.5}
    writer = JsonlWriter(folder / "listen.jsonl")
    writer.write({**row, "chosen": answer | {"heard": "doctor"}, "rejected": answer})
    writer.close()
    return folder


def make_run(folder: Path, *, init_from: str = "", evil: str = "") -> Path:
    writer = JsonlWriter(folder / "events.jsonl")
    writer.write({"kind": "run_start", "time": 1.0, "stage": f"text_lm{evil}", "versions": {}})
    rest = {"lr": {"llm": 0.1}, "metrics": {"loss_task/asr": 2.0}}
    for step in range(1, 41):
        loss: Any = float("nan") if step == 7 else 3.0 / step
        writer.write({"kind": "step", "step": step, "loss": loss, "tokens": 10, **rest})
    writer.write({"kind": "non_finite", "step": 7, "rank": 1, "what": "loss", "keys": [f"k{evil}"]})
    said = {"text": f"river{evil}", "heard": "river", "wer": 0.5, "speaker": "v", "key": "k"}
    (folder / "audio").mkdir()
    soundfile.write(folder / "audio" / "a.wav", np.zeros(16_000, np.float32), 16_000)
    soundfile.write(folder.parent / "outside.wav", np.zeros(160, np.float32), 16_000)
    for wave in ("audio/a.wav", "../outside.wav"):
        writer.write({"kind": "audio", "task": "tts", "wave": wave, **said})
    Image.new("RGB", (40, 30), "red").save(folder / "picture.png")
    asked = {"prompt": f"what?{evil}", "media": ["picture.png", "../outside.wav"], "score": 1.0}
    reply = {"key": "k", "reference": f"a{evil}", "prediction": "b"}
    writer.write({"kind": "sample", "task": f"vqa{evil}", **asked, **reply})
    score = {"task": f"asr{evil}", "metric": "wer", "value": 0.25, "num_samples": 8}
    writer.write({"kind": "evaluation", **score})
    writer.write({"kind": "run_end", "elapsed_s": 60.0, "status": "done", "step": 40})
    writer.close()
    ledger = JsonlWriter(folder / "ledger.jsonl")
    for _ in range(3):
        ledger.write({"source": f"asr{evil}", "reason": "truncated"})
    ledger.close()
    (folder / "state.json").write_text(json.dumps({"status": "done", "reason": ""}))
    settings: dict[str, Any] = {"optim": {"lr": 0.1}, "model": {"init_from": init_from or evil}}
    settings["data"] = {"sources": {"pairs": {"path": str(make_pairs(folder / "pairs", evil))}}}
    (folder / "resolved.yaml").write_text(yaml.safe_dump(settings))
    pairs = JsonlWriter(folder / "predictions-asr.jsonl")
    pairs.write({"reference": f"a{evil}", "prediction": "b"})
    pairs.close()
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    make_run(root / "first", evil=EVIL)
    make_run(root / "second", init_from="runs/first")
    assert main(["report", str(root), "--no-pictures"]) == 0
    return root / "report.html"


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    facts = read_run(make_run(tmp_path / "run"))
    assert (facts.steps, facts.tokens, facts.seconds, facts.state) == (40, 400, 60.0, "done")
    # A step without a finite loss leaves a gap.
    assert [p[0] for p in facts.charts["loss"]["loss"]][5:8] == [6, 8, 9]
    # Each group of metrics by itself.
    assert facts.charts["loss_task"] == {"asr": [[step, 2.0] for step in range(1, 41)]}
    assert facts.charts["lr"] == {"llm": [[step, 0.1] for step in range(1, 41)]}
    assert facts.unused == [(("asr", "truncated"), 3)]
    assert [(f.step, f.kind) for f in facts.faults] == [(7, "non_finite")]
    assert facts.evaluations == [{"task": "asr", "metric": "wer", "value": 0.25, "n": 8}]
    # A wave outside of the run is no part of it.
    assert [sound.text for sound in facts.sounds] == ["river"]
    assert facts.replies == {"asr": [("a", "b")]}
    columns, ((key, asked, picture, reference, *rest),) = facts.samples["vqa"]
    assert columns == ["key", "prompt", "image", "reference", "prediction", "score"]
    assert (key, asked, reference, rest) == ("k", "what?", "a", ["b", 1.0])
    assert (picture.kind, picture.uri[:22]) == (MediaType.image, "data:image/png;base64,")


def test_thinning_keeps_every_spike() -> None:
    points = [[float(n), 1.0] for n in range(10_000)]
    points[7_777][1] = 50.0
    kept = thin(points)
    assert len(kept) <= 1000
    assert [7_777.0, 50.0] in kept
    assert kept == sorted(kept)


def test_nothing_of_a_run_becomes_markup_and_nothing_is_fetched(page: Path) -> None:
    text = page.read_text()
    assert text.count("<script") == 2
    assert "onerror=alert(1)>" not in re.sub(r"&lt;img[^<]*", "", text)
    assert "script-src 'sha256-" in text
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"(?:src|href)=\"([^\"]{0,20})", text))
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses), addresses
    assert "://" not in text
    # What a run starts from is an arrow and a comparison.
    assert "before (first)" in text
    assert text.count("<path") == 1


def test_runs_and_answers_can_be_heard_side_by_side(page: Path) -> None:
    text = page.read_text()
    # Both runs spoke one text, and keep it in their own sections too.
    table = text.partition("spoken by each")[2].partition("<h2")[0]
    assert re.findall(r"<th[^>]*>([^<]*)", table) == ["text", "first", "second"]
    assert table.count("<audio") == 2
    pairs = text.split("Preference pairs")[1:]
    # Each run has pairs of its own.
    assert len(pairs) == 2
    for section in pairs:
        table = section.partition("</table>")[0]
        assert re.findall(r"<th[^>]*>([^<]*)", table) == ["text", "chosen", "rejected", "gap"]
        assert table.count('src="data:audio/wav;base64,UklGRg=="') == 2
        assert "doctor" in table


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 66
    assert main(["report", "no-such-pipeline"]) == 2
    said = capsys.readouterr().err
    assert "there is no run in" in said
    assert "one of:" in said


def browser_command(browser: str, page: Path, *options: str) -> list[str]:
    common = ("--headless", "--no-sandbox", "--disable-gpu", "--mute-audio")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    autoplay = "--autoplay-policy=no-user-gesture-required"
    return [browser, *common, profile, autoplay, "--enable-logging=stderr", *options, page.as_uri()]


def browse(browser: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = browser_command(browser, page, *options)
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def probe(browser: str, page: Path) -> dict[str, Any]:
    """What the probe in the page saw; it tells by the console."""
    process = subprocess.Popen(
        browser_command(browser, page, "--remote-debugging-port=0", "--window-size=390,1200"),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    timer = threading.Timer(100, process.kill)
    timer.start()
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "RESULT" in line:
                result: dict[str, Any] = json.loads(line.partition("RESULT")[2].partition("END")[0])
                return result
        raise AssertionError("".join(lines))
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def test_a_browser_draws_zooms_plays_and_fits(page: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is here")
    shot = page.with_name("shot.png")
    done = browse(browser, page, f"--screenshot={shot}", "--window-size=390,1200")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert shot.stat().st_size > 5_000
    # The page's own policy would stop the probe, which shows that it works.
    probed = page.with_name("probed.html")
    text = page.read_text().replace("</body>", f"<script>{PROBE}</script></body>")
    probed.write_text(text)
    assert (
        "Refused to execute inline script"
        in (refused := browse(browser, probed, "--dump-dom").stderr)
        or "violates the following Content Security Policy" in refused
    )
    probed.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text))
    result = probe(browser, probed)
    assert result["before"] > 500, result
    assert (result["zoomed"], result["back"], result["played"]) == (True, True, True), result
    assert result["overflow"] <= 0, result
    assert result["title"] != "owned"
    # The pictures of both runs, and none from elsewhere.
    assert result["images"] == 2, result
