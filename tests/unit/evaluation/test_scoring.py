"""Every kind of score on known replies, and the traps of the libraries behind them."""

from __future__ import annotations

import jiwer
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_train.config.errors import DataError
from omni_train.evaluation.kinds.base import Answer
from omni_train.evaluation.kinds.choice import read_letter
from omni_train.evaluation.kinds.grounding import overlap, read_box
from omni_train.evaluation.metrics import Metric, Normalizer
from omni_train.evaluation.scoring import KINDS, Scored, format_scores, score

BASIC = Normalizer.basic
NI_HAO, NI = "\u4f60\u597d", "\u4f60"


def scored(
    pairs: list[tuple[str, str]],
    metric: Metric,
    normalizer: Normalizer = BASIC,
    options: tuple[str, ...] = (),
) -> Scored:
    answers = [Answer(f"s{i}", (r,), p, options) for i, (r, p) in enumerate(pairs)]
    return score(answers, metric, normalizer)


def value(
    pairs: list[tuple[str, str]],
    metric: Metric,
    normalizer: Normalizer = BASIC,
    options: tuple[str, ...] = (),
) -> float:
    return scored(pairs, metric, normalizer, options).whole.value


def test_there_is_a_kind_for_every_metric() -> None:
    assert set(KINDS) == set(Metric)


def test_word_errors_are_counted_over_all_texts() -> None:
    assert value([("apple banana", "Apple, banana!"), ("garden", "garden")], Metric.wer) == 0.0
    pairs = [("apple banana", "apple"), ("garden", "window")]
    assert value(pairs, Metric.wer) == pytest.approx(2 / 3)
    assert value(pairs, Metric.wer) == pytest.approx(
        jiwer.wer([r for r, _ in pairs], [p for _, p in pairs])
    )
    assert value([("apple", "apple apple apple")], Metric.wer) == 2.0


def test_an_empty_reference_is_refused_and_named() -> None:
    # jiwer counts it as one whole error and says nothing.
    assert jiwer.wer([""], ["apple"]) >= 1.0
    for metric in (Metric.wer, Metric.cer):
        with pytest.raises(DataError, match=r"empty_reference.*s1"):
            value([("apple", "apple"), ("...", "apple")], metric)
    with pytest.raises(DataError, match="no_samples"):
        score([], Metric.wer, BASIC)


def test_an_empty_prediction_is_all_deletions() -> None:
    assert value([("apple banana", "")], Metric.wer) == 1.0
    assert value([(NI_HAO, "\u3002")], Metric.cer, Normalizer.chinese) == 1.0


def test_chinese_is_scored_by_character() -> None:
    pairs = [(f"{NI_HAO}\uff0c\u4e16\u754c\uff01", f"{NI_HAO}\u65f6\u754c")]
    assert value(pairs, Metric.cer, Normalizer.chinese) == pytest.approx(0.25)
    # By word the whole sentence is one wrong word: the trap that the character rate is for.
    assert value(pairs, Metric.wer, Normalizer.chinese) == 1.0
    # Full width, spaces and punctuation are no errors.
    assert value([("\uff21\uff22 \u4f60", f"ab{NI}\u3002")], Metric.cer, Normalizer.chinese) == 0.0


TEXTS = st.text(alphabet="abc d.", min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
def test_bleu_is_sacrebleu_s(pairs: list[tuple[str, str]]) -> None:
    theirs = sacrebleu.corpus_bleu([p for _, p in pairs], [[r for r, _ in pairs]])
    assert value(pairs, Metric.bleu) == pytest.approx(theirs.score, abs=1e-6)


def test_bleu_of_chinese_and_of_several_references() -> None:
    pairs = [("\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002", "\u4eca\u5929\u5929\u6c14\u597d\u3002")]
    theirs = sacrebleu.corpus_bleu([pairs[0][1]], [[pairs[0][0]]], tokenize="zh")
    assert value(pairs, Metric.bleu, Normalizer.chinese) == pytest.approx(theirs.score)
    references = ("the cat sat on the mat", "a cat was on the mat there")
    both = score([Answer("s", references, "the cat was on the mat")], Metric.bleu, BASIC)
    theirs = sacrebleu.corpus_bleu(["the cat was on the mat"], [[r] for r in references])
    assert both.whole.value == pytest.approx(theirs.score)


def test_exact_and_relaxed_match() -> None:
    assert value([("a red circle", "A red circle."), ("a", "b")], Metric.exact_match) == 0.5
    several = Answer("s", ("2", "two"), "Two")
    assert score([several], Metric.exact_match, BASIC).whole.value == 1.0
    near = [("100", "104"), ("100", "106"), ("0", "0.01"), ("12%", "12.1"), ("1,000", "1000.")]
    assert scored(near, Metric.relaxed_match).each == [1, 0, 0, 1, 1]
    assert value([("blue", "Blue."), ("blue", "7")], Metric.relaxed_match) == 0.5
    assert value([("nan", "nan"), ("5", "inf")], Metric.relaxed_match) == 0.5


def test_signs_count_where_nothing_is_folded() -> None:
    signs = [("-3", "3"), ("-3", " -3 "), ("\\frac{1}{2}", "\\frac{1}{2}")]
    assert scored(signs, Metric.exact_match, Normalizer.verbatim).each == [0, 1, 1]
    assert value([("-3", "3")], Metric.exact_match) == 1.0


def test_tempo_is_right_within_four_percent() -> None:
    near = [("100", "104"), ("100", "104.5"), ("136", "68"), ("136", "fast")]
    assert scored(near, Metric.tempo).each == [1, 0, 0, 0]


def test_answers_that_others_judge_are_only_counted() -> None:
    assert value([("", "a"), ("", " \n")], Metric.answered) == 0.5


def test_anls_takes_the_nearest_reference_and_drops_the_distant() -> None:
    verbatim = Normalizer.verbatim
    pairs = [("Nokia", "nokia"), ("nokia", "nokla"), ("nokia", "sony"), ("nokia", "")]
    assert scored(pairs, Metric.anls, verbatim).each == pytest.approx([1, 0.8, 0, 0])
    # A distance of exactly a half counts for nothing.
    assert value([("ab", "ac")], Metric.anls, verbatim) == 0.0
    several = Answer("s", ("samsung", "nokia"), "nokias")
    assert score([several], Metric.anls, verbatim).whole.value == pytest.approx(5 / 6)


def test_soft_accuracy_leaves_each_person_out() -> None:
    def soft(agreeing: int) -> float:
        people = ("nokia",) * agreeing + ("none",) * (10 - agreeing)
        return score([Answer("s", people, "Nokia.")], Metric.vqa, BASIC).whole.value

    # k of ten agree: each of them sees k - 1 others, the rest see k; three are enough.
    found = [soft(agreeing) for agreeing in range(5)]
    assert found == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])
    assert value([("nokia", "nokia"), ("nokia", "sony")], Metric.vqa) == 0.5


OPTIONS = ("a red dog", "red", "a cat", "blue")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            ("B", "B"),
            ("(B)", "B"),
            ("B.", "B"),
            ("B. red", "B"),
            ("**D**", "D"),
            ("B\nbecause", "B"),
        ),
        *(("The answer is C.", "C"), ("Answer: (D)", "D"), ("option A", "A")),
        *(("It is blue", "D"), ("A cat", "C"), ("I see a red dog", "A"), ("red", "B")),
        *(("", ""), ("E", ""), ("red or blue", ""), ("nothing", ""), ("b", "")),
    ],
)
def test_letters_are_read_from_replies(text: str, letter: str) -> None:
    assert read_letter(text, OPTIONS, BASIC) == letter


def test_choice_refuses_what_cannot_be_scored() -> None:
    assert value([("B", "B"), ("C", "D")], Metric.choice, options=OPTIONS) == 0.5
    with pytest.raises(DataError, match=r"bad_reference.*s0"):
        value([("red", "B")], Metric.choice, options=OPTIONS)
    with pytest.raises(DataError, match="no_options"):
        value([("A", "A")], Metric.choice)


def test_labels() -> None:
    labels = ("sadness", "joy", "very sad", "sad")
    pairs = [
        *(("joy", "Joy!"), ("joy", "The emotion is joy."), ("joy", "joy or sadness")),
        *(("sad", "very sad"), ("very sad", "very sad"), ("joy", "joyful"), ("joy", "")),
    ]
    assert scored(pairs, Metric.label, options=labels).each == [1, 1, 0, 0, 1, 0, 0]
    with pytest.raises(DataError, match="bad_reference"):
        value([("anger", "anger")], Metric.label, options=labels)


def test_boxes() -> None:
    assert read_box("It is at (10,20),(30,40).") == (10, 20, 30, 40)
    assert read_box('{"bbox_2d": [10, 20.5, 3, 40]}') == (3, 20.5, 10, 40)
    assert read_box("(1, 2, 3, 4)") == (1, 2, 3, 4)
    assert read_box("[1, 2, 3]") is None
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (20, 20, 30, 30)) == 0.0
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
    right = "[0, 0, 10, 10]"
    pairs = [(right, "(0,0),(10,5)"), (right, "[0, 0, 10, 4.9]"), (right, "there")]
    assert scored(pairs, Metric.grounding).each == [1, 0, 0]
    with pytest.raises(DataError, match="bad_reference"):
        value([("left", right)], Metric.grounding)


def test_groups_and_intervals() -> None:
    answers = [
        Answer(f"s{i}", ("yes",), "yes" if i % 4 else "no", group="voice" if i % 2 else "text")
        for i in range(40)
    ]
    found = score(answers, Metric.exact_match, BASIC)
    assert found == score(answers, Metric.exact_match, BASIC)
    assert {name: one.value for name, one in found.groups.items()} == {"text": 0.5, "voice": 1.0}
    assert found.groups["voice"].low == found.groups["voice"].high == 1.0
    whole = found.whole
    assert (whole.value, whole.num_samples) == (0.75, 40)
    # The binomial interval of 30 of 40 is 0.62 to 0.88.
    assert 0.58 < whole.low < 0.66
    assert 0.84 < whole.high < 0.92
    table = format_scores({"qa": (Metric.exact_match, found)})
    assert "voice" in table
    assert "0.7500" in table
