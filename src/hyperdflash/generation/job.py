"""The command that answers one prompt with a drafter and shows its drafts round by round: accepted ones green, rejected ones
red and struck through, the target's own tokens plain. Without color (NO_COLOR, or no terminal): [accepted] and {-rejected-}.

python -m src.generate prompt="Write a function that adds two numbers."                       drafts of the native MTP block
python -m src.generate prompt="..." run=runs/train/<run> temperature=1 max_new_tokens=256     a trained drafter
python -m src.generate prompt="..." method=ar                                                 plain decoding
python -m src.generate run=runs/train/<run>                                                   a chat on the terminal
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.decoding.loop import FirstToken, Generation, Round
from hyperdflash.generation.api import Answer, TextStream, answer_of, generate_stream, ids_of_prompt, load_drafter, tokenizer_of
from hyperdflash.identity import runs_dir
from hyperdflash.targets.load import Target

# kind -> style, what stands around it without color and with it, its name in the legend
STYLES = {
    "accepted": ("green", "[", "]", "", "accepted draft"),
    "rejected": ("red strike", "{-", "-}", "‹›", "rejected draft"),
    "plain": ("", "", "", "", "the target's own"),
}


class RoundPrinter:
    """Writes events of ``speculate`` to a console, round by round."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, show_rejected: bool = True):
        self.stream, self.console, self.show_rejected = TextStream(tokenizer), console, show_rejected
        self.styled = console.is_terminal and not os.environ.get("NO_COLOR")

    def show(self, event: FirstToken | Round) -> None:
        if isinstance(event, FirstToken):
            self._write(self.stream.push([event.token_id]), "plain")
            return
        self._write(self.stream.push(event.emitted[: event.accepted]), "accepted")
        rejected = event.drafted[event.accepted :]
        if self.show_rejected and rejected and len(event.emitted) > event.accepted:
            tokens = self.stream.tokenizer.decode(rejected, skip_special_tokens=False)
            self._write(tokens.replace("\n", "⏎"), "rejected")
        self._write(self.stream.push(event.emitted[event.accepted :]), "plain")

    def legend(self) -> None:
        for kind, (*_, name) in STYLES.items():
            self._write(name, kind)
            self.console.print("  ", end="")
        self.console.print()

    def end(self) -> None:
        self._write(self.stream.push([], last=True), "plain")
        self.console.print()

    def _write(self, text: str, kind: str) -> None:
        style, before, after, ends, _ = STYLES[kind]
        if text and self.styled:
            before, after = ends[:1], ends[1:]
        if text:
            shown = Text.assemble(before, (text, style if self.styled else ""), after)
            self.console.print(shown, end="", soft_wrap=True, highlight=False)


def summary_line(generation: Generation) -> str:
    """Returns tau, rounds, speed, the parts of a round's time and the speedup over one verification per token, on one line."""
    count = len(generation.rounds)
    parts = [f"{len(generation.token_ids)} tokens, ended by {'a stop token' if generation.ended_by == 'stop' else 'the limit'}"]
    if count:
        seconds = generation.seconds
        draft, verify, rest = (1e3 * s / count for s in (seconds.draft, seconds.verify, seconds.rest))
        parts += [f"tau {generation.tau:.2f} over {count} rounds", f"{generation.tokens_per_second:.1f} tokens/s"]
        parts.append(f"per round: draft {draft:.1f} + verify {verify:.1f} + rest {rest:.2f} ms")
        parts.append(f"{generation.tau * verify / (draft + verify + rest):.2f} times as fast as one verification per token")
    return " · ".join([*parts, f"first token after {1e3 * generation.first.seconds.total:.0f} ms"])


def newest_run(target: Target, method: str = "hyperdflash") -> Path:
    """Returns the newest finished run of ``method`` (conf/method) on this target's weights, from the latest stage; its loss may
    differ from the method's. Prints of how many. ValueError without such a run."""
    from hyperdflash.evaluation.methods import compose_method, stated_options
    from hyperdflash.training.run_index import RunIndex

    stated, parts = stated_options(compose_method(method)), ("conditioning", "reducer", "inputs", "lead", "head")
    needed = {name: value for name, value in stated.items() if name.partition(".")[0] in parts or name == "drafter.option"}
    fitting = [run for run in RunIndex() if run.record["target"] == target.fingerprint and run.agrees(needed)]
    if not fitting:
        raise ValueError(
            f"method={method} has no finished run on this target in {runs_dir() / 'train'}: run "
            f"`python -m src.train method={method} experiment=stage1` first, or give run=<directory> or method=mtp"
        )
    newest = max(fitting, key=lambda run: (run.decided["stage"], run.finished_s)).directory
    print(f"method={method}: takes {newest}, the newest of the latest stage of {len(fitting)} runs", flush=True)
    return newest


class Decoder:
    """A target with a drafter, both as ``config`` says; ``draft_with`` changes the drafter."""

    def __init__(self, config: DictConfig, console: Console):
        from hyperdflash.options import instantiate

        method = config.drafted_by or ("hyperdflash" if config.run else "mtp")
        self.config, self.console = config, console
        self.generations: list[Generation] = []
        torch.set_num_threads(config.threads)
        self.target: Target = instantiate(config.target)
        self.draft_with(config.run or method)

    def draft_with(self, source: str) -> None:
        """Loads a run's directory, an export, or the newest run of a method. ValueError if there is none."""
        if source not in ("mtp", "ar") and os.sep not in source and not Path(source).is_dir():
            source = str(newest_run(self.target, source))
        self.drafter = load_drafter(source, self.target, num_slots=self.config.num_slots)
        self.say(f"target {self.config.target.path}, drafter {source}, temperature {self.config.temperature}")

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def answer(self, prompt: Conversation | list[int]) -> Answer:
        """Generates, and shows each round as it ends."""
        config = self.config
        printer = RoundPrinter(tokenizer_of(self.target.path), self.console, show_rejected=config.show_rejected)
        if not self.generations:
            printer.legend()
        settings = {name: config[name] for name in ("max_new_tokens", "temperature", "top_p", "seed", "mode")}
        pieces = []
        for piece in generate_stream(self.target, self.drafter, prompt, synchronize=True, **settings):
            printer.show(piece.event)
            pieces.append(piece)
        printer.end()
        answer = answer_of(pieces, self.target)
        self.generations.append(answer.generation)
        self.say(summary_line(answer.generation))
        return answer


def first_turns(config: DictConfig) -> tuple[Turn, ...]:
    return (Turn("system", str(config.system)),) if config.system else ()


def answer_prompt(config: DictConfig, console: Console) -> Answer:
    """Loads target and drafter, and answers ``config.prompt``."""
    prompt = Conversation("prompt", "chat", (*first_turns(config), Turn("user", str(config.prompt))))
    prompt_ids = ids_of_prompt(prompt, config.target.path, config.mode, config.max_new_tokens)
    return Decoder(config, console).answer(prompt_ids)


def chat(config: DictConfig, console: Console, ask: Callable[[str], str] = input) -> list[Turn]:
    """Answers line by line, the earlier turns included, until /quit or the end of the input. Returns the turns."""
    decoder, turns = Decoder(config, console), list(first_turns(config))
    decoder.say("/drafter NAME changes the drafter (mtp, ar, a method, a run's directory), /new forgets the turns, /quit ends")
    while True:
        rounds = [len(one.emitted) for generation in decoder.generations for one in generation.rounds]
        try:
            line = ask(f"tau {sum(rounds) / len(rounds):.2f} > " if rounds else "> ").strip()
        except EOFError:
            return turns
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return turns
            elif command == "/new":
                turns = list(first_turns(config))
            elif command == "/drafter":
                decoder.draft_with(argument.strip())
            elif command.startswith("/"):
                decoder.say(f"{command} is no command: /drafter NAME, /new or /quit")
            elif line:
                asked = [*turns, Turn("user", line)]
                answer = decoder.answer(Conversation("chat", "chat", tuple(asked)))
                turns = [*asked, Turn("assistant", answer.text)]
        except ValueError as error:
            decoder.say(f"error: {error}")


def generate(config: DictConfig) -> None:
    """Answers ``config.prompt``; without one, chats."""
    if OmegaConf.is_missing(config, "prompt"):
        with suppress(ImportError):
            import readline  # noqa: F401  input() then edits lines and recalls earlier ones
        chat(config, Console())
    else:
        answer_prompt(config, Console())
