"""Completion, and what every command's help has to offer."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import build_parser, main


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


@pytest.mark.parametrize("parser", list(parsers(build_parser())), ids=lambda p: p.prog)
def test_every_help_text_has_examples(parser: argparse.ArgumentParser) -> None:
    epilog = parser.epilog or ""
    assert "examples:" in epilog
    assert f"{parser.prog}" in epilog or parser.prog == "omni-train"
    assert parser.format_help()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["omni-train", "do"], {"doctor"}),
        (["omni-train", "train", "stage1_a"], {"stage1_audio"}),
        (["omni-train", "runs", "di"], {"diff"}),
        (["omni-train", "data", "lint", "--js"], {"--json"}),
        (["omni-train", "plan", "--re"], {"--refit"}),
        (["omni-train", "config", "stage1_audio", "--j"], {"--json"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_completes(
    typed: list[str], expected: set[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = " ".join(f"'{word}'" for word in typed)
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _omni_train; "
    ask += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == expected
