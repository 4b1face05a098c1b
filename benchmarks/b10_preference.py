"""B10: one DPO step against trl.DPOTrainer, on the same model and pairs.

Ours reads each prompt once for both answers, has the reference's log-probabilities stored, and
builds log-probabilities at the answers alone; the peer pads chosen and rejected rows, prompt and
all, and runs both models, or, at its best, has the reference's stored too
(`precompute_ref_log_probs`; its `padding_free` is switched off in this version). A text-only model,
which TRL can run; AdamW on both sides. Loss and gradients are compared before anything is timed.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

from benchmarks.report import compare, parser, show
from omni_train.data.tokenizer import CHAT_TOKENS, train_tokenizer
from omni_train.data.visibility import NO_PARENT, Segments
from omni_train.models.attention import packed_hidden, register_attention
from omni_train.models.thinker import LogProbHead
from omni_train.objectives.preference import PairTargets, PreferenceConfig, preference

NUM_PAIRS, ANSWER, VOCAB = 4, 192, 2048
BETA, LR = 0.1, 1e-4


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of one prompt length, packed: prompt, chosen and rejected of each, one after the other.

    Args:
        rows: ids of prompt, chosen and rejected of each pair.
        pairs: whose targets are whose.
    """

    rows: list[tuple[list[int], list[int], list[int]]]
    pairs: PairTargets

    @property
    def num_target_tokens(self) -> int:
        """Pairs."""
        return self.pairs.num_pairs


class Shared(nn.Module):
    """A causal language model that reads the pairs of a pack with their prompts shared."""

    def __init__(self, model: Qwen2ForCausalLM, batch: Pairs) -> None:
        super().__init__()
        self.model = model.model
        self.model.set_attn_implementation(register_attention())
        head = model.lm_head
        self.head = LogProbHead(head.in_features, head.out_features, bias=False)
        self.head.weight = head.weight
        ids: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        parents: list[int] = []
        index: list[int] = []
        targets: list[int] = []
        for prompt, *answers in batch.rows:
            root, last = len(lengths), len(ids) + len(prompt) - 1
            ids += prompt
            positions += range(len(prompt))
            lengths.append(len(prompt))
            parents.append(NO_PARENT)
            for answer in answers:
                index += [last, *range(len(ids), len(ids) + len(answer) - 1)]
                targets += answer
                ids += answer
                positions += range(len(prompt), len(prompt) + len(answer))
                lengths.append(len(answer))
                parents.append(root)
        self.ids, self.positions = torch.tensor([ids]), torch.tensor([positions])
        self.segments = Segments(lengths, parents)
        self.index, self.targets = torch.tensor(index), torch.tensor(targets)

    def forward(self, batch: Pairs) -> Tensor:
        """Return the log-probabilities float32 [N] of all answers' tokens."""
        embeds = self.model.embed_tokens(self.ids)
        hidden = packed_hidden(self.model, embeds, self.positions, self.segments)[0]
        logprobs: Tensor = self.head(hidden.index_select(0, self.index), self.targets)
        return logprobs


def make_pairs(prompt_length: int) -> Pairs:
    """Return random pairs; without a reference yet."""
    rng = torch.Generator().manual_seed(prompt_length)
    sizes = (prompt_length, ANSWER, ANSWER)
    rows = [
        tuple(torch.randint(9, VOCAB, (size,), generator=rng).tolist() for size in sizes)
        for _ in range(NUM_PAIRS)
    ]
    answers = torch.arange(2 * NUM_PAIRS).repeat_interleave(ANSWER)
    lengths = torch.full((2 * NUM_PAIRS,), float(ANSWER))
    return Pairs(rows, PairTargets(answers, lengths, torch.zeros(2 * NUM_PAIRS)))  # type: ignore[arg-type]


def language_model(seed: int) -> Qwen2ForCausalLM:
    """Return a model of 3.7 million parameters."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, **sizes, **heads)).float()


class Peer:
    """TRL's trainer on the same pairs, with a reference model of its own.

    Args:
        batch: pairs with the reference's log-probabilities.
        folder: for the trainer's files.
        stored: take these instead of running the reference.
    """

    def __init__(self, batch: Pairs, folder: str, *, stored: bool) -> None:
        tokenizer = train_tokenizer(["the words do not matter here"], vocab_size=320)
        tokenizer.pad_token = tokenizer.eos_token = CHAT_TOKENS["im_end"]
        args = DPOConfig(
            output_dir=folder,
            beta=BETA,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            per_device_train_batch_size=NUM_PAIRS,
            max_length=None,
            disable_tqdm=True,
        )
        row = {"prompt": "the", "chosen": "words", "rejected": "matter"}
        self.trainer = DPOTrainer(
            model=language_model(1),
            ref_model=language_model(2),
            args=args,
            train_dataset=Dataset.from_list([row]),
            processing_class=tokenizer,
        )
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        examples = [dict(zip(names, row, strict=True)) for row in batch.rows]
        self.inputs: dict[str, Any] = self.trainer.data_collator(examples)
        self.trainer.precompute_ref_logps = stored
        chosen, rejected = batch.pairs.reference.view(-1, 2).unbind(1)
        self.inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.model: nn.Module = self.trainer.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)

    def loss(self) -> Tensor:
        """Return the mean loss, with its graph."""
        found: Tensor = self.trainer.compute_loss(self.model, dict(self.inputs))
        return found

    def step(self) -> None:
        """One update."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours:
    """The same step by the objective of `talker_dpo`."""

    def __init__(self, batch: Pairs) -> None:
        self.batch, self.config = batch, PreferenceConfig(beta=BETA)
        with torch.no_grad():
            logprobs = Shared(language_model(2), batch)(batch)
        zeros = torch.zeros(2 * NUM_PAIRS)
        batch.pairs.reference = zeros.index_add(0, batch.pairs.answers, logprobs)
        self.model = Shared(language_model(1), batch).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)

    def loss(self) -> Tensor:
        """Return the mean loss, with its graph."""
        output = preference(self.model, self.batch, self.config)
        return output.loss / output.num_tokens

    def step(self) -> None:
        """One update."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def check_equal(ours: Ours, peer: Peer) -> None:
    """Hold loss and gradients of both sides to each other, before any update."""
    losses = [ours.loss(), peer.loss()]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    theirs = {n.removeprefix("model."): p.grad for n, p in peer.model.named_parameters()}
    for name, param in ours.model.model.named_parameters():
        assert param.grad is not None, name
        assert theirs[name] is not None, name
        gap, size = (param.grad - theirs[name]).abs().max(), theirs[name].abs().max()
        assert gap < 1e-4 * max(size, 1e-2), f"{name}: {gap} of {size}"
    for side in (ours, peer):
        side.optimizer.zero_grad()


def main() -> int:
    """Run the table."""
    args = parser("A DPO step against TRL's, the reference evaluated each step.").parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, times, least in (("prompt = reply", 1, 1.5), ("prompt 3 : 1 reply", 3, 1.9)):
        batch = make_pairs(times * ANSWER)
        for stored, peer_name, goal in (
            (False, "runs its reference", least),
            (True, "has it stored", 0.0),
        ):
            ours = Ours(batch)
            with tempfile.TemporaryDirectory() as folder:
                peer = Peer(batch, folder, stored=stored)
            check_equal(ours, peer)
            title = f"{name}, peer {peer_name}"
            rows.append(compare(title, ours.step, peer.step, goal=goal, pairs=args.pairs))
    note = f"{NUM_PAIRS} pairs a step, answers of {ANSWER} tokens, fp32, one thread"
    return show(rows, ("torch", "transformers", "trl"), [note], as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
