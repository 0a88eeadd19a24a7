# make demo    train on the bundled faces, then sample new ones: demo/samples.png
# make test    lint, and the whole test suite
# make docs    the documentation as a site in site/: strict, links checked

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo/pipeline

.PHONY: demo test quality style docs clean

demo: demo/samples.png

demo/samples.png: $(DEMO)/model_index.json
	$(BIN)/python examples/sample_hdit.py --pipeline $(DEMO) --output $@ --guidance_scale 2 \
		--real_images src/diffusers_hdit/data/fluent_faces_64.png

# If it is interrupted, `make demo` resumes from the last checkpoint.
$(DEMO)/model_index.json: | $(VENV)/.installed
	$(BIN)/python examples/train_hdit.py --config examples/configs/tiny.json --output_dir $(DEMO) \
		--resume_from_checkpoint latest

test: quality
	$(BIN)/python -m pytest -n 2

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

# torch first and pinned: the version that constraints.txt names, so that no other package chooses another one.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.10 or later is needed, this is {v.major}.{v.minor}. Try: make PYTHON=python3.12" if v < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build site *.egg-info src/*.egg-info .pytest_cache .ruff_cache
