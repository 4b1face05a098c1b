"""A row of every benchmark as its owner documents it, and the files it lies in."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from tests.unit.data.clips import clip, every, tone, wav
from tests.unit.data.samples import png

SOUND = {"bytes": wav(tone(0.3, 16_000)), "path": "a.wav"}
PICTURE = {"bytes": png(56, 56, 1), "path": "a.png"}
FOUR = ["red", "blue", "green", "pink"]
# name -> (a row as the owner documents it, media files, the right reply)
ROWS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "librispeech": ({"id": "84-1-0000", "text": "GO DO"}, ["84-1-0000.flac"], "GO DO"),
    "common_voice": (
        {"client_id": "c", "path": "c.mp3", "sentence": "Go on.", "up_votes": "2"},
        ["clips/c.mp3"],
        "Go on.",
    ),
    "common_voice_zh": (
        {"path": "c.mp3", "sentence": "\u4f60\u597d"},
        ["clips/c.mp3"],
        "\u4f60\u597d",
    ),
    "fleurs": ({"id": 1, "audio": SOUND, "transcription": "go", "lang_id": 1}, [], "go"),
    "fleurs_zh": ({"audio": SOUND, "transcription": "\u4f60\u597d"}, [], "\u4f60\u597d"),
    "voxpopuli": ({"audio": SOUND, "normalized_text": "go", "raw_text": "Go."}, [], "go"),
    "wenetspeech": (
        {"sid": "Y1_S0", "begin_time": 0.1, "end_time": 0.25, "text": "\u4f60\u597d"}
        | {"confidence": 1.0, "subsets": ["TEST_NET"], "path": "audio/Y1.opus"},
        ["audio/Y1.opus"],
        "\u4f60\u597d",
    ),
    "covost2": (
        {
            "path": "c.mp3",
            "sentence": "Go.",
            "translation": "Geh bitte nach Hause.",
            "client_id": "c",
        },
        ["clips/c.mp3"],
        "Geh bitte nach Hause.",
    ),
    "covost2_zh": (
        {"path": "c.mp3", "translation": "\u8bf7\u4f60\u56de\u5bb6\u5427"},
        ["clips/c.mp3"],
        "\u8bf7\u4f60\u56de\u5bb6\u5427",
    ),
    "meld": (
        {"Utterance": "Oh", "Emotion": "joy", "Dialogue_ID": "0", "Utterance_ID": "3"},
        ["dia0_utt3.mp4"],
        "joy",
    ),
    "vocalsound": (
        {"wav": "/data/owner/audio_16k/f0003_0_cough.wav", "labels": "/m/01b_21"},
        ["audio_16k/f0003_0_cough.wav"],
        "cough",
    ),
    "giantsteps": (
        {"id": "1092771.LOFI", "tempo": "136"},
        ["audio/1092771.LOFI.mp3"],
        "136",
    ),
    "musiccaps": (
        {"ytid": "-0Gj8", "start_s": "30", "end_s": "40", "aspect_list": "['slow', 'harp']"}
        | {"caption": "A slow harp, and rain."},
        ["-0Gj8.wav"],
        "A slow harp, and rain.",
    ),
    "omnibench": (
        {
            "index": 1,
            "task type": "Action",
            "audio type": "speech",
            "question": "What?",
            "options": FOUR,
            "answer": "green",
            "audio_path": "a.mp3",
            "image_path": "a.jpg",
        },
        ["mm_data/audio/a.mp3", "mm_data/image/a.jpg"],
        "C",
    ),
    "mmau": (
        {"id": "x", "audio_id": "./t/a.wav", "question": "?", "choices": FOUR, "answer": "blue"}
        | {"task": "sound", "difficulty": "easy"},
        ["t/a.wav"],
        "B",
    ),
    "mmmu": (
        {"id": "x", "question": "<image 1>?", "options": str(FOUR), "answer": "D"}
        | {"question_type": "multiple-choice", "subfield": "Art", "image_1": PICTURE},
        [],
        "D",
    ),
    "mmlu": ({"question": "?", "choices": FOUR, "answer": 2, "subject": "art"}, [], "C"),
    "mmlu_pro": (
        {"question": "?", "options": [*FOUR, "grey"], "answer": "E", "category": "art"},
        [],
        "E",
    ),
    "mmlu_redux": ({"question": "?", "choices": FOUR, "answer": 1, "error_type": "ok"}, [], "B"),
    "gpqa": (
        {"Question": "Why?", "Correct Answer": "red", "High-level domain": "Physics"}
        | {f"Incorrect Answer {i}": FOUR[i] for i in (1, 2, 3)},
        [],
        "C",
    ),
    "mmbench": (
        {"index": "1", "hint": 'Two lines,\nand a "quote".', "question": "?", "A": "B", "B": "A"}
        | {"C": "", "D": "", "answer": "A", "category": "ocr", "l2-category": "x"}
        | {"image": base64.b64encode(png(56, 56, 1)).decode()},
        [],
        "A",
    ),
    "mmmu_pro": (
        {"id": "x", "question": "<image 1>?", "options": str(FOUR), "answer": "D"}
        | {"subject": "Art", "image_1": PICTURE},
        [],
        "D",
    ),
    "muirbench": (
        {"idx": 1, "task": "Counting", "question": "<image>Like?", "options": ["<image>", "none"]}
        | {"answer": "B", "image_list": [PICTURE, PICTURE]},
        [],
        "B",
    ),
    "mmstar": (
        {"index": 0, "question": "?\nOptions: A: red, B: blue", "image": PICTURE, "answer": "B"}
        | {"category": "math", "l2_category": "x"},
        [],
        "B",
    ),
    "realworldqa": ({"image": PICTURE, "question": "Where?", "answer": "Left"}, [], "Left"),
    "mme": (
        {"question_id": "a.png", "image": PICTURE, "question": "? Please answer yes or no."}
        | {"answer": "Yes", "category": "count"},
        [],
        "Yes",
    ),
    "mathvista": (
        {"pid": "1", "question": "?", "image": "images/1.jpg", "decoded_image": PICTURE}
        | {"choices": FOUR, "answer": "pink", "question_type": "multi_choice"},
        [],
        "D",
    ),
    "mathvision": (
        {"id": "4", "question": "<image1>?", "options": [], "image": "images/4.jpg"}
        | {"decoded_image": PICTURE, "answer": "-3", "subject": "algebra", "level": 2},
        [],
        "-3",
    ),
    "video_mme": (
        {"videoID": "v", "question": "?", "options": ["A. red", "B. blue"], "answer": "B"}
        | {"duration": "short", "question_id": "001-1"},
        ["v.mp4"],
        "B",
    ),
    "mvbench": (
        {"video": "x/v.mp4", "question": "?", "candidates": FOUR, "answer": "red"},
        ["x/v.mp4"],
        "A",
    ),
    "egoschema": (
        {"question_idx": "0", "video_idx": "v", "question": "?", "option": ["A. red", "B. blue"]}
        | {"answer": "1"},
        ["videos/v.mp4"],
        "B",
    ),
    "ai2d": ({"image": PICTURE, "question": "?", "options": FOUR, "answer": "3"}, [], "D"),
    "chartqa": ({"imgname": "1.png", "query": "How many?", "label": "14"}, ["png/1.png"], "14"),
    "textvqa": (
        {"image_id": "1f", "question": "?", "answers": ["nok", *["nokia"] * 9]},
        ["1f.jpg"],
        "nokia",
    ),
    "docvqa": ({"image": "d/1.png", "question": "?", "answers": ["7"]}, ["d/1.png"], "7"),
    "refcoco": (
        {"image": PICTURE, "answer": ["left cup"], "bbox": [10.0, 20.0, 30.0, 5.5]},
        [],
        "[10.0, 20.0, 40.0, 25.5]",
    ),
    "refcoco_plus": (
        {"image": PICTURE, "answer": ["cup"], "bbox": [1.0, 2.0, 3.0, 4.0]},
        [],
        "[1.0, 2.0, 4.0, 6.0]",
    ),
    "refcoco_g": (
        {"image": PICTURE, "answer": ["the cup"], "bbox": [1.0, 2.0, 3.0, 4.0]},
        [],
        "[1.0, 2.0, 4.0, 6.0]",
    ),
    "voicebench": ({"audio": SOUND, "prompt": "Who?", "reference": "Bach"}, [], "Bach"),
    "voicebench_text": ({"prompt": "Who?", "reference": "Bach"}, [], "Bach"),
    "voicebench_open": ({"audio": SOUND, "prompt": "Who was Bach?"}, [], "Who was Bach?"),
    "gsm8k": ({"question": "?", "answer": "2+2\n#### 1,004"}, [], "1004"),
    "math": (
        {"problem": "?", "level": "Level 1", "type": "Algebra"}
        | {"solution": "So \\boxed{1}, no, $\\boxed{\\frac{-1}{2}}$."},
        [],
        "\\frac{-1}{2}",
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}
        | {"test": "def check(c): assert c() == 1", "entry_point": "f"},
        [],
        "    return 1",
    ),
    "mbpp": (
        {"task_id": 1, "text": "Return one.", "code": "def f(): return 1"}
        | {"test_list": ["assert f() == 1"], "test_setup_code": ""},
        [],
        "def f(): return 1",
    ),
}
# A field whose absence must be named.
NEEDED = {
    "librispeech": "text",
    "common_voice": "sentence",
    "common_voice_zh": "path",
    "fleurs": "transcription",
    "fleurs_zh": "audio",
    "voxpopuli": "normalized_text",
    "covost2": "translation",
    "covost2_zh": "path",
    "meld": "Emotion",
    "vocalsound": "labels",
    "omnibench": "audio_path",
    "mmau": "choices",
    "mmmu": "options",
    "mmlu": "answer",
    "mmlu_pro": "category",
    "video_mme": "videoID",
    "mvbench": "candidates",
    "ai2d": "image",
    "chartqa": "label",
    "textvqa": "answers",
    "docvqa": "question",
    "refcoco": "bbox",
    "voicebench": "reference",
    "voicebench_text": "prompt",
    "gsm8k": "answer",
    "wenetspeech": "text",
    "giantsteps": "tempo",
    "musiccaps": "caption",
    "mmlu_redux": "error_type",
    "gpqa": "Incorrect Answer 2",
    "mmbench": "image",
    "mmmu_pro": "subject",
    "muirbench": "image_list",
    "mmstar": "category",
    "realworldqa": "answer",
    "mme": "category",
    "mathvista": "question_type",
    "mathvision": "decoded_image",
    "egoschema": "video_idx",
    "refcoco_plus": "answer",
    "refcoco_g": "image",
    "voicebench_open": "prompt",
    "math": "solution",
    "humaneval": "entry_point",
    "mbpp": "test_list",
}
CSV, TSV = ("meld", "musiccaps", "gpqa"), ("common_voice", "covost2", "mmbench")
# Pictures that are not a column of their own.
INNER = {"muirbench": 2, "mmbench": 1}
BYTES = {
    ".mp4": lambda: clip(every(1.0, 4), sound=tone(0.5, 16_000)),
    ".wav": lambda: SOUND["bytes"],
}


def sound_file(suffix: str) -> bytes:
    """A real sound in the container of the suffix."""
    sink = io.BytesIO()
    kind = {".opus": ("OGG", "OPUS")}.get(suffix, (suffix.lstrip(".").upper(), None))
    soundfile.write(sink, tone(0.3, 16_000), 16_000, format=kind[0], subtype=kind[1])
    return sink.getvalue()


def picture_file(suffix: str) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(sink, format={".jpg": "JPEG"}.get(suffix, "PNG"))
    return sink.getvalue()


def lay_out(folder: Path, name: str, row: dict[str, Any]) -> Path:
    """Write media and one row in the owner's kind of file; return what the command is given."""
    for media in ROWS[name][1]:
        path = folder / media
        path.parent.mkdir(parents=True, exist_ok=True)
        make = {".mp4": BYTES[".mp4"], ".wav": BYTES[".wav"]}.get(path.suffix)
        if make is not None:
            path.write_bytes(make())
        elif path.suffix in (".png", ".jpg"):
            path.write_bytes(picture_file(path.suffix))
        else:
            path.write_bytes(sound_file(path.suffix))
    if name == "wenetspeech":
        segment = {key: value for key, value in row.items() if key != "path"}
        recording = {"aid": "Y1", "path": row["path"], "duration": 0.3, "segments": [segment]}
        file = folder / "WenetSpeech.json"
        file.write_text(json.dumps({"audios": [recording]}))
        return file
    if name == "giantsteps":
        file = folder / "annotations/giantsteps/1092771.LOFI.bpm"
        file.parent.mkdir(parents=True)
        said = f"tempo 0 {row['tempo']}" if "tempo" in row else ""
        file.write_text(f"#@format: tempo\ttimestamp(float)\tbpm(float)\n{said}")
        return folder
    if name.startswith((*CSV, *TSV)):
        file = folder / ("test.csv" if name in CSV else "test.tsv")
        with file.open("w", encoding="utf-8", newline="") as sink:
            writer = csv.DictWriter(sink, row, delimiter="," if name in CSV else "\t")
            writer.writeheader()
            writer.writerow(row)
        return file
    if any(isinstance(value, dict) for value in row.values()) or name == "muirbench":
        file = folder / "test.parquet"
        pq.write_table(pa.Table.from_pylist([row]), file)
        return file
    file = folder / ("rows.json" if name in ("vocalsound", "textvqa") else "rows.jsonl")
    text = json.dumps({"data": [row]} if file.suffix == ".json" else row)
    file.write_text(text + "\n", encoding="utf-8")
    return file
