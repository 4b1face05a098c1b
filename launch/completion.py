"""`omni-train completion`: a script that completes commands, options and stages in bash and zsh.

Made from the parser, so that it cannot know other commands than there are. It is static: nothing
is started while somebody types.
"""

from __future__ import annotations

import argparse

SHELLS = ("bash", "zsh")
_STAGE_ARGUMENTS = ("stage",)


def script(parser: argparse.ArgumentParser, shell: str, stages: list[str]) -> str:
    """Return the script.

    Args:
        parser: of the whole command line.
        shell: bash or zsh.
        stages: words that complete a stage's name.
    """
    tree = _tree(parser, stages)
    cases = "\n".join(f'    "{path}") words="{" ".join(words)}" ;;' for path, words in tree)
    names = " ".join(sorted({name for path, _ in tree for name in path.split()}))
    body = f"""_omni_train() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" path="" word words=""
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    [[ " {names} " == *" $word "* ]] && path="${{path:+$path }}$word"
  done
  case "$path" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  [[ ${{#COMPREPLY[@]}} -gt 0 ]] || COMPREPLY=($(compgen -f -- "$current"))
}}
complete -o nosort -F _omni_train omni-train ./run
"""
    if shell == "zsh":
        return f"autoload -U +X bashcompinit && bashcompinit\n{body.replace('-o nosort ', '')}"
    return body


def _tree(
    parser: argparse.ArgumentParser, stages: list[str], path: str = ""
) -> list[tuple[str, list[str]]]:
    """(commands so far, words that may follow) of a parser and all below it."""
    words: list[str] = []
    below: list[tuple[str, list[str]]] = []
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                words.append(name)
                below += _tree(child, stages, f"{path} {name}".strip())
        elif not action.option_strings and action.dest in _STAGE_ARGUMENTS:
            words += stages
        elif action.choices is not None and not action.option_strings:
            words += [str(choice) for choice in action.choices]
    return [(path, words), *below]
