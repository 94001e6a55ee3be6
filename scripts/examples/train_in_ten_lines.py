"""Fine-tune on scored rollouts without the command: train_in_ten_lines.py RUN OUT

RUN is a folder that `tilt rollout` made and `tilt score` scored.
"""

import sys
from pathlib import Path

from accelerate import Accelerator

from finetune import Gdro, Rollouts, gdro, load_data, loop
from steering import tiny

run, out = Rollouts(Path(sys.argv[1])), Path(sys.argv[2])
pipe, settings = tiny.load("tiny-sd3"), Gdro(steps=4, groups=2, k=2)
data = load_data(run, settings.reward, settings.reward_norm, settings.k)
trainer = gdro.trainer_of(pipe, data, settings, Accelerator())
loop.begin(trainer, out, settings.steps, resume=True)  # a run that was cut off goes on
loop.run(trainer, out, settings.steps, log_every=1, shown=("loss", "accuracy"))
file, _ = loop.export(trainer, type(pipe), out)
print(file)  # pipe.load_lora_weights(out / "lora")
