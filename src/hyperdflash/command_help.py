"""What `--help` prints: what a command does, the groups that it reads and their options, each with its comment in conf/."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hyperdflash.identity import CONF

OPTION = re.compile(r"( *)(?:- )?([\w./ ]+): *([^#\n]*?) *(?:# (.*))?$")
COLUMN, WIDTH = 44, 132  # of the comments; of a line


def command_help(config_name: str, words: Sequence[str] = ()) -> str:
    """Returns the help of the command that ``config_name`` configures, with the choices that ``words`` of its line make."""
    with initialize_config_dir(CONF, version_base="1.3"):
        composed = compose(config_name, overrides=list(words), return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        chosen = {group: choice for group, choice in composed.hydra.runtime.choices.items() if not group.startswith("hydra/")}
        choices = {group: loader.get_group_options(group) for group in chosen}
    header, comments = read_comments(Path(CONF) / f"{config_name}.yaml")
    comments = read_comments(Path(CONF) / "train.yaml")[1] | comments  # some commands extend it
    lines = [*header, *(["", "groups (GROUP=CHOICE)"] if chosen else [])]
    for group, choice in reversed(chosen.items()):
        names = [*choices[group], *(["null"] if choice is None else [])]
        lines += _entry(group, " | ".join(f"[{name}]" if name == str(choice or "null") else name for name in names))
        about = [comments.get(group, "null: without one" if choice is None else "")]
        own = Path(CONF) / group / f"{choice}.yaml"
        for path in sorted((Path(CONF) / group).rglob("[!.]*.yaml"), key=lambda path: path != own):  # a file may extend others
            found, options = read_comments(path)
            comments = {**{f"{group}.{option}": comment for option, comment in options.items()}, **comments}
            about += found if path == own else []
        lines += _entry("", *about)
    lines += ["", "options (OPTION=VALUE), with their values here"]
    for option, value in _options(composed):
        lines += _entry(f"{option}={value}", comments.get(option) or comments.get(option.rpartition(".")[0], ""))
    return "\n".join(lines)


def read_comments(path: Path) -> tuple[list[str], dict[str, str]]:
    """Returns of an option file the comment at its head, a line each, and dotted option -> the comment on its line."""
    lines = path.read_text().splitlines() if path.exists() else []
    start = next((place for place, line in enumerate(lines) if line and not line.startswith("#")), len(lines))
    head = [line.lstrip("# ") for line in lines[:start] if line.startswith("# ") and not line.startswith("# @")]
    comments, above, option = {}, [], ""
    for line in lines[start:]:
        if match := OPTION.match(line):
            indent, name, _, comment = match.groups()
            above = [(depth, other) for depth, other in above if depth < len(indent)] + [(len(indent), name)]
            option = ".".join(other for _, other in above).removeprefix("defaults.")
            if comment:
                comments[option] = comment
        elif line.startswith(" " * 8) and line.lstrip().startswith("#") and option in comments:  # goes on
            comments[option] += " " + line.lstrip(" #")
    return head, comments


def _options(config: DictConfig, place: str = "") -> Iterator[tuple[str, str]]:
    """Yields dotted option and value of every leaf; a value that cannot be read here as it stands in its file."""
    for name in config:
        if name in ("hydra", "method") or name.startswith("_"):
            continue
        if OmegaConf.is_missing(config, name):
            yield place + name, "???"
            continue
        try:
            value = config[name]
        except (OmegaConfBaseException, ValueError):
            value = OmegaConf.to_container(config, resolve=False)[name]
        if OmegaConf.is_dict(value) and len(value) and not OmegaConf.is_interpolation(config, name):
            yield from _options(value, f"{place}{name}.")
        elif not OmegaConf.is_dict(value):
            text = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
            yield place + name, "null" if text is None else str(text).lower() if isinstance(text, bool) else str(text)


def _entry(left: str, *texts: str) -> list[str]:
    """Returns lines with ``left`` in the first column and ``texts``, wrapped, in the second."""
    right = [line for text in texts for line in textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False)]
    if not left:
        return [" " * COLUMN + line for line in right]
    return [f"  {left:<{COLUMN - 4}}  {right[0] if right else ''}".rstrip(), *(" " * COLUMN + line for line in right[1:])]
