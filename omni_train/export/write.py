"""From a checkpoint to a complete Hugging Face directory, which appears when it is complete.

    OUT/model-*.safetensors, model.safetensors.index.json, config.json, generation_config.json
    OUT/tokenizer files, chat_template.jinja, (video_)preprocessor_config.json
    OUT/spk_dict.pt        voices; tensors and numbers alone, for weights_only loading
    OUT/codec/             only where the Talker's codes are not Token2Wav's
    OUT/adapter/           only with adapters: the same ones in peft's format
    OUT/README.md, export.json

Done here: what goes into it, and config. Tensors, processor files and the card are their modules'.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5OmniConfig
from transformers import Qwen2_5OmniForConditionalGeneration as WholeModel

import omni_train
from omni_train.config.errors import ConfigError
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.checkpoint_files import step_folders
from omni_train.engine.checkpoint_reader import CheckpointReader
from omni_train.engine.deepspeed import DTYPES
from omni_train.engine.hashing import file_hash
from omni_train.export.card import Card, format_card
from omni_train.export.facts import Lineage, RunFacts, read_lineage, scores_of
from omni_train.export.probe import logits_hash, probe_logits
from omni_train.export.processor import write_processor
from omni_train.export.tensors import Layout, Part, choose_parts, write_parts
from omni_train.models.build import build_replica
from omni_train.models.groups import THINKER_GROUPS
from omni_train.models.lora import lora_of, write_adapter
from omni_train.models.presets import model_spec, quiet, resolve_speech_config
from omni_train.models.talker_layout import TalkerSpec
from omni_train.models.talker_spec import talker_spec
from omni_train.models.weights import SafetensorsSource, WeightSource, open_source

SPEAKERS_FILE = "spk_dict.pt"
CODEC_FOLDER, ADAPTER_FOLDER = "codec", "adapter"
# Key of config.json for what transformers has no field for.
NOTES = "omni_train"
DEFAULT_SHARD_BYTES = 4 << 30
_TALKER, _TOKEN2WAV = "talker.", "token2wav."


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What to export.

    Args:
        run: run directory, or a checkpoint in one.
        out: directory to make.
        base: has the parts that the run has not; empty takes what the first run began from.
        tokenizer: directory; empty takes the run's.
        codec: run or directory of the codec, for a Talker whose codes are not Token2Wav's.
        layout: names of the Thinker's parts in the files.
        licence: for the card.
        scores: `evaluate` runs whose scores the card gives.
        shard_bytes: largest file of weights.
        verify: reload in a new process and compare logits.
    """

    run: Path
    out: Path
    base: str = ""
    tokenizer: str = ""
    codec: str = ""
    layout: Layout = Layout.released
    licence: str = "other"
    scores: tuple[Path, ...] = ()
    shard_bytes: int = DEFAULT_SHARD_BYTES
    verify: bool = True


@dataclass(slots=True)
class _Model:
    """What is known of the model before anything is written."""

    facts: RunFacts
    lineage: Lineage
    tokenizer: PreTrainedTokenizerFast
    source: WeightSource
    base: WeightSource | None
    config: Qwen2_5OmniConfig
    spec: TalkerSpec | None
    audio: bool


def export(options: ExportOptions, report: Callable[[str], None]) -> str:
    """Write an export; return the hash of its logits, or nothing where it was not verified.

    Args:
        options: what and where.
        report: called with a line about each part that is done.

    Raises:
        ConfigError: the run or the base cannot be used, or the directory exists.
        RuntimeError: the reloaded model gives other logits.
    """
    if options.out.exists():
        raise ConfigError(
            key="export OUT",
            value=str(options.out),
            rule="there is something at this place",
            remedy="choose a new directory; nothing is overwritten",
        )
    model = _read(options)
    scores = [event for run in options.scores for event in scores_of(run)]
    codec_place = _codec_place(model, options)
    partial = options.out.with_name(f"{options.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parts = _parts(model)
    write_parts(parts, partial, layout=options.layout, shard_bytes=options.shard_bytes)
    report(f"{len(parts)} tensors, {sum(p.num_bytes for p in parts) / 1e9:.3f} GB")
    codec = _write_codec(codec_place, partial)
    _write_config(model, partial, codec=codec)
    spec = model_spec(model.config.thinker_config, model.tokenizer)
    write_processor(partial, model.tokenizer, model.facts.processing, spec)
    speakers = _write_speakers(model, partial)
    _write_adapter(options, model, partial)
    digest = _verify(model, partial) if options.verify else ""
    report(f"verified, logits {digest}" if digest else "not verified")
    carried = {} if model.base is None else _carried(model, model.base)
    card = Card(
        name=options.out.name,
        licence=options.licence,
        lineage=model.lineage,
        scores=scores,
        carried=carried,
        audio=model.audio,
        codec=codec,
        logits=digest,
        default_speaker=next(iter(speakers), ""),
    )
    (partial / "README.md").write_text(format_card(card), encoding="utf-8")
    files = {
        path.relative_to(partial).as_posix(): file_hash(path)
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    record = {"logits_xxh3": digest, "layout": options.layout.name, "files": files}
    (partial / "export.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(options.out)
    return digest


def _read(options: ExportOptions) -> _Model:
    lineage = read_lineage(options.run)
    facts = lineage.runs[0]
    if options.tokenizer:
        facts = replace(facts, model=replace(facts.model, tokenizer=options.tokenizer))
    tokenizer = load_tokenizer(facts.model.tokenizer)
    place = options.base or next(
        (r for r in lineage.roots if (Path(r) / "config.json").exists()), ""
    )
    base = SafetensorsSource(place) if place else None
    source = open_source(str(options.run))
    config = resolve_speech_config(replace(facts.model, init_from=place), tokenizer)
    speaks = any(name.startswith(_TALKER) for name in source.names())
    spec = talker_spec(config, facts.model, tokenizer) if speaks else None
    held = base.names() if base is not None else set()
    # Sound takes both: a Talker, and the decoder of its codes, which only a base can have.
    decodes = any(name.startswith(_TOKEN2WAV) for name in held)
    has_talker = speaks or any(name.startswith(_TALKER) for name in held)
    audio = has_talker and decodes and not options.codec
    return _Model(facts, lineage, tokenizer, source, base, config, spec, audio)


def _parts(model: _Model) -> list[Part]:
    model.config.enable_audio_output = model.audio
    with torch.device("meta"), quiet():
        whole = WholeModel(model.config)
    wanted = set(whole.state_dict())
    if model.spec is not None and not model.audio:
        # transformers leaves these alone; our own commands read them.
        wanted |= {n for n in model.source.names() if n.startswith(_TALKER)}
    wanted -= {"talker.text_rows.weight", "talker.speaker_rows.weight"}
    dtype = DTYPES[model.facts.precision]
    return choose_parts(wanted, model.source, model.base, dtype=dtype, spec=model.spec)


def _carried(model: _Model, base: WeightSource) -> dict[str, str]:
    """Parts that the run has not, by name."""
    named = {"The Talker": _TALKER, "Token2Wav": _TOKEN2WAV}
    ours = model.source.names()
    return {
        part: base.path
        for part, prefix in named.items()
        if model.audio and not any(name.startswith(prefix) for name in ours)
    }


def _codec_place(model: _Model, options: ExportOptions) -> Path | None:
    """Directory of the codec that goes along; None where sound needs none."""
    if model.audio or model.spec is None:
        return None
    place = Path(options.codec or ".")
    if (place / CODEC_FOLDER).is_dir():
        place = place / CODEC_FOLDER
    if not options.codec or not (place / "codec.json").is_file():
        raise ConfigError(
            key="--codec",
            value=options.codec,
            rule="the run's Talker speaks in codes of a codec that is not in the base",
            remedy="give the run.dir of `speech_codec`, or a base with Token2Wav",
        )
    return place


def _write_codec(place: Path | None, folder: Path) -> str:
    if place is None:
        return ""
    (folder / CODEC_FOLDER).mkdir()
    for path in sorted(place.iterdir()):
        if path.is_file():
            shutil.copy(path, folder / CODEC_FOLDER / path.name)
    return CODEC_FOLDER


def _write_config(model: _Model, folder: Path, *, codec: str) -> None:
    config, tokens = model.config, model_spec(model.config.thinker_config, model.tokenizer).tokens
    ends = {"eos_token_id": tokens.im_end, "pad_token_id": model.tokenizer.pad_token_id}
    # transformers takes the end of the Thinker's replies from here, not from generation_config.
    for part in (config.thinker_config, config.thinker_config.text_config):
        for key, value in ends.items():
            setattr(part, key, value)
    config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
    config.dtype = DTYPES[model.facts.precision]
    notes: dict[str, Any] = {"stage": model.facts.stage, "step": model.facts.step}
    if codec:
        notes |= {"talker": True, "codec": codec, "audio_output": f"needs the codec in {codec}/"}
    setattr(config, NOTES, notes)
    with quiet():
        config.save_pretrained(str(folder))
    GenerationConfig(**ends, do_sample=False, repetition_penalty=1.0).save_pretrained(str(folder))


def _write_speakers(model: _Model, folder: Path) -> dict[str, Any]:
    """Write `spk_dict.pt`: the base's voices, or the tokens of those that the run's Talker has."""
    known: dict[str, Any] = {}
    kept = Path(model.base.path) / SPEAKERS_FILE if model.base is not None else None
    if kept is not None and kept.is_file():
        known = torch.load(kept, weights_only=True)
    elif model.spec is not None:
        known = {name: {"bos_token": row} for name, row in model.spec.speakers.items()}
    torch.save(known, folder / SPEAKERS_FILE)
    # Read back the way that its readers do; a file with anything but data would fail here.
    torch.load(folder / SPEAKERS_FILE, weights_only=True)
    return known


def _write_adapter(options: ExportOptions, model: _Model, folder: Path) -> None:
    path = options.run
    if (path / "checkpoints").is_dir():
        path = step_folders(path / "checkpoints")[0]
    reader = CheckpointReader(path, verify=False)
    lora = lora_of(reader.notes(), path)
    if lora is not None:
        base = model.base.path if model.base is not None else options.out.name
        write_adapter(reader, lora, folder / ADAPTER_FOLDER, base)


def _verify(model: _Model, folder: Path) -> str:
    """Compare the logits of the trained weights with those that a new process gets."""
    precision = model.facts.precision
    # Sizes are the base's where it has a config.json; every weight is the run's.
    place = model.source.path if model.base is None else model.base.path
    groups = {} if model.base is None else dict.fromkeys(THINKER_GROUPS, model.source.path)
    trained_config = replace(model.facts.model, init_from=place, init_groups=groups)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        replica = build_replica(trained_config, model.tokenizer, precision, torch.device("cpu"))
        replica.thinker.set_attn_implementation("sdpa")
        trained = logits_hash(probe_logits(replica.thinker))
    finally:
        torch.set_num_threads(threads)
    del replica
    place = str(folder.resolve())
    command = [sys.executable, "-m", "omni_train.export.probe", place, precision.name]
    # From where this very code lies: another checkout may be where the command was given.
    home = Path(omni_train.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=home)
    reloaded = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    if done.returncode or reloaded != trained:
        raise RuntimeError(
            f"{folder}: the reloaded model gives other logits ({reloaded or done.stderr[-2000:]}) "
            f"than the trained weights ({trained})"
        )
    return trained
