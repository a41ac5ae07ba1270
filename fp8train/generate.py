"""`fp8train generate`: print sample text from a checkpoint, in the precision it was trained in."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fp8train.arguments import parse_arguments, with_key
from fp8train.checkpoint import open_checkpoint
from fp8train.data.build import training_tokenizer
from fp8train.data.tokenizers import Tokenizer
from fp8train.distributed import check_single, init
from fp8train.errors import ConfigError, exit_code
from fp8train.models import Decoder
from fp8train.trainer.restored import restored

INCOMPLETE = "\ufffd"  # stands for a character of which some bytes are still to come


@dataclass(kw_only=True, slots=True)
class GenerateArguments:
    """Print sample text from a checkpoint.

    checkpoint: run folder (its newest checkpoint) or one checkpoint
    prompt: text to continue, quotes around the whole of it left out; special tokens in it are themselves; without one
        the model begins a document
    max_new_tokens: stop after this many, or where the model ends the document
    temperature: 0 takes the likeliest token every time; 1 samples from the model's own distribution
    top_k: sample among this many likeliest tokens; null: among all
    seed: of the sampling
    backend: what executes FP8: auto or a name
    device: cpu or cuda; null: the GPU where there is one
    tokenizer: bytes, a tokenizer.json or a tokenizer folder, of the ids of the training; null: its own
    """

    checkpoint: Path
    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    seed: int = 1
    backend: str = "auto"
    device: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"prompt: is not UTF-8 at character {error.start}; needs text. Give it in UTF-8 (PYTHONUTF8=1 where "
                "the locale is another)."
            ) from error
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed: got {self.seed}; needs a number of 64 bits.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: got {self.max_new_tokens}; needs at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: got {self.temperature}; needs 0 or more. 0 takes the likeliest token.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: got {self.top_k}; needs at least 1, or null for all tokens.")
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device: got {self.device!r}; needs cpu, cuda or null.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device: got cuda, but this machine has no CUDA GPU. Leave device out.")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0."""
    argv = with_key(argv, "checkpoint")
    check_single("generate")
    arguments = parse_arguments(argv, GenerateArguments)
    checkpoint = open_checkpoint(arguments.checkpoint)
    for line in checkpoint.skipped:
        sys.stderr.write(f"{line}\n")
    trained = checkpoint.config
    tokenizer = training_tokenizer(trained.data, arguments.tokenizer, trained.model.vocab_size)
    config = dataclasses.replace(trained, compile=False, backend=arguments.backend)
    model = restored(checkpoint, init(device_type=arguments.device).device, config=config).model.eval()
    prompt = tokenizer.encode_prompt(arguments.prompt) or [tokenizer.separator]
    ids = generate(
        model,
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        end=tokenizer.separator,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show
    sys.stdout.write(arguments.prompt)
    for piece in decode_pieces(ids, tokenizer, prompt):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    seed: int = 1,
    end: int | None = None,
) -> Iterator[int]:
    """Sample token ids one at a time.

    Each token runs the model over the whole context, the last max_seq_len tokens: the computation of training, also
    under a recipe that scales a tensor as a whole, for which a cache of keys and values would be another function.

    Args:
        model: a Decoder in eval mode.
        prompt: at least one token id.
        temperature: the logits are divided by it; 0 takes the largest.
        top_k: only the k largest logits take part; None all.
        seed: of the draws, which are made on the CPU.
        end: token that ends the text and is not yielded.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    ids = list(prompt)
    for _ in range(max_new_tokens):
        context = torch.tensor([ids[-model.config.max_seq_len :]], device=device)
        logits = model(context)[0, -1].float().cpu()
        token = _draw(logits, temperature, top_k, generator)
        if token == end:
            return
        yield token
        ids.append(token)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def decode_pieces(ids: Iterable[int], tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> Iterator[str]:
    """Text of ids behind a prompt as it becomes complete: a character is held back until its last byte is there.

    Both are decoded together: a tokenizer may leave out the space before the first word of a text.
    """
    seen = list(prompt)
    shown = text = tokenizer.decode(seen)
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith(INCOMPLETE):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
