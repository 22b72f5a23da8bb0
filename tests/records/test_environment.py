"""The commit that a run is said to be of: pbbench's own, or none."""

import subprocess

import pytest

from pbbench.records.environment import commit_of


def git(folder, *words):
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def clone(tmp_path):
    """A repository whose root holds a package pbbench."""
    (tmp_path / "pbbench").mkdir()
    (tmp_path / "pbbench" / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_the_commit_of_a_clone_and_whether_its_code_was_changed(clone, monkeypatch):
    head = git(clone, "rev-parse", "HEAD")
    assert commit_of(clone) == {"commit": head, "dirty": False}
    (clone / "notes.md").write_text("no code")
    assert commit_of(clone)["dirty"] is False
    (clone / "pbbench" / "__init__.py").write_text("changed = True")
    monkeypatch.setenv("GIT_DIR", str(clone / "nowhere"))
    assert commit_of(clone) == {"commit": head, "dirty": True}


@pytest.mark.parametrize("ignored", [True, False])
def test_a_copy_in_somebodys_repository_has_no_commit(clone, ignored):
    copy = clone / "vendor" / "pbbench-copy"
    (copy / "pbbench").mkdir(parents=True)
    (copy / "pbbench" / "__init__.py").write_text("")
    if ignored:
        (clone / ".gitignore").write_text("vendor/")
    git(clone, "add", ".")
    git(clone, "commit", "-q", "-m", "second")
    assert commit_of(copy) == {"commit": None, "dirty": None}


def test_installed_without_a_repository(tmp_path):
    assert commit_of(tmp_path) == {"commit": None, "dirty": None}
