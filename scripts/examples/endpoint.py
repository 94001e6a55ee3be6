"""Steered pictures over HTTP: python scripts/examples/endpoint.py, then

    curl -d '{"prompt": "the word \\"CRAB\\""}' -H 'Content-Type: application/json' \
        http://127.0.0.1:8000/steer -o crab.png

Needs fastapi and uvicorn, which the extra "app" brings.
"""

import io
import os
import threading
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # or a request could fetch gigabytes of weights

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

import rewards
from steering import steer, tiny

app = FastAPI(title="Steered pictures")
pipe = tiny.load("tiny-sd3")
call: dict[str, Any] = tiny.call_defaults("tiny-sd3")
call |= {"preview": tiny.preview(), "progress": False}
one_at_a_time = threading.Lock()  # FastAPI runs plain functions in threads; the network is one


class Order(BaseModel):
    """What is to be drawn, every number within bounds; nothing else may be asked for."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=500)
    reward: str = Field("clip(tiny)", min_length=1, max_length=200)
    particles: int = Field(4, ge=1, le=16)
    steps: int = Field(call["num_inference_steps"], ge=1, le=50)
    height: int = Field(64, ge=32, le=128, multiple_of=16)
    width: int = Field(64, ge=32, le=128, multiple_of=16)
    seed: int = Field(0, ge=0, lt=2**63)


@app.post("/steer", response_class=Response)
def draw(order: Order) -> Response:
    """The PNG of highest reward; its reward and log Ẑ stand in the headers."""
    wanted: dict[str, Any] = call | {"height": order.height, "width": order.width}
    wanted["num_inference_steps"] = order.steps
    try:
        # never imports=True here: this text came over the network
        reward = rewards.load(order.reward)
        reward.check([order.prompt])
        with one_at_a_time:
            out = steer(pipe, order.prompt, reward, order.particles, seed=order.seed, **wanted)
    except ValueError as error:  # a sentence that says what to do
        raise HTTPException(422, str(error)) from None
    png = io.BytesIO()
    out.best[0].save(png, "png")
    found = {"X-Reward": f"{out.rewards.max():.4f}", "X-Log-Z": f"{out.log_z[0]:.4f}"}
    return Response(png.getvalue(), media_type="image/png", headers=found)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=8000)
