"""The wheel carries all that a command needs, from any folder, and answers at once."""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from loralab.cli.init import TEMPLATE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Another environment with the wheel in it; its dependencies are this one's."""
    folder = tmp_path_factory.mktemp("other") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    inside = next((folder / "lib").glob("python*/site-packages"))
    (inside / "dependencies.pth").write_text(str(packages))
    return folder / "bin" / "loralab"


def test_the_wheel_holds_configurations_sweeps_the_base_and_the_page(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [
        "loralab/conf/train.yaml",
        "loralab/conf/hydra/job_logging/loralab.yaml",
        "loralab/sweeps/quickstart.yaml",
        "loralab/tiny/model.safetensors",
        "loralab/tiny/tokenizer.json",
        "loralab/reporting/templates/page.css",
        "loralab/reporting/templates/sweep.html",
        "loralab/reporting/templates/figures.js",
        "loralab/data/docstrings_train.bin",
        "loralab/py.typed",
        "hydra_plugins/loralab_packed/packed_launcher.py",
        "hydra_plugins/loralab_own/own_files.py",
        *(f"loralab/template/{path.relative_to(TEMPLATE)}" for path in TEMPLATE.rglob("*.*") if path.suffix != ".pyc"),
    ]
    assert [name for name in wanted if name not in names] == []
    assert "hydra_plugins/__init__.py" not in names


def test_the_installed_wheel_composes_from_an_empty_folder_with_a_space(installed, tmp_path):
    folder = tmp_path / "an empty folder"
    folder.mkdir()
    done = subprocess.run([installed, "train", "--cfg", "job"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_target_: loralab.adapters.lora.LoRA" in done.stdout
    where = subprocess.run([installed, "train", "--info", "searchpath"], cwd=folder, capture_output=True, text=True)
    assert str(ROOT) not in where.stdout
    assert list(folder.iterdir()) == []
    lab = [[installed, "init", "lab"], [installed, "sweep", "lab/sweeps/first.yaml", "--cfg", "job", "-p", "sweep"]]
    init, shown = (subprocess.run(words, cwd=folder, capture_output=True, text=True) for words in lab)
    assert init.returncode == 0, init.stderr
    assert (
        "experiment=sums: there is no such option" in shown.stderr
    )  # of another folder's conf, which is not searched here
    words = [installed, "sweep", "first", "--cfg", "job", "-p", "sweep"]
    shown = subprocess.run(words, cwd=folder / "lab", capture_output=True, text=True)
    assert "name: first" in shown.stdout, shown.stderr


def test_help_answers_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "loralab.cli.main", "--help"]
    best = 1e9
    for _ in range(5):
        started = time.monotonic()
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
        )
        best = min(best, time.monotonic() - started)
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "hydra", "lightning", "transformers", "omegaconf"}
    assert best < 0.5


def test_hydra_scans_the_launcher_without_torch():
    code = "import sys, hydra_plugins.loralab_packed.packed_launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
