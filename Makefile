# Everything runs in .venv, which `make demo` and `make test` create by themselves. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
TRAINERS := .venv-trainers
NEWEST := .venv-newest
FLOWER := .venv-flower
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BACKENDS := $(patsubst %/pyproject.toml,%,$(wildcard backends/*/pyproject.toml))
PROJECTS := pyproject.toml $(addsuffix /pyproject.toml,$(BACKENDS))
# Three files at a time on two cores: most of a FLARE job, and of a server's start, is waiting. Alone: make SIDE_BY_SIDE= test
SIDE_BY_SIDE := -n 3 --dist loadfile
SOURCES := trackhub jobs tests docs .ci/raise_versions.py $(wildcard backends/*/src backends/*/tests)

# The long tests in parts, each of which runs alone as well: `make test-hostile`.
LONG_PARTS := flare products kit faults seeds hostile trainers flower newest
SEEDS := tests/faults/test_random.py tests/faults/test_kills.py tests/faults/test_damaged_pages.py
long_flare := tests/integration
long_products := tests/e2e
long_kit := tests/contract tests/unit $(wildcard backends/*/tests)
long_faults := tests/faults $(addprefix --ignore=,$(SEEDS))
long_seeds := $(SEEDS)
long_hostile := tests/hostile
# A long file of many seeds is shared among the processes, test by test.
test-seeds test-hostile test-kit: SIDE_BY_SIDE := -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test trainers flower newest $(addprefix test-,all $(LONG_PARTS)) faults check-wandb lint format types arch coverage bench bench-quick bench-curves docs pages dist versions changelog clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 12

setup: $(INSTALLED) ## create .venv and install the core with all extras and every backend, editable

# The stamp is written last, so a failed or interrupted installation is done again.
$(INSTALLED): $(PROJECTS)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "trackhub needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 setup")'
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[flare,cli,report,tables,testing,jobs,dev]' $(addprefix -e ,$(BACKENDS))
	@touch $@

demo: $(INSTALLED) ## train CIFAR-10 with FedAvg at two sites, tracked, and say how to look at the result
# Fewer images than there are, so that it takes a minute or two on two cores; ARGS may say otherwise.
	$(BIN)/python jobs/cifar10_fedavg/job.py --samples_per_site 5000 $(ARGS)

test: $(INSTALLED) ## run every test but the long ones
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

trainers: $(TRAINERS)/.installed ## create .venv-trainers, with the trainers' libraries beside what .venv has

flower: $(FLOWER)/.installed ## create .venv-flower, with the Flower that FLARE can run beside what .venv has

# An environment that sees all that .venv has, and in which what it installs itself comes first. So what it installs never
# changes what the other tests run with. Python reads .pth files in the order of their names, and the one of the editable
# trackhub needs `editables` from .venv.
define beside
$(BIN)/python -m venv $(1)
$(1)/bin/python -c 'import sys, sysconfig, pathlib; here = sysconfig.get_path("purelib"); beside = here.replace(sys.prefix, sys.argv[1]); pathlib.Path(here, "00-beside.pth").write_text(f"import site; site.addsitedir({beside!r})\n")' $(abspath $(VENV))
endef

$(TRAINERS)/.installed $(FLOWER)/.installed: .venv-%/.installed: $(INSTALLED)
	@rm -f $@
	$(call beside,$(@D))
	$(@D)/bin/python -m pip install -e '.[$*]'
	@touch $@

# Made anew each time, since the index may have newer ones by now. The upper bounds of the backends do not hold here.
newest: $(INSTALLED) ## create .venv-newest, with the newest mlflow, wandb and tensorboard beside what .venv has
	rm -rf $(NEWEST)
	$(call beside,$(NEWEST))
	$(NEWEST)/bin/python -m pip install --quiet --upgrade mlflow wandb tensorboard
	@$(NEWEST)/bin/python -m pip list 2>/dev/null | grep -E '^(mlflow|wandb|tensorboard) '

test-all: ## run every test: `test`, then the long ones in parts; about an hour and a half
# A part that fails does not keep the next ones from running.
	@failed=; for part in test $(addprefix test-,$(LONG_PARTS)); do \
	    echo "== make $$part"; $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Its tests of XGBoost and Lightning in FLARE start Python there, and are skipped where it is missing.
test-flare: $(TRAINERS)/.installed

test-flare test-products test-kit test-faults test-seeds test-hostile: test-%: $(VENV)/.installed-tools
	$(BIN)/python -m pytest -m long $(SIDE_BY_SIDE) $(long_$*) $(ARGS)

test-trainers: $(TRAINERS)/.installed
	$(TRAINERS)/bin/python -m pytest -m long tests/trainers $(ARGS)

# Jobs with all backends, and the backends' own tests. Their long tests, of outages and kills, are run with the bounded
# versions alone: they would take a quarter of an hour more. A warning of a newer SDK is no failure here.
test-newest: NEWEST_PYTEST = PATH="$(abspath $(NEWEST))/bin:$(abspath $(BIN)):$$PATH" $(NEWEST)/bin/python -m pytest -W default $(SIDE_BY_SIDE)
test-newest: newest
	$(NEWEST_PYTEST) -m long tests/e2e/test_all_backends.py $(ARGS)
	$(NEWEST_PYTEST) -m "not long" $(wildcard backends/*/tests) $(ARGS)

test-flower: $(FLOWER)/.installed
	$(FLOWER)/bin/python -m pytest -m long tests/trainers/test_flower.py $(ARGS)

lint: $(INSTALLED) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## check types
	$(BIN)/mypy $(SOURCES)

arch: $(INSTALLED) ## check who imports whom
	$(BIN)/lint-imports

faults: $(INSTALLED) ## kill, fill, cut and starve everything, with all seeds; about an hour
	$(BIN)/python -m pytest -m "" $(SIDE_BY_SIDE) tests/faults $(ARGS)

check-wandb: $(INSTALLED) ## by hand, with a W&B login: run the job against wandb.ai and read every point back
	$(BIN)/python -m tests.by_hand.check_wandb $(ARGS)

coverage: $(INSTALLED) ## run the quick tests and show which lines of the core they miss
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest tests/unit $(wildcard tests/contract tests/faults)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

bench: $(INSTALLED) ## measure against stock FLARE and the bare SDKs: one table, runs/bench.json; under 28 minutes
	$(BIN)/python -m tests.bench $(ARGS)

bench-quick: $(INSTALLED) ## most of the figures, from fewer and shorter runs, in under 4 minutes
	$(BIN)/python -m tests.bench --quick $(ARGS)

bench-curves: $(INSTALLED) ## measure how cost grows with records, keys, sites and backends, and draw it into runs/curves
	$(BIN)/python -m tests.bench --curves runs/curves $(ARGS)

# Only who makes the site or the packages needs their tools.
$(VENV)/.installed-tools: $(INSTALLED)
	$(BIN)/python -m pip install -e '.[docs,dist]'
	@touch $@

docs: $(VENV)/.installed-tools ## make a site of the pages in build/site, without a network; a warning or a dead link is an error
	$(BIN)/sphinx-build --builder html --conf-dir docs --doctree-dir build/doctrees --fail-on-warning --keep-going --quiet . build/site
	@echo "The site begins at build/site/index.html"

pages: $(INSTALLED) ## write the generated parts of the pages anew: tables of backends, reference of commands
	$(BIN)/python docs/generated_parts.py

dist: $(VENV)/.installed-tools ## build wheels and source distributions of the core and the backends into dist/, and check them
# Each wheel is built from the source distribution, so that one which lacks a file fails here.
	rm -rf dist
	@for project in . $(BACKENDS); do $(BIN)/python -m build --no-isolation --outdir dist $$project || exit 1; done
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

versions: ## raise the version of the core and the backends: make versions TO=0.2.0
	$(PYTHON) .ci/raise_versions.py $(TO)

changelog: $(INSTALLED) ## show what the next release's changelog will say
	$(BIN)/towncrier build --draft --version next

clean: ## remove .venv and what the tools left behind
	rm -rf $(VENV) $(TRAINERS) $(FLOWER) $(NEWEST) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage*
