# What a fresh clone needs is installed on first use, and again when requirements.txt or pyproject.toml change.
PYTHON ?= 3.11
SEEDS ?= 1
DATASET ?= embedded
ON ?= local
UV = $(shell command -v uv || echo .uv/bin/uv)
GET_UV = command -v $(UV) >/dev/null || (python3 -m venv .uv && echo '*' > .uv/.gitignore && .uv/bin/pip install uv)
NBVAL = --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg

.PHONY: help reproduce test lab lock
.DEFAULT_GOAL := help

help:
	@echo "make reproduce [SEEDS=3]   run every notebook and write all tables to results/embedded/reproduced"
	@echo "    DATASET=voc2012 DATA_ROOT=PATH   on VOC 2012: what it takes says .venv/bin/wsss plan --dataset voc2012"
	@echo "    PAPERS='apc more' ON=dask        only some papers; on all GPUs of this machine, or ON=slurm"
	@echo "make test                  run the tests, then compare every notebook with its committed outputs"
	@echo "make lab                   open the notebooks in JupyterLab"
	@echo "make lock                  pin the dependencies of pyproject.toml anew in requirements.txt"
	@echo "PYTHON=3.12 before the first use takes another Python (3.11 or 3.12)."

reproduce: .venv/.installed
	.venv/bin/wsss reproduce --dataset $(DATASET) --seeds $(SEEDS) --on $(ON) \
		$(if $(DATA_ROOT),--data-root "$(DATA_ROOT)") $(if $(PAPERS),--papers $(PAPERS))

# Threads of a process that wait for each other on a busy machine make it many times slower.
test: export OMP_NUM_THREADS ?= 1
test: .venv/.installed
	.venv/bin/python -m pytest tests
	.venv/bin/python -m pytest -p no:cacheprovider $(NBVAL) notebooks/

lab: .venv/.installed
	.venv/bin/jupyter lab notebooks

lock:
	$(GET_UV)
	$(UV) pip compile pyproject.toml --extra test --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header -o requirements.txt

# --python names the environment, whichever one is active. pydensecrf's C++ must be generated anew: see pyproject.toml.
.venv/.installed: requirements.txt build-constraints.txt pyproject.toml
	$(GET_UV)
	test -x .venv/bin/python || $(UV) venv --python $(PYTHON) .venv
	CYTHON_FORCE_REGEN=1 $(UV) pip sync --python .venv/bin/python --require-hashes \
		--build-constraints build-constraints.txt requirements.txt
	$(UV) pip install --python .venv/bin/python --no-deps -e .
	touch $@
