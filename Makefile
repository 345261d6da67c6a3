# make demo   text from the model that ships with the package, in an environment of its own
# make test   everything: lint, types, fast tests, and those that need Rockchip's compiler or the emulated board
# make fast   the fast tests only
# make campaign   an hour of damaged and forged files for every reader, commands ended in the middle, a loaded server, 1000 prompts in a row, then every kernel on the emulated board
# make board  the emulated board, in your cache folder: as root it installs qemu and a cross compiler
#
# PYTHON is a Python 3.10 to 3.12 for all of it (3.13 lacks Rockchip's compiler). PyPI's torch for Linux on x86-64
# brings CUDA along, some gigabytes: TORCH="torch==2.13.0 --index-url URL", with PyTorch's index of CPU builds, does not.
# JOBS processes run the tests; the default suits 2 cores and 8 GB.

JOBS ?= 2
PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3.10 python3,$(shell $(v) -c 'import sys; print(sys.executable)' 2>/dev/null)))
TORCH ?= torch==2.13.0
PARALLEL = -n $(JOBS) --dist loadgroup
PIP = -m pip install --quiet --disable-pip-version-check

.PHONY: demo test fast campaign board clean

demo: .venv/demo
	.venv/bin/rwkv-npu generate --prompt "Return the " --echo --temp 0.6 --seed 11
	@echo

test: .venv/dev
	.venv/bin/python -m pytest -m "" $(PARALLEL)

fast: .venv/dev
	.venv/bin/python -m pytest $(PARALLEL)

campaign: .venv/dev
	RWKV_FUZZ_SECONDS=$${RWKV_FUZZ_SECONDS:-3600} RWKV_FUZZ_SEED=$${RWKV_FUZZ_SEED:-$$(date +%s)} \
	  .venv/bin/python -m pytest -m fuzz -s tests/fuzz
	.venv/bin/python -m tests.reliability.campaign $${RWKV_RELIABILITY:-.reliability.json}
	RWKV_PROMPTS=1000 .venv/bin/python -m pytest tests/test_waves.py -k prompts_in_a_row
	RWKV_LOAD_SECONDS=$${RWKV_LOAD_SECONDS:-120} .venv/bin/python -m pytest -m load -s tests/test_serve_load.py
	RWKV_CAMPAIGN=1 .venv/bin/python -m pytest -m board -v tests/test_kernels_on_board.py

board: .venv/demo
	.venv/bin/python -m tools.board build

.venv/bin/python:
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "install the venv module first: apt install python3-venv" >&2; exit 1; }

.venv/demo: .venv/bin/python pyproject.toml
	.venv/bin/python $(PIP) -e .
	@touch $@

# torch first and alone, so that nothing else chooses its build; setuptools, which it brings, is not ours to use.
.venv/dev: .venv/bin/python pyproject.toml
	.venv/bin/python $(PIP) $(TORCH)
	.venv/bin/python $(PIP) -e ".[dev]"
	@touch $@ .venv/demo

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
