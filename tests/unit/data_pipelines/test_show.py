"""The token timeline: every token once, borders where two seconds end, texts that stay texts."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from data_pipelines.shards import write_shards
from data_pipelines.show import page_of, print_ids, show_sample, split_place
from data_pipelines.timeline import draw_timeline, wrap
from data_pipelines.timeline_data import Timeline, TokenKind, unpatchify
from data_pipelines.timeline_draw import Box, Drawing, Label, Line, text_width, to_png, to_svg
from data_pipelines.timeline_media import envelope
from data_pipelines.timeline_style import LEFT, PLOT, Scale, round_steps
from launch import cli
from omni_train.config.errors import ConfigError
from omni_train.data.image import patchify
from omni_train.data.index import index_path, read_index
from omni_train.data.tokenizer import load_tokenizer
from tests.unit.data_pipelines.test_lint import encoding_of, spoken

SHARD = "shard-000000.tar"
ATTACK = '<script src="//x.y/z.js">alert(1)</script> & "quoted"'


def first_keys(corpus: Path) -> dict[str, str]:
    """One sample of each kind, by the path of its shard and its key."""
    places = {}
    for name in ("text", "asr", "caption", "av", "dialogue"):
        shard = corpus / "heldout" / name / SHARD
        for row in read_index(index_path(shard)):
            kind = name
            if name == "av":
                kind = "clip with sound" if row.media[0].has_audio else "silent clip"
            places.setdefault(kind, f"{shard}:{row.key}")
    assert len(places) == 6
    return places


@pytest.fixture(scope="module")
def shown(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Timeline]:
    out = tmp_path_factory.mktemp("show")
    how = encoding_of(corpus)
    return {
        kind: show_sample(place, how, out).timeline for kind, place in first_keys(corpus).items()
    }


def boxes(drawing: Drawing, name: str) -> list[Box]:
    return [s for s in drawing.shapes if isinstance(s, Box) and s.name.startswith(name)]


KINDS = ("text", "asr", "caption", "clip with sound", "silent clip", "dialogue")


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_drawn_once_at_its_place(shown: dict[str, Timeline], kind: str) -> None:
    timeline = shown[kind]
    drawing = draw_timeline(timeline)
    scale = Scale(0, timeline.num_tokens)
    drawn: list[int] = []
    for box in boxes(drawing, "tokens:"):
        start, end = map(int, box.name.split(":")[1:])
        drawn += range(start, end)
        assert box.x == pytest.approx(scale(start))
        assert box.x + box.width == pytest.approx(scale(end))
        assert len({timeline.kinds[at] for at in range(start, end)}) == 1
    assert drawn == list(range(timeline.num_tokens))
    assert (scale(0), scale(timeline.num_tokens)) == (LEFT, LEFT + PLOT)
    axes = [s for s in drawing.shapes if isinstance(s, Line) and s.name.startswith("axis:")]
    assert [axis.name for axis in axes] == ["axis:0", "axis:1", "axis:2"]
    for axis in axes:
        levels = [y for _, y in axis.points[::2]]
        order = np.argsort(timeline.positions[int(axis.name[-1])], kind="stable")
        assert (np.diff(np.array(levels)[order]) <= 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_drawn_outside_the_picture(shown: dict[str, Timeline], kind: str) -> None:
    drawing = draw_timeline(shown[kind])
    for shape in drawing.shapes:
        if isinstance(shape, Label):
            width = text_width(shape.text, shape.size)
            left = shape.x - {"start": 0, "middle": width / 2, "end": width}[shape.anchor]
            assert left >= 0, shape
            assert left + width <= drawing.width, shape
            assert 0 < shape.y < drawing.height, shape
        elif not isinstance(shape, Line):
            assert shape.x >= 0, shape
            assert shape.x + shape.width <= drawing.width + 0.01, shape
            assert shape.y + shape.height <= drawing.height, shape
    picture = Image.open(io.BytesIO(to_png(drawing)))
    assert picture.size == (drawing.width, drawing.height)


def test_a_clip_with_sound(shown: dict[str, Timeline]) -> None:
    timeline = shown["clip with sound"]
    (view,) = timeline.media
    names = [s.name for s in draw_timeline(timeline).shapes if isinstance(s, Line)]
    borders = [float(name.split(":")[1]) for name in names if name.startswith("border:")]
    assert borders == [2.0 * number for number in range(1, int(np.ceil(view.duration_s / 2)))]
    assert len(borders) >= 2
    held = [at for block in view.blocks for at in range(block.first, block.end)]
    assert held == list(range(view.first + 2, view.end - 2))
    for block in view.blocks:
        kinds = [timeline.kinds[at] for at in range(block.first, block.end)]
        # Inside a block the picture comes first, then the sound.
        assert kinds == [TokenKind.video] * block.num_video + [TokenKind.audio] * block.num_audio
        assert block.end_s - block.start_s == 2.0
    assert sum(b.num_audio for b in view.blocks) == len(view.sound_times_s)
    # An odd last frame fills its patch alone.
    assert -(-len(view.frames) // 2) == view.grid[0]
    assert np.allclose(
        view.patch_times_s, [time for time, _ in view.frames[::2]], atol=timeline.token_s
    )


def test_other_kinds_show_what_they_have(shown: dict[str, Timeline]) -> None:
    assert not shown["text"].media
    (sound,) = shown["asr"].media
    assert len(sound.wave) > 0
    assert not sound.frames
    (image,) = shown["caption"].media
    assert not image.blocks
    (silent,) = shown["silent clip"].media
    assert len(silent.wave) == 0
    assert silent.frames
    assert {k.info.kind.name for k in shown["dialogue"].media} <= {"image", "audio"}


def test_unpatchify_undoes_patchify(corpus: Path) -> None:
    spec = encoding_of(corpus).spec
    frames = torch.randint(0, 256, (4, 3, 56, 84), dtype=torch.uint8)
    patches, grid = patchify(frames, spec)
    assert (unpatchify(patches, grid, spec) == frames.permute(0, 2, 3, 1).numpy()).all()


class Page(HTMLParser):
    """Collects what a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on")]
        self.addresses += [str(values[n]) for n in ("src", "href", "data") if n in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(values["content"])


def attacked(corpus: Path, folder: Path) -> Path:
    """A set with one sample whose every text tries to leave its place."""
    sample = spoken(0, 8000)
    sample.record |= {"task": ATTACK, "speaker": ATTACK}
    sample.record["messages"][1]["content"] = ATTACK
    write_shards(
        [sample], folder, tokenizer=load_tokenizer(corpus / "tokenizer"), samples_per_shard=1
    )
    return folder / SHARD


def test_the_page_is_self_contained_and_escapes_texts(corpus: Path, tmp_path: Path) -> None:
    shard = attacked(corpus, tmp_path / "set")
    done = show_sample(f"{shard}:s-0", encoding_of(corpus), tmp_path)
    text = done.page.read_text()
    assert "<script" not in text
    assert "&lt;script" in text
    assert not re.search(r"https?:", text)
    page = Page()
    page.feed(text)
    assert "default-src 'none'" in page.policy
    assert "script" not in page.tags
    assert page.tags.count("audio") == 1
    assert len(page.addresses) == 2
    assert all(address.startswith("data:") for address in page.addresses)
    assert str(done.timeline.num_tokens) in text
    assert len(re.findall(r'<span class="o', text)) == done.timeline.num_tokens


def test_the_same_sample_gives_the_same_files(corpus: Path, tmp_path: Path) -> None:
    place = first_keys(corpus)["clip with sound"]
    one, two = (show_sample(place, encoding_of(corpus), tmp_path / n) for n in ("a", "b"))
    assert one.png.read_bytes() == two.png.read_bytes()
    assert one.page.read_text() == two.page.read_text()
    assert page_of(one.timeline, to_svg(draw_timeline(one.timeline))) == one.page.read_text()


def test_the_command_prints_ids_and_where_the_pictures_are(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = first_keys(corpus)["asr"]
    assert cli.main(["data", "show", place, "--out", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["ids"]) == len(record["supervised"]) == record["num_tokens"]
    assert sum(record["supervised"]) == record["num_target_tokens"] > 0
    assert Image.open(record["png"]).format == "PNG"
    assert cli.main(["data", "show", place.replace(".tar", ""), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{record['num_tokens']} ids" in out
    assert "\x1b" not in out
    assert cli.main(["data", "show", f"{place}x", "--out", str(tmp_path)]) == 65
    assert cli.main(["data", "show", "nothing", "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "unknown_key" in errors
    assert "SHARD:KEY" in errors


def test_a_place_may_hold_colons() -> None:
    assert split_place("a:b/shard-1.tar:k") == (Path("a:b"), "shard-1.tar", "k")
    assert split_place("s3://b/set/shard-1:k") == ("s3://b/set", "shard-1.tar", "k")
    with pytest.raises(ConfigError, match="SHARD:KEY"):
        split_place("shard-1.tar:")


def test_wrap_keeps_to_the_width() -> None:
    lines = wrap("word " * 60 + "w" * 400, 500, 16, max_lines=50)
    assert all(text_width(line, 16) <= 500 for line in lines)
    assert "".join(lines).replace(" ", "") == "word" * 60 + "w" * 400
    assert len(wrap("word " * 600, 500, 16, max_lines=3)) == 3
    assert wrap("word " * 600, 500, 16, max_lines=3)[-1].endswith("...")


@pytest.mark.parametrize("high", [0.3, 1, 4.97, 17, 261, 262, 8192, 70_000])
def test_ticks_are_few_round_and_inside(high: float) -> None:
    ticks = round_steps(high, 12)
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 12
    assert ticks[-1] <= high


def test_the_envelope_keeps_the_loudest_samples() -> None:
    wave = np.zeros(1000, np.float32)
    wave[333], wave[777] = 0.5, -0.25
    low, high = envelope(wave, 40)
    assert (len(low), high.max(), low.min()) == (40, 0.5, -0.25)
    assert len(envelope(wave[:7], 40)[0]) == 7


def test_blocks_too_narrow_to_see_are_counted(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    write_shards([spoken(0, 250 * 16_000)], tmp_path, tokenizer=tokenizer, samples_per_shard=1)
    done = show_sample(f"{tmp_path / SHARD}:s-0", encoding_of(corpus), tmp_path)
    drawing = draw_timeline(done.timeline)
    assert len(done.timeline.media[0].blocks) == 125
    assert not [s for s in drawing.shapes if isinstance(s, Line) and s.name.startswith("border:")]
    texts = [s.text for s in drawing.shapes if isinstance(s, Label)]
    assert texts.count("125 blocks, too narrow to draw") == 2
    assert len(drawing.shapes) < 500


def test_ids_are_coloured_by_the_loss_mask(shown: dict[str, Timeline]) -> None:
    sink = io.StringIO()
    print_ids(shown["asr"], Console(file=sink, force_terminal=True, color_system="standard"))
    timeline = shown["asr"]
    green = " ".join(re.findall(r"\x1b\[1;4;32m([^\x1b]*)", sink.getvalue()))
    supervised = timeline.ids[timeline.supervised].tolist()
    assert [int(word) for word in green.split()] == supervised
