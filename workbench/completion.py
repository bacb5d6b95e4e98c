"""Print the script with which bash or zsh completes `viral`.

It completes commands, the names of recipes, sweeps and analyses, and options; anything else is completed as a file.

python -m workbench.completion bash
python -m workbench.completion zsh

    viral completion bash > ~/.local/share/bash-completion/completions/viral
    viral completion zsh > ~/.viral-completion.zsh      # and in ~/.zshrc: source ~/.viral-completion.zsh

The script is a snapshot: write it again after an upgrade, or after installing a package that adds an analysis.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from workbench.analysis.declaration import Where
from workbench.analysis.discover import load_analyses
from workbench.cli import ConfigFile, command, parse
from workbench.commands import COMMANDS, Command
from workbench.package_files import RECIPES, SWEEPS
from workbench.yaml_config import config_fields

SCRIPT = """{start}_viral() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" at="$COMP_CWORD" words=""
    if (( at == 1 )); then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$cur") )
}}
complete -o default -o bashdefault -F _viral viral
"""
START = {"bash": "", "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"}


@dataclass(frozen=True)
class Config:
    """The shell to complete for."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """The shell that is to run the script: bash or zsh."""


def main(argv: list[str]) -> None:
    """Print the script."""
    config = parse(Config, argv, prog="python -m workbench.completion", description=__doc__ or "")
    sys.stdout.write(script(config.shell))


def script(shell: str) -> str:
    """Return the completion script for a shell, "bash" or "zsh"."""
    cases = [
        f"            {name}) {_words(_first(command), flags_of(*_classes(command)))} ;;"
        for name, command in COMMANDS.items()
        if command.options
    ]
    analyses = load_analyses()
    analysis_cases = [
        f"                {name}) {_words((), flags_of(analysis.config, Where, ConfigFile))} ;;"
        for name, analysis in analyses.items()
    ]
    analysis_names = f'(( at == 2 )) && words="{" ".join(analyses)}"'
    cases += ["            analyze)", f"                {analysis_names}", '                case "${COMP_WORDS[2]}" in']
    cases += [*analysis_cases, "                esac ;;"]
    commands = " ".join([*COMMANDS, "--help", "--version"])
    return SCRIPT.format(start=START[shell], commands=commands, cases="\n".join(cases))


def _first(command: Command) -> Iterable[str]:
    """Return the names that may be the first word of a command."""
    return {"recipe": RECIPES, "sweep": SWEEPS}[command.first].files() if command.first else ()


def _classes(command: Command) -> list[Any]:
    module, _, name = command.options.partition(":")
    return [getattr(import_module(module), name)]


def _words(first: Iterable[str], flags: Iterable[str]) -> str:
    """Return the bash code that sets `words` to the options and, for the first word of the command, the names."""
    names = " ".join(first)
    return f'words="{" ".join(flags)}"' + (f'; (( at == 2 )) && words="{names} $words"' if names else "")


def flags_of(*classes: Any) -> Iterator[str]:
    """Yield the options of a command line that is made from dataclasses."""
    for cls in classes:
        positional = {
            name
            for name, hint in get_type_hints(cls, include_extras=True).items()
            if tyro.conf.Positional in getattr(hint, "__metadata__", ())
        }
        for key, hint in config_fields(cls):
            if key not in positional:
                yield f"--{key}"
                if hint is bool:
                    head, _, last = key.rpartition(".")
                    yield f"--{head + '.' if head else ''}no-{last}"
    yield from ("--help", "--debug")


if __name__ == "__main__":
    command(main)
