"""One thread a process: the tensors here are tiny, and threads that spin only slow each other.

TILT_TEST has the tests run as on another processor: see processors.py.
"""

import os
from collections.abc import Iterator
from typing import Any

import processors
import pytest
from hypothesis import HealthCheck, settings

processors.act(os.environ.get("TILT_TEST", ""))
# no test fails because the machine is busy
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A random-weight Stable Diffusion in a folder, as pipe.save_pretrained() leaves it."""
    import tiny_pipelines

    folder = tmp_path_factory.mktemp("model")
    tiny_pipelines.sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server() -> Iterator[Any]:
    """The endpoint of a judge, which answers as the test says."""
    from judge_server import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def qwen(request, tmp_path_factory) -> str:
    """A small untrained Qwen2.5-VL in a folder, in either dtype."""
    import torch
    from small_judge import save_qwen

    return save_qwen(tmp_path_factory.mktemp("qwen"), getattr(torch, request.param))


@pytest.fixture
def no_curves(monkeypatch):
    """Leave out a card's curves, which take half of a small run."""
    monkeypatch.setattr("tilt.model_card.curves", lambda log, checks, path: None)


@pytest.fixture
def no_model(monkeypatch):
    """Fail where a model would be loaded: what is refused here is refused before that."""

    def load(*args, **kwargs):
        pytest.fail("the model was loaded")

    monkeypatch.setattr("tilt.loading.load_pipeline", load)
