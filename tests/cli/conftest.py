import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from spikeform.cli import app


class Result:
    """What one command printed, and how it ended."""

    def __init__(self, result):
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self):
        return json.loads(self.out)  # fails unless stdout is one document


@pytest.fixture(scope="session")
def run():
    """Runs a command in this process: ``run("convert", model, out)``."""

    def call(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result)

    return call


@pytest.fixture(scope="session")
def dense(tiny_llama, tokenizer, tmp_path_factory):
    """Folder of a tiny dense model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_llama(context=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _converted(run, dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "out"
    result = run("convert", dense, folder, "--steps", "12", "--calibration-tokens", "256")
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def spiking(_converted, tmp_path):
    """Folder of the converted model, which the test may damage."""
    return shutil.copytree(_converted, tmp_path / "spiking")


@pytest.fixture
def text(tmp_path):
    """A text file of about 900 tokens."""
    torch.manual_seed(0)
    letters = "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (900,)))
    file = tmp_path / "text.txt"
    file.write_text(letters)
    return file
