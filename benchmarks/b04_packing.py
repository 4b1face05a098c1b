"""B4: useful tokens a second of a tiny Thinker, forward and backward, on the same documents.

Ours packs by best fit, attends document by document and builds logits of supervised tokens alone.
The peer is transformers' own Thinker with the same weights and documents, in three ways:

- padded, eight documents in the order of the stream (a Trainer's default, and its worst);
- padded, eight documents of like length (`group_by_length`);
- packed: our packs with positions that restart, by which transformers builds a block mask for SDPA
  (what TRL's `packing` comes to without flash-attn). Its best.

Documents have the lengths of text in loads.py, at most half a pack. A quarter of a document is
supervised, as an answer is. Losses and gradients are compared first.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from benchmarks.report import Row, compare, parser, show
from omni_train.data.collate import collate
from omni_train.data.measure import Costs
from omni_train.data.plan import plan_window
from omni_train.data.tokenizer import train_tokenizer
from omni_train.data.types import IGNORE_INDEX, Batch, EncodedSample, ModelSpec, SampleRef
from omni_train.models.build import build_thinker
from omni_train.models.config import ModelConfig
from omni_train.models.thinker import ThinkerForTraining

PACK_TOKENS, PACKS, TIMED_PACKS = 2048, 64, 5
# Tokens of the window, of what its packs hold: the planner leaves a hundredth of room, and the
# loader takes so many that the packs come out even.
WINDOW = 0.986
BATCH = 8
PADDED, PACKED, FILL = 3.0, 1.3, 0.985
Peer = Qwen2_5OmniThinkerForConditionalGeneration


def document(length: int, number: int, spec: ModelSpec) -> EncodedSample:
    """Return a document of words, its last quarter supervised."""
    rng = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 250, (length,), generator=rng)
    supervised = torch.arange(length) >= length - max(length // 4, 1)
    return EncodedSample(
        key=str(number),
        input_ids=ids,
        labels=torch.where(supervised, ids, IGNORE_INDEX),
        position_ids=torch.arange(length).expand(3, -1),
        patches=torch.zeros(0, 3 * spec.temporal_patch_size * spec.patch_size**2).byte(),
        grid_thw=torch.zeros(0, 3, dtype=torch.long),
        mel=torch.zeros(spec.num_mel_bins, 0),
        mel_lengths=torch.zeros(0, dtype=torch.long),
    )


def packs_of(lengths: Sequence[int]) -> list[list[int]]:
    """Return the numbers of the documents of each pack, as the planner packs them."""
    tokens = np.array(lengths)
    none = np.zeros(len(tokens))
    costs = Costs(num_tokens=tokens, vision_cost=none, audio_cost=none, llm_cost=tokens * 1.0)
    refs = [SampleRef(0, 0, number) for number in range(len(tokens))]
    plan = plan_window(refs, costs, pack_tokens=PACK_TOKENS, packs_per_step=1, seed=(0, 0))
    return [[ref.row for ref in pack.samples] for step in plan.steps for pack in step]


def ours(model: ThinkerForTraining, packs: Sequence[Batch]) -> Tensor:
    """Return the summed loss of all packs; gradients are added to the model's."""
    total = torch.zeros(())
    for pack in packs:
        loss = -model(pack).sum()
        loss.backward()
        total += loss.detach()
    return total


def padded(model: Peer, batches: Sequence[Sequence[EncodedSample]]) -> Tensor:
    """The same of padded batches, by transformers' own loss."""
    total = torch.zeros(())
    for batch in batches:
        ids = pad_sequence([d.input_ids for d in batch], batch_first=True)
        labels = pad_sequence(
            [d.labels for d in batch], batch_first=True, padding_value=IGNORE_INDEX
        )
        lengths = torch.tensor([d.num_tokens for d in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        count = (labels[:, 1:] != IGNORE_INDEX).sum()
        # Its loss is a mean; summed again, batches of other sizes weigh the same.
        out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        loss = out.loss * count
        loss.backward()
        total += loss.detach()
    return total


def packed(model: Peer, packs: Sequence[Sequence[EncodedSample]]) -> Tensor:
    """The same of packs whose positions restart."""
    total = torch.zeros(())
    for pack in packs:
        ids = torch.cat([d.input_ids for d in pack])[None]
        restart = torch.cat([torch.arange(d.num_tokens) for d in pack])
        labels = torch.cat([d.labels for d in pack])
        labels = labels.where(restart > 0, IGNORE_INDEX)[None]
        count = (labels[:, 1:] != IGNORE_INDEX).sum()
        positions = restart.expand(4, 1, -1)
        # With a cache transformers would not look for packs, and documents would see each other.
        out = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
        loss = out.loss * count
        loss.backward()
        total += loss.detach()
    return total


def check_equal(model: ThinkerForTraining, peer: Peer, losses: Sequence[Tensor]) -> None:
    """Hold losses of all ways to each other, then the gradients of the last two runs."""
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-3)
    theirs = dict(peer.named_parameters())
    for name, param in model.thinker.named_parameters():
        if param.grad is None or theirs[name].grad is None:
            continue  # towers: ours run a dummy, theirs do not run
        gap = (param.grad - theirs[name].grad).abs().max()
        size = theirs[name].grad.abs().max()
        assert gap <= 1e-3 * max(size, 1.0), f"{name}: {gap} of {size}"


def fill_row(packs: Sequence[Sequence[int]], lengths: Sequence[int]) -> Row:
    """Return how full the packs are."""
    full = [sum(lengths[n] for n in pack) / PACK_TOKENS for pack in packs]
    mean = statistics.mean(full)
    ratios = (mean / FILL, min(full) / FILL, max(full) / FILL)
    return Row(f"{len(packs)} packs full", mean, FILL, "", *ratios, 1.0)


def main() -> int:
    """Run the table."""
    args = parser("Tokens a second of a tiny Thinker, against transformers' own.").parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["the words do not matter here"], vocab_size=2048)
    model = build_thinker(
        ModelConfig(tokenizer="in memory"), tokenizer, seed=0, dtype=torch.float32
    )
    # A config of its own: which attention is used is written into it.
    peer = Peer(copy.deepcopy(model.thinker.config))
    peer.load_state_dict(model.thinker.state_dict())
    peer.set_attn_implementation("sdpa")
    model.train()
    peer.train()
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < PACKS * PACK_TOKENS * WINDOW:
        lengths.append(int(np.clip(rng.lognormal(np.log(200), 0.9), 16, PACK_TOKENS // 2)))
    packs = packs_of(lengths)
    timed = packs[:TIMED_PACKS]
    chosen = {n: document(lengths[n], n, model.spec) for pack in timed for n in pack}
    batches = [collate([chosen[n] for n in pack], model.spec) for pack in timed]
    documents = [chosen[n] for n in sorted(chosen)]
    alike = sorted(documents, key=lambda d: d.num_tokens)
    groups = [
        [docs[i : i + BATCH] for i in range(0, len(docs), BATCH)] for docs in (documents, alike)
    ]
    their_packs = [[chosen[n] for n in pack] for pack in timed]
    ways = {
        f"padded, {BATCH} at a time": (lambda: padded(peer, groups[0]), PADDED),
        f"padded, {BATCH} of like length": (lambda: padded(peer, groups[1]), 0.0),
        "packed, block mask": (lambda: packed(peer, their_packs), PACKED),
    }
    losses = [ours(model, batches)]
    for run, _ in ways.values():
        peer.zero_grad()
        losses.append(run())
    check_equal(model, peer, losses)
    useful = sum(d.num_tokens for d in documents)
    rows = [
        compare(
            f"tokens/s, peer {name}",
            lambda: ours(model, batches),
            run,
            goal=goal,
            pairs=args.pairs,
            items=useful,
        )
        for name, (run, goal) in ways.items()
    ]
    rows.append(fill_row(packs, lengths))
    notes = [f"{len(documents)} documents, {useful} tokens in packs of {PACK_TOKENS}; fp32"]
    return show(rows, ("torch", "transformers"), notes, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
