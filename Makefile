# `make demo` and `make test` need Python 3.11 or newer, make and, for the S3 tests, apt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STDLIB = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('stdlib'))")

CLIENT_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python) $(shell command -v python3.13))
CLIENT_TESTS := tests/test_golden.py tests/test_reader.py tests/test_shards.py tests/test_sites.py

BRIDGE_TESTS := tests/test_bridges.py tests/test_torch_loader.py

.PHONY: demo test test-client test-bridges test-nightly lint bench schemas s3 clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[jobs,text,xarray,plots]' --group test --group lint
	touch $@

demo: $(VENV)/.installed  ## build a dataset from the bundled model, check it and draw it
	rm -rf demo.zarr demo.png
	$(BIN)/actcache build ./demo.zarr --model examples/tiny-gpt --corpus '$(STDLIB)/*.py' --max-tokens 250000
	$(BIN)/actcache info ./demo.zarr
	$(BIN)/actcache verify --full ./demo.zarr
	$(BIN)/actcache lens logit ./demo.zarr --max-tokens 50000 --plot demo.png

$(VENV)-client/.installed: pyproject.toml
	$(CLIENT_PYTHON) -m venv $(VENV)-client
	$(VENV)-client/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-client/bin/python -m pip install --quiet --editable '.[text,xarray,plots]' --group test
	touch $@

ifeq ($(CLIENT_PYTHON),)
test-client:
	@echo "no Python 3.13 here: the client is not tested on it"
else
test-client: $(VENV)-client/.installed  ## the reading half on Python 3.13, with a newer zarr and without torch
	$(VENV)-client/bin/python -m pytest $(CLIENT_TESTS)
endif

# dictionary_learning wants torchvision, whose wheels are for another torch than the one that is tested, and does not import it here.
$(VENV)-bridges/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-bridges
	$(VENV)-bridges/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-bridges/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)-bridges/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[jobs,text]' --group test --group bridges
	$(VENV)-bridges/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

test-bridges: $(VENV)-bridges/.installed  ## training with SAELens, dictionary_learning and torchdata: 2.5 GB of packages
	$(VENV)-bridges/bin/python -m pytest $(BRIDGE_TESTS)

test: $(VENV)/.installed s3  ## every test but the slow ones
	$(BIN)/python -m pytest -m 'not slow' -n 2

test-nightly: $(VENV)/.installed s3  ## every test, and more examples of the properties
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n 2

s3: $(VENV)/.installed  ## install the S3 server of the tests where that is possible
	-$(BIN)/python tests/s3/server.py install

lint: $(VENV)/.installed  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed s3  ## ratios against a bare forward pass, raw copies and peers
	$(BIN)/python -m benchmarks

schemas: $(VENV)/.installed  ## write the published JSON Schemas anew
	$(BIN)/python -m actcache.schemas.publish schemas/json

clean:
	rm -rf $(VENV) $(VENV)-client $(VENV)-bridges .peers demo.zarr demo.png
