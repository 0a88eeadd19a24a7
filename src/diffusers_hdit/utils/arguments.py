"""Command lines whose errors are one sentence."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that takes no abbreviations, and names the flag that was meant by a misspelt one."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # Before anything else: a required flag that is missing may be the one that was misspelt.
        args = sys.argv[1:] if args is None else list(args)
        known = [option for action in self._actions for option in action.option_strings]
        for arg in args[: args.index("--")] if "--" in args else args:
            flag = arg.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                close = difflib.get_close_matches(flag, known, n=1)
                self.error(
                    f"unknown flag {flag}{f'; did you mean {close[0]}?' if close else '. --help lists all flags.'}"
                )
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message as the only line, without the usage."""
        self.exit(2, f"error: {message}\n")
