"""What git knows of the code of a training is recorded, and git never gets in the way."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from trainbus.capture.environment import MAX_DIFF, git_state
from trainbus.events import GitState

GIT = shutil.which("git")
pytestmark = pytest.mark.skipif(GIT is None, reason="needs git")


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """The variables of a user without any configuration of git."""
    (tmp_path / "home").mkdir()
    known = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    who = {
        f"GIT_{who}_{what}": "me" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), **known, **who}


def git(folder: Path, environ: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, environ: dict[str, str]) -> Path:
    """A repository with one commit on `main`."""
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, environ, "init", "-q", "-b", "main")
    (folder / "train.py").write_text("lr = 1\n", encoding="utf-8")
    git(folder, environ, "add", ".")
    git(folder, environ, "commit", "-q", "-m", "first")
    return folder


def test_a_clean_repository(repository: Path, environ: dict[str, str]) -> None:
    """Commit, branch, root and the remote without its password are recorded, from any subfolder."""
    git(repository, environ, "remote", "add", "origin", "https://me:pw@host/a.git")
    (repository / "sub").mkdir()
    commit = git(repository, environ, "rev-parse", "HEAD")
    expected = GitState(
        commit=commit, branch="main", remote="https://host/a.git", root=str(repository), dirty=False
    )
    assert expected == git_state(str(repository / "sub"), environ)


def test_the_diff_can_be_applied(repository: Path, environ: dict[str, str]) -> None:
    """The diff has what is staged and what is not, however the user has git format it."""
    for name, value in [("diff.noprefix", "true"), ("color.ui", "always")]:
        git(repository, environ, "config", name, value)
    (repository / "train.py").write_text("lr = 2\n", encoding="utf-8")
    (repository / "new.py").write_text("µ\n", encoding="utf-8")
    git(repository, environ, "add", "new.py")
    found = git_state(str(repository), environ)
    assert found is not None
    assert (True, False) == (found.dirty, found.diff_truncated)
    git(repository, environ, "reset", "-q", "--hard")
    (repository.parent / "diff").write_text(found.diff, encoding="utf-8")
    git(repository, environ, "apply", str(repository.parent / "diff"))
    assert "lr = 2\n" == (repository / "train.py").read_text(encoding="utf-8")
    assert "µ\n" == (repository / "new.py").read_text(encoding="utf-8")


def test_untracked_files_make_it_dirty(repository: Path, environ: dict[str, str]) -> None:
    """A file that git does not know is not in the diff, but the repository is not clean."""
    (repository / "new.py").write_text("x\n", encoding="utf-8")
    found = git_state(str(repository), environ)
    assert found is not None
    assert (True, "") == (found.dirty, found.diff)


def test_a_secret_in_the_diff_is_replaced(repository: Path, environ: dict[str, str]) -> None:
    """A token that was added to the code is not recorded."""
    token = "ghp_" + "a1B2" * 9
    (repository / "train.py").write_text(f"token = '{token}'\n", encoding="utf-8")
    found = git_state(str(repository), environ)
    assert found is not None
    assert token not in found.diff
    assert "-lr = 1\n" in found.diff


def test_a_large_diff_is_truncated(repository: Path, environ: dict[str, str]) -> None:
    """At most 1 MiB of a diff is recorded, in complete lines."""
    (repository / "train.py").write_text("0123456789abcde\n" * 200_000, encoding="utf-8")
    found = git_state(str(repository), environ)
    assert found is not None
    assert found.diff_truncated
    assert MAX_DIFF - 17 <= len(found.diff) <= MAX_DIFF
    assert found.diff.endswith("+0123456789abcde\n")


def test_a_repository_without_a_commit(tmp_path: Path, environ: dict[str, str]) -> None:
    """Before the first commit, there is a branch and nothing to compare with."""
    git(tmp_path, environ, "init", "-q", "-b", "main", "code")
    (tmp_path / "code" / "x").touch()
    expected = GitState(branch="main", root=str(tmp_path / "code"), dirty=True)
    assert expected == git_state(str(tmp_path / "code"), environ)


def test_a_detached_head_has_no_branch(repository: Path, environ: dict[str, str]) -> None:
    """A commit that was checked out by its hash is on no branch."""
    git(repository, environ, "checkout", "-q", "--detach")
    found = git_state(str(repository), environ)
    assert found is not None
    assert (None, git(repository, environ, "rev-parse", "HEAD")) == (found.branch, found.commit)


def test_no_repository_and_no_git(tmp_path: Path, environ: dict[str, str]) -> None:
    """Outside of a repository, and without the program, nothing is recorded."""
    assert None is git_state(str(tmp_path), environ)
    assert None is git_state(str(tmp_path), {**environ, "PATH": str(tmp_path)})


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away"
)
def test_a_repository_of_another_user(repository: Path, environ: dict[str, str]) -> None:
    """Git refuses to read the repository of another user, and that is no error."""
    for path in (repository, repository / ".git"):
        os.chown(path, 12345, 12345)
    assert None is git_state(str(repository), environ)


def test_a_repository_starts_no_programs(repository: Path, environ: dict[str, str]) -> None:
    """Programs in the configuration of a repository are not started to describe it."""
    started = repository.parent / "started"
    program = repository.parent / "program"
    program.write_text(f"#!/bin/sh\ntouch '{started}'\n", encoding="utf-8")
    program.chmod(0o700)
    for name in ("core.fsmonitor", "diff.external", "diff.x.textconv", "core.pager"):
        git(repository, environ, "config", name, str(program))
    (repository / ".git" / "info" / "attributes").write_text("*.py diff=x\n", encoding="utf-8")
    started.unlink(missing_ok=True)
    (repository / "train.py").write_text("lr = 2\n", encoding="utf-8")
    found = git_state(str(repository), environ)
    assert found is not None
    assert "+lr = 2\n" in found.diff
    assert not started.exists()


def test_the_index_stays_as_it_is(repository: Path, environ: dict[str, str]) -> None:
    """The user's own git never finds the index locked or rewritten."""
    os.utime(repository / "train.py", (1, 1))  # a `git status` of the user would rewrite the index
    before = (repository / ".git" / "index").read_bytes()
    found = git_state(str(repository), environ)
    assert found is not None
    assert False is found.dirty
    assert before == (repository / ".git" / "index").read_bytes()


def test_a_git_that_takes_too_long_is_killed(
    repository: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A git that does not answer counts as none, also if its children hold its output open."""
    monkeypatch.setattr("trainbus.capture.environment.GIT_TIMEOUT_S", 0.2)
    program = repository.parent / "bin" / "git"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho late\n/bin/sleep 600 &\nwait\n", encoding="utf-8")
    program.chmod(0o700)
    assert None is git_state(str(repository), {**environ, "PATH": str(program.parent)})
