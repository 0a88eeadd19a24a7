"""Pipelines on the Hugging Face Hub: what inference needs and a true card, in one commit, in the background if wanted.

    python -m diffusers_hdit.hub.push FOLDER USER/NAME [--private]

pushes the pipeline in a folder, for instance one whose training ended while the Hub was away.
"""

import argparse
import json
import logging
import re
import shlex
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError, safe_open

from . import model_card
from .model_card import SAMPLES_FILE, TrainingMetadata


logger = logging.getLogger(__name__)

WAITS = (1, 2, 4, 8, 16)  # seconds between attempts
# Request timeout, conflict with another commit, the same on the parent commit, too many requests; and all of 5xx.
_TRANSIENT = {408, 409, 412, 429}


def push_pipeline(
    pipeline: DiffusionPipeline,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    safe_serialization: bool = True,
    variant: str | None = None,
    subfolder: str | None = None,
    *,
    revision: str | None = None,
    max_shard_size: int | str | None = None,
    license: str | None = None,
    training_metadata: TrainingMetadata | None = None,
    samples: Image.Image | None = None,
) -> CommitInfo:
    """See `HDiTPipeline.push_to_hub`."""
    if not safe_serialization:
        raise ValueError("safe_serialization=False would upload pickles, which can run code; leave it out.")
    if subfolder is not None:
        raise ValueError(f"a pipeline is pushed to the root of a repository, not to subfolder={subfolder!r}.")
    if samples is not None and (training_metadata is None or training_metadata.samples is None):
        raise ValueError("samples need training_metadata.samples, or the card could not say how they were generated.")
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        if training_metadata is not None:
            training_metadata.save(folder)
        if samples is not None:
            path = inside(Path(folder), training_metadata.samples["file"])
            path.parent.mkdir(parents=True, exist_ok=True)
            samples.save(path)
        return push_folder(
            folder,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            create_pr=create_pr,
            revision=revision,
            license=license,
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    license: str | None = None,
    also: Sequence[str] = (),
    stop: threading.Event | None = None,
) -> CommitInfo:
    """
    Push the pipeline that `save_pretrained` or a training wrote, and nothing else that lies in the folder.

    One commit, on top of the one whose card was read: until it is there, the repository is as it was. Attempts that
    fail for a reason that may pass are repeated after `WAITS`; large files that arrived are not sent again.

    Args:
        folder: with model_index.json; `training_facts.json` in it goes into the card.
        also: patterns of other files in the folder that are to go along, for instance "logs/**/*".
        stop: give up between attempts once it is set.
        others: see `HDiTPipeline.push_to_hub`.

    Raises:
        ValueError: for a folder without a pipeline, a name the Hub would refuse, or a public repository if `private`.
        huggingface_hub.errors.HfHubHTTPError: what the Hub answered last.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    files = {**files_for_inference(folder), **matching(folder, also)}
    api = HfApi(token=token)

    def attempt() -> CommitInfo:
        name = prepare_repository(api, repo_id, private, revision)
        head = api.model_info(name, revision=revision)
        there = {sibling.rfilename for sibling in head.siblings}
        card = write_card(folder, name, read_card(api, name, head.sha) if "README.md" in there else None, license)
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()]
        operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode()))
        operations += [CommitOperationDelete(path_in_repo=path) for path in superseded(set(files), there)]
        return api.create_commit(
            name,
            operations,
            commit_message=commit_message or "Upload HDiT pipeline",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,
        )

    return with_retries(attempt, f"Pushing to {repo_id}", stop)


# ----------------------------------------------------------------------------------------------------------------------
# What is uploaded


def files_for_inference(folder: Path) -> dict[str, Path]:
    """
    Path in the repository -> file, for the pipeline in a folder.

    Raises:
        ValueError: if there is no pipeline, if it names places outside of the folder, or if weights are damaged.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(folder)!r} holds no pipeline: model_index.json can't be read ({error}). Give a folder that "
            "save_pretrained or a training wrote."
        ) from error
    files = {"model_index.json": folder / "model_index.json"}
    if isinstance(index.get("_class_name"), list):
        code = f"{index['_class_name'][0]}.py"
        files[code] = inside(folder, code)
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value[:1] == [None]:
            continue
        component = inside(folder, name)
        for path in sorted(component.iterdir()) if component.is_dir() else ():
            if path.suffix in (".json", ".safetensors") or path.name == f"{value[0]}.py":
                files[f"{name}/{path.name}"] = inside(folder, f"{name}/{path.name}")
    for path in files.values():
        if path.suffix == ".safetensors":
            check_whole(path)
    training_metadata = TrainingMetadata.load(folder)
    if training_metadata is not None and training_metadata.samples:
        grid = inside(folder, training_metadata.samples["file"])
        if grid.is_file():
            files[SAMPLES_FILE] = grid
    return files


def matching(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Path in the repository -> file, for what else was asked for; ValueError for a pattern that matches nothing."""
    files = {}
    for pattern in patterns:
        found = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        if not found:
            raise ValueError(f"nothing in {str(folder)!r} matches {pattern!r}; nothing was uploaded.")
        names = [path.relative_to(folder).as_posix() for path in found]
        files.update({name: inside(folder, name) for name in names})
    return files


def inside(folder: Path, name: str) -> Path:
    """`folder / name`; ValueError if that is not inside of the folder, links followed."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} is not inside of {str(folder)!r}; nothing was uploaded.")
    return path


def check_whole(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is not a whole safetensors file: {error}. Save the pipeline again."
        ) from error


def superseded(new: set[str], there: set[str]) -> list[str]:
    """Weights in the repository that the new ones replace under other names: shards, where there were more or fewer."""
    weights = {canonical(path) for path in new} - {None}
    return sorted(path for path in there - new if canonical(path) in weights)


def canonical(path: str) -> str | None:
    """One name for the whole and the sharded weights of a variant, and for the index of the shards; None for others."""
    if match := re.fullmatch(r"(.*?)(-\d{5}-of-\d{5})?\.safetensors", path):
        return f"{match[1]}.safetensors"
    if match := re.fullmatch(r"(.*)\.safetensors\.index((?:\.[^./]+)?)\.json", path):
        return f"{match[1]}{match[2]}.safetensors"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# The repository


def prepare_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Makes the repository and the branch if they are not there; returns the full name."""
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(name).private:
        raise ValueError(
            f"the repository {name!r} exists and is public, but private=True was given. Make it private in its settings "
            "on the Hub, or choose another name. Nothing was uploaded."
        )
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    return name


def read_card(api: HfApi, repo_id: str, commit: str) -> str:
    # Into an empty folder: from its cache, the client would answer with an older card when the Hub does not.
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, "README.md", revision=commit, local_dir=folder)
        return Path(path).read_text(encoding="utf-8")


def write_card(folder: Path, repo_id: str, existing: str | None, license: str | None) -> str:
    """The card for the pipeline in the folder, around what somebody wrote into the existing one."""
    config = {
        name: json.loads((folder / path).read_text(encoding="utf-8"))
        for name, path in (
            ("pipeline_config", "model_index.json"),
            ("model_config", "transformer/config.json"),
            ("scheduler_config", "scheduler/scheduler_config.json"),
        )
    }
    training_metadata = TrainingMetadata.load(folder)
    stated = license or model_card.read_card(existing, repo_id)[0].get("license")
    section = model_card.card_section(repo_id, **config, training_metadata=training_metadata, license=stated)
    pipeline = model_card.pipeline_name(config["pipeline_config"])
    metadata = model_card.card_metadata(config["model_config"], training_metadata, license, pipeline)
    return model_card.make_card(existing, repo_id, section, metadata)


# ----------------------------------------------------------------------------------------------------------------------
# Failures that pass


def is_transient(error: BaseException | None) -> bool:
    """Whether trying again may help: the connection, or an answer that the Hub gives when it is busy or ill."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(error, HfHubHTTPError) and response is not None:
            return response.status_code in _TRANSIENT or response.status_code >= 500
        if isinstance(error, OfflineModeIsEnabled):
            return False
        # By name: the client has changed its HTTP library more than once.
        if any(cls.__name__ in ("TransportError", "ConnectionError", "Timeout") for cls in type(error).__mro__):
            return True
        # A failed upload of a large file comes wrapped.
        error = error.__cause__
    return False


def with_retries(function: Callable, what: str, stop: threading.Event | None = None) -> Any:
    """Call until it succeeds, at most once more than there are `WAITS`; errors that do not pass are raised at once."""
    stop = stop or threading.Event()
    for wait in (*WAITS, None):
        try:
            return function()
        except Exception as error:
            if wait is None or stop.is_set() or not is_transient(error):
                raise
            logger.warning("%s: %s Trying again in %s s.", what, first_line(error), wait)
            if stop.wait(wait):
                raise


def first_line(error: BaseException) -> str:
    """An error in one line, with what caused it."""
    causes = []
    while error is not None:
        causes.append((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."))
        error = error.__cause__
    return ": ".join(dict.fromkeys(causes)) + "."


# ----------------------------------------------------------------------------------------------------------------------
# During training


class BackgroundPush:
    """
    Push in the background. Errors of the Hub are logged and never raised, and only `finish` waits for it.

    Args:
        repo_id, private, token: as in `push_folder`.
        scratch: folder to save pipelines in that are on their way; made and removed here.

    Raises:
        ValueError: for a name that the Hub would refuse.
    """

    def __init__(self, repo_id: str, *, private: bool | None, token: str | None, scratch: str | Path):
        validate_repo_id(repo_id)
        self.repo_id, self.private, self.token, self.scratch = repo_id, private, token, Path(scratch)
        self._stop = threading.Event()
        self._pushing: threading.Thread | None = None
        # A wrong token shows now, not after days.
        self._looking = self._start(
            lambda: prepare_repository(HfApi(token=token), repo_id, private, None), "Looking for"
        )

    def push(self, save: Callable[[Path], None], commit_message: str) -> bool:
        """
        Saves the pipeline now, `save(folder)`, and uploads it from another thread. Does nothing and returns False if an
        earlier push is still on its way: a slow Hub gets fewer of them.
        """
        if self._pushing is not None and self._pushing.is_alive():
            logger.warning("The last push to %s is still on its way; leaving this one out.", self.repo_id)
            return False
        shutil.rmtree(self.scratch, ignore_errors=True)
        save(self.scratch)
        # The first card counts the network's operations, with fake tensors: not in a thread beside a training.
        write_card(self.scratch, self.repo_id, None, None)

        def push():
            self._looking.join()
            self._push_folder(self.scratch, commit_message)

        self._pushing = self._start(push, "Pushing to")
        return True

    def finish(self, folder: str | Path, commit_message: str) -> CommitInfo | None:
        """Pushes the finished pipeline and waits for it. None, and how to push later in the log, if that fails."""
        # An earlier push that still waits for better times is now in the way.
        self._stop.set()
        self._looking.join()
        if self._pushing is not None:
            self._pushing.join()
        self._stop.clear()
        shutil.rmtree(self.scratch, ignore_errors=True)
        try:
            return self._push_folder(folder, commit_message)
        except Exception as error:
            logger.error(
                "Pushing to %s failed: %s The pipeline is in %s. Push it later with\n    %s",
                self.repo_id, first_line(error), folder, self.command(folder),
            )  # fmt: skip
            return None

    def command(self, folder: str | Path) -> str:
        private = " --private" if self.private else ""
        return f"python -m diffusers_hdit.hub.push {shlex.quote(str(folder))} {self.repo_id}{private}"

    def _push_folder(self, folder: str | Path, commit_message: str) -> CommitInfo:
        return push_folder(
            folder,
            self.repo_id,
            commit_message=commit_message,
            private=self.private,
            token=self.token,
            stop=self._stop,
        )

    def _start(self, function: Callable, what: str) -> threading.Thread:
        def run():
            try:
                function()
            except Exception as error:
                logger.warning("%s %s failed: %s Training continues.", what, self.repo_id, first_line(error))

        # A daemon: where training breaks off, nothing waits for the upload.
        thread = threading.Thread(target=run, name="push_to_hub", daemon=True)
        thread.start()
        return thread


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_hdit.hub",
        description="Pushes the pipeline in a folder, and its model card, to the Hugging Face Hub.",
    )
    parser.add_argument("folder", help="what a training or save_pretrained wrote")
    parser.add_argument("repo_id", help="USER/NAME; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it a private one")
    parser.add_argument("--token", help="default: the one of `hf auth login`, or HF_TOKEN")
    parser.add_argument("--license", help="of the weights, for instance cc-by-4.0")
    parser.add_argument("--commit_message")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="PATTERN", help="other files, for instance 'logs/**/*'"
    )
    args = parser.parse_args(args)
    try:
        commit = push_folder(
            args.folder,
            args.repo_id,
            commit_message=args.commit_message,
            private=args.private or None,
            token=args.token,
            license=args.license,
            also=args.also,
        )
    except Exception as error:
        sys.exit(f"error: {first_line(error)}")
    print(f"Pushed to {commit.commit_url}")


if __name__ == "__main__":
    main()
