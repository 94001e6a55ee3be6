# Every target sets up .venv first; the machine needs only Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.dev
APP := .venv/.app
BROWSER := .venv/.browser
DOCS := .venv/.docs
QUANTIZE := .venv/.quantize
DEMO_OUT ?= out/demo
DEMO_ARGS ?= --particles 4 --steps 20
TUNED := $(DEMO_OUT)/tuned
TUNED_OF := $(DEMO_OUT)/tuned-of
TUNED_IMAGES ?= 12
TUNED_STEPS ?= 50
# pytest in two processes, since the tests compute on one thread each; WORKERS=0 runs it in one.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
# The tests that draw in batches of several shapes, or compare with other software.
PORTABLE := $(addprefix tests/test_, $(addsuffix .py, pipeline_parity decoding embedded checks evaluate \
  rollouts spread nft gdro rewards_clip rewards_siglip rewards_towers))

.PHONY: help setup demo demo-objects demo-tuned app test test-portable test-slow test-browser test-docs test-quantize lint wheel docs
help:
	@echo "make setup          create .venv with everything for development"
	@echo "make demo           draw steered words with the embedded model, in $(DEMO_OUT)/words"
	@echo "make demo-objects   draw steered shapes, in $(DEMO_OUT)/objects"
	@echo "make demo-tuned     fine-tune the embedded model on words; the LoRA is in $(TUNED)/lora"
	@echo "make app            run the app at http://127.0.0.1:7860"
	@echo "make test           run the test suite (CPU, offline)"
	@echo "make test-portable  run the tests that draw or compare images with other kernels"
	@echo "make test-slow      run the tests that take minutes"
	@echo "make test-browser   test the app in Chromium (needs Debian's chromium-driver)"
	@echo "make test-docs      run every command of the README and docs/ at a small size (minutes)"
	@echo "make test-quantize  install torchao, which writes to every command's output, and test 8 bits"
	@echo "make lint           run ruff and pyright"
	@echo "make wheel          build the wheel and check its contents"
	@echo "make docs           build the documentation in site/; broken links are errors"

setup: $(DEV)

# With the stamps, later calls skip the installation; a change of pyproject.toml installs again. The
# demo needs only the package itself, the other targets also the extra "dev".
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Tilt needs Python 3.11 or newer, but $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(DEV): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(APP): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[app]'
	@touch $@

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(QUANTIZE): $(DEV)
	$(BIN)/python -m pip install --quiet --editable '.[quantize]'
	@touch $@

$(BROWSER): $(DEV)
	$(BIN)/python -m pip install --quiet --editable '.[browser]'
	@touch $@

# A second call finds the images of the first and prints where they are.
demo: $(READY)
	$(BIN)/tilt steer 'the word "ANTS"' 'the word "DUNE"' 'the word "JADE"' 'the word "LOAF"' \
	  --model tiny-sd3 --guidance-scale 1 --reward ocr --compare --resume $(DEMO_ARGS) --out $(DEMO_OUT)/words

demo-objects: $(READY)
	$(BIN)/tilt steer 'an orange star and a purple triangle' 'an orange star and a green square' \
	  'a green circle and an orange square' --model tiny-sd3 --guidance-scale 1 --reward 'objects(mode=share)' \
	  --compare --resume $(DEMO_ARGS) --out $(DEMO_OUT)/objects

# 48 words for training, four others for the checks and six for the evaluation. Finished steps are skipped.
demo-tuned: $(READY)
	mkdir -p $(TUNED_OF)
	head -n 2 scripts/tiny/words.txt | xargs printf 'the word "%s"\n' > $(TUNED_OF)/prompts.txt
	printf 'the word "%s"\n' FERN HAWK LIME YARN > $(TUNED_OF)/checks.txt
	printf 'the word "%s"\n' ROSE CRAB HIVE SOAP MINT TUBE > $(TUNED_OF)/unseen.txt
	$(BIN)/tilt rollout --prompts $(TUNED_OF)/prompts.txt --out $(TUNED_OF)/rollouts \
	  --images $(TUNED_IMAGES) --call.guidance-scale 1.0 --resume
	$(BIN)/tilt score $(TUNED_OF)/rollouts --reward 'ocr + 0*clip(tiny)' --resume
	$(BIN)/tilt train gdro --config scripts/configs/gdro_tiny.yaml --rollouts $(TUNED_OF)/rollouts \
	  --out $(TUNED) --gdro.steps $(TUNED_STEPS) --check.every 10 --check.prompts $(TUNED_OF)/checks.txt \
	  --check.train-prompts 4 --resume
	$(BIN)/tilt evaluate --prompts $(TUNED_OF)/unseen.txt --out $(TUNED)/eval --lora $(TUNED)/lora \
	  --reward 'ocr + 0*clip(tiny)' --call.guidance-scale 1.0 --resume
	$(BIN)/tilt steer 'the word "NAIL"' 'the word "RIDE"' --model tiny-sd3 --lora $(TUNED)/lora \
	  --guidance-scale 1 --reward ocr --compare --resume $(DEMO_ARGS) --out $(DEMO_OUT)/tuned-steered

test: $(DEV)
	$(PYTEST)

# With PyTorch's simplest kernels, where the last digits of a row depend on the batch: tests/processors.py
test-portable: export ATEN_CPU_CAPABILITY = default
test-portable: export ONEDNN_MAX_CPU_ISA = SSE41
test-portable: $(DEV)
	$(BIN)/python -m pytest -q tests/test_scale.py tests/test_configs.py -k allocator
	TILT_TEST=noise=8 $(BIN)/python -m pytest -q $(PORTABLE)

test-slow: $(DEV)
	$(BIN)/python -m pytest -q -m slow

test-browser: $(BROWSER)
	$(BIN)/python -m pytest -q -m browser

test-docs: $(DEV)
	$(PYTEST) -m slow tests/test_commands.py

test-quantize: $(QUANTIZE)
	$(PYTEST) tests/test_quantization.py tests/test_offloading.py

app: $(APP)
	$(BIN)/tilt app

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

wheel: $(DEV)
	$(BIN)/python -m pytest -q -m slow tests/test_wheel.py

docs: $(DOCS)
	$(BIN)/mkdocs build --strict
