"""Steered pictures over HTTP: python scripts/examples/endpoint.py, then

    curl -d '{"prompt": "the word \\"CRAB\\""}' -H 'Content-Type: application/json' \
        http://127.0.0.1:8000/steer -o crab.png

Needs fastapi and uvicorn, which the extra "app" brings.
"""

import io
import threading

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import Response
from pydantic import BaseModel, Field

import rewards
from steering import steer, tiny

app = FastAPI(title="Steered pictures")
pipe = tiny.load("tiny-sd3")
call = tiny.call_defaults("tiny-sd3") | {"preview": tiny.preview(), "progress": False}
one_at_a_time = threading.Lock()  # FastAPI runs plain functions in threads; the network is one


class Order(BaseModel):
    """What is to be drawn."""

    prompt: str = Field(min_length=1, max_length=500)
    reward: str = Field("clip(tiny)", max_length=200)
    particles: int = Field(4, ge=1, le=16)
    seed: int = 0


@app.post("/steer", response_class=Response)
def draw(order: Order) -> Response:
    """The PNG of highest reward; its reward and log Ẑ stand in the headers."""
    try:
        reward = rewards.load(order.reward)
        reward.check([order.prompt])
        with one_at_a_time:
            out = steer(pipe, order.prompt, reward, order.particles, seed=order.seed, **call)
    except ValueError as error:  # a sentence that says what to do
        raise HTTPException(422, str(error)) from None
    png = io.BytesIO()
    out.best[0].save(png, "png")
    found = {"X-Reward": f"{out.rewards.max():.4f}", "X-Log-Z": f"{out.log_z[0]:.4f}"}
    return Response(png.getvalue(), media_type="image/png", headers=found)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=8000)
