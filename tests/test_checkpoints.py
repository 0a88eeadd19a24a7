"""Checkpoint folders: complete or not there, verified before they are loaded, never lost."""

import json
import os
import random
import shutil

import pytest
import torch
from accelerate import Accelerator

from diffusers_hdit.training import checkpointing
from diffusers_hdit.training.checkpointing import find_checkpoint, load_checkpoint, save_checkpoint, verify
from diffusers_hdit.training.ema import EMAWeights


SETTINGS = {"seed": 0, "learning_rate": 0.1, "model.widths": [8]}


class Training:
    """A small network with its optimizer and averages, after some steps."""

    def __init__(self, seed, steps=3):
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(8, 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.ema = EMAWeights(self.model, [0.9], [0.1])
        for _ in range(steps):
            self.step()

    def step(self):
        self.model(torch.ones(2, 8)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step()

    @property
    def objects(self):
        return {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}

    def state(self):
        state = [*self.model.parameters()]
        for parameter in self.model.parameters():
            state += [self.optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq", "step")]
        for name in self.ema.names:
            state += self.ema.full_state_dict(name).values()
        return [value.detach().clone() for value in state]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def save(accelerator, folder, training, step, limit=None):
    progress = {"step": step, "images_seen": 8 * step, "settings": SETTINGS}
    return save_checkpoint(accelerator, folder, progress, limit, **training.objects)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_is_saved_is_loaded_bit_for_bit(accelerator, tmp_path):
    saved, loaded = Training(0), Training(1, steps=1)
    path = save(accelerator, tmp_path, saved, 3)
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors", "optimizer.pt", "averages.pt", "progress.json", "checksums.json"
    }  # fmt: skip
    assert load_checkpoint(accelerator, path, SETTINGS, **loaded.objects)["images_seen"] == 24
    assert same(saved.state(), loaded.state())
    saved.step()
    loaded.step()
    assert same(saved.state(), loaded.state())


def test_a_hundred_damages(accelerator, tmp_path):
    """Truncated, with a flipped bit, or a file deleted: found, or loaded as it was saved."""
    good, trouble = Training(0), random.Random(0)
    save(accelerator, tmp_path, good, 3)
    found = 0
    for i in range(100):
        path = tmp_path / f"try-{i}" / "checkpoint-3"
        shutil.copytree(tmp_path / "checkpoint-3", path)
        file = trouble.choice(sorted(path.iterdir()))
        data = bytearray(file.read_bytes())
        if i % 3 == 0:
            file.write_bytes(data[: trouble.randrange(len(data))])
        elif i % 3 == 1:
            data[trouble.randrange(len(data))] ^= 1 << trouble.randrange(8)
            file.write_bytes(data)
        else:
            file.unlink()
        reports = []
        try:
            chosen = find_checkpoint(path.parent, None, reports.append)
        except ValueError as error:
            assert "no checkpoint of it can be used" in str(error) and "is damaged" in reports[0]
            found += 1
        else:
            loaded = Training(1)
            load_checkpoint(accelerator, chosen, SETTINGS, **loaded.objects)
            assert same(good.state(), loaded.state())
    assert found >= 95, "only a flip in the white space of the list of checksums does no harm"


def test_the_one_before_a_damaged_one_is_used(accelerator, tmp_path):
    for step in (2, 10, 9):
        save(accelerator, tmp_path, Training(0), step)
    (tmp_path / "checkpoint-10" / "averages.pt").write_bytes(b"")
    os.rename(tmp_path / "checkpoint-9", tmp_path / ".partial-checkpoint-9")
    reports = []
    assert find_checkpoint(tmp_path, None, reports.append) == tmp_path / "checkpoint-2"
    assert reports == [f"{tmp_path / 'checkpoint-10'} is damaged (averages.pt is not what was written) and not used."]


def test_a_failed_write_leaves_what_was_there(accelerator, tmp_path, monkeypatch):
    """A full disk, say, at each of the writes in turn."""
    before = save(accelerator, tmp_path, Training(0), 2)
    for module, name in (
        (checkpointing, "save_file"),
        (torch, "save"),
        (checkpointing, "hash_files"),
        (os, "replace"),
    ):

        def fail(*arguments, **options):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(module, name, fail)
            save(accelerator, tmp_path, Training(0), 3)
        assert find_checkpoint(tmp_path, None) == before and verify(before) is None
    assert find_checkpoint(tmp_path, None) == before
    assert save(accelerator, tmp_path, Training(0), 3) == find_checkpoint(tmp_path, None)
    assert not list(tmp_path.glob(".partial*"))


def test_the_limit_counts_from_the_newest_written(accelerator, tmp_path):
    for step in (1, 2, 3):
        save(accelerator, tmp_path, Training(0), step)
    # A damaged one of a later step must not count as the one to keep.
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "checksums.json").write_text("{}")
    (tmp_path / "checkpoint-1-mine").mkdir()
    save(accelerator, tmp_path, Training(0), 4, limit=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-3", "checkpoint-4", "checkpoint-9", "checkpoint-1-mine"}
    save(accelerator, tmp_path, Training(0), 5, limit=1)
    assert find_checkpoint(tmp_path, None, lambda line: None).name == "checkpoint-5"


def test_other_settings_are_refused_or_forked(accelerator, tmp_path):
    path = save(accelerator, tmp_path, Training(0), 3)
    other, objects = {**SETTINGS, "learning_rate": 0.2}, Training(1).objects
    with pytest.raises(ValueError, match="learning_rate was 0.1, is 0.2. To start from it with these, give another"):
        load_checkpoint(accelerator, path, other, **objects)
    objects["optimizer"].param_groups[0]["lr"] = 0.2
    load_checkpoint(accelerator, path, other, checkpointing.FORKS_MAY_CHANGE, **objects)
    assert objects["optimizer"].param_groups[0]["lr"] == 0.2
    with pytest.raises(ValueError, match=r"model.widths was \[8\], is \[16\]. Nothing was changed"):
        load_checkpoint(
            accelerator, path, {**SETTINGS, "model.widths": [16]}, checkpointing.FORKS_MAY_CHANGE, **objects
        )


def test_folders_of_others(tmp_path):
    assert find_checkpoint(tmp_path, None) is None and find_checkpoint(tmp_path / "new", None) is None
    (tmp_path / "checkpoint-3" / "unet").mkdir(parents=True)
    for resume_from in (None, "latest", "checkpoint-3"):
        with pytest.raises(ValueError, match="is not an empty folder, and does not hold a run"):
            find_checkpoint(tmp_path, resume_from)


def test_named_checkpoints(accelerator, tmp_path):
    run = tmp_path / "run"
    for step in (3, 6):
        save(accelerator, run, Training(0), step)
    assert find_checkpoint(run, "checkpoint-6") == run / "checkpoint-6"
    with pytest.raises(ValueError, match="has a newer checkpoint, checkpoint-6"):
        find_checkpoint(run, "checkpoint-3")
    with pytest.raises(
        ValueError, match="no complete checkpoint 'checkpoint-9'.*there are: checkpoint-3, checkpoint-6"
    ):
        find_checkpoint(run, "checkpoint-9")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        find_checkpoint(tmp_path / "full", str(run / "checkpoint-3"))
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    assert find_checkpoint(run, "checkpoint-3") == run / "checkpoint-3", "the newer one can't be used"
    with pytest.raises(ValueError, match="is damaged: optimizer.pt is missing"):
        find_checkpoint(run, "checkpoint-6")


def test_a_fork_resumes_from_its_own_checkpoints(accelerator, tmp_path):
    """The same command again: from the other run's checkpoint until there is one of its own."""
    source, fork = save(accelerator, tmp_path / "run", Training(0), 3), tmp_path / "fork"
    assert find_checkpoint(fork, str(source)) == source
    fork.mkdir()
    (fork / "training_args.json").write_text(json.dumps({"resume_from_checkpoint": str(source)}))
    assert find_checkpoint(fork, str(source)) == source
    with pytest.raises(ValueError, match="started from .*checkpoint-3 and has no checkpoint of its own yet"):
        find_checkpoint(fork, None)
    own = save(accelerator, fork, Training(0), 5)
    assert find_checkpoint(fork, str(source)) == find_checkpoint(fork, None) == own


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    (tmp_path / "training_args.json").write_text('{"half')
    (tmp_path / ".partial-checkpoint-3").mkdir()
    assert find_checkpoint(tmp_path, None) is None
