# make demo | app | notebooks | screenshots | miniature | miniature-scores | benchmarks | test | test-app | test-fiftyone | test-training | matrix | check | style | clean. Every target sets up what it needs; pip is all it takes.
PYTHON ?= python3
WORKERS ?= 2

# transformers releases that this repository promises to work with; the newest is the one development uses.
OLDER := 4.57.1 4.57.6 5.0.0 5.8.1 5.17.0
NEWEST := 5.23.0
VERSIONS ?= $(OLDER) $(NEWEST)
# These run the whole suite, the others the core suite (everything that is not marked slow).
FULL_SUITE := 4.57.1 $(NEWEST)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MEASURING := .venv-benchmarks
RESULTS ?= benchmarks/results/cpu.json


# The app and the notebooks: what they need besides, in an environment that sees the other one.
APP_VENV := .venv-app
APP_BIN := $(APP_VENV)/bin
APP_READY := $(APP_VENV)/.ready

.PHONY: setup demo app notebooks screenshots miniature miniature-scores benchmarks test test-app test-fiftyone test-training matrix check style clean

setup: $(READY)

$(READY): pyproject.toml constraints/dev.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "transformers $(NEWEST) needs Python 3.11 or newer, but $(PYTHON) is `$(PYTHON) --version 2>&1`. Name another one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -c constraints/dev.txt "transformers==$(NEWEST)" -e ".[dev,video]"
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

$(APP_READY): $(READY) constraints/app.txt
	rm -rf $(APP_VENV)
	$(BIN)/python -m venv $(APP_VENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >`$(APP_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/base.pth
	$(APP_BIN)/python -m pip install -qq -c constraints/app.txt "transformers==$(NEWEST)" -e ".[app,app-test]"
	@touch $@

# The demo app; with another model: make app APP_OPTIONS="--model FOLDER"
app: $(APP_READY)
	$(APP_BIN)/python -m app $(APP_OPTIONS)

# The app in a headless browser, and the notebooks from clean kernels; with BROWSER=optional, all but the page where none can be had.
test-app: $(APP_READY)
	if scripts/browser $(APP_BIN)/python; then needed=1; else [ "$(BROWSER)" = optional ] || exit 1; fi; MOLMO2_NEEDS_BROWSER=$$needed scripts/pytest $(APP_BIN)/python tests/test_app.py tests/test_notebooks.py

# Runs the notebooks and stores what they print; takes the pictures of the app anew.
notebooks: $(APP_READY)
	$(APP_BIN)/python notebooks/execute.py

screenshots: $(APP_READY)
	scripts/browser $(APP_BIN)/python
	$(APP_BIN)/python tests/app_screenshots.py

# Trains the miniature anew into miniature_run/ (80 minutes on two cores, then 15 more with a small rate); continues a run
# that is there.
miniature: $(READY)
	cd examples && ../$(BIN)/python -m miniature.train ../miniature_run
	cd examples && ../$(BIN)/python -m miniature.train ../miniature_run --minutes 95
	cd examples && ../$(BIN)/python -m miniature.curves ../miniature_run/log.jsonl ../miniature_run/curves.png

# What the shipped miniature scores on seeds that training never saw.
miniature-scores: $(READY)
	cd examples && ../$(BIN)/python -m miniature.evaluate

# Measures this code beside the native class of transformers (about 25 minutes on two cores, quiet ones). Other remote
# code, fewer rows: make benchmarks OPTIONS='--peer DIR --rows photo-8'. In an environment of its own, because a
# torchvision built for CUDA, which the native processors want, breaks transformers elsewhere.
benchmarks: $(MEASURING)/.ready
	$(MEASURING)/bin/python -m benchmarks --curves --output $(RESULTS) $(OPTIONS)

$(MEASURING)/.ready: $(READY)
	$(BIN)/python -m venv $(MEASURING)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "`$(MEASURING)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/development.pth"
	$(MEASURING)/bin/python -m pip install -qq --no-deps -c constraints/dev.txt torchvision
	@touch $@

test: check
	scripts/pytest $(BIN)/python -n $(WORKERS)

# FiftyOne's packages stand beside those of the development environment, which a .pth file adds; see the list.
FIFTYONE := .venv-fiftyone
FIFTYONE_SECONDS := 600

$(FIFTYONE)/.ready: $(READY) constraints/fiftyone.txt
	rm -rf $(FIFTYONE)
	$(BIN)/python -m venv $(FIFTYONE)
	packages() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; echo "import site; site.addsitedir('`packages $(BIN)/python`')" > "`packages $(FIFTYONE)/bin/python`/development.pth"
	$(FIFTYONE)/bin/python -m pip install -qq --no-deps -r constraints/fiftyone.txt
	@touch $@

test-fiftyone: $(FIFTYONE)/.ready
	$(FIFTYONE)/bin/python scripts/with_mongod $(FIFTYONE_SECONDS) scripts/pytest $(CURDIR)/$(FIFTYONE)/bin/python -q -W ignore::DeprecationWarning -o faulthandler_timeout=120 tests/test_fiftyone.py

# PEFT, TRL and data sets stand beside the packages of the development environment too.
TRAINING := .venv-training

$(TRAINING)/.ready: $(READY) constraints/training.txt
	rm -rf $(TRAINING)
	$(BIN)/python -m venv $(TRAINING)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >`$(TRAINING)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/base.pth
	$(TRAINING)/bin/python -m pip install -qq -c constraints/dev.txt -c constraints/training.txt "transformers==$(NEWEST)" -e ".[training]"
	@touch $@

test-training: $(TRAINING)/.ready
	scripts/pytest $(TRAINING)/bin/python tests/test_trainers.py tests/test_finetuning.py tests/test_training_round_trip.py tests/test_training_example.py

matrix: $(READY)
	FULL_SUITE="$(FULL_SUITE)" WORKERS=$(WORKERS) scripts/matrix $(BIN)/python $(VERSIONS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/bundle.py --check

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TRAINING) $(FIFTYONE) $(APP_VENV) $(MEASURING) .matrix .benchmarks
