"""The console command `diffusers-hdit`: one door to training, sampling, evaluation and the Hub."""

import importlib
import sys
from collections.abc import Sequence

from . import __version__


# Each command's module, which has `main(argv)`, and what it does.
COMMANDS = {
    "train": ("training.__main__", "train a model on your images (several GPUs: accelerate launch -m diffusers_hdit.training)"),
    "sample": ("evaluation.sample", "generate images with a saved pipeline: a labelled grid, or many"),
    "evaluate": ("evaluation.evaluate", "compare a pipeline's images with real ones"),
    "profile": ("evaluation.profile", "print parameters, multiply-accumulates, memory and kernels of a model"),
    "convert": ("conversion", "convert checkpoints of other projects to pipelines"),
    "push": ("hub.push", "push a saved pipeline to the Hugging Face Hub"),
}  # fmt: skip


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = (f"  {name:<{width}}{about}" for name, (_, about) in COMMANDS.items())
    return "\n".join(
        ("usage: diffusers-hdit COMMAND [flags]", "", *lines, "", "diffusers-hdit COMMAND --help lists the flags.")
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names with the other arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(__version__)
        return
    if argv[0] not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}."
        sys.stderr.write(f"error: unknown command {argv[0]}; {meant}\n")
        raise SystemExit(2)
    name = argv[0]
    sys.argv = [f"diffusers-hdit {name}", *argv[1:]]  # what the help calls the program
    importlib.import_module(f".{COMMANDS[name][0]}", __package__).main(argv[1:])


if __name__ == "__main__":
    main()
