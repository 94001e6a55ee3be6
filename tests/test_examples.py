"""The examples run, as they stand in the documentation."""

import io
import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"


@pytest.mark.parametrize(
    ("name", "made"),
    [("ten_lines", ("crab.png", "crab/report.html")), ("custom_reward", ("red.png",))],
)
def test_a_script_runs(name, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert all((tmp_path / file).stat().st_size > 100 for file in made)
    assert capsys.readouterr().out


def test_the_endpoint_answers_with_a_picture_or_a_sentence():
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    from scripts.examples import endpoint

    client = TestClient(endpoint.app)
    answer = client.post("/steer", json={"prompt": "two red stars", "particles": 2})
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    again = client.post("/steer", json={"prompt": "two red stars", "particles": 2})
    assert again.content == answer.content
    assert again.headers["x-reward"] == answer.headers["x-reward"]
    refused = client.post("/steer", json={"prompt": "a", "reward": "clop(tiny)"})
    assert refused.status_code == 422
    assert "clop" in refused.json()["detail"]
    for bad in ({"prompt": ""}, {"prompt": "a", "particles": 10_000}, {}):
        assert client.post("/steer", json=bad).status_code == 422
