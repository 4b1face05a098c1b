"""Directories of models that ask for code: what they ask for is dropped, and nothing runs.

These are not refused: released directories hold such keys too, and without them they are harmless.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from launch.cli import main
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.exit_codes import ExitCode
from omni_train.models.presets import ModelPreset, TinySizes, build_config, read_config
from tests.security.tripwire import tripwire
from tests.unit.data.samples import TOKENIZER

CODE = "import os\nos.system('touch {}')\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved model whose every file names code, with that code beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    TOKENIZER.save_pretrained(folder)
    build_config(ModelPreset.tiny, TOKENIZER, TinySizes()).save_pretrained(folder)
    (folder / "evil.py").write_text(CODE.format(tmp_path / "hacked"))
    asks = {
        "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "trust_" + "remote_code": True,
        "_attn_implementation": "kernels-community/evil",
        "_attn_implementation_internal": "somebody/evil",
        "custom_pipelines": {"evil": {"impl": "evil.Evil"}},
        "chat_template": "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
    }
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        record = json.loads(path.read_text()) | asks
        if name == "config.json":
            record["thinker_config"] |= asks
            record["thinker_config"]["text_config"] |= asks
        path.write_text(json.dumps(record))
    return folder


def test_a_model_config_cannot_name_code(model: Path) -> None:
    (model / "secret").mkdir()
    with tripwire(model / "secret") as happened:
        config = read_config(model / "config.json")

    assert happened == []
    for part in (config, config.thinker_config, config.thinker_config.text_config):
        said = json.dumps(part.to_dict(), default=str)
        assert "evil" not in said, said
    assert not (model.parent / "hacked").exists()


def test_a_tokenizer_cannot_name_code(model: Path) -> None:
    (model / "secret").mkdir()
    with tripwire(model / "secret") as happened:
        tokenizer = load_tokenizer(model)
    assert happened == []
    assert type(tokenizer).__name__ == type(TOKENIZER).__name__
    assert tokenizer("which word").input_ids == TOKENIZER("which word").input_ids
    assert not (model.parent / "hacked").exists()


@pytest.mark.parametrize("name", ["a\ntouch hacked", "a\r#SBATCH --wrap=x", "$(id)", "a;b", "../a"])
def test_a_name_that_would_be_a_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talks.jsonl").write_text("{}\n")
    (tmp_path / "tok").mkdir()
    TOKENIZER.save_pretrained(tmp_path / "tok")
    given = ["data", "prepare", str(tmp_path / "talks.jsonl"), str(tmp_path / "out")]
    given += ["--format", "jsonl", "--tokenizer", str(tmp_path / "tok")]
    for more in ([], ["--slurm-array", "2"]):
        assert main([*given, "--name", name, *more]) == ExitCode.refused
        output = capsys.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_tripwire_sees_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with tripwire(tmp_path) as happened:
        # The event that the call raises, without the call.
        sys.audit("os.system", b"true")
        (tmp_path / "a").read_text()
        with socket.socket() as probe, pytest.raises(OSError):
            probe.connect(("127.0.0.1", 1))
    assert [event.split()[0] for event in happened] == ["os.system", "socket.connect", "a"]
    with tripwire(tmp_path) as happened:
        pass
    assert happened == []
