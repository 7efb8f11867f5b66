# `make` alone lists the targets. Everything lives in .venv; nothing outside the checkout is changed.
#   PYTHON    the interpreter that makes .venv: the first found of 3.11, 3.12 and 3.13
#   EXTRAS    extras to install as well, with commas between them: make train EXTRAS=cuda
#   PIP_ARGS  arguments for pip
#   ALGO      the algorithm that `make train` trains: a yaml's name in configs/algo
#   ARGS      arguments for the command behind a target: make train ARGS="num_seeds=4 run_dir=outputs/first"

VENV     := .venv
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON   ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
              $$p -c '$(SUITABLE)' >/dev/null 2>&1 && echo $$p && break; done)
EXTRAS   ?=
PIP_ARGS ?=
ALGO     ?= ow_qmix
ARGS     ?=

# A variable that nothing reads, `make train num_seeds=4` say, would be ignored without a word.
KNOWN    := PYTHON EXTRAS PIP_ARGS ALGO ARGS
GIVEN    := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN  := $(sort $(filter-out $(KNOWN) VENV WORKERS SHELL MAKE MAKEFLAGS MAKEOVERRIDES -*-%,$(GIVEN)))
ifneq ($(UNKNOWN),)
upper     = $(shell echo '$(1)' | tr -d '+' | tr a-z A-Z)
meant     = $(filter $(KNOWN),$(upper))
options   = $(foreach name,$(UNKNOWN),$(if $(call meant,$(name)),,$(shell echo '$(name)' | tr A-Z a-z)=$(value $(name))))
spelling  = $(strip $(foreach name,$(UNKNOWN),$(if $(call meant,$(name)),$(call meant,$(name))=$(value $(name)))) \
              $(if $(options),ARGS="$(strip $(options))"))
$(error $(foreach name,$(UNKNOWN),$(name)=$(value $(name))): make knows no such variable. Write $(spelling). Known are $(KNOWN))
endif
ifneq ($(words $(EXTRAS)),$(if $(EXTRAS),1,0))
$(error EXTRAS=$(EXTRAS) is not allowed: write commas between extras and no spaces)
endif

comma    := ,
PIP      := $(VENV)/bin/pip
RUN      := $(VENV)/bin/python
# One stamp per set of extras: made once, and again when pyproject.toml changes.
USE      := $(VENV)/.installed$(if $(EXTRAS),-$(EXTRAS))
DEVELOP  := $(VENV)/.installed-dev$(if $(EXTRAS),-$(EXTRAS))
# `pip install .` in .venv leaves a copy of the package there, which hides later edits: it is replaced by the checkout.
COPY     := $(if $(wildcard $(VENV)/lib/python*/site-packages/wqmix_jax/__init__.py),replace-copy)
# A resumed run keeps its algorithm.
CHOSEN   := $(if $(and $(filter file,$(origin ALGO)),$(findstring resume=,$(ARGS))),,+algo=$(ALGO))
# A test process per core, each with tests that stand together, which share what they have compiled.
WORKERS  := -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo train test test-slow lint format docs benchmark clean replace-copy

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEVELOP) ## make .venv with all that development needs

demo: $(USE) ## see QMIX fail and OW-QMIX learn, in minutes on a laptop
	$(RUN) -m experiments.demo $(ARGS)

train: $(USE) ## train OW-QMIX on predator-prey (ALGO=NAME for another algorithm, ARGS for options)
	$(RUN) -m wqmix_jax.train $(CHOSEN) $(ARGS)

test: $(DEVELOP) ## run the tests, the slow ones left out
	$(RUN) -m pytest $(WORKERS) $(ARGS)

test-slow: $(DEVELOP) ## run the slow tests
	$(RUN) -m pytest -m slow $(WORKERS) $(ARGS)

lint: $(DEVELOP) ## check style, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(DEVELOP) ## format the code and fix what can be fixed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(DEVELOP) ## build the documentation into build/site (ARGS=serve shows it on a local address)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs $(or $(ARGS),build) --strict -f docs/mkdocs.yml

benchmark: $(USE) ## measure speed on this machine
	$(RUN) -m experiments.benchmark $(ARGS)

clean: ## remove caches and builds; .venv and outputs stay
	rm -rf build dist *.egg-info .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(PIP):
	@'$(PYTHON)' -c '$(SUITABLE)' 2>/dev/null || { \
	  echo 'Python 3.11, 3.12 or 3.13 with its venv module is needed; name it: make setup PYTHON=/path/to/python3.11' >&2; \
	  exit 1; }
	'$(PYTHON)' -m venv $(VENV)

$(USE): pyproject.toml $(COPY) | $(PIP)
	$(PIP) install $(PIP_ARGS) -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

$(DEVELOP): pyproject.toml $(COPY) | $(PIP)
	$(PIP) install $(PIP_ARGS) -e '.[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@ $(USE)

replace-copy:
	@echo '$(VENV) holds a copy of wqmix_jax, which is replaced by this checkout'
