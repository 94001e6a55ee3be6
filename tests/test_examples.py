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
    for bad in ({"prompt": ""}, {}, {"prompt": "a", "num_inference_steps": 10**9}):
        assert client.post("/steer", json=bad).status_code == 422
    bounds = {"particles": 17, "steps": 51, "height": 4096, "width": 48.5, "seed": 2**63}
    for field, value in bounds.items():
        for wrong in (value, -1, "many"):
            answer = client.post("/steer", json={"prompt": "a", field: wrong})
            assert answer.status_code == 422, (field, wrong)


def test_the_endpoint_runs_nothing_that_a_request_names(tmp_path, monkeypatch):
    """The shell command of the first issue about it, and its kin; rewards' own tests have more."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    from scripts.examples import endpoint

    monkeypatch.chdir(tmp_path)
    client = TestClient(endpoint.app)
    for reward in (
        'os:system("touch ran")',
        'jpeg + min(jpeg, os:system("touch ran"))',
        "objects(detector=os:system)",
        "clip(/etc)",
        "judge(url=http://127.0.0.1:1/v1, model=m, key_env=PATH)",
    ):
        answer = client.post("/steer", json={"prompt": "a", "reward": reward})
        assert answer.status_code == 422
        assert "untrusted text may not do" in answer.json()["detail"]
    assert not list(tmp_path.iterdir())
