"""Whether memory stays constant over many prompts.

python -m scripts.bench soak --prompts 500
"""

import rewards
from steering import tiny
from steering.pipeline import steer_each

from ..parser import parser_of
from ..tables import head, line
from .machine import resident


def main(argv: list[str] | None = None) -> None:
    """Print resident memory on the way; each result is dropped when the next one comes."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(argv)
    pipe = tiny.load(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = tiny.call_defaults(args.model) | {"num_inference_steps": args.steps}
    call |= {"preview": tiny.preview(), "progress": False}
    prompts = [f"{i} red circles" for i in range(args.prompts)]
    work = steer_each(pipe, prompts, rewards.load("clip(tiny)"), args.particles, **call)
    print(head("prompts", "MiB resident"))
    marks = {1, 50, *range(100, args.prompts + 1, 100), args.prompts}
    for done, _ in enumerate(work, 1):
        if done in marks:
            print(line(done, f"{resident():.0f}"), flush=True)
