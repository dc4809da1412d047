# Every target sets up what it needs; Python 3.11 or newer and pip are all it takes.
PYTHON ?= python3
WORKERS ?= 2
RELEASES = $(shell $(PYTHON) scripts/matrix.py)
IN := $(PYTHON) scripts/environment.py
TEST := scripts/pytest python
MINIATURE := $(IN) dev env -C examples python -m miniature

.DEFAULT_GOAL := help
.PHONY: help demo app test test-slow nightly mutate fuzz check style bundle matrix test-app test-fiftyone test-training test-quantization test-batch test-metrics test-tools test-common test-lmms-eval test-vlmevalkit test-vllm docs wheel browser benchmarks miniature miniature-scores notebooks cookbook screenshots clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## the example of the README: a trained miniature from its checkpoint to drawn points
	$(IN) dev python examples/demo.py

app: ## starts the demo app; another model: make app APP_OPTIONS="--model FOLDER"
	$(IN) app python -m app $(APP_OPTIONS)

test: check ## all checks and the test-suite on the transformers release of development
	$(IN) dev $(TEST) -n $(WORKERS) -m "not slow"

test-slow: ## the tests that need more than a few seconds each: whole clips, scores, growth of memory
	$(IN) dev $(TEST) -n $(WORKERS) -m slow $(addprefix --ignore=tests/training/test_,trainers.py training_round_trip.py training_example.py)

nightly: ## tests that repeat what others show on more inputs
	$(IN) dev $(TEST) -n $(WORKERS) -m nightly

mutate: ## whether the tests notice small changes of geometry, masks and parser; one of them: make mutate MODULES=mask
	$(IN) dev env PYTHONPATH=src:tests python scripts/mutate.py --seed 12 $(MODULES)

fuzz: ## hostile media, checkpoints, answers and more, for some minutes: make fuzz MINUTES=10 FUZZ_OPTIONS="--seed 3"
	$(IN) dev env OMP_NUM_THREADS=1 python scripts/fuzz.py --minutes $(or $(MINUTES),5) $(FUZZ_OPTIONS)

check: ## lint, types, layers, and whether the files in the root are those of `make bundle`
	$(IN) dev ruff check .
	$(IN) dev ruff format --check .
	$(IN) dev mypy
	$(IN) dev lint-imports
	$(IN) dev python scripts/bundle.py --check

style: ## lets ruff fix what it can
	$(IN) dev ruff check --fix .
	$(IN) dev ruff format .

bundle: ## writes the remote code in the root from src/molmo2
	$(IN) dev python scripts/bundle.py

# Releases run side by side, each in one process: one that splits its tests over several imports and collects in each.
matrix: ## the suite on every supported release; some of them: make matrix RELEASES="4.57.1 5.8.1"
	$(MAKE) --keep-going --output-sync=target $(if $(findstring jobserver,$(MAKEFLAGS)),,--jobs=$(WORKERS)) $(addprefix matrix-,$(RELEASES))

matrix-%:
	$(PYTHON) scripts/matrix.py $* -n 0

test-app: ## the app in a headless browser, and the notebooks; without a browser: make test-app BROWSER=optional
	MOLMO2_NEEDS_BROWSER=$(if $(filter optional,$(BROWSER)),,1) $(IN) app $(TEST) tests/clients/test_app.py tests/clients/test_app_backend.py tests/clients/test_view_in_browser.py tests/clients/test_notebooks.py

test-fiftyone: ## the FiftyOne model and labels beside a database
	$(IN) fiftyone python scripts/with_mongod 600 $(TEST) -W ignore::DeprecationWarning tests/clients/test_fiftyone.py

test-training: ## runs with TRL, PEFT and several processes, the example of fine-tuning, and ms-swift and axolotl
	$(IN) training $(TEST) $(addprefix tests/training/test_,trainers.py finetuning.py parallel.py training_round_trip.py training_example.py data_sets.py recipes.py)
	$(IN) ms-swift $(TEST) tests/clients/test_ms_swift.py
	$(IN) axolotl $(TEST) tests/clients/test_axolotl.py

test-quantization: ## bitsandbytes, torchao, quanto and torch's own, on transformers 4.57.1 and the release of development; llm-compressor on 5.17.0
	$(IN) quantization@4.57.1 $(TEST) tests/clients/test_quantization.py
	$(IN) quantization $(TEST) tests/clients/test_quantization.py
	$(IN) llm-compressor $(TEST) tests/clients/test_llm_compressor.py

test-batch: ## batches on a local Ray cluster and in Parquet, and the client against `transformers serve`
	$(IN) batch $(TEST) tests/clients/test_batch_ray.py tests/clients/test_transformers_serve.py

test-metrics: ## the metrics beside TrackEval, pycocotools and SciPy
	$(IN) metrics $(TEST) tests/clients/test_trackeval.py

test-tools: ## answers read by annotation tools and SAM 2, tensor names by gguf and mlx-vlm, files of trainers, a linter for containers
	$(IN) tools $(TEST) $(addprefix tests/clients/test_,tools.py sam2.py training_tools.py) tests/unit/test_containers.py

test-common: ## transformers' own common tests of models and processors, on transformers 4.57.1 and the release of development
	$(IN) common@4.57.1 scripts/common_tests.py python $(OPTIONS)
	$(IN) common scripts/common_tests.py python $(OPTIONS)

test-lmms-eval: ## lmms-eval with the model and the tasks of this package, in one, two and four processes
	$(IN) lmms-eval $(TEST) tests/clients/test_lmms_eval.py

test-vlmevalkit: ## VLMEvalKit's runner with the model of this package, on images and clips
	$(IN) vlmevalkit $(TEST) tests/clients/test_vlmevalkit.py

test-vllm: ## vLLM for CPUs with the plugin molmo2.vllm: answers token by token, server, hostile requests
	$(IN) vllm timeout 900 $(TEST) tests/clients/test_vllm.py

docs: ## builds the documentation site into site/; to see it while writing: make docs DOCS=serve
	$(IN) docs mkdocs $(or $(DOCS),build --strict)

wheel: ## builds the wheel and tries it in an empty environment, outside of the checkout
	$(PYTHON) scripts/environment.py --make fiftyone
	$(IN) dev python scripts/check_wheel.py --fiftyone $(CURDIR)/.venvs/fiftyone/bin/python

benchmarks: ## measures this code beside the native class; see benchmarks/README.md for OPTIONS
	$(IN) benchmarks python -m benchmarks --curves --output $(or $(RESULTS),benchmarks/results/cpu.json) $(OPTIONS)

miniature: ## trains the miniature anew into miniature_run/, or continues a run that is there (95 minutes)
	$(MINIATURE).train ../miniature_run
	$(MINIATURE).train ../miniature_run --minutes 95
	$(MINIATURE).curves ../miniature_run/log.jsonl ../miniature_run/curves.png

miniature-scores: ## what the shipped miniature scores on seeds that training never saw
	$(MINIATURE).evaluate

notebooks: ## runs the notebooks and stores what they print
	$(IN) app python notebooks/execute.py

cookbook: ## runs the pages of the cookbook and stores what they print and draw
	$(IN) dev python scripts/cookbook.py
	$(IN) quantization python scripts/cookbook.py quantized
	$(IN) fiftyone python scripts/with_mongod 600 python scripts/cookbook.py labelling map

screenshots: ## takes the images of the app in docs/images anew, in a headless browser
	$(IN) app python tests/support/app_screenshots.py

browser: ## installs a headless Chromium for test-app and screenshots, as a system package where run by root
	$(IN) app scripts/browser python

clean: ## removes all environments and what builds leave behind
	rm -rf .venv .venvs .benchmarks site build dist
