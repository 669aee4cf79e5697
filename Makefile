# make study: the whole study on film reviews, a quarter of an hour on two cores. make help lists the rest.
.DEFAULT_GOAL := help
PYTHON ?= python3.11
LOCK ?= locks/cpu.txt
BIN := .venv/bin
CODE := dense_rlhf tests benchmarks examples locks setup.py
READY := .venv/ready-$(shell cat locks/common.txt $(LOCK) pyproject.toml setup.py | cksum | cut -d' ' -f1)

.PHONY: help env test lint smoke study report lock clean

help: ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/'

env: $(READY) ## make .venv from locks/cpu.txt; LOCK=locks/cuda.txt for a GPU
$(READY): locks/common.txt $(LOCK) pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r $(LOCK) || \
		{ echo "Where pip finds no torch of the CPU: LOCK=locks/cuda.txt, or see locks/README.md"; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	rm -f .venv/ready-*; touch $(READY)

study: env ## run params/reviews.yaml and render reports/reviews/index.html
	$(BIN)/python -m dense_rlhf run params/reviews.yaml

smoke: env ## the same study at its smallest, a few minutes
	$(BIN)/python -m dense_rlhf run params/reviews.yaml --set size=smoke --set study=reviews_smoke

lab: env ## JupyterLab on copies of the notebooks in play/, which keep what you change; 02 and 03 have sliders
	mkdir -p play && cp -Rn notebooks/. play
	$(BIN)/jupyter lab --notebook-dir play

test: env ## all tests, one process a core
	$(BIN)/python -m pytest -n $$(nproc) --dist loadfile --no-loadscope-reorder

lint: env ## style of package, notebooks and tests; notebooks without outputs
	$(BIN)/ruff check $(CODE) notebooks
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb notebooks/*/*.ipynb

report: env ## render the reports of the finished runs again
	$(BIN)/python -m dense_rlhf report params/reviews.yaml

lock: env ## write locks/*.txt: what is installed, and the hashes of its files; half an hour
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python locks/write.py

clean: ## remove runs and reports; keeps .venv and downloads
	rm -rf runs reports/*/ reports/index.html
