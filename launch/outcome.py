"""Says in one word how a run went: done, preempted, failed, running or none; for job scripts.

Usage: python -m launch.outcome RUN_DIRECTORY [OFFSET [--failed REASON]]

With an offset into `events.jsonl`, only what was recorded after it counts: a job script must not
take the end of the attempt before for its own. --failed writes the reason into `state.json` where
the attempt died before it could do so itself. The standard library is all that is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def outcome(run_dir: Path, offset: int | None = None) -> str:
    """Return the word.

    Args:
        run_dir: run directory; it may not exist.
        offset: bytes of `events.jsonl` that belong to earlier attempts; None asks `state.json`.
    """
    if offset is None:
        path = run_dir / "state.json"
        return str(json.loads(path.read_bytes())["status"]) if path.exists() else "none"
    log = run_dir / "events.jsonl"
    if not log.exists():
        return "none"
    with log.open("rb") as file:
        file.seek(offset)
        lines = file.read().splitlines()
    ends = [line for line in lines if line.startswith(b'{"kind": "run_end"')]
    return str(json.loads(ends[-1])["status"]) if ends else "none"


def write_failure(run_dir: Path, reason: str) -> str:
    """Record why an attempt that left no end of its own failed, and return the whole reason."""
    log = run_dir / "logs" / "rank-00000.out"
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    whole = f"{text.splitlines()[-1]} ({reason})" if text else reason
    state = {"status": "failed", "stage": "", "step": 0, "exit_code": None, "reason": whole}
    path = run_dir / "state.json"
    if path.exists():
        state = {**json.loads(path.read_bytes()), "status": "failed", "reason": whole}
    path.with_name("state.json.tmp").write_text(json.dumps(state, indent=1) + "\n")
    path.with_name("state.json.tmp").replace(path)
    return whole


def main() -> None:
    """Print the word, or the reason."""
    run_dir, *rest = sys.argv[1:]
    word = outcome(Path(run_dir), int(rest[0]) if rest else None)
    if rest[1:2] == ["--failed"]:
        state = Path(run_dir) / "state.json"
        known = word == "failed" and state.exists()
        reason = json.loads(state.read_bytes())["reason"] if known else rest[2]
        print(f"failed: {reason if known else write_failure(Path(run_dir), reason)}")
    else:
        print(word)


if __name__ == "__main__":
    main()
