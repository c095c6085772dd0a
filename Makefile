# Two commands set everything up: `make run` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check

.PHONY: run test slow lint clean

run: $(VENV)/.installed
	$(VENV)/bin/compress run recipes/quickstart.yaml

# Two processes, each of which takes whole files, so that what the tests of a file share is made once. What pytest makes of their
# text is kept, as Python keeps what it compiles: to make it anew takes each process ten seconds.
test slow: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
