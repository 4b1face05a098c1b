"""Attention by segments equals a dense mask; a shared prompt equals its copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from omni_train.config.errors import ConfigError
from omni_train.data.visibility import NO_PARENT, Segments
from omni_train.models.attention import packed_hidden, segment_attention
from omni_train.models.build import build_thinker
from tests.numerics.samples import small_config, small_tokenizer

# A prompt with two answers, the second of which goes on in two ways; and a document beside it.
TREE = Segments([5, 3, 4, 6, 1, 2], [NO_PARENT, 0, 0, NO_PARENT, 2, 2])
MODULE = nn.Module()
MODULE.num_key_value_groups = 2


def dense_mask(segments: Segments) -> Tensor:
    """bool [T, T] of who sees whom, from the definition."""
    mask = torch.ones(segments.num_tokens, segments.num_tokens).tril().bool()
    number = torch.arange(len(segments.lengths)).repeat_interleave(torch.tensor(segments.lengths))
    for row in range(segments.num_tokens):
        own = int(number[row])
        seen = torch.tensor([own, *segments.ancestors(own)])
        mask[row] &= torch.isin(number, seen)
    return mask


def inputs(total: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    shapes = [(1, heads, total, 16) for heads in (4, 2, 2)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    "segments",
    [Segments([12]), Segments([1, 4, 7]), Segments([5, 5, 1, 1]), Segments([4, 1], [-1, 0]), TREE],
    ids=str,
)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_segments_equal_a_dense_mask(segments: Segments, scaling: float | None) -> None:
    query, key, value = inputs(segments.num_tokens)
    got, _ = segment_attention(MODULE, query, key, value, None, scaling=scaling, segments=segments)
    mask = dense_mask(segments)[None, None]
    want, _ = segment_attention(MODULE, query, key, value, mask, scaling=scaling)
    assert got.shape == (1, segments.num_tokens, 4, 16)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    factor = torch.randn_like(got)
    grads = [torch.autograd.grad((x * factor).sum(), (query, key, value)) for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_half_precision_is_rounded_once() -> None:
    """Joining two parts adds no error to that of bf16 itself."""
    half = inputs(TREE.num_tokens, torch.bfloat16)
    full = [x.detach().float() for x in half]
    got, _ = segment_attention(MODULE, *half, None, segments=TREE)
    want, _ = segment_attention(MODULE, *full, None, segments=TREE)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=2**-8)
    got.float().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in half)


def test_shared_prompt_with_two_answers_equals_two_sequences() -> None:
    """Through the whole language model: hidden states, and gradients of inputs and weights."""
    tokenizer = small_tokenizer()
    config, _ = small_config(tokenizer)
    thinker = build_thinker(config, tokenizer, seed=1, dtype=torch.float32).thinker
    model = thinker.model.language_model
    torch.manual_seed(2)
    width = model.config.hidden_size
    prompt, one, two = (torch.randn(n, width, requires_grad=True) for n in (23, 9, 14))
    # Factors, so that all tokens count differently; the prompt's own outputs count once each time.
    weight, of_one, of_two = torch.randn(23, width), torch.randn(9, width), torch.randn(14, width)

    def run(parts: list[Tensor], starts: list[int], segments: Segments) -> Tensor:
        places = [
            torch.arange(s, s + len(p)).expand(4, -1) for p, s in zip(parts, starts, strict=True)
        ]
        positions = torch.cat(places, dim=1)[:, None]
        return packed_hidden(model, torch.cat(parts)[None], positions, segments)[0]

    leaves = [prompt, one, two, *model.parameters()]
    shared = run([prompt, one, two], [0, 23, 23], Segments([23, 9, 14], [NO_PARENT, 0, 0]))
    loss = (shared * torch.cat([2 * weight, of_one, of_two])).sum()
    got = torch.autograd.grad(loss, leaves, allow_unused=True)
    first = run([prompt, one], [0, 23], Segments([32]))
    second = run([prompt, two], [0, 23], Segments([37]))
    loss = (first * torch.cat([weight, of_one])).sum()
    loss = loss + (second * torch.cat([weight, of_two])).sum()
    want = torch.autograd.grad(loss, leaves, allow_unused=True)

    torch.testing.assert_close(shared[:32], first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared[32:], second[23:], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            scale = max(1.0, float(theirs.abs().max()))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)
    assert all(grad is not None for grad in want[:3])


def test_offsets_of_the_kernel_on_a_gpu() -> None:
    """Keys of each segment: its ancestors', the first ones first, then its own."""
    assert TREE.documents == [0, 0, 0, 1, 0, 0]
    assert TREE.query_starts.tolist() == [0, 5, 8, 12, 18, 19, 21]
    assert TREE.key_starts.tolist() == [0, 5, 13, 22, 28, 38, 49]
    assert TREE.key_index is not None
    prompt, second = list(range(5)), list(range(8, 12))
    assert TREE.key_index[28:38].tolist() == [*prompt, *second, 18]
    assert TREE.key_index[38:].tolist() == [*prompt, *second, 19, 20]
    assert (TREE.max_query_length, TREE.max_key_length) == (6, 11)
    plain = Segments([3, 2])
    assert plain.key_index is None
    assert plain.key_starts.tolist() == plain.query_starts.tolist() == [0, 3, 5]


@pytest.mark.parametrize(
    ("lengths", "parents"), [([], []), ([3, 0], []), ([3, 2], [-1]), ([3, 2], [1, -1])]
)
def test_segments_that_cannot_be(lengths: list[int], parents: list[int]) -> None:
    with pytest.raises(AssertionError):
        Segments(lengths, parents)


def test_segments_must_make_up_the_pack_without_mask_or_dropout() -> None:
    query = torch.randn(1, 2, 6, 8)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    for lengths, given, dropout in (([3, 2], None, 0.0), ([6], mask, 0.0), ([6], None, 0.1)):
        with pytest.raises(AssertionError):
            segment_attention(
                nn.Module(), query, query, query, given, dropout, segments=Segments(lengths)
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("segments", [Segments([7, 64, 1, 130]), TREE], ids=str)
def test_varlen_equals_a_dense_mask(segments: Segments) -> None:
    device = torch.device("cuda")
    query, key, value = (x.detach().to(device) for x in inputs(segments.num_tokens, torch.bfloat16))
    moved = segments.to(device)
    got, _ = segment_attention(MODULE, query, key, value, None, segments=moved)
    mask = dense_mask(segments)[None, None].to(device)
    want, _ = segment_attention(MODULE, query, key, value, mask)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp32_on_a_gpu_says_what_to_do() -> None:
    query, key, value = (x.detach().cuda() for x in inputs(TREE.num_tokens))
    with pytest.raises(ConfigError, match="bf16"):
        segment_attention(MODULE, query, key, value, None, segments=TREE.to(query.device))
