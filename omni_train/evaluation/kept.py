"""Keeps the first samples of an evaluation with their media, so that a person can look at them.

The bytes go into the run directory as they are, `samples/TASK/NUMBER-MEDIUM.SUFFIX`; a `sample`
event says what was asked, what the model said and which files belong to it. The views show them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omni_train.data.types import RawSample
from omni_train.tracking.samples import MAX_FILE_BYTES, media_type

SAMPLES_DIR = "samples"


def keep_sample(run_dir: Path, task: str, number: int, raw: RawSample) -> dict[str, Any]:
    """Write a sample's media; return the text of its question and the files' names.

    Args:
        run_dir: of the run.
        task: name of the task.
        number: of the sample, from the start of the index.
        raw: the sample as it was asked. What no view can show, or is too large, stays out.
    """
    folder = run_dir / SAMPLES_DIR / task
    names = []
    for place, info in enumerate(raw.row.media):
        content = raw.media.get(info.member)
        path = folder / f"{number:06d}-{place}{Path(info.member).suffix.lower()}"
        if content is None or media_type(path) is None or len(content) > MAX_FILE_BYTES:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        names.append(str(path.relative_to(run_dir)))
    return {"prompt": _question(raw.record["messages"]), "media": names}


def _question(messages: list[dict[str, Any]]) -> str:
    """The text of the last user turn; its media by their kind."""
    content = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if isinstance(content, str):
        return content
    words = [item["text"] if item["type"] == "text" else f"<{item['type']}>" for item in content]
    return " ".join(words)
