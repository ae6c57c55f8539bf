# make demo    install into .venv, then run the 2 x 2 sweep on the embedded model
# make test    install into .venv, then run the tests
# make lint    ruff and mypy
# make clean   remove build products and caches (not .venv, not outputs/)
#
# PYTHON=python3.12           another interpreter (3.11 - 3.13) for a new .venv
# TORCH_INDEX=<index url>     an extra package index for torch. On Linux an ordinary index's torch brings CUDA
#                             along; without a GPU, the CPU index that the PyTorch project offers saves gigabytes.
# pip's own settings (PIP_* variables, pip.conf) are left as they are.

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(INSTALLED)
	$(VENV)/bin/python -m dllmq.run -m method=awq,gptq tmas=true,false

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(INSTALLED): pyproject.toml constraints.txt $(wildcard build_hooks/*.py build_hooks/*.pth)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find conf dllmq tests -name __pycache__ -type d -prune -exec rm -rf {} +
