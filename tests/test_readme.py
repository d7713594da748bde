"""README as a user meets it: its programs and its commands, run word for word."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import probae.cli
from probae.cli import MODELS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_programs_run_as_they_stand(tmp_path: Path) -> None:
    program = "\n".join(blocks("python"))
    assert "probae.fit(" in program
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nats per datum" in done.stdout
    assert (tmp_path / "runs" / "digits" / "pair.json").is_file()


def test_commands_run_as_they_stand(tmp_path: Path) -> None:
    lines = "\n".join(blocks("bash")).splitlines()
    commands = [line for line in lines if line.startswith("probae ")]
    assert [shlex.split(line)[1] for line in commands] == ["fit", "evaluate", "sample"]
    for line in commands:
        done = subprocess.run(
            [sys.executable, "-m", *["probae.cli", *shlex.split(line)[1:]]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_every_model_of_the_table_is_there_with_its_kind() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([A-Z_]+)[^|]*\|$", README, re.MULTILINE)
    by_fit = {model.preset.__name__ for model in MODELS.values()}
    adversarial = {"GAN", "AdversarialAutoencoder", "AdversarialVariationalBayes"}
    assert {name for name, _ in rows} == by_fit | adversarial
    for name, kind in rows:
        assert getattr(probae, name)(8, 2).kind == kind
