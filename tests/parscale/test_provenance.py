import platform
import subprocess
from pathlib import Path

import jax

from parscale import provenance
from parscale.config import MeshConfig
from sharding.mesh import make_mesh


def test_a_result_names_its_code_and_machine():
    found = provenance.provenance(make_mesh(MeshConfig(data=8)))
    assert found["device"] == f"8 x {jax.devices()[0].device_kind}"
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["jax"] == jax.__version__


def test_the_commit_says_whether_files_changed(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    file = tmp_path / "module.py"
    file.write_text("one")
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance.commit() == ""
    git("init", "-q")
    git("add", "module.py")
    git("commit", "-qm", "first")
    assert provenance.commit() == git("rev-parse", "--short=12", "HEAD")
    file.write_text("two")
    assert provenance.commit() == git("rev-parse", "--short=12", "HEAD") + "-changed"
    monkeypatch.setenv("PATH", str(Path(tmp_path)))
    assert provenance.commit() == ""
