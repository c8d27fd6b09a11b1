"""What the model answers to ``eval.prompts`` while it is trained: greedily, with the weights of then."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from portmoe.checkpoint.agreement import on_first_rank
from portmoe.config import Config
from portmoe.data.chat.messages import USER, Message
from portmoe.generation.conversation import Conversation, open_conversation, read_prompts
from portmoe.generation.decode import Decoding, answers
from portmoe.parallel.layout import Layout
from portmoe.record.answers import Answer
from portmoe.training.engine import Engine

MULTIPLE = 64  # of tokens in a batch, so that buffers come in few sizes


@dataclass(frozen=True)
class Questions:
    """The prompts of a run, as every rank asks its part of the model.

    Attributes:
        conversation: renders and reads them; on rank 0 alone.
        tokens: of each prompt.
        multiple: of tokens in a batch, as the layout needs it.
    """

    prompts: Sequence[str]
    conversation: Conversation | None
    tokens: Sequence[Sequence[int]]
    decoding: Decoding
    multiple: int
    every: int

    @classmethod
    def of(cls, config: Config, layout: Layout, group: dist.ProcessGroup) -> "Questions | None":
        """Read and render the prompts; None where there are none, or a pipeline holds the model. Collective.

        Args:
            group: a CPU group of all ranks.

        Raises:
            ConfigError: they cannot be read, or there is no tokenizer or template for them.
            BackendError: a package that reads it is missing.
        """
        if not config.eval.prompts or layout.pipeline > 1:
            return None
        opened: list[Conversation] = []

        def rendered() -> tuple[list[str], list[list[int]], frozenset[int]]:
            conversation = open_conversation(config)
            opened.append(conversation)
            prompts = read_prompts(config.eval.prompts)
            tokens = [conversation.prompt([Message(USER, prompt)]) for prompt in prompts]
            return prompts, tokens, conversation.ends

        prompts, tokens, ends = on_first_rank(group, rendered)
        return cls(
            prompts=prompts,
            conversation=opened[0] if opened else None,
            tokens=tokens,
            decoding=Decoding(config.eval.max_tokens, ends),
            multiple=MULTIPLE * layout.tensor,
            every=config.eval.every,
        )

    def due(self, step: int, total: int) -> bool:
        """Whether they are asked after so many of ``total`` steps."""
        return step % self.every == 0 or step == total

    def ask(self, engine: Engine, group: dist.ProcessGroup) -> list[Answer]:
        """The answers now, on rank 0; nothing of training changes. Collective."""

        def agreed(tokens: list[int]) -> list[int]:
            of_first = torch.tensor(tokens)
            dist.broadcast(of_first, src=0, group=group)
            return of_first.tolist()

        with engine.answering() as next_logits:
            found = answers(next_logits, self.tokens, self.decoding, self.multiple, agreed)
        if self.conversation is None:
            return []
        return [
            Answer(prompt, self.conversation.text(tokens), len(tokens), tokens[-1] in self.decoding.ends)
            for prompt, tokens in zip(self.prompts, found, strict=True)
        ]
