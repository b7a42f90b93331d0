# Two commands: `make quickstart` and `make test`. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test lint clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

quickstart: $(VENV)/installed
	$(RUN) main.py --config=configs/digits.py --workdir=runs/digits
	$(RUN) main.py --mode=eval --workdir=runs/digits
	$(RUN) main.py --mode=predict --workdir=runs/digits --images=runs/digits/examples --topk=3
	$(RUN) main.py --mode=visualize --workdir=runs/digits

test: $(VENV)/installed
	$(RUN) -m pytest

lint: $(VENV)/installed
	$(RUN) -m ruff check .

clean:
	rm -rf $(VENV) runs
