"""Steer a pipeline in ten lines: python scripts/examples/ten_lines.py"""

import rewards
from steering import steer, tiny
from tilt import report

pipe = tiny.load("tiny-sd3")  # or DiffusionPipeline.from_pretrained(...).to("cuda")
call = tiny.call_defaults("tiny-sd3") | {"preview": tiny.preview()}
out = steer(pipe, ['the word "CRAB"'], rewards.load("ocr"), particles=4, **call)
out.best[0].save("crab.png")  # of the highest reward; out.sample(generator) draws by weight
print(report.write(out.save("crab")))  # a page of every picture, and how it came about
